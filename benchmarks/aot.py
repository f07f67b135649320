"""Compile the kernels for GPUs that are not here, and read in the machine code what they take.

    python benchmarks/aot.py --target sm_90 --op chunk --kind bf16 --size 128
    python benchmarks/aot.py --size 128 --kind "bf16 raw" --write    # a table of these cases into docs/kernels.md

Each launch that the calls of ``CASES`` would make on a target is compiled by Triton's own path, specialisation of
arguments included: by its warm-up entry, under a driver that knows nothing but the target. A line a kernel, as in that
table, and what is wrong, if anything.
Without TRITON_INTERPRET: Triton decides when it decorates a kernel whether it will be compiled.
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile

import torch
import triton
from calls import KINDS, decode_step, gdn2_inputs, qkv_inputs, segment
from launches import recorded
from tables import DOCS, fill, table
from triton.backends.compiler import GPUTarget

from gdn2_titan import ops
from gdn2_titan.ops.gdn2.triton.fold import fold

KB = 1024
INSTRUCTION = 16  # bytes, on NVIDIA
TENSOR_MEMORY = 512  # columns, of a program on sm_100; for a kernel that wants more Triton emits a trap
SPILLED = 256  # bytes of a thread; a kernel that spills more is named here, with the reason
SPILLS = {
    "gradient_kernel": "three programs to a processor: slices that spill half as much take 1.1 to 1.2 times as long",
    "prepare_kernel": "slices of 32 channels: those of 16 read the gates and the matrices of sums twice as often",
    "scan_kernel": "heads of 256: two programs to a processor, whose states are half of all registers",
    "segment_kernel": "it is scan_kernel twice",
}
# Name: what ``target.arch`` returns there, what Triton calls it, the shared memory of one program.
TARGETS = {
    "sm_80": (80, GPUTarget("cuda", 80, 32), 163 * KB),
    "sm_90": (90, GPUTarget("cuda", 90, 32), 227 * KB),
    "sm_100": (100, GPUTarget("cuda", 100, 32), 227 * KB),
    "sm_120": (120, GPUTarget("cuda", 120, 32), 99 * KB),
    "gfx942": ("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KB),
}
SIZES = (64, 128, 256)
# What a call asks for besides; "documents" is how training calls it, "packed" takes cu_seqlens, "no erase" has no b.
OPTIONS = {
    "plain": {},
    "documents": {"resets": True, "state": True},
    "packed": {"packed": True, "state": True},
    "no erase": {"erases": False},
}
B, T, H = 1, 4096, 4


def _train(function, inputs):
    outputs = [x for x in torch.utils._pytree.tree_leaves(function(**inputs, backend="triton")) if x is not None]
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(x) for x in outputs])


def _chunk(kind, size, options):
    inputs = gdn2_inputs(kind, B, T, H, size, size, **options, requires_grad=True)
    _train(functools.partial(ops.chunk_gdn2, num_segments=1), inputs)


def _segment(kind, size, options):
    with torch.no_grad():
        segment(**gdn2_inputs(kind, B, T, H, size, size, **options))


def _fold(kind, size, options):
    """The states between segments, forward and backward."""
    M, D = torch.empty(B, 4, H, size, size), torch.empty(B, 4, H, size, size)
    for transposed in (False, True):
        fold(M, D, None, transposed)


def _recurrent(kind, size, options):
    with torch.no_grad():
        ops.recurrent_gdn2(**gdn2_inputs(kind, B, T, H, size, size, **options), backend="triton")


def _decode(kind, size, options):
    """One token for each of 64 sequences, the state updated in place."""
    with torch.no_grad():
        decode_step(**gdn2_inputs(kind, 64, 1, H, size, size, **options | {"state": True}))


def _conv(kind, size, options):
    _train(ops.causal_conv1d_qkv, qkv_inputs(kind, B, T, H * size, **options, requires_grad=True))


def _conv_decode(kind, size, options):
    """The convolutions of q, k and v in a step of 64 sequences, the states updated in place."""
    inputs = qkv_inputs(kind, 64, 1, H * size, state=True)
    del inputs["output_final_state"]
    with torch.no_grad():
        ops.causal_conv1d_qkv_(**inputs, backend="triton")


OPS = {"chunk": _chunk, "segment": _segment, "fold": _fold, "recurrent": _recurrent, "decode": _decode, "conv": _conv,
       "conv_decode": _conv_decode}  # fmt: skip


def _wanted(op, kind, size, options):
    """Every kind and size of input, and every option with the inputs of training; the convolution knows no sizes.
    Without an erase gate, whose kernels are parts of the others: small heads, activated, and those of training."""
    if options == "no erase":
        return op in ("chunk", "segment", "decode") and (kind, size) in (("bf16", 64), ("bf16 raw", 128))
    if op == "fold":  # in fp32 whatever the inputs
        return options == "plain" and kind == "bf16 raw"
    if op == "conv_decode":
        return options == "plain" and size == 128 and kind != "bf16 raw"
    if op == "conv":
        return size == 128 and kind != "bf16 raw"
    if op == "segment" and options == "packed":
        return False  # it has no cu_seqlens
    return options == "plain" or (op != "decode" and size == 128 and kind == "bf16 raw")


CASES = [case for case in itertools.product(OPS, KINDS, SIZES, OPTIONS) if _wanted(*case)]


class _Driver:
    """All that Triton asks of a driver in order to compile; a kernel's compiled forms are kept by the device."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._target.arch

    def get_current_stream(self, device):
        return 0


def _compile(launch, config, target):
    triton.runtime.driver.set_active(_Driver(target))
    return launch.kernel.warmup(grid=(1,), **launch.args, **launch.constants, **config)


def _cuda_resources(compiled):
    def cuobjdump(option):
        command = [triton.knobs.nvidia.cuobjdump.path, option, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = cuobjdump("--dump-resource-usage")
        sass = cuobjdump("--dump-sass")
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(\w+)", sass, re.MULTILINE))
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],  # bytes of a thread
        "matrix": {n: x for n, x in sorted(instructions.items()) if re.fullmatch(r"[HQDIO]?G?MMA|UTC\w*MMA", n)},
        "code": INSTRUCTION * sum(instructions.values()),  # bytes
    }


def _hip_resources(compiled):
    text = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    matrix = collections.Counter(re.findall(r"^\s+(v_s?mfma\w*)", text, re.MULTILINE))
    return {
        "registers": field("vgpr_count"),
        "spilled": field("private_segment_fixed_size"),
        "matrix": dict(sorted(matrix.items())),
        "code": int(re.search(r"codeLenInByte = (\d+)", text).group(1)),
    }


OPERAND = r"(?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x(\w+)"
DOT = re.compile(rf"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b.* : {OPERAND}.*?>(?: \*|,) {OPERAND}")
DOTS = {"tt.dot": "mma", "ttng.warp_group_dot": "wgmma", "ttng.tc_gen5_mma": "tcgen05"}


def _report(launch, config, target):
    """Of the machine code, and "products": those of the target's own IR, e.g. "wgmma 64x128x64 bf16" (rows, columns,
    inner) -> how many."""
    _, triton_target, limit = TARGETS[target]
    compiled = _compile(launch, config, triton_target)
    resources = _cuda_resources if triton_target.backend == "cuda" else _hip_resources
    dots = DOT.findall(compiled.asm["ttgir"])
    products = collections.Counter(f"{DOTS[op]} {m}x{n}x{k} {dtype}" for op, m, k, dtype, _, n, _ in dots)
    return resources(compiled) | {
        "shared": compiled.metadata.shared,
        "shared_limit": limit,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),
        "products": dict(sorted(products.items())),
    }


def faults(report):
    """What of a report breaks the promise made for every default configuration; one sentence each."""
    if "error" in report:
        return [f"does not compile: {report['error']}"]
    found = []
    if report["shared"] > report["shared_limit"]:
        found.append(f"wants {report['shared']} bytes of shared memory of {report['shared_limit']}")
    if report["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"wants {report['tensor_memory']} columns of tensor memory of {TENSOR_MEMORY}")
    if report["spilled"] > SPILLED and report["kernel"] not in SPILLS:
        found.append(f"spills {report['spilled']} bytes of a thread, and SPILLS has no reason for it")
    if report["products"] and not report["matrix"]:
        found.append("multiplies without tensor cores")
    if report["target"] == "sm_90":
        # A warp group takes 64 rows at a time, so smaller products have no choice.
        slow = [x for x in report["products"] if re.fullmatch(r"mma (64|128|256)x\S+ b?f16", x)]
        found += [f"multiplies {x} without wgmma" for x in slow]
    return found


def case_reports(job):
    """One dict for each kernel that a case starts on a target, at its default configuration, and at that of enough
    sequences to fill the target where it is another. job: (target, case, changes of the configuration by name)."""
    target, case, changes = job
    op, kind, size, options = case
    with recorded(TARGETS[target][0]) as launches:
        OPS[op](kind, size, OPTIONS[options])
    with recorded(TARGETS[target][0], processors=1) as filling:
        OPS[op](kind, size, OPTIONS[options])
    launches += [full for few, full in zip(launches, filling, strict=True) if few.candidates != full.candidates]
    found = []
    for launch in launches:
        config = {name: changes.get(name, x) for name, x in launch.candidates[0].items()}
        report = {"op": op, "kind": kind, "size": size, "options": options, "target": target}
        report |= {"kernel": launch.name, "config": config}
        try:
            report |= _report(launch, config, target)
        except Exception as error:  # whatever Triton or an assembler raises: one kernel must not hide the others
            report["error"] = f"{type(error).__name__}: {error}"
        if report not in found:
            found.append(report)
    return found


def _row(report):
    """Of the table in docs/kernels.md; a kernel that breaks a promise is in bold."""
    inputs = [report["op"], report["kind"], str(report["size"]), *(x for x in [report["options"]] if x != "plain")]
    row = [report["target"], report["kernel"], ", ".join(inputs)]
    row.append(", ".join(f"{name} {value}" for name, value in report["config"].items()))
    if "error" in report:
        row += ["does not compile", "", "", "", ""]
    else:
        shared = f"{report['shared'] / KB:.0f} of {report['shared_limit'] // KB}"
        matrix = ", ".join(f"{count} {name}" for name, count in report["matrix"].items())
        row += [report["registers"], report["spilled"], report["code"] // KB, shared, matrix]
    return [f"**{cell}**" if cell != "" else "" for cell in row] if faults(report) else row


COLUMNS = ("GPU", "kernel", "inputs", "configuration", "registers", "spilled", "code", "shared",
           "matrix instructions")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    axes = {"op": OPS, "kind": KINDS, "size": SIZES, "options": OPTIONS}
    for name, values in (axes | {"target": TARGETS}).items():
        values = list(values)
        parser.add_argument(f"--{name}", nargs="*", type=type(values[0]), choices=values, default=values)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="change the configurations")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--write", action="store_true", help="put a table into docs/kernels.md")
    chosen = parser.parse_args()
    cases = [case for case in CASES if all(x in getattr(chosen, name) for name, x in zip(axes, case, strict=True))]
    changes = {name: int(x) for name, x in (change.split("=") for change in chosen.set)}
    jobs = [(target, case, changes) for target in chosen.target for case in cases]
    rows = []
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        for report in itertools.chain.from_iterable(pool.map(case_reports, jobs)):
            wrong, row = faults(report), _row(report)
            line = "\n    ".join([" | ".join(map(str, row)), *wrong])
            print(json.dumps(report | {"faults": wrong}) if chosen.json else line, flush=True)
            rows.append(row)
    if chosen.write:
        fill(DOCS / "kernels.md", {"kernels": table(COLUMNS, rows)})


if __name__ == "__main__":
    main()
