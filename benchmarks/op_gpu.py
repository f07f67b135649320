"""How fast the op is on this GPU, beside what one would use instead, in one run on one device.

    python benchmarks/op_gpu.py --out results
    python benchmarks/op_gpu.py --out results --lengths --implementations gdn2_titan flash-linear-attention   # quicker

Ours, flash-linear-attention's chunk_gdn2 (where installed, on the same tensors), the chunked PyTorch form under
torch.compile, and causal softmax attention (flash), forward and forward + backward: raw gates as a layer has them, at
the shapes of docs/kernels.md, then over lengths; then decoding over batch sizes and the short convolutions. Medians of
CUDA-event times with a cold L2 cache. "predicted": what docs/kernels.md says of forward + backward on an H100; of what
is bound by bytes, those by the bandwidth of a copy. "of copy bandwidth": bytes of every input and output once, by the
time and by the bandwidth of a large copy, both measured here. What fails is a line in the results, and is not tried at
greater sizes.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import pathlib
import re

import torch
import torch.nn.functional as F
from calls import decode_step, gdn2_inputs, qkv_inputs
from keys import settle_keys
from tables import DOCS, describe, one_line, table, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from gdn2_titan import ops

OURS, FLA, TORCH, SDPA = "gdn2_titan", "flash-linear-attention", "compiled PyTorch", "softmax attention"
H, SIZE = 16, 128  # heads, K and V
SHAPES = ((8, 4096), (1, 16384), (4, 8192))  # B and T
BATCHES = (1, 4, 16, 64, 256)  # of decoding
FORWARD, BOTH = "forward", "forward + backward"


def _fla(name):
    return getattr(importlib.import_module("fla.ops.gdn2"), name)


def _compiled(function):
    torch.compiler.reset()  # each length compiles afresh, or Dynamo would go dynamic, and give up after a few
    return torch.compile(function)


def softmax_attention(q, k, v, **others):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def fla_raw(b, w, use_sigmoid_in_kernel, **others):
    """Its operator takes the gates themselves: their sigmoids are PyTorch's, as in its layer."""
    return _fla("chunk_gdn2")(b=b.sigmoid(), w=w.sigmoid(), **others)


def convolve(activation, **tensors):
    def one(x, weight):
        y = F.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=weight.shape[0])
        return F.silu(y[..., : x.shape[1]]).mT

    return [one(tensors[name], tensors[f"{name}_weight"]) for name in "qkv"]


def shape_inputs(B, T, device):
    """What a layer gives the operator: raw gates, all of them leaves."""
    return gdn2_inputs("bf16 raw", B, T, H, SIZE, SIZE, device=device, requires_grad=True)


def decode_inputs(B, device):
    return gdn2_inputs("bf16 raw", B, 1, H, SIZE, SIZE, state=True, device=device)


def convolution_inputs(T, device):
    return qkv_inputs("bf16", 1, T, H * SIZE, device=device, requires_grad=True)


def predicted(B, T):
    """Implementation: milliseconds forward + backward that docs/kernels.md names for a shape."""
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]]
            for line in (DOCS / "kernels.md").read_text().splitlines() if line.startswith("|")]  # fmt: skip
    shape, found, column = f"B = {B}, T = {T:,}", {}, None
    for name, *cells in rows:
        if any(cell.startswith("B = ") for cell in cells):
            column = cells.index(shape) if shape in cells else None
        for implementation, start in ((OURS, BOTH), (FLA, FLA)):
            if column is not None and name.startswith(start) and re.match(r"[\d.]+", cells[column]):
                found[implementation] = cells[column]
    return found


# Ours, by what is measured.
CALLED = {
    "chunk": functools.partial(ops.chunk_gdn2, backend="triton"),
    "conv": functools.partial(ops.causal_conv1d_qkv, backend="triton"),
}
# Implementation: what returns the function to be measured, or fails where a package is missing.
SEQUENCE = {
    OURS: lambda: CALLED["chunk"],
    FLA: lambda: _fla("chunk_gdn2"),
    TORCH: lambda: functools.partial(_compiled(ops.chunk_gdn2), backend="torch"),
    SDPA: lambda: softmax_attention,
}
RAW = SEQUENCE | {FLA: lambda: fla_raw}
DECODING = {OURS: lambda: decode_step}
CONVOLUTION = {
    OURS: lambda: CALLED["conv"],
    "compiled conv1d": lambda: _compiled(convolve),
}


def _milliseconds(call):
    """Median over calls that each find the L2 cache cold, by CUDA events."""
    return do_bench(call, warmup=100, rep=300, return_mode="median")


def _peak_bytes(call):
    """Of memory above what is allocated before the call."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _copy_bandwidth():
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.zeros(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * _milliseconds(lambda: target.copy_(source)))


def _bytes(tensors):
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))


def _both(leaves, do):
    """Forward and backward."""

    def run(call):
        outputs = call()
        if isinstance(do, list):  # of as many outputs
            outputs = outputs[: len(do)]
        elif isinstance(outputs, tuple):
            outputs = outputs[0]
        # Attention takes three of the leaves.
        torch.autograd.grad(outputs, leaves, do, allow_unused=True)

    return lambda call: functools.partial(run, call)


def _replayed(call):
    """As a CUDA graph: for work so short that starting it from Python takes longer."""
    for _ in range(3):  # what is tuned or allocated at first must not be captured
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Bench:
    """Collects rows; knows who has failed already."""

    def __init__(self, chosen):
        self.chosen = chosen  # names of implementations
        self.bandwidth = _copy_bandwidth()
        self.rows = []
        self.failed = {}

    def measure(self, benchmark, mode, size, implementations, inputs, prepare, floor, expected=None):
        """prepare(call) -> what is timed. floor: bytes that the task must move. expected: milliseconds that were
        predicted, by implementation."""
        for name, function in implementations.items():
            if name not in self.chosen:
                continue
            row = {"benchmark": benchmark, "mode": mode, "size": size, "implementation": name}
            row["predicted"] = (expected or {}).get(name, "-")
            self.rows.append(row)
            case = benchmark, mode, name
            if case in self.failed:
                row["error"] = f"failed at {self.failed[case]}"
                continue
            try:
                call = prepare(functools.partial(function(), **inputs))
                row["ms"] = _milliseconds(call)
                row["copy_fraction"] = floor / (1e-3 * row["ms"]) / self.bandwidth
                row["peak_mb"] = _peak_bytes(call) / 1e6
            except Exception as error:  # one that is missing, runs out of memory or breaks ends alone
                row["error"] = one_line(error)
                self.failed[case] = size
            print(row, flush=True)
            torch.cuda.empty_cache()


def sequences(bench, lengths):
    benchmark = f"chunk_gdn2, B = 1, H = {H}, K = V = {SIZE}, bf16, g fp32, over T"
    for T in lengths:
        inputs = gdn2_inputs("bf16", 1, T, H, SIZE, SIZE, device="cuda", requires_grad=True)
        leaves, do = list(inputs.values()), torch.randn_like(inputs["v"])
        given = _bytes(leaves)
        bench.measure(benchmark, FORWARD, T, SEQUENCE, inputs, torch.no_grad(), given + do.nbytes)
        # The forward reads the inputs and writes o; the backward reads them and do, and writes their gradients.
        floor = 3 * given + 2 * do.nbytes
        bench.measure(benchmark, BOTH, T, SEQUENCE, inputs, _both(leaves, do), floor)


def shapes(bench, chosen):
    benchmark = f"chunk_gdn2, H = {H}, K = V = {SIZE}, bf16, raw gates, over B x T"
    for B, T in chosen:
        inputs = shape_inputs(B, T, "cuda")
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        do, given, size = torch.randn_like(inputs["v"]), _bytes(leaves), f"{B} x {T:,}"
        bench.measure(benchmark, FORWARD, size, RAW, inputs, torch.no_grad(), given + do.nbytes)
        floor = 3 * given + 2 * do.nbytes
        bench.measure(benchmark, BOTH, size, RAW, inputs, _both(leaves, do), floor, predicted(B, T))


def decoding(bench, batches):
    benchmark = f"recurrent_gdn2_, one token, H = {H}, K = V = {SIZE}, bf16, raw gates, state fp32, over the batch"
    for B in batches:
        with torch.no_grad():
            inputs = decode_inputs(B, "cuda")
            floor = _bytes(inputs.values()) + inputs["initial_state"].nbytes + inputs["v"].nbytes
            bound = {OURS: f"{1e3 * floor / bench.bandwidth:.4f}"}
            bench.measure(benchmark, "as a CUDA graph", B, DECODING, inputs, _replayed, floor, bound)


def convolutions(bench, lengths):
    benchmark = f"causal_conv1d_qkv, D = {H * SIZE} each, W = 4, SiLU, bf16, over T"
    for T in lengths:
        inputs = convolution_inputs(T, "cuda")
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        dys = [torch.randn_like(inputs[name]) for name in "qkv"]
        bound = {OURS: f"{1e3 * 5 * _bytes(dys) / bench.bandwidth:.4f}"}
        bench.measure(benchmark, BOTH, T, CONVOLUTION, inputs, _both(leaves, dys), 5 * _bytes(dys), bound)


def markdown(rows):
    """A table for each benchmark and mode: a line for each size and implementation, with the ratio to ours."""
    lines = []
    for names, group in itertools.groupby(sorted(rows, key=_benchmark), key=_benchmark):
        cells, ours = [], {}
        for row in group:
            cells.append([row["size"] if isinstance(row["size"], str) else f"{row['size']:,}", row["implementation"]])
            if "error" in row:
                cells[-1] += [row["error"], row["predicted"], "", "", ""]
                continue
            if row["implementation"] == OURS:
                ours[row["size"]] = row["ms"]
            ratio = f"{row['ms'] / ours[row['size']]:.2f}" if row["size"] in ours else "-"
            cells[-1] += [
                f"{row['ms']:.4f}",
                row["predicted"],
                ratio,
                f"{row['copy_fraction']:.0%}",
                f"{row['peak_mb']:,.0f}",
            ]
        head = ["size", "implementation", "ms", "predicted", "by ours", "of copy bandwidth", "MB"]
        lines += [f"### {', '.join(names)}", "", table(head, cells, align="---:"), ""]
    return lines


def _benchmark(row):
    return row["benchmark"], row["mode"]


def _shape(text):
    B, _, T = text.partition("x")
    return int(B), int(T)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--shapes", type=_shape, nargs="*", default=SHAPES, metavar="BxT", help="with raw gates")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1 << n for n in range(11, 17)])
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES, help="of the decoding")
    names = list(SEQUENCE) + [name for name in CONVOLUTION if name not in SEQUENCE]
    parser.add_argument("--implementations", nargs="+", choices=names, default=names)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    if importlib.util.find_spec("fla") is None and FLA in chosen.implementations:
        print(f"{FLA} is not installed: nothing is compared with it.", flush=True)
        chosen.implementations.remove(FLA)
    settle_keys()
    bench = Bench(chosen.implementations)
    facts = describe("cuda") | {"copy bandwidth": f"{bench.bandwidth / 1e9:.0f} GB/s"}
    try:
        shapes(bench, chosen.shapes)
        decoding(bench, chosen.batches)
        convolutions(bench, chosen.lengths or [T for _, T in chosen.shapes])
        sequences(bench, chosen.lengths)
    finally:  # also what was measured before something broke
        write(chosen.out, "op_gpu", facts, bench.rows, markdown(bench.rows))


if __name__ == "__main__":
    main()
