"""What the kernels of a training call would take on an H100, by a model of their machine code; no GPU is needed.

    python benchmarks/kernel_times.py                                  # forward + backward, raw gates, heads of 128
    python benchmarks/kernel_times.py --shape B8T4096 --kernels gradient_kernel --set BS=16 num_warps=8 --waits
    python benchmarks/kernel_times.py --shape --decode                 # steps of decoding instead
    python benchmarks/kernel_times.py --write                          # the tables of docs/kernels.md

Every launch of ``chunk_gdn2`` at the shape is recorded with its grid and default configuration, compiled for sm_90, and
modelled by ``h100``: what it takes, bounds by single resources, and a simulated range, in ms. PyTorch's own operators
are counted by their bytes. docs/kernels.md says what the model was held against, and what it leaves out.
Without TRITON_INTERPRET: Triton decides when it decorates a kernel whether it will be compiled.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
from typing import NamedTuple

import torch
from aot import INSTRUCTION, TARGETS, _compile
from calls import decode_step
from h100 import machine
from h100.machine_code import disassemble
from h100.memory import Arguments
from h100.model import Kernel, time_of
from launches import recorded
from op_gpu import BATCHES, decode_inputs
from operators import Operators
from tables import DOCS, fill, table

from gdn2_titan import ops
from gdn2_titan.ops.gdn2.flops import CHUNK
from gdn2_titan.ops.gdn2.segmented import number_of_segments
from gdn2_titan.ops.gdn2.triton.matrices import sum_matrices

ARCHITECTURE, TARGET, SHARED = TARGETS["sm_90"]
WALKS = (6, 12)  # chunks of the short sequences
PACKED = 2048  # tokens of each packed sequence
MS = 1e3
US = 1e3  # in a millisecond
OPERATORS = "PyTorch's own operators, by their bytes"


class Shape(NamedTuple):
    """sequences of so many tokens; split: in segments, as many as "auto" would make."""

    sequences: int
    tokens: int
    split: bool = True


class Case(NamedTuple):
    """A call besides its shape. gate, norm, sigmoid: what the op does to its inputs. floats: what stands for a decay
    that is compared with the most that one product can hold."""

    heads: int = 16
    value_heads: int = 16
    size: int = 128
    gate: bool = True
    norm: bool = True
    sigmoid: bool = True
    erases: bool = True
    resets: bool = False
    packed: bool = False
    floats: float = 0.0


SHAPES = {
    "B8T4096": Shape(8, 4096),
    "B1T16384": Shape(1, 16384),
    "B1T16384-whole": Shape(1, 16384, split=False),
    "B4T8192": Shape(4, 8192),
}
MAMBA = Case(64, 64, 64, norm=False, sigmoid=False)
CASES = {
    "raw": Case(),
    "activated": Case(gate=False, norm=False, sigmoid=False),
    "documents": Case(resets=True),
    "packed": Case(packed=True),
    "grouped": Case(heads=8),
    "heads of 64": Case(32, 32, 64),
    "heads of 96": Case(size=96),
    "heads of 256": Case(8, 8, 256),
    "strong": Case(floats=-1e6),
    "no erase": Case(erases=False),
    "mamba": MAMBA,
    "mamba, no erase": MAMBA._replace(erases=False),
}


def _inputs(case, B, T, sequences):
    """Keyword arguments of chunk_gdn2 whose contents nobody reads, and those with a gradient."""
    bf16, H, HV, D = torch.bfloat16, case.heads, case.value_heads, case.size
    shapes = {"q": H, "k": H, "g": H, "b": H, "v": HV, "w": HV}
    tensors = {name: torch.empty(B, T, heads, D, dtype=bf16) for name, heads in shapes.items()}
    if case.gate:
        tensors |= {"A_log": torch.zeros(H), "dt_bias": torch.zeros(H, D)}
    else:
        tensors["g"] = tensors["g"].float()
    if not case.erases:
        del tensors["b"]
    leaves = [x.requires_grad_() for x in tensors.values()]
    inputs = {"b": None} | tensors
    inputs |= dict(use_gate_in_kernel=case.gate, use_qk_l2norm_in_kernel=case.norm, use_sigmoid_in_kernel=case.sigmoid)
    if case.resets:
        inputs["resets"] = torch.zeros(B, T, dtype=torch.bool)
    if case.packed:
        inputs["cu_seqlens"] = torch.arange(sequences + 1) * (T // sequences)
    return inputs, leaves


def _launches(case, B, T, sequences, segments):
    """The launches of forward and backward, how many of them are forward, and of PyTorch's operators in each phase the
    number and bytes."""
    inputs, leaves = _inputs(case, B, T, sequences)
    with recorded(ARCHITECTURE) as launches, Operators() as operators:
        phases = [operators.begin()]
        o = ops.chunk_gdn2(**inputs, backend="triton", num_segments=segments)[0]
        forward = len(launches)
        phases.append(operators.begin())
        torch.autograd.grad([o], leaves, [torch.empty_like(o)])
    counts = [{name: sum(row[name] for row in rows.values()) for name in ("launches", "distinct")} for rows in phases]
    return launches, forward, counts


def _segments(case, shape):
    if case.packed or not shape.split:
        return 1
    return number_of_segments(
        shape.sequences, shape.tokens, case.heads, case.value_heads, case.size, case.size, machine.PROCESSORS
    )


def _arguments(launch, config, compiled, code):
    """As the emulator takes them: of tensors of integers the contents."""
    values = [launch.args[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    values = [x.numpy() if isinstance(x, torch.Tensor) and not x.is_floating_point() else x for x in values]
    return Arguments(code.parameters, values, 32 * compiled.metadata.num_warps, *launch.grid(launch.constants | config))


def _row(launch, short, length, changes, floats):
    """short: chunks of a sequence -> the same launch on such sequences."""
    config = {name: changes.get(name, x) for name, x in launch.candidates[0].items()}
    compiled = _compile(launch, config, TARGET)
    code = disassemble(compiled.asm["cubin"])
    kernel = Kernel(code, compiled.metadata.shared, compiled.metadata.num_warps)
    row = {"kernel": launch.name, "config": config, "registers": code.registers, "stack": code.stack,
           "resident": kernel.resident, "code": INSTRUCTION * len(code.instructions)}  # fmt: skip
    if not kernel.resident or kernel.shared > SHARED:
        raise SystemExit(f"{launch.name} {config}: a program takes {kernel.shared} bytes of shared memory")
    [count] = launch.grid(launch.constants | config)
    # Programs that are as many on shorter sequences go from chunk to chunk.
    walks = all(one.grid(one.constants | config) == (count,) for one in short.values())
    same = short if walks else {length: launch}
    arguments = {n: _arguments(one, config, compiled, code) for n, one in same.items()}
    found = time_of(kernel, count, length, arguments, floats)
    times = {"low": MS * found.low, "high": MS * found.high}
    return row | times | {"bounds": {name: MS * x for name, x in found.bounds.items()}, "waits": found.waits}


def rows_of(shape: str, case: str, kernels: list[str], changes: dict[str, int]) -> list[dict]:
    """One dict for each launch of a call, in ms, and one for PyTorch's operators in each phase. kernels: which of them;
    changes: of the configurations, by name."""
    (B, T, _), of_case = SHAPES[shape], CASES[case]
    segments = _segments(of_case, SHAPES[shape])
    sequences, length = (B * T // PACKED, PACKED) if of_case.packed else (B * segments, T // segments)
    rows, tokens = (1, B * T) if of_case.packed else (B, T)
    sum_matrices(torch.device("cpu"), torch.bfloat16)  # once for a device, and no part of a call
    launches, forward, operators = _launches(of_case, rows, tokens, sequences, segments)
    short = {n: _launches(of_case, rows, n * CHUNK * sequences // rows, sequences, segments)[0] for n in WALKS}
    names = [launch.name for launch in launches]
    assert all([launch.name for launch in others] == names for others in short.values()), (
        "what is left over is not modelled"
    )
    found = []
    for number, launch in enumerate(launches):
        if not kernels or launch.name in kernels:
            same = {n: others[number] for n, others in short.items()}
            row = _row(launch, same, length // CHUNK, changes, of_case.floats)
            found.append({"phase": "forward" if number < forward else "backward"} | row)
    for phase, count in zip(("forward", "backward"), operators, strict=True):
        if not kernels and count["launches"]:
            time = MS * count["distinct"] / machine.HBM
            found.append(
                {"phase": phase, "kernel": OPERATORS, "launches": count["launches"], "low": time, "high": time}
            )
    return [{"shape": shape, "case": case} | row for row in found]


def decode_row(batch: int) -> dict:
    """The launch of a step of decoding, as of ``rows_of``: 16 heads of 128, raw gates, the states in place."""
    with torch.no_grad(), recorded(ARCHITECTURE) as launches:
        decode_step(**decode_inputs(batch, "cpu"))
    [launch] = launches
    return {"phase": "decode", "batch": batch} | _row(launch, {1: launch}, 1, {}, CASES["raw"].floats)


def _all_rows(jobs):
    """{(shape, case): rows}, by two processes."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        return {job[:2]: rows for job, rows in zip(jobs, pool.map(rows_of, *zip(*jobs, strict=True)), strict=True)}


def _range(low, high, digits=2):
    low, high = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _sum(rows, digits=1):
    return _range(sum(row["low"] for row in rows), sum(row["high"] for row in rows), digits)


def _print(rows, waits):
    for row in rows:
        if row["kernel"] == OPERATORS:
            print(f"{row['phase']}, {OPERATORS}: {row['launches']} launches, {row['low']:.3f} ms")
            continue
        config = ", ".join(f"{name} {value}" for name, value in row["config"].items())
        print(
            f"{row['phase']}, {row['kernel']} ({config}): {row['registers']} registers, {row['stack']} bytes of stack, "
            f"{row['resident']} programs to a processor, {row['code'] // 1024} KB of code"
        )
        bounds = ", ".join(f"{name} {value:.2f}" for name, value in row["bounds"].items())
        print(f"    {_range(row['low'], row['high'])} ms; bounds: {bounds}")
        if waits:
            most = sorted(row["waits"].items(), key=lambda item: -item[1])
            print("    warps: " + ", ".join(f"{name} {100 * part:.0f}%" for name, part in most if part > 0.02))


# Of flash-linear-attention 0.6.0, forward + backward in ms, modelled in the same way on 2026-11-28 with Triton 3.9.0,
# each kernel in the fastest of its configurations. "safe": activated gates in a mode that is wrong below g = -5.
FLA = {
    ("raw", "B8T4096"): (10.02, 10.58), ("raw", "B1T16384"): (5.68, 5.98),
    ("activated", "B8T4096"): (8.82, 9.39), ("activated", "B1T16384"): (5.08, 5.38),
    ("safe", "B8T4096"): (6.70, 7.34), ("safe", "B1T16384"): (4.02, 4.36),
}  # fmt: skip
FLA |= {(case, "B8T4096"): FLA["raw", "B8T4096"] for case in ("documents", "packed")}  # taken to be the same
COLUMNS = {
    "prepare": ("forward", "prepare_kernel"),
    "scan or segment": ("forward", "scan_kernel", "segment_kernel"),
    "prepare, backward": ("backward", "prepare_kernel"),
    "scan, backward": ("backward", "scan_kernel"),
    "reverse": ("backward", "reverse_kernel"),
    "gradient": ("backward", "gradient_kernel"),
}
# What else joins segments, forward and backward together.
JOINS = {"fold": "fold_kernel", OPERATORS: OPERATORS}
CALLS = {
    "B = 8, T = 4,096": ("B8T4096", "raw"),
    "B = 1, T = 16,384": ("B1T16384", "raw"),
    "the same in one segment": ("B1T16384-whole", "raw"),
    "B = 1, T = 16,384, activated gates": ("B1T16384", "activated"),
    "B = 4, T = 8,192": ("B4T8192", "raw"),
}
OTHERS = {
    "raw gates, 128": "raw",
    "activated gates, 128": "activated",
    "raw, documents (`resets`)": "documents",
    "raw, packed in sequences of 2,048 (`cu_seqlens`)": "packed",
    "raw, grouped: 8 key heads, 16 value heads": "grouped",
    "raw, 64": "heads of 64",
    "raw, 96": "heads of 96",
    "raw, 256": "heads of 256",
    "raw, every chunk and slice takes seven products": "strong",
}
ERASE = {"gated": "raw", "`b=None`": "no erase"}
MAMBAS = {"gated": "mamba", "`b=None`": "mamba, no erase"}
CUT = {"in segments": "B1T16384", "in one": "B1T16384-whole"}
CUT_CASES = {
    "raw, documents": "documents",
    "raw, grouped": "grouped",
    "raw, 64": "heads of 64",
    "raw, 256": "heads of 256",
    "raw, `b=None`": "no erase",
}


def _cells(rows):
    """The time of each of COLUMNS."""
    return [_sum([row for row in rows if row["phase"] == phase and row["kernel"] in names], 2)
            for phase, *names in COLUMNS.values()]  # fmt: skip


def _fla(case, shape):
    text = f"{_range(*FLA[case, shape], 1)}" if (case, shape) in FLA else ""
    safe = f"; safe mode, wrong below g = -5: {_range(*FLA['safe', shape], 1)}" if case == "activated" else ""
    return text + safe


def _steps(rows):
    """The table of steps of decoding."""
    head = ["sequences", "bytes alone, µs", "model, µs"]
    return table(head, [[row["batch"], f"{US * row['bounds']['hbm']:.1f}", _range(US * row["low"], US * row["high"], 1)]
                        for row in rows])  # fmt: skip


def _tables(found):
    """{mark: Markdown}. found: rows by shape and case."""
    calls = [found[call] for call in CALLS.values()]
    times = [[name, *column] for name, *column in zip(COLUMNS, *map(_cells, calls), strict=True)]
    for name, kernel in JOINS.items():
        times.append([name, *(_sum([row for row in rows if row["kernel"] == kernel], 2) for rows in calls)])
    times.append(["**forward + backward**", *(f"**{_sum(rows)}**" for rows in calls)])
    times.append(["flash-linear-attention 0.6.0", *(_fla(case, shape) for shape, case in CALLS.values())])
    tables = {"times": table(["", *CALLS], times)}
    for mark, names in (("shapes", OTHERS), ("erase", ERASE), ("mamba", MAMBAS)):
        head = ["", *COLUMNS, "sum"]
        rows = [
            [name, *_cells(found["B8T4096", case]), f"**{_sum(found['B8T4096', case])}**"]
            for name, case in names.items()
        ]
        if mark == "shapes":
            head = [head[0], "heads", *head[1:], "flash-linear-attention"]
            rows = [[row[0], CASES[case].value_heads, *row[1:], _fla(case, "B8T4096")]
                    for row, case in zip(rows, names.values(), strict=True)]  # fmt: skip
        tables[mark] = table(head, rows)
    cut = [[name, *(_sum(found[shape, case]) for shape in CUT.values())] for name, case in CUT_CASES.items()]
    return tables | {"segments": table(["", *CUT], cut)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--case", nargs="*", choices=CASES, default=["raw"])
    parser.add_argument("--decode", action="store_true", help="also steps of decoding")
    parser.add_argument("--kernels", nargs="*", default=[], metavar="NAME", help="only these")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="change the configurations")
    parser.add_argument("--waits", action="store_true", help="say where warps wait")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    chosen = parser.parse_args()
    changes = {name: int(x) for name, x in (change.split("=") for change in chosen.set)}
    calls = list(itertools.product(chosen.shape, chosen.case))
    if chosen.write:
        others = [("B8T4096", case) for case in (*OTHERS.values(), *ERASE.values(), *MAMBAS.values())]
        calls = list(dict.fromkeys([*CALLS.values(), *others, *itertools.product(CUT.values(), CUT_CASES.values())]))
    found = _all_rows([(*call, chosen.kernels, changes) for call in calls])
    for (shape, case), rows in found.items():
        if chosen.json:
            print("\n".join(map(json.dumps, rows)))
        else:
            print(f"{shape}, {case}")
            _print(rows, chosen.waits)
            print(f"sum {_sum(rows, 2)} ms\n")
    steps = [decode_row(batch) for batch in BATCHES] if chosen.decode or chosen.write else []
    if steps:
        print("\n".join(map(json.dumps, steps)) if chosen.json else _steps(steps))
    if chosen.write:
        fill(DOCS / "kernels.md", _tables(found) | {"decode": _steps(steps)})


if __name__ == "__main__":
    main()
