"""How fast the op is on this GPU, beside what one would use instead, in one run on one device.

    python benchmarks/op_gpu.py --out results

Ours, flash-linear-attention's chunk_gdn2 (where installed, on the same tensors), the chunked PyTorch form under
torch.compile, and causal softmax attention (flash), forward and forward + backward, over lengths; then decoding over
batch sizes and the short convolution. Medians of CUDA-event times with a cold L2 cache. "of copy bandwidth": bytes of
every input and output once, by the time and by the bandwidth of a large copy, both measured here. What fails is a line
in the results, and is not tried at greater sizes.
"""

import argparse
import pathlib

import torch
import torch.nn.functional as F
from calls import conv_inputs, gdn2_inputs
from gpu_timer import copy_bandwidth, describe, milliseconds, peak_bytes, replayed
from tables import failures, one_line, table, write
from torch.nn.attention import SDPBackend, sdpa_kernel

from gdn2_titan import ops

OURS, FLA, TORCH, SDPA = "gdn2_titan", "flash-linear-attention", "compiled PyTorch", "softmax attention"
TENSORS = ("q", "k", "v", "g", "b", "w")


def _first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def ours(inputs):
    return lambda: ops.chunk_gdn2(**inputs, backend="triton")


def flash_linear_attention(inputs):
    from fla.ops.gdn2 import chunk_gdn2

    return lambda: chunk_gdn2(**inputs)


def pytorch(inputs):
    torch.compiler.reset()  # each length compiles afresh, or Dynamo would go dynamic, and give up after a few
    compiled = torch.compile(ops.chunk_gdn2)
    return lambda: compiled(**inputs, backend="torch")


def softmax_attention(inputs):
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))

    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


SEQUENCE = {OURS: ours, FLA: flash_linear_attention, TORCH: pytorch, SDPA: softmax_attention}


def ours_decoding(inputs):
    state = inputs["initial_state"]
    tensors = {name: inputs[name] for name in TENSORS}
    return lambda: ops.recurrent_gdn2_(**tensors, state=state, backend="triton")


def flash_linear_attention_decoding(inputs):
    from fla.ops.gdn2 import fused_recurrent_gdn2

    return lambda: fused_recurrent_gdn2(**inputs)


DECODING = {OURS: ours_decoding, FLA: flash_linear_attention_decoding}


def our_convolution(inputs):
    return lambda: ops.causal_conv1d(**inputs, backend="triton")


def pytorch_convolution(inputs):
    torch.compiler.reset()

    @torch.compile
    def convolve(x, weight):
        y = F.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=weight.shape[0])
        return F.silu(y[..., : x.shape[1]]).mT

    return lambda: convolve(inputs["x"], inputs["weight"])


CONVOLUTION = {OURS: our_convolution, "compiled conv1d": pytorch_convolution}


def _bytes(tensors):
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))


class Bench:
    """Collects rows; knows who has failed already."""

    def __init__(self):
        self.bandwidth = copy_bandwidth()
        self.rows = []
        self.failed = {}

    def measure(self, benchmark, mode, size, contestants, inputs, prepare, floor):
        """prepare(call) -> what is timed. floor: bytes that the task must move."""
        for name, build in contestants.items():
            row = {"benchmark": benchmark, "mode": mode, "size": size, "implementation": name}
            self.rows.append(row)
            before = self.failed.get((benchmark, mode, name))
            if before:
                row["error"] = f"failed at {before:,}"
                continue
            try:
                call = prepare(build(inputs))
                row["ms"] = milliseconds(call)
                row["copy_fraction"] = floor / (1e-3 * row["ms"]) / self.bandwidth
                row["peak_mb"] = peak_bytes(call) / 1e6
            except Exception as error:  # a contestant that is missing, runs out of memory or breaks ends alone
                row["error"] = one_line(error)
                self.failed[benchmark, mode, name] = size
            print(row, flush=True)
            torch.cuda.empty_cache()


def sequences(bench, lengths, batch, heads, size):
    benchmark = f"chunk_gdn2, B = {batch}, H = {heads}, K = V = {size}, bf16, g fp32, over T"
    for T in lengths:
        inputs = gdn2_inputs("bf16", batch, T, heads, size, size, device="cuda", requires_grad=True)
        do = torch.randn_like(inputs["v"])
        given = _bytes(inputs.values())

        def forward(call):
            def run():
                with torch.no_grad():
                    call()

            return run

        def both(call, inputs=inputs, do=do):
            # Attention takes three of them.
            def run():
                torch.autograd.grad(_first(call()), list(inputs.values()), do, allow_unused=True)

            return run

        bench.measure(benchmark, "forward", T, SEQUENCE, inputs, forward, given + do.nbytes)
        # The forward reads the inputs and writes o; the backward reads them and do, and writes their gradients.
        bench.measure(benchmark, "forward + backward", T, SEQUENCE, inputs, both, 3 * given + 2 * do.nbytes)


def decoding(bench, batches, heads, size):
    benchmark = f"recurrent_gdn2_, one token, H = {heads}, K = V = {size}, bf16, state fp32, over the batch"
    for B in batches:
        with torch.no_grad():
            inputs = gdn2_inputs("bf16", B, 1, heads, size, size, state=True, device="cuda")
            floor = _bytes(inputs.values()) + inputs["initial_state"].nbytes + inputs["v"].nbytes
            bench.measure(benchmark, "as a CUDA graph", B, DECODING, inputs, replayed, floor)


def convolutions(bench, lengths, width):
    benchmark = f"causal_conv1d, D = {width}, W = 4, SiLU, bf16, over T"
    for T in lengths:
        inputs = conv_inputs("bf16", 1, T, width, device="cuda", requires_grad=True)
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        dy = torch.randn_like(inputs["x"])

        def both(call, leaves=leaves, dy=dy):
            return lambda: torch.autograd.grad(_first(call()), leaves, dy)

        bench.measure(benchmark, "forward + backward", T, CONVOLUTION, inputs, both, 5 * dy.nbytes)


def markdown(rows):
    """A table for each benchmark and mode: a line for each size, what each implementation took, and ratios to ours."""
    groups = {}
    for row in rows:
        sizes = groups.setdefault((row["benchmark"], row["mode"]), {})
        sizes.setdefault(row["size"], {})[row["implementation"]] = row
    lines = []
    for (benchmark, mode), sizes in groups.items():
        names = list(dict.fromkeys(name for group in sizes.values() for name in group))
        others = [name for name in names if name != OURS]
        head = ["size", *(f"{name}, ms" for name in names), *(f"{name} / ours" for name in others)]
        head += ["ours, of copy bandwidth", *(f"{name}, MB" for name in names)]
        cells = [
            [f"{size:,}", *(_cell(group, name, "ms", "{:.3f}") for name in names),
             *(_ratio(group, name) for name in others), _cell(group, OURS, "copy_fraction", "{:.0%}"),
             *(_cell(group, name, "peak_mb", "{:,.0f}") for name in names)]
            for size, group in sizes.items()
        ]  # fmt: skip
        lines += [f"### {benchmark}, {mode}", "", table(head, cells, align="---:"), ""]
    return lines + failures(rows, "{benchmark}, {mode}, {size:,}, {implementation}")


def _cell(group, name, field, form):
    row = group.get(name, {})
    return form.format(row[field]) if field in row else "-"


def _ratio(group, name):
    times = [group.get(x, {}).get("ms") for x in (name, OURS)]
    return "-" if None in times else f"{times[0] / times[1]:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1 << n for n in range(11, 17)])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 256], help="of the decoding")
    parser.add_argument("--batch", type=int, default=1, help="sequences at every length")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="K and V")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    bench = Bench()
    facts = describe("cuda") | {"copy bandwidth": f"{bench.bandwidth / 1e9:.0f} GB/s"}
    try:
        sequences(bench, chosen.lengths, chosen.batch, chosen.heads, chosen.size)
        decoding(bench, chosen.batches, chosen.heads, chosen.size)
        convolutions(bench, chosen.lengths, chosen.heads * chosen.size)
    finally:  # also what was measured before something broke
        write(chosen.out, "op_gpu", facts, bench.rows, markdown(bench.rows))


if __name__ == "__main__":
    main()
