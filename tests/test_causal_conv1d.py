"""causal_conv1d against a convolution written token by token in fp64, and as a citizen of PyTorch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.ops.short_conv import windowed as windowed_conv1d
from gdn2_titan.ops.short_conv.api import causal_conv1d
from tests.gdn2_cases import examples, slowly

from .conv_cases import (
    BACKWARD,
    FORWARD,
    VARIANTS,
    assert_close,
    gradients,
    leaves,
    make,
    op_arguments,
    output_gradients,
    permuted,
    run_both,
    variant_inputs,
)


@st.composite
def cases(draw):
    packed = draw(st.booleans())
    B = 1 if packed else draw(st.integers(1, 3))
    T = draw(st.integers(1, 9))
    cu = None
    if packed:
        cu = [0, *sorted(draw(st.lists(st.integers(0, T), max_size=4))), T]
    resets = draw(st.none() | st.lists(st.booleans(), min_size=B * T, max_size=B * T))
    return {
        "B": B,
        "T": T,
        "D": draw(st.sampled_from([1, 2, 5])),
        "W": draw(st.integers(2, 4)),
        "bias": draw(st.booleans()),
        "state": draw(st.booleans()),
        "cu": cu,
        "resets": resets,
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 1000)),
    }


@examples(100, 600)
def test_values_and_all_gradients_equal_the_oracle_for_any_combination_of_options(count):
    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(cases(), st.sampled_from([None, "silu", "swish"]), st.sampled_from(["both", "y", "final_state"]))
    def check(case, activation, through):
        got, want = run_both(make(**case), activation, through)
        assert_close(got, want, 1e-5 if case["dtype"] == torch.float32 else 1e-13)

    check()


variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_pass_gradcheck_in_fp64(variant, silu):
    inputs = variant_inputs(variant)
    names = list(leaves(inputs))

    def function(*values):
        args = inputs | dict(zip(names, values, strict=True))
        return causal_conv1d(**args, activation="silu" if silu else None, output_final_state=True)

    assert torch.autograd.gradcheck(function, tuple(leaves(inputs).values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("variant", ["state", "resets", "packed with resets"])
def test_half_precision_errs_at_most_twice_what_rounding_the_outputs_does(variant, activation, dtype):
    inputs = variant_inputs(variant, D=32, dtype=dtype)
    got, want = run_both(inputs, activation)
    for name, exact in want.items():
        assert got[name].dtype == dtype, name
        rounding = (exact.to(dtype).double() - exact).abs().max()
        assert (got[name].double() - exact).abs().max() <= 2 * rounding, name


def test_weight_and_bias_may_have_another_dtype_and_gradients_keep_each_input_s_own():
    inputs = make(dtype=torch.bfloat16)
    for name in ("weight", "bias"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    y, final_state = causal_conv1d(**inputs, output_final_state=True)
    assert y.dtype == final_state.dtype == torch.bfloat16
    dtypes = {name: grad.dtype for name, grad in gradients(inputs, [y, final_state], [y, final_state]).items()}
    bfloat16, float32 = torch.bfloat16, torch.float32
    assert dtypes == {"x": bfloat16, "weight": float32, "bias": float32, "initial_state": bfloat16}
    got, want = run_both(inputs, "silu")
    assert_close({name: got[name] for name in ("dweight", "dbias")}, {n: want[n] for n in ("dweight", "dbias")}, 1e-5)


def test_final_state_is_none_unless_asked_for_and_y_is_the_same():
    inputs = make()
    y, none = causal_conv1d(**inputs)
    assert none is None
    assert torch.equal(y, causal_conv1d(**inputs, output_final_state=True)[0])


def test_what_a_reset_hides_never_shows_through_even_as_nan():
    inputs = make(B=1, T=6, W=4, resets=[True, False, False, True, False, False])
    with torch.no_grad():
        inputs["initial_state"].fill_(float("nan"))
    y, final_state = causal_conv1d(**inputs, activation="silu", output_final_state=True)
    grads = gradients(inputs, [y, final_state], output_gradients(y, final_state))
    assert all(torch.isfinite(tensor).all() for tensor in (y, final_state, *grads.values()))
    assert not grads["initial_state"].any()

    with torch.no_grad():
        inputs["x"][:, :3] = float("nan")
    y, final_state = causal_conv1d(**inputs, activation="silu", output_final_state=True)
    assert torch.isfinite(y[:, 3:]).all() and torch.isfinite(final_state).all()


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
@pytest.mark.parametrize("with_resets", [False, True])
def test_a_sequence_split_in_two_with_the_state_handed_on_equals_the_whole(cut, with_resets):
    T = 9
    resets = [t in (1, 5, 9, 16) for t in range(2 * T)] if with_resets else None
    inputs = make(T=T, resets=resets)
    whole = causal_conv1d(**inputs, activation="silu", output_final_state=True)

    x, flags = inputs["x"], inputs["resets"]
    shared = dict(weight=inputs["weight"], bias=inputs["bias"], activation="silu", output_final_state=True)
    head, tail = (None, None) if flags is None else (flags[:, :cut], flags[:, cut:])
    y1, middle = causal_conv1d(x[:, :cut], initial_state=inputs["initial_state"], resets=head, **shared)
    y2, final_state = causal_conv1d(x[:, cut:], initial_state=middle, resets=tail, **shared)
    parts = torch.cat([y1, y2], 1), final_state

    out_grads = output_gradients(*whole)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        gradients(inputs, parts, out_grads), gradients(inputs, whole, out_grads), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_the_same_sequences_run_one_by_one(index_dtype):
    bounds = [0, 4, 4, 5, 11]
    inputs = make(B=1, T=11, cu=bounds, resets=[t in (2, 5, 8) for t in range(11)])
    inputs["cu_seqlens"] = inputs["cu_seqlens"].to(index_dtype)
    packed = causal_conv1d(**inputs, activation="silu", output_final_state=True)
    ys, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = inputs["initial_state"][n : n + 1]
        if start == end:
            states.append(state)
            continue
        y, final_state = causal_conv1d(
            inputs["x"][:, start:end], inputs["weight"], inputs["bias"], "silu", state, True,
            resets=inputs["resets"][:, start:end],
        )  # fmt: skip
        ys.append(y)
        states.append(final_state)
    separate = torch.cat(ys, 1), torch.cat(states)
    out_grads = output_gradients(*packed)
    torch.testing.assert_close(packed, separate, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        gradients(inputs, packed, out_grads), gradients(inputs, separate, out_grads), rtol=1e-12, atol=1e-12
    )


given_inputs = pytest.mark.parametrize(
    "bias, state", [(True, True), (False, False), *slowly((True, False), (False, True))]
)


@given_inputs
@pytest.mark.parametrize("variant", ["state", "resets", "packed", "packed with resets"])
def test_forward_op_passes_opcheck_for_absent_and_present_inputs(variant, bias, state):
    torch.library.opcheck(FORWARD, op_arguments(variant_inputs(variant, bias=bias, state=state)))


@given_inputs
@pytest.mark.parametrize("through", ["both", "y", "final_state"])
@pytest.mark.parametrize("variant", ["state", "packed with resets"])
def test_backward_op_passes_opcheck_for_absent_and_present_inputs(variant, through, bias, state):
    args = op_arguments(variant_inputs(variant, bias=bias, state=state))
    args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
    dy, dfinal_state = output_gradients(*FORWARD(*args))
    dy = None if through == "final_state" else dy
    dfinal_state = None if through == "y" else dfinal_state
    torch.library.opcheck(BACKWARD, (dy, dfinal_state, *args))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("variant", ["state", "packed with resets"])
def test_both_ops_pass_opcheck_in_a_permuted_dense_layout(variant, silu):
    inputs = variant_inputs(variant)
    inputs |= {name: permuted(inputs[name]) for name in ("x", "weight", "initial_state")}
    if inputs["resets"] is not None:
        inputs["resets"] = permuted(inputs["resets"])
    args = op_arguments(inputs, silu)
    torch.library.opcheck(FORWARD, args)
    args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
    out_grads = [permuted(grad) for grad in output_gradients(*FORWARD(*args))]
    torch.library.opcheck(BACKWARD, (*out_grads, *args))


def test_both_ops_pass_opcheck_with_a_weight_and_bias_of_other_dtypes_than_x():
    inputs = make(dtype=torch.bfloat16)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    inputs["bias"] = inputs["bias"].detach().double().requires_grad_()
    args = op_arguments(inputs)
    torch.library.opcheck(FORWARD, args)
    args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
    torch.library.opcheck(BACKWARD, (*output_gradients(*FORWARD(*args)), *args))


@pytest.mark.parametrize("through", [0, 1])
def test_an_output_nobody_used_costs_no_gradient_of_zeros(through):
    received = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is BACKWARD.default:
                received.append([grad is not None for grad in args[:2]])
            return func(*args, **(kwargs or {}))

    output = causal_conv1d(**make(), output_final_state=True)[through]
    with Spy():
        output.sum().backward()
    assert received == [[through == 0, through == 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T", [1, 2, 6])
@pytest.mark.parametrize("B, D, W", [(1, 1, 2), (2, 1, 2), (2, 3, 4)])
def test_outputs_are_contiguous_and_share_no_memory(B, D, W, T, dtype):
    inputs = make(B=B, T=T, D=D, W=W, dtype=dtype)
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in op_arguments(inputs, silu=False)]
    outs = FORWARD(*args)
    for results, given_args in ((outs, args), (BACKWARD(*outs, *args), [*outs, *args])):
        tensors = [*results, *(arg for arg in given_args if isinstance(arg, torch.Tensor))]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
        for tensor in results:
            assert tensor.stride() == torch.empty(tensor.shape).stride()


def compiled_inputs(options, B, T):
    cu, resets = None, None
    if "cu" in options:
        B, cu = 1, [0, 1, 1, T]
    if "resets" in options:
        resets = [t % 3 == 1 for t in range(B * T)]
    full = "state" in options
    return make(B=B, T=T, cu=cu, resets=resets, bias=full, state=full, dtype=torch.float32, seed=T)


@pytest.mark.parametrize("options", [(), ("state",), ("resets",), ("state", "cu", "resets")], ids="+".join)
@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2)])
def test_compiles_without_graph_breaks_and_not_again_when_the_length_changes(options, dynamic, graphs):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def function(inputs):
        return causal_conv1d(**inputs, activation="silu", output_final_state=True)

    for T in (5, 8, 13, 21):
        inputs = compiled_inputs(options, 2, T)
        got = function(inputs)
        want = causal_conv1d(**inputs, activation="silu", output_final_state=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        out_grads = output_gradients(*want)
        eager = gradients(inputs, want, out_grads)
        for name, grad in gradients(inputs, got, out_grads).items():
            assert torch.equal(grad, eager[name]), name
    assert counter.frame_count == graphs


def test_eager_and_compiled_agree_under_autocast_and_match_running_without_it():
    inputs = make(dtype=torch.float32)

    def function():
        y, final_state = causal_conv1d(**inputs, activation="silu", output_final_state=True)
        return y, final_state, *torch.autograd.grad([y, final_state], [inputs["x"], inputs["weight"]], [y, final_state])

    def forward():
        return causal_conv1d(**inputs, activation="silu", output_final_state=True)

    plain = function()
    with torch.autocast("cpu", torch.bfloat16):
        eager = function()
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")()
    for got, want in ((eager, plain), (compiled, plain[:2])):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_is_off_inside_both_op_bodies(monkeypatch):
    # On a CPU nothing in the bodies is of a kind that autocast changes; on other devices some operators are.
    seen = []
    layout = windowed_conv1d._layout
    monkeypatch.setattr(
        windowed_conv1d, "_layout", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or layout(*args)
    )
    with torch.autocast("cpu", torch.bfloat16):
        causal_conv1d(**make())[0].sum().backward()
    assert seen == [False, False]


@pytest.mark.parametrize("options", [("state",), ("state", "resets")], ids="+".join)
def test_exports_with_dynamic_batch_and_length(options):
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias, initial_state, resets):
            return causal_conv1d(x, weight, bias, "silu", initial_state, True, None, resets)

    def args(B, T):
        inputs = compiled_inputs(options, B, T)
        return tuple(inputs[name] for name in ("x", "weight", "bias", "initial_state", "resets"))

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    resets = {0: batch, 1: length} if "resets" in options else None
    shapes = {"x": {0: batch, 1: length}, "weight": None, "bias": None, "initial_state": {0: batch}, "resets": resets}
    module = torch.export.export(Module(), args(3, 7), dynamic_shapes=shapes).module()
    for B, T in ((3, 7), (2, 11), (5, 4)):
        got, want = module(*args(B, T)), Module()(*args(B, T))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_flop_counter_counts_forward_and_backward():
    B, T, D, W = 2, 7, 3, 4
    inputs = make(B=B, T=T, D=D, W=W)
    with FlopCounterMode(display=False) as counter:
        y, _ = causal_conv1d(**inputs, activation="silu")
    assert counter.get_total_flops() == 2 * B * T * D * W
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), inputs["x"])
    assert counter.get_total_flops() == 4 * B * T * D * W


def test_differentiating_twice_raises_rather_than_dropping_terms():
    inputs = make()
    y, _ = causal_conv1d(**inputs, activation="silu")
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d cannot be differentiated twice"):
        torch.autograd.grad(dx.sum(), inputs["x"])


def changed(**changes):
    return lambda: causal_conv1d(**({"x": torch.zeros(1, 4, 3), "weight": torch.zeros(3, 4)} | changes))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (changed(x=[1.0]), TypeError, "x is a list"),
        (changed(weight=None), TypeError, "weight is a NoneType"),
        (changed(resets=[True]), TypeError, "resets is a list"),
        (changed(x=torch.zeros(1, 4, 3, dtype=torch.int64)), TypeError, "x has dtype torch.int64"),
        (changed(bias=torch.zeros(3, dtype=torch.complex64)), TypeError, "bias has dtype torch.complex64"),
        (changed(weight=torch.zeros(3, 4, device="meta")), ValueError, "weight is on meta"),
        (changed(activation="relu"), ValueError, "activation is 'relu'"),
        (changed(activation=["silu"]), ValueError, "activation is "),
        (changed(x=torch.zeros(4, 3)), ValueError, "x has shape (4, 3)"),
        (changed(x=torch.zeros(1, 4, 0)), ValueError, "x has shape (1, 4, 0)"),
        (changed(weight=torch.zeros(3, 5)), ValueError, "weight has shape (3, 5)"),
        (changed(weight=torch.zeros(3, 1)), ValueError, "weight has shape (3, 1)"),
        (changed(weight=torch.zeros(4, 4)), ValueError, "weight has shape (4, 4)"),
        (changed(weight=torch.zeros(3, 1, 4)), ValueError, "weight has shape (3, 1, 4)"),
        (changed(bias=torch.zeros(4)), ValueError, "bias has shape (4,)"),
        (changed(initial_state=torch.zeros(1, 3, 4)), ValueError, "initial_state has shape (1, 3, 4)"),
        (changed(initial_state=torch.zeros(2, 3, 3)), ValueError, "initial_state has shape (2, 3, 3)"),
        (changed(initial_state=torch.zeros(1, 3, 3).half()), TypeError, "initial_state has dtype torch.float16"),
        (changed(resets=torch.zeros(1, 4)), TypeError, "resets has dtype torch.float32"),
        (changed(resets=torch.zeros(4, dtype=torch.bool)), ValueError, "resets has shape (4,)"),
        (changed(cu_seqlens=torch.tensor([0.0, 4.0])), TypeError, "cu_seqlens has dtype torch.float32"),
        (changed(cu_seqlens=torch.tensor([4])), ValueError, "cu_seqlens has shape (1,)"),
        (changed(cu_seqlens=torch.tensor([0, 4]), x=torch.zeros(2, 4, 3)), ValueError, "x has batch size 2"),
        (changed(cu_seqlens=torch.tensor([1, 4])), ValueError, "cu_seqlens is [1, 4]"),
        (changed(cu_seqlens=torch.tensor([0, 3, 2, 4])), ValueError, "cu_seqlens is [0, 3, 2, 4]"),
        (changed(cu_seqlens=torch.tensor([0, 3])), ValueError, "cu_seqlens is [0, 3]"),
        (changed(cu_seqlens=torch.tensor([0, 5])), ValueError, "cu_seqlens is [0, 5]"),
    ],
)
def test_refusals_name_the_argument_what_came_and_what_is_allowed(call, error, message):
    with pytest.raises(error) as refusal:
        call()
    assert str(refusal.value).startswith(message)
    assert "; it must " in str(refusal.value) or "; with cu_seqlens it must" in str(refusal.value)
