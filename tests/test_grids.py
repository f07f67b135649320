"""What the Triton kernels ask of a GPU that no interpreter refuses: grids of one axis.

The tensors are on the meta device: every launch is recorded, none is made.
"""

import itertools

import pytest
import torch

from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.triton import chunk, recurrent
from gdn2_titan.ops.gdn2.triton.fold import fold
from gdn2_titan.ops.short_conv.arguments import ConvInputs
from gdn2_titan.ops.short_conv.triton import launches as causal_conv1d
from gdn2_titan.ops.triton import launching

MOST = 2**31 - 1  # programs on the first axis of a grid, of CUDA; 65,535 on the others
OPTIONS = GDN2Options(1.0, l2norm=True, gate=True, sigmoid=True)
META = "meta"


def tensors(B, T, H, HV, N, K=128, V=128):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=META)

    q, k, g, b = (empty(B, T, H, K) for _ in range(4))
    v, w = (empty(B, T, HV, V) for _ in range(2))
    parameters = empty(H, dtype=torch.float32), empty(H, K, dtype=torch.float32)
    return q, k, v, g, b, w, *parameters, empty(N, HV, K, V, dtype=torch.float32)


def packed(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def run_gdn2(B, T, H, HV, cu_seqlens=None):
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    inputs = GDN2Inputs(*tensors(B, T, H, HV, N), cu_seqlens)
    o, final_state = chunk.chunk_forward(inputs, OPTIONS)
    assert final_state.shape == (N, HV, 128, 128)
    chunk.chunk_backward(o, final_state, inputs, OPTIONS)
    recurrent.recurrent_forward(inputs, OPTIONS)
    if cu_seqlens is None:
        _, _, M, D = chunk.segment_forward(inputs._replace(initial_state=None), OPTIONS)
        fold(M.unsqueeze(1), D.unsqueeze(1), final_state)


def run_conv(B, T, D, cu_seqlens=None, count=1):
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    x, weight, bias, state = (torch.empty(shape, device=META) for shape in ((B, T, D), (D, 4), (D,), (N, D, 3)))
    parts = [ConvInputs(x, weight, bias, True, state, cu_seqlens, None)] * count
    ys, final_states = zip(*causal_conv1d.forward(parts), strict=True)
    causal_conv1d.backward(ys, final_states, parts)
    causal_conv1d.update(parts, None)


GDN2 = {"prepare_kernel", "scan_kernel", "reverse_kernel", "gradient_kernel", "recurrent_kernel"}
CUT = {"segment_kernel", "fold_kernel"}
CONV = {f"causal_conv1d_{name}_kernel" for name in ("forward", "backward", "sum", "update")}
CASES = {
    "65,600 sequences times heads": (lambda: run_gdn2(4100, 64, 16, 16), GDN2 | CUT),
    "65,600 by grouped value heads": (lambda: run_gdn2(2050, 1, 4, 32), GDN2 | CUT),
    "65,600 key heads": (lambda: run_gdn2(1, 64, 65_600, 65_600), GDN2 | CUT),
    "2,050 packed documents of 32 heads": (lambda: run_gdn2(1, 2050 * 9, 32, 32, packed([9] * 2050)), GDN2),
    "16M tokens": (lambda: run_gdn2(1, 1 << 24, 16, 16), GDN2 | CUT),
    "16M tokens through convolutions": (lambda: run_conv(1, 1 << 24, 8192), CONV),
    "4M channels": (lambda: run_conv(1, 64, 1 << 22), CONV),
    "4M channels of q, k and v each": (lambda: run_conv(1, 64, 1 << 22, count=3), CONV),
    "70,000 packed documents": (lambda: run_conv(1, 140_000, 4096, packed([2] * 70_000)), CONV),
}


@pytest.mark.parametrize("arch", [80, 90, 100, 120, "gfx942"])
@pytest.mark.parametrize("case", CASES)
def test_every_launch_is_a_grid_of_one_axis_that_a_gpu_accepts(case, arch, monkeypatch):
    grids = {}

    def record(kernel, grid, candidates, args, constants):
        grids.setdefault(kernel.__name__, []).extend(grid(constants | candidate) for candidate in candidates)

    monkeypatch.setattr(launching, "launch", record)
    monkeypatch.setattr(chunk.target, "arch", lambda x: arch)
    run, kernels = CASES[case]
    run()
    assert grids.keys() == kernels
    for name, grid in ((name, grid) for name, found in grids.items() for grid in found):
        assert len(grid) == 1 and 0 < grid[0] <= MOST, f"{name} has the grid {grid}"
