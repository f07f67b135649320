"""How fast the chunked op is on a CPU, and that its time and memory grow linearly with the sequence.

    python benchmarks/op_cpu.py            # the ratio to the textbook chunked form, then T = 2k .. 32k

The textbook form is what the chunkwise equations say when typed in directly: it materialises the decay between
every two tokens of a chunk, [C, C, K], and lets autograd differentiate it. Both are timed in this one process,
alternating, at B = 1, T = 2048, H = 4, K = V = 64, fp32, forward + backward; the ratio of the medians is printed.
"""

import concurrent.futures
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import torch
from calls import gdn2_inputs

from gdn2_titan.ops import chunk_gdn2

H, K, V = 4, 64, 64


def inputs(T):
    """q, k, v, g, b, w in fp32, and the gradient of the output."""
    tensors = gdn2_inputs("fp32", 1, T, H, K, V, requires_grad=True)
    return [tensors[name] for name in ("q", "k", "v", "g", "b", "w")], torch.randn(1, T, H, V)


def textbook(q, k, v, g, b, w, chunk=64):
    """The chunkwise form with an explicit decay tensor. [B, T, H, K] and [B, T, H, V] -> [B, T, H, V]; chunk | T."""
    B, T, H, K = q.shape
    q, k, v, g, b, w = (
        x.view(B, T // chunk, chunk, H, -1).permute(0, 3, 1, 2, 4) for x in (q * K**-0.5, k, v, g, b, w)
    )  # [B, H, NC, C, *]
    G = g.cumsum(-2)
    below = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    difference = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(~below[:, :, None], -torch.inf)
    decay = difference.exp()  # [B, H, NC, C, C, K]
    a_qk = torch.einsum("...rd,...sd,...rsd->...rs", q, k, decay)
    t = torch.einsum("...rd,...sd,...rsd->...rs", b * k, k, decay).tril(-1)
    eye = torch.eye(chunk).expand_as(t)
    a = torch.linalg.solve_triangular(eye + t, eye, upper=False, unitriangular=True)
    y, u = a @ (G.exp() * b * k), a @ (w * v)
    kt = (G[..., -1:, :] - G).exp() * k
    state = q.new_zeros(B, H, K, v.shape[-1])
    outputs = []
    for i in range(T // chunk):
        r = u[:, :, i] - y[:, :, i] @ state
        outputs.append((q[:, :, i] * G[:, :, i].exp()) @ state + a_qk[:, :, i] @ r)
        state = G[:, :, i, -1].exp()[..., None] * state + kt[:, :, i].mT @ r
    return torch.stack(outputs, 2).permute(0, 2, 3, 1, 4).reshape(B, T, H, -1)


def ours(*args):
    return chunk_gdn2(*args)[0]


def milliseconds(fn, args, do):
    start = time.perf_counter()
    torch.autograd.grad(fn(*args), args, do)
    return 1e3 * (time.perf_counter() - start)


def compare():
    args, do = inputs(2048)
    both = [torch.autograd.grad(fn(*args), args, do) for fn in (textbook, ours)]  # also warms up
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
    slow, fast = [], []
    for _ in range(7):
        slow.append(milliseconds(textbook, args, do))
        fast += [milliseconds(ours, args, do) for _ in range(5)]
    slow, fast = statistics.median(slow), statistics.median(fast)
    print(f"textbook {slow:.0f} ms, chunk_gdn2 {fast:.1f} ms, ratio {slow / fast:.1f}")


def peak_memory():
    """Peak resident MB of this process. Not ru_maxrss, which a child inherits from its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def scaling_point(T):
    """A line of the table: milliseconds, and MB above the inputs, for one length."""
    args, do = inputs(T)
    milliseconds(ours, *inputs(128))
    base = peak_memory()
    ms = statistics.median(milliseconds(ours, args, do) for _ in range(5))
    return f"{T:>8} {ms:>10.1f} {peak_memory() - base:>10.0f}"


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    compare()
    print(f"{'T':>8} {'ms':>10} {'MB':>10}   forward + backward, fp32, H = {H}, K = V = {K}", flush=True)
    # Each length in a fresh process, so that the peak is its own.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for line in processes.map(scaling_point, (2048, 4096, 8192, 16384, 32768)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
