"""The states between segments, and sequences cut in segments, by Triton's kernels: in its interpreter where there is no
GPU, else on it."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from gdn2_titan.ops import chunk_gdn2
from gdn2_titan.ops.gdn2.triton.fold import fold
from tests.fold_cases import folded_by_hand, maps
from tests.gdn2_cases import (
    DEVICE,
    RAW,
    assert_norms_close,
    cotangents,
    golden,
    make,
    on_device,
    random_resets,
    run_on_device,
    slowly,
)
from tests.kernel_launches import fenced, memory_of_nan

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
FP32 = torch.float32


def assert_folds(given, transposed):
    found = fold(*(None if x is None else x.to(DEVICE) for x in given), transposed)
    got = dict(zip(("entered", "left"), (x.cpu() for x in found), strict=True))
    assert_norms_close(got, folded_by_hand(*given, transposed), 1e-6)


SIZES = {
    "odd sizes, grouped heads, batch": dict(),
    "without a state": dict(state=False),
    "a state alone": dict(D=False),
    "one segment": dict(count=1),
    "the least": dict(B=1, H=1, groups=1, K=1, V=1),
    "heads of 128": dict(B=1, H=1, groups=1, K=128, V=16),
    "a state in parts": dict(B=1, H=1, groups=2, K=130, V=5),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", SIZES)
def test_states_between_segments_are_exact_to_rounding(case, transposed):
    assert_folds(maps(**SIZES[case]), transposed)


def test_the_memory_layout_of_maps_does_not_matter():
    M, D, state = maps()
    laid = M.mT.contiguous().mT, D.transpose(0, 2).contiguous().transpose(0, 2), state.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in laid)
    assert_folds(laid, False)


def test_no_kernel_reads_or_writes_outside_its_tensors(monkeypatch):
    launched = fenced(monkeypatch)
    for transposed, options in ((True, {}), (False, dict(state=False)), (False, dict(D=False))):
        assert_folds(maps(K=5, V=3, **options), transposed)
    assert launched == {"fold_kernel"}


def small(**options):
    return make(**dict(T=100, H=1, K=8, V=8, dtype=FP32) | options)


def assert_cut_is_exact(inputs, count, through=("o", "final_state")):
    grads = cotangents(inputs)
    got = run_on_device(functools.partial(chunk_gdn2, num_segments=count), inputs, grads, through=through)
    assert_norms_close(got, golden(inputs, grads, through), 1e-5)


CUT = {
    "three segments": (dict(T=99), 3, ("o", "final_state")),
    "no state": (dict(T=90, state=False), 3, ("o",)),
    "batch, documents, logits, the rest by itself": (
        dict(B=2, T=150, groups=2, K=5, V=3, **RAW, resets=random_resets(2, 150, every=90)), 2, ("o", "final_state")
    ),
}  # fmt: skip
RARE_CUT = {"a loss on the state alone": (dict(T=66), 2, ("final_state",))}


@pytest.mark.parametrize("case", [*CUT, *slowly(*RARE_CUT)])
def test_a_sequence_cut_in_segments_is_exact_to_rounding_in_values_and_all_gradients(case):
    options, count, through = (CUT | RARE_CUT)[case]
    assert_cut_is_exact(small(**options), count, through)


def test_no_result_depends_on_what_fresh_memory_holds():
    with memory_of_nan():
        assert_cut_is_exact(small(T=80, K=5, V=3, state=False, sigmoid=True), 2, ("o",))


class _Products(TorchDispatchMode):
    """The dtypes of what PyTorch multiplies, inside the package's operators too."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            if func.namespace == "gdn2_titan":  # into its body
                key = torch._C.DispatchKey.CUDA if DEVICE == "cuda" else torch._C.DispatchKey.CPU
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs or {})
        if func.overloadpacket.__name__ in ("matmul", "mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"):
            self.dtypes |= {x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        return func(*args, **kwargs or {})


def test_pytorch_multiplies_nothing_in_fp32_where_segments_are_joined():
    """It would do so without tensor cores."""
    inputs = on_device({n: x.bfloat16().detach().requires_grad_() if n in ("q", "k", "v") else x
                        for n, x in small(T=64, K=16, V=16).items()})  # fmt: skip
    with _Products() as products:
        o, state = chunk_gdn2(**inputs, output_final_state=True, backend="triton", num_segments=2)
        (o.float().sum() + state.sum()).backward()
    assert products.dtypes == {torch.bfloat16}
