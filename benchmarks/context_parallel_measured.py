"""What the operators of context parallelism take on the machine at hand: its GPU, or else its CPU."""

import datetime
import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gdn2_titan.ops import chunk_gdn2
from gdn2_titan.ops.maps import apply, read, read_transposed
from gdn2_titan.ops.segments import segment_gdn2_op

__all__ = ["measure"]

REPEATS = 20


def _processor():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, 1 thread"


def _seconds(functions):
    """{name: shortest of REPEATS}: what else the machine does only ever adds to a time."""
    times = {name: [] for name in functions}
    for i in range(REPEATS + 2):
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:  # before that, warm-up
                times[name].append(time.perf_counter() - before)
    return {name: min(found) for name, found in times.items()}


def measure(H, K, V):
    """ "seconds": of a token and head; of a head for "product", D + M S. "attention": FLOP/s of a causal softmax."""
    gpu = torch.cuda.is_available()
    device, dtype, T = ("cuda", torch.bfloat16, 8192) if gpu else ("cpu", torch.float32, 512)
    torch.set_num_threads(1)  # two that wait for each other measure what else a shared machine does
    torch.manual_seed(0)
    inputs = [torch.randn(1, T, H, size, device=device, dtype=dtype, requires_grad=True) for size in (K, K, V, K, K, V)]
    A_log, M, S = (torch.randn(shape, device=device) for shape in ((H,), (1, H, K, K), (1, H, K, V)))
    raw = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_sigmoid_in_kernel": True}
    q, v = inputs[0].detach(), inputs[2].detach()
    o, _ = chunk_gdn2(*inputs, A_log=A_log, **raw)
    softmax_inputs = [torch.randn(1, H, T, K, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    attended = F.scaled_dot_product_attention(*softmax_inputs, is_causal=True)

    @torch.no_grad()
    def forward():
        chunk_gdn2(*inputs, A_log=A_log, **raw)

    @torch.no_grad()
    def segment():
        segment_gdn2_op(*inputs, A_log, None, None, K**-0.5, True, True, True, 1.0)

    @torch.no_grad()
    def attention():
        F.scaled_dot_product_attention(*softmax_inputs, is_causal=True)

    found = _seconds(
        {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(o, inputs, v, retain_graph=True),
            "segment": segment,
            "read": lambda: (v + read(q, S)).to(dtype),
            "read_transposed": lambda: read_transposed(q, v, S.dtype),
            "product": lambda: S + apply(M, S),
            "attention": attention,
            "attention, backward": lambda: torch.autograd.grad(attended, softmax_inputs, attended, retain_graph=True),
        }
    )
    pairs = H * T * T / 2
    rate = 14 * K * pairs / (found.pop("attention") + found.pop("attention, backward"))
    of_one = {name: seconds / H / (1 if name == "product" else T) for name, seconds in found.items()}
    about = {"machine": _processor(), "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch.")}
    about |= {"date": datetime.date.today().isoformat(), "load": round(os.getloadavg()[0], 1)}
    return about | {"tokens": T, "heads": H, "seconds": of_one, "attention": rate}
