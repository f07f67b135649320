"""How fast the op is on this GPU, beside what one would use instead, in one run on one device.

    python benchmarks/op_gpu.py --out results

Ours, flash-linear-attention's chunk_gdn2 (where installed, on the same tensors), the chunked PyTorch form under
torch.compile, and causal softmax attention (flash), forward and forward + backward, over lengths; then decoding over
batch sizes and the short convolution. Medians of CUDA-event times with a cold L2 cache. "of copy bandwidth": bytes of
every input and output once, by the time and by the bandwidth of a large copy, both measured here. What fails is a line
in the results, and is not tried at greater sizes.
"""

import argparse
import functools
import importlib
import itertools
import pathlib

import torch
import torch.nn.functional as F
from calls import conv_inputs, gdn2_inputs
from tables import describe, one_line, table, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from gdn2_titan import ops

OURS, FLA, TORCH, SDPA = "gdn2_titan", "flash-linear-attention", "compiled PyTorch", "softmax attention"
H, SIZE = 16, 128  # heads, K and V


def _fla(name):
    return getattr(importlib.import_module("fla.ops.gdn2"), name)


def _compiled(function):
    torch.compiler.reset()  # each length compiles afresh, or Dynamo would go dynamic, and give up after a few
    return torch.compile(function)


def softmax_attention(q, k, v, **others):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def decode(initial_state, output_final_state, **tensors):
    return ops.recurrent_gdn2_(**tensors, state=initial_state, backend="triton")


def convolve(x, weight, activation):
    y = F.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=weight.shape[0])
    return F.silu(y[..., : x.shape[1]]).mT


# Implementation: what returns the function to be measured, or fails where a package is missing.
SEQUENCE = {
    OURS: lambda: functools.partial(ops.chunk_gdn2, backend="triton"),
    FLA: lambda: _fla("chunk_gdn2"),
    TORCH: lambda: functools.partial(_compiled(ops.chunk_gdn2), backend="torch"),
    SDPA: lambda: softmax_attention,
}
DECODING = {OURS: lambda: decode, FLA: lambda: _fla("fused_recurrent_gdn2")}
CONVOLUTION = {
    OURS: lambda: functools.partial(ops.causal_conv1d, backend="triton"),
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
        # Attention takes three of the leaves.
        torch.autograd.grad(outputs[0] if isinstance(outputs, tuple) else outputs, leaves, do, allow_unused=True)

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

    def __init__(self):
        self.bandwidth = _copy_bandwidth()
        self.rows = []
        self.failed = {}

    def measure(self, benchmark, mode, size, implementations, inputs, prepare, floor):
        """prepare(call) -> what is timed. floor: bytes that the task must move."""
        for name, function in implementations.items():
            row = {"benchmark": benchmark, "mode": mode, "size": size, "implementation": name}
            self.rows.append(row)
            case = benchmark, mode, name
            if case in self.failed:
                row["error"] = f"failed at {self.failed[case]:,}"
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
        bench.measure(benchmark, "forward", T, SEQUENCE, inputs, torch.no_grad(), given + do.nbytes)
        # The forward reads the inputs and writes o; the backward reads them and do, and writes their gradients.
        floor = 3 * given + 2 * do.nbytes
        bench.measure(benchmark, "forward + backward", T, SEQUENCE, inputs, _both(leaves, do), floor)


def decoding(bench, batches):
    benchmark = f"recurrent_gdn2_, one token, H = {H}, K = V = {SIZE}, bf16, state fp32, over the batch"
    for B in batches:
        with torch.no_grad():
            inputs = gdn2_inputs("bf16", B, 1, H, SIZE, SIZE, state=True, device="cuda")
            floor = _bytes(inputs.values()) + inputs["initial_state"].nbytes + inputs["v"].nbytes
            bench.measure(benchmark, "as a CUDA graph", B, DECODING, inputs, _replayed, floor)


def convolutions(bench, lengths):
    benchmark = f"causal_conv1d, D = {H * SIZE}, W = 4, SiLU, bf16, over T"
    for T in lengths:
        inputs = conv_inputs("bf16", 1, T, H * SIZE, device="cuda", requires_grad=True)
        leaves, dy = [inputs["x"], inputs["weight"]], torch.randn_like(inputs["x"])
        bench.measure(benchmark, "forward + backward", T, CONVOLUTION, inputs, _both(leaves, dy), 5 * dy.nbytes)


def markdown(rows):
    """A table for each benchmark and mode: a line for each size and implementation, with the ratio to ours."""
    lines = []
    for names, group in itertools.groupby(sorted(rows, key=_benchmark), key=_benchmark):
        cells, ours = [], {}
        for row in group:
            cells.append([f"{row['size']:,}", row["implementation"]])
            if "error" in row:
                cells[-1] += [row["error"], "", "", ""]
                continue
            if row["implementation"] == OURS:
                ours[row["size"]] = row["ms"]
            ratio = f"{row['ms'] / ours[row['size']]:.2f}" if row["size"] in ours else "-"
            cells[-1] += [f"{row['ms']:.3f}", ratio, f"{row['copy_fraction']:.0%}", f"{row['peak_mb']:,.0f}"]
        head = ["size", "implementation", "ms", "by ours", "of copy bandwidth", "MB"]
        lines += [f"### {', '.join(names)}", "", table(head, cells, align="---:"), ""]
    return lines


def _benchmark(row):
    return row["benchmark"], row["mode"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1 << n for n in range(11, 17)])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 256], help="of the decoding")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    bench = Bench()
    facts = describe("cuda") | {"copy bandwidth": f"{bench.bandwidth / 1e9:.0f} GB/s"}
    try:
        sequences(bench, chosen.lengths)
        decoding(bench, chosen.batches)
        convolutions(bench, chosen.lengths)
    finally:  # also what was measured before something broke
        write(chosen.out, "op_gpu", facts, bench.rows, markdown(bench.rows))


if __name__ == "__main__":
    main()
