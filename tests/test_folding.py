"""The operator that exchanges of maps call, by PyTorch's kernels; tests/test_triton_fold.py has Triton's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.ops.gdn2.folding import advance, fold_maps
from tests.fold_cases import folded_by_hand, maps

FOLD = torch.ops.gdn2_titan.fold_maps
CASES = {
    "all": dict(),
    "without a state": dict(state=False),
    "a state alone": dict(D=False),
    "one segment": dict(count=1),
}


def in_fp64(**options):
    return [None if x is None else x.double() for x in maps(**options)]


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_states_between_segments_are_those_of_one_product_after_the_other(case, transposed):
    given = in_fp64(**CASES[case])
    entered, left = fold_maps(*given, "auto", transposed)
    want = folded_by_hand(*given, transposed)
    torch.testing.assert_close(entered, want["entered"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left, want["left"], rtol=1e-12, atol=1e-12)


def test_two_maps_in_a_row_are_one():
    M, D, state = in_fp64(count=2, K=5, V=3)
    whole = advance(M[:, 1], M[:, 0], None, "auto"), advance(M[:, 1], D[:, 0], D[:, 1], "auto")
    torch.testing.assert_close(advance(whole[0], state, whole[1], "auto"), fold_maps(M, D, state, "auto")[1])


@pytest.mark.parametrize("case", CASES)
def test_the_operator_passes_opcheck(case):
    for transposed in (False, True):
        torch.library.opcheck(FOLD.default, (*in_fp64(K=3, V=2, **CASES[case]), "auto", transposed))


def test_flops_are_those_of_the_products():
    with FlopCounterMode(display=False) as counter:
        fold_maps(*in_fp64(B=2, count=3, H=2, groups=2, K=5, V=3), "auto")
    assert counter.get_total_flops() == 2 * (2 * 3 * 4) * 5 * 5 * 3


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="the state (is on cpu|has dtype).*, use backend='torch'"):
        fold_maps(*in_fp64(), "triton")
