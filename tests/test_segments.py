"""A segment as a map of the state: the operator, and segment_summary."""

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.ops import segment_summary
from gdn2_titan.ops.gdn2.flops import forward_flops
from tests.gdn2_cases import (
    DECAYS,
    RAW,
    assert_close,
    assert_within_twice,
    cases,
    cast,
    cotangents,
    examples,
    golden,
    make,
    run,
)  # fmt: skip
from tests.segment_cases import applied, read_by_hand, segment_arguments

segment_gdn2 = torch.ops.gdn2_titan.segment_gdn2
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def through_the_map(**inputs):
    """What ``chunk_gdn2`` returns, by the map of the whole sequence."""
    del inputs["output_final_state"]
    o, P, M, D = segment_gdn2(*segment_arguments(inputs))
    S = inputs["initial_state"].to(D.dtype)
    return (o + read_by_hand(P, S)).to(o.dtype), applied(M, S) + D


@examples(12, 50)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_state_sent_through_the_map_is_what_the_definition_says_with_all_gradients(dtype, count):
    # As in test_gdn2_op: where a gradient is a sum that cancels, rounding is measured by the largest tensor.
    floor = 32 * torch.finfo(dtype).eps

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(case=cases(longest=140))
    def check(case):
        inputs = make(**case | {"cu": None, "state": True}, dtype=dtype)
        grads = cotangents(inputs)
        assert_close(run(through_the_map, inputs, grads), golden(inputs, grads), BOUNDS[dtype], floor)

    check()


@pytest.mark.parametrize("decay", DECAYS)
def test_the_map_is_exact_to_rounding_for_every_strength_of_decay(decay):
    inputs = make(B=2, T=150, H=2, groups=2, K=16, V=8, decay=decay, dtype=torch.float32)
    grads = cotangents(inputs)
    assert_close(run(through_the_map, inputs, grads), golden(inputs, grads), 1e-5, 1e-6)


def test_bf16_errs_at_most_twice_what_rounding_the_inputs_alone_does():
    exact = make(B=2, T=200, H=2, groups=2, K=32, V=32, **RAW)
    rounded = cast(exact, torch.bfloat16, only=("q", "k", "v", "g", "b", "w"))
    grads = cotangents(exact)
    inputs = cast(rounded, torch.float32, only=("A_log", "dt_bias", "initial_state"))
    assert_within_twice(
        run(through_the_map, inputs, grads), golden(exact, grads), golden(rounded, grads), torch.bfloat16
    )


@pytest.mark.parametrize("options", [{}, RAW, dict(resets=[0, 0, 1, 0, 0])], ids=["plain", "raw", "resets"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_operator_passes_opcheck(options, dtype):
    inputs = make(T=5, K=2, V=3, groups=2, dtype=dtype, **options)
    torch.library.opcheck(segment_gdn2, segment_arguments(inputs))


def test_two_maps_in_a_row_are_the_map_of_both_and_gradients_flow_through_either():
    inputs = make(B=2, T=150, H=2, groups=2, K=8, V=5)
    tensors = {name: inputs[name] for name in ("k", "v", "g", "b", "w")}

    def part(span):
        return segment_summary(**{name: x[:, span] for name, x in tensors.items()})

    (M1, D1), (M2, D2), whole = part(slice(0, 70)), part(slice(70, None)), part(slice(None))
    joined = M2 @ M1, applied(M2, D1) + D2
    grads = [torch.randn(x.shape, dtype=x.dtype) for x in whole]
    for a, b in zip(joined, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    got, want = (torch.autograd.grad(x, list(tensors.values()), grads) for x in (joined, whole))
    for name, a, b in zip(tensors, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_after_a_reset_nothing_is_left_of_the_entering_state():
    inputs = make(B=2, T=150, H=2, K=8, V=8, decay="none")
    resets = torch.zeros(2, 150, dtype=torch.bool)
    resets[0, 90] = True
    _, P, M, _ = segment_gdn2(*segment_arguments(inputs | {"resets": resets}))
    assert (M[0] == 0).all() and (P[0, 90:] == 0).all()
    assert (M[1] != 0).any() and (P[0, 89] != 0).any()


def test_flops_are_those_of_the_forward_with_k_more_value_columns():
    inputs = make(B=2, T=128, H=2, groups=3, K=8, V=4)
    with FlopCounterMode(display=False) as counter:
        segment_gdn2(*segment_arguments(inputs))
    assert counter.get_total_flops() == forward_flops(2 * 128, 2, 8, 3 * 4 + 8)


def test_autocast_changes_nothing():
    inputs = make(T=70, K=8, V=8, dtype=torch.float32)
    tensors = [inputs[name] for name in ("k", "v", "g", "b", "w")]
    want = segment_summary(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        got = segment_summary(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_differentiating_twice_raises():
    inputs = make(T=5)
    M, _ = segment_summary(*(inputs[name] for name in ("k", "v", "g", "b", "w")))
    (dk,) = torch.autograd.grad(M.sum(), inputs["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dk.sum().backward()


def test_segment_summary_refuses_what_the_op_refuses():
    inputs = make(T=5)
    k, v, g, b, w = (inputs[name] for name in ("k", "v", "g", "b", "w"))
    with pytest.raises(ValueError, match=r"w has shape .* it must be v's shape"):
        segment_summary(k, v, g, b, w[:, :4])
    with pytest.raises(ValueError, match="backend is 'reference'; it must be one of 'auto', 'triton', 'torch'"):
        segment_summary(k, v, g, b, w, backend="reference")
