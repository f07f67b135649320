"""Every kernel against fp64, at three shapes, forward, backward and decoding: within 90 s it is known what is wrong.

    python benchmarks/check_gpu.py --out results
    TRITON_INTERPRET=1 python benchmarks/check_gpu.py --out results --device cpu --tokens 70     # that it runs

Each call runs on Triton, and again on PyTorch's kernels in fp64 from the same numbers. An error is the norm of the
difference by the norm of the fp64 result. A line for every result; the exit status says whether any is above its bound
(16 bits: 2e-2, fp32: 1e-4) or any kernel of the package was started by no call.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from calls import gdn2_inputs, qkv_inputs, segment
from keys import kernel_modules, settle_keys
from tables import describe, one_line, table, write

from gdn2_titan import ops
from gdn2_titan.ops.triton import launching

BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
H = 4
# Name: kind of input, B, T, K and V, what else is asked for.
SHAPES = {
    "documents": ("bf16 raw", 2, 1000, 64, 64, {"resets": True, "state": True}),
    "long": ("bf16 raw", 1, 4096, 128, 128, {}),
    "packed, fp32": ("fp32", 1, 2000, 96, 256, {"packed": True, "state": True}),
}


class Call(NamedTuple):
    """function(**inputs, backend=...) -> results; with the gradients of the leaves among the inputs, if any are."""

    name: str
    function: Callable
    inputs: dict


def _decode(q, initial_state, backend, output_final_state=True, **others):
    """A step on a pool of states, in which the rows lie in reverse."""
    state, indices = initial_state.flip(0).contiguous(), torch.arange(len(q), device=q.device).flip(0)
    o = ops.recurrent_gdn2_(q, **others, state=state, state_indices=indices, backend=backend)
    return o, state.flip(0)


def _conv_decode(backend, output_final_state=True, **inputs):
    states = [inputs.pop(f"{name}_state").flip(0).contiguous() for name in "qkv"]
    indices = torch.arange(len(states[0]), device=states[0].device).flip(0)
    given = dict(zip(("q_state", "k_state", "v_state"), states, strict=True))
    ys = ops.causal_conv1d_qkv_(**inputs, **given, state_indices=indices, backend=backend)
    return *ys, *(state.flip(0) for state in states)


def _segments(backend, **inputs):
    """In one piece in fp64."""
    return ops.chunk_gdn2(**inputs, backend=backend, num_segments=4 if backend == "triton" else 1)


def _recurrent(backend, **inputs):
    """Chunk by chunk in fp64: the same function, in less time."""
    return (ops.recurrent_gdn2 if backend == "triton" else ops.chunk_gdn2)(**inputs, backend=backend)


def calls(device: str, tokens: int | None = None) -> Iterator[Call]:
    """What is checked. tokens: instead of those of the shapes."""
    for shape, (kind, B, T, K, V, options) in SHAPES.items():
        T = tokens or T
        inputs = gdn2_inputs(kind, B, T, H, K, V, device=device, **options)
        leaves = gdn2_inputs(kind, B, T, H, K, V, device=device, requires_grad=True, **options)
        yield Call(f"{shape}: chunk_gdn2", ops.chunk_gdn2, leaves)
        yield Call(f"{shape}: recurrent_gdn2", _recurrent, inputs)
        if "packed" not in options:
            yield Call(f"{shape}: chunk_gdn2 in segments", _segments, leaves)
            yield Call(f"{shape}: a segment", segment, inputs)
        step = gdn2_inputs(kind, 8, 1, H, K, V, device=device, state=True)
        yield Call(f"{shape}: recurrent_gdn2_", _decode, step)
        yield Call(f"{shape}: causal_conv1d_qkv", ops.causal_conv1d_qkv,
                   qkv_inputs(kind, B, T, H * K, device=device, requires_grad=True, **options))  # fmt: skip
        step = qkv_inputs(kind, 8, 1, H * K, device=device, state=True)
        yield Call(f"{shape}: causal_conv1d_qkv_", _conv_decode, step)


def results(call: Call, backend: str, double: bool = False) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a call by name, for output gradients that depend on shapes alone."""
    inputs = dict(call.inputs)
    for name, x in inputs.items():
        if double and isinstance(x, torch.Tensor) and x.is_floating_point():
            inputs[name] = x.detach().double().requires_grad_(x.requires_grad)
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    with torch.set_grad_enabled(bool(leaves)):
        tree = call.function(**inputs, backend=backend)
        outputs = [x for x in torch.utils._pytree.tree_leaves(tree) if x is not None]
        found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
        if leaves:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            seeds = [torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype) for x in outputs]
            grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
            found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def kernels() -> set[str]:
    """The names of all kernels of the package."""
    return {
        name for module in kernel_modules() for name, x in vars(module).items()
        if name.endswith("_kernel") and callable(x)
    }  # fmt: skip


def check(device: str, tokens: int | None) -> list[dict]:
    """A row for every result, and one for every kernel that was never started."""
    rows, started, launch = [], set(), launching.launch

    def noted(kernel, *given):
        started.add(kernel.__name__)
        launch(kernel, *given)

    for call in calls(device, tokens):
        begun = time.monotonic()
        found = [{"call": call.name, "result": "-"}]
        try:
            with mock.patch.object(launching, "launch", noted):
                got = results(call, "triton")
            want = results(call, "torch", double=True)
            found = []
            for name, exact in want.items():
                bound = BOUNDS[next(iter(call.inputs.values())).dtype]
                error = ((got[name].double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
                found.append({"call": call.name, "result": name, "error": error, "ok": error <= bound})
        except Exception as error:  # a call that breaks ends alone
            found[0] |= {"ok": False, "fault": one_line(error)}
        worst = max(found, key=lambda row: row.get("error", float("inf")))
        print(
            f"{time.monotonic() - begun:.1f} s", "ok" if all(row["ok"] for row in found) else "WRONG", worst, flush=True
        )
        rows += found
    missed = sorted(kernels() - started)
    return rows + [{"call": name, "result": "-", "ok": False, "fault": "was started by no call"} for name in missed]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, help="of every sequence, instead of up to 4,096")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device is 'cuda'; without a GPU it must be 'cpu', with TRITON_INTERPRET=1")
    settle_keys()
    rows = check(chosen.device, chosen.tokens)
    cells = [
        [row["call"], row["result"], row.get("fault") or f"{row['error']:.1e}", "" if row["ok"] else "WRONG"]
        for row in rows
    ]
    write(chosen.out, "check_gpu", describe(chosen.device), rows, [table(["call", "result", "error", ""], cells)])
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
