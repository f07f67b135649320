"""The model of the kernels' time on an H100: its parts against what is known otherwise, and the times that it gives.

The times in a process of its own: the other tests interpret the kernels, and Triton cannot do both in one process.
"""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "benchmarks" / "kernel_times.py"
MOST = {"B8T4096": 5.2, "B1T16384": 3.0}  # ms, forward + backward
BITS = 2**32 - 1


@pytest.fixture(scope="module")
def module():
    """A module of benchmarks/h100 by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield lambda name: importlib.import_module(f"h100.{name}")


def signed(x):
    return x - 2**32 if x >> 31 else x


# Instruction: what it leaves in R0, and in R1 or P0 where it writes them, of R4 .. R7 and P1.
INTEGERS = {
    "IADD3 R0, P0, R4, R5, RZ": lambda a, b, c, d, p: (a + b, (a + b) >> 32),
    "IADD3 R0, R4, -R5, R6": lambda a, b, c, d, p: (a - b + c,),
    "IADD3.X R0, R4, R5, RZ, P1, !PT": lambda a, b, c, d, p: (a + b + p,),
    "LOP3.LUT R0, R4, R5, R6, 0x96, !PT": lambda a, b, c, d, p: (a ^ b ^ c,),
    "LOP3.LUT R0, R4, R5, R6, 0xca, !PT": lambda a, b, c, d, p: (a & b | ~a & c,),
    "SHF.L.U32 R0, R4, 0x7, RZ": lambda a, b, c, d, p: (a << 7,),
    "SHF.L.U64.HI R0, R4, 0x9, R5": lambda a, b, c, d, p: ((b << 32 | a) << 9 >> 32,),
    "SHF.R.U64 R0, R4, 0x4, R5": lambda a, b, c, d, p: ((b << 32 | a) >> 4,),
    "SHF.R.S32.HI R0, RZ, 0x1f, R4": lambda a, b, c, d, p: (signed(a) >> 31,),
    "SHF.R.U32.HI R0, RZ, 0x3, R4": lambda a, b, c, d, p: (a >> 3,),
    "IMAD.WIDE R0, R4, R5, R6": lambda a, b, c, d, p: divmod(signed(a) * signed(b) + (d << 32 | c), 2**32)[::-1],
    "IMAD.WIDE.U32 R0, R4, 0x60, R6": lambda a, b, c, d, p: divmod(a * 0x60 + (d << 32 | c), 2**32)[::-1],
    "IMAD.HI.U32 R0, R4, R5, RZ": lambda a, b, c, d, p: (a * b >> 32,),
    "LEA.HI.X R0, R4, R5, R6, 0x2, P1": lambda a, b, c, d, p: (((c << 32 | a) << 2 >> 32) + b + p,),
    "ISETP.LT.AND P0, PT, R4, R5, PT": lambda a, b, c, d, p: (None, signed(a) < signed(b)),
    "ISETP.GE.U32.AND P0, PT, R4, R5, P1": lambda a, b, c, d, p: (None, a >= b and p),
    "ISETP.GE.U32.AND.EX P0, PT, R4, R5, PT, P1": lambda a, b, c, d, p: (None, a > b or (a == b and p)),
    "VIMNMX3 R0, R4, R5, R6, PT": lambda a, b, c, d, p: (min(a, b, c, key=signed),),
    "PRMT R0, R4, 0x5410, R5": lambda a, b, c, d, p: (a & 0xFFFF | (b & 0xFFFF) << 16,),
    "SGXT R0, R4, 0x5": lambda a, b, c, d, p: ((a & 31) - 32 * (a >> 4 & 1),),
    "SEL R0, R4, R5, P1": lambda a, b, c, d, p: (a if p else b,),
}  # fmt: skip


@pytest.mark.parametrize("text", INTEGERS)
def test_integers_are_computed_as_python_does(module, text):
    generator = random.Random(0)
    threads = module("threads").Threads(32)
    values = [[generator.choice((generator.getrandbits(32), generator.getrandbits(4), BITS)) for _ in range(32)]
              for _ in range(4)]  # fmt: skip
    held = [bool(generator.getrandbits(1)) for _ in range(32)]
    threads.registers |= {f"R{4 + k}": np.array(x, np.uint64) for k, x in enumerate(values)}
    threads.predicates["P1"] = np.array(held)
    module("integers").execute(threads, module("machine_code").Instruction(text))
    for lane, (*operands, p) in enumerate(zip(*values, held, strict=True)):
        want, *more = INTEGERS[text](*operands, p)
        assert want is None or threads.registers["R0"][lane] == want & BITS
        for x in more:
            found = threads.registers["R1"] if "WIDE" in text else threads.predicates["P0"]
            assert found[lane] == (x & BITS)


LANES = np.arange(32, dtype=np.uint64)
ALL = np.ones(32, bool)


@pytest.mark.parametrize(
    "stride, width, waves",
    [(4, 4, 1), (8, 4, 2), (128, 4, 32), (132, 4, 1), (0, 4, 1), (8, 8, 2), (16, 16, 4), (128, 16, 32)],
)
def test_lanes_wait_for_those_that_read_other_words_of_the_same_bank(module, stride, width, waves):
    addresses = LANES * np.uint64(stride) + np.uint64(1024)
    assert module("memory").wavefronts(addresses, ALL, width).tolist() == [waves]
    assert module("memory").wavefronts(addresses, LANES < 1, width).tolist() == [1]
    assert module("memory").wavefronts(addresses, LANES < 0, width).tolist() == [0]


def test_wide_accesses_take_turns_by_eight_lanes(module):
    addresses = LANES * np.uint64(16) + LANES // np.uint64(8) * np.uint64(16)  # lanes 0, 8, 16 and 24 in other banks
    assert module("memory").wavefronts(addresses, LANES % 8 == 0, 16).tolist() == [4]
    assert module("memory").wavefronts(addresses, LANES < 4, 16).tolist() == [1]


@pytest.mark.parametrize("stride, sectors", [(4, 4), (32, 32), (16, 16), (0, 1)])
def test_lanes_share_sectors_of_32_bytes(module, stride, sectors):
    [found] = module("memory").sectors_of(LANES * np.uint64(stride), ALL)
    assert found == list(range(sectors))


def code_of(module, *lines):
    """Machine code of these instructions, with one pointer as its parameter."""
    instructions = [module("machine_code").Instruction(text, 16 * k) for k, text in enumerate(lines)]
    return module("machine_code").MachineCode(instructions, [(0, 8)], 32, 0)


def emulated(module, *lines, program=0, floats=0.0):
    code = code_of(module, *lines)
    arguments = module("memory").Arguments(code.parameters, [object()], 32, 1)
    return [step.number for step in module("emulator").emulate(code, arguments, program, 1, floats)]


def test_loops_run_as_often_as_their_counter_says(module):
    lines = "MOV R0, RZ", "IADD3 R0, R0, 0x3, RZ", "ISETP.LT.AND P0, PT, R0, 0xa, PT", "@P0 BRA 0x10", "EXIT"
    assert emulated(module, *lines) == [0, *4 * [1, 2, 3], 4]


@pytest.mark.parametrize("floats, steps", [(0.0, [0, 1, 3]), (-1e6, [0, 1, 2, 3])])
def test_a_float_that_is_compared_with_a_constant_is_what_the_caller_says(module, floats, steps):
    lines = "FSETP.GE.AND P0, PT, R0, -120, PT", "@P0 BRA 0x30", "NOP", "EXIT"
    assert emulated(module, "FADD R0, R1, R2", *lines[:1], "@P0 BRA 0x40", *lines[2:], floats=floats) == [
        0, 1, 2, *(x + 1 for x in steps[2:])
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line", ["@P0 BRA 0x30", "@P0 EXIT", "LDG.E R4, desc[UR4][R0.64]", "@P0 STG.E desc[UR4][R2.64], R0", "LDS R4, [R0]"]
)
def test_what_depends_on_an_unknown_value_is_refused_with_where_it_began(module, line):
    with pytest.raises(ValueError, match=r"cannot follow .*, from FADD R0, R1, R2 at 0x0 on"):
        emulated(
            module, "FADD R0, R1, R2", "ISETP.NE.AND P0, PT, R0, RZ, PT", "ULDC.64 UR4, c[0x0][0x210]", line, "EXIT"
        )


def test_a_guarded_instruction_writes_for_its_threads_alone(module):
    """Else the loop, which R1 ends, would go on for every thread as long as for the last."""
    lines = (
        "S2R R2, SR_TID.X",
        "ISETP.LT.AND P0, PT, R2, 0x5, PT",
        "@P0 IADD3 R1, R1, 0x1, RZ",
        "ISETP.EQ.AND P1, PT, R1, 0x1, PT",
    )
    assert emulated(module, *lines, "@P1 EXIT", "NOP", "EXIT") == [0, 1, 2, 3, 4, 5, 6]
    assert emulated(module, *lines, "@P0 EXIT", "@P1 BRA 0x0", "EXIT") == [0, 1, 2, 3, 4, 5, 6]


def test_threads_that_part_go_on_together_where_they_meet(module):
    lines = "S2R R2, SR_TID.X", "ISETP.LT.AND P0, PT, R2, 0x5, PT", "@P0 BRA 0x40", "NOP", "NOP", "EXIT"
    assert emulated(module, *lines) == [0, 1, 2, 3, 4, 5]


def test_a_choice_between_floats_is_issued_whoever_makes_it(module):
    lines = "FADD R0, R1, R2", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 FMUL R3, R0, R0", "EXIT"
    assert emulated(module, *lines) == [0, 1, 2, 3]


def test_integers_pass_through_memory_and_spills_to_where_they_decide(module):
    there = "S2R R0, SR_TID.X", "IMAD.SHL.U32 R2, R0, 0x4, RZ", "STS [R2], R0", "STL [R1], R0", "MOV R0, RZ"
    back = "LDS R3, [R2]", "LDL R4, [R1]", "ISETP.NE.AND P0, PT, R3, R4, PT", "@P0 BRA 0x0", "EXIT"
    assert emulated(module, *there, *back) == list(range(10))


def test_what_neighbours_read_comes_from_hbm_once_and_what_all_read_does_not(module):
    code = code_of(
        module, "S2R R0, SR_CTAID.X", "SHF.R.U32.HI R1, RZ, 0x1, R0", "ULDC.64 UR4, c[0x0][0x210]",
        "IMAD.WIDE.U32 R2, R0, 0x20, UR4", "LDG.E R8, desc[UR6][R2.64+0x200000]",  # its own
        "IMAD.WIDE.U32 R4, R1, 0x20, UR4", "LDG.E R8, desc[UR6][R4.64+0x100000]",  # that of two programs
        "IMAD.WIDE.U32 R4, RZ, 0x20, UR4", "LDG.E R8, desc[UR6][R4.64]", "LDG.E R9, desc[UR6][R4.64]", "EXIT",
    )  # fmt: skip
    machine, count = module("machine"), 4096
    arguments = module("memory").Arguments(code.parameters, [object()], 32, count)
    found = module("model").time_of(module("model").Kernel(code, 0, 1), count, 1, {1: arguments})
    assert found.bounds["hbm"] == pytest.approx(count * 32 * 1.5 / machine.HBM)
    assert found.bounds["l2"] == pytest.approx(count * 32 * 3 / machine.L2)


def test_no_time_is_below_what_the_bytes_take(module):
    """Where processors may take more than their shares, they could."""
    loads = (f"LDG.E.128 R8, desc[UR6][R2.64+{512 * k:#x}]" for k in range(8))
    code = code_of(
        module, "S2R R0, SR_CTAID.X", "S2R R1, SR_TID.X", "ULDC.64 UR4, c[0x0][0x210]",
        "LEA R0, R0, R1, 0x8", "IMAD.WIDE.U32 R2, R0, 0x10, UR4", *loads, "EXIT",
    )  # fmt: skip
    count = 100_000
    arguments = module("memory").Arguments(code.parameters, [object()], 32, count)
    found = module("model").time_of(module("model").Kernel(code, 0, 1), count, 1, {1: arguments})
    assert found.bounds["hbm"] == pytest.approx(count * 4096 / module("machine").HBM)
    assert found.high >= found.low == max(found.bounds.values()) == found.bounds["hbm"]


def stream(module, count, **fields):
    """One warp's records, all alike, and a last one that waits for the first scoreboard."""
    records = np.zeros(count + 1, module("simulator").RECORD)
    for name, value in ({"written": 7, "read": 7, "stall": 1, "pipe4": 4} | fields).items():
        records[name] = value
    records["waits"][-1], records["written"][-1] = 1, 7
    return records


def test_a_lone_warp_issues_by_its_stall_counts(module):
    clocks, _, _ = module("simulator").simulate([stream(module, 100, stall=5)], 1, 1)
    assert clocks == pytest.approx(100 * 5, abs=1)


def test_warps_of_one_quarter_share_a_pipe_and_those_of_four_do_not(module):
    alu = [stream(module, 1000, pipe=2, pipe4=8)] * 8
    assert module("simulator").simulate(alu[:4], 1, 1)[0] == pytest.approx(2000, rel=0.01)
    assert module("simulator").simulate(alu, 1, 1)[0] == pytest.approx(4000, rel=0.01)


def test_a_stream_from_hbm_takes_its_bytes_at_the_rate_that_is_given(module):
    loads = stream(module, 400, pipe=5, kind=7, written=0, memory4=16, l2=512, hbm=512, latency=680)
    clocks, ends, waits = module("simulator").simulate([loads] * 4, 1, 3, l2=1e9, hbm=20.0)
    assert clocks == pytest.approx(3 * (4 * 401 * 512 / 20 + 680), rel=0.01)
    assert ends.tolist() == sorted(ends) and clocks == pytest.approx(ends[-1], abs=1)
    assert dict(zip(module("simulator").WAITS, waits, strict=True))["loads from L2 or HBM"] > 0


def test_a_barrier_waits_for_every_warp_that_has_not_ended(module):
    slow, ended = stream(module, 100, stall=5), stream(module, 2)
    barrier = stream(module, 1, kind=1)[:1]
    late, early = np.concatenate([slow, barrier]), np.concatenate([barrier, slow])
    assert module("simulator").simulate([early, late, ended], 1, 1)[0] == pytest.approx(2 * 101 * 5, abs=5)
    assert module("simulator").simulate([early, ended], 1, 1)[0] == pytest.approx(101 * 5 + 20, abs=5)


def test_more_warps_than_a_processor_holds_are_refused(module):
    with pytest.raises(ValueError, match="64 warps"):
        module("simulator").simulate([stream(module, 1)], 65, 65)


@pytest.fixture(scope="module")
def times():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMMAND), "--json", "--decode"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MOST)
def test_training_takes_no_longer_than_is_promised(times, shape):
    assert 0 < sum(row["high"] for row in times if row.get("shape") == shape) <= MOST[shape]


@pytest.mark.slow
def test_a_step_of_decoding_takes_little_more_than_its_bytes_and_what_the_docs_say(times):
    steps = [row for row in times if row["phase"] == "decode"]
    assert [row["batch"] for row in steps] == [1, 4, 16, 64, 256]
    for row in steps:
        states = row["batch"] * 16 * 128 * 128 * 4 * 2  # read and written
        assert row["bounds"]["hbm"] == pytest.approx(1e3 * states / 2.95e12, rel=0.05)
        assert row["batch"] < 16 or row["high"] <= 1.35 * row["bounds"]["hbm"]
    text = (ROOT / "docs" / "kernels.md").read_text().split("<!-- decode -->")[1].split("<!-- end of decode -->")[0]
    said = [line.split("|")[3].split(" to ") for line in text.strip().splitlines()[2:]]
    for row, (low, high) in zip(steps, said, strict=True):
        assert (1e3 * row["low"], 1e3 * row["high"]) == pytest.approx((float(low), float(high)), rel=0.1)


@pytest.mark.slow
def test_every_kernel_takes_what_the_docs_say(times, monkeypatch):
    """To a tenth."""
    monkeypatch.syspath_prepend(str(COMMAND.parent))
    command = importlib.import_module("kernel_times")
    text = (ROOT / "docs" / "kernels.md").read_text().split("<!-- times -->")[1].split("<!-- end of times -->")[0]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines())
    documented = {(name, call): cell for name, *cells in rows for call, cell in zip(head[1:], cells, strict=True)}
    named = {name: ([phase], kernels) for name, (phase, *kernels) in command.COLUMNS.items()}
    named |= {name: (["forward", "backward"], [kernel]) for name, kernel in command.JOINS.items()}
    assert len(rows) == len(named) + 2  # the sum, and flash-linear-attention's
    for call, (shape, case) in command.CALLS.items():
        if case != "raw":
            continue
        for name, (phases, kernels) in named.items():
            found = [
                row for row in times if row["phase"] in phases and row["kernel"] in kernels
                and (row["shape"], row["case"]) == (shape, case)
            ]  # fmt: skip
            low, *high = map(float, documented[name, call].split(" to "))
            sums = sum(row["low"] for row in found), sum(row["high"] for row in found)
            assert sums == pytest.approx((low, (high or [low])[0]), rel=0.1, abs=0.01), f"{name}, {call}"
