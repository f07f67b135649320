"""Calls without a token, B = 0 or T = 0: results of no tokens, and states as they were."""

import functools

import pytest
import torch

from gdn2_titan.ops import causal_conv1d, chunk_gdn2, recurrent_gdn2, recurrent_gdn2_, segment_summary
from tests.gdn2_cases import DEVICE, RAW, leaves, make, on_device, op_arguments

BACKENDS = ("reference", "torch", "triton")
SIZES = ((0, 5), (2, 0), (0, 0))
sizes = pytest.mark.parametrize("B, T", SIZES)
OPS = {
    "chunk": chunk_gdn2,
    "recurrent": recurrent_gdn2,
    "two segments": functools.partial(chunk_gdn2, num_segments=2),
}


def without_tokens(B, T, **options):
    return on_device(make(B=B, T=T, H=2, groups=2, K=4, V=3, dtype=torch.float32, **options))


@sizes
@pytest.mark.parametrize("options", [dict(), RAW, dict(state=False)], ids=["plain", "raw", "no state"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_the_state_passes_through_forward_and_backward(op, backend, options, B, T):
    inputs = without_tokens(B, T, **options)
    o, final_state = OPS[op](**inputs, output_final_state=True, backend=backend)
    assert o.shape == (B, T, 4, 3) and o.dtype == torch.float32
    initial_state = inputs.get("initial_state", torch.zeros(B, 4, 4, 3, device=DEVICE))
    assert torch.equal(final_state, initial_state)
    if B:
        assert final_state.data_ptr() != initial_state.data_ptr()
    dfinal = torch.randn_like(final_state)
    given = leaves(inputs)
    grads = dict(zip(given, torch.autograd.grad([o, final_state], list(given.values()), [torch.ones_like(o), dfinal],
                                                materialize_grads=True), strict=True))  # fmt: skip
    for name, x in given.items():
        assert torch.equal(grads[name], dfinal if name == "initial_state" else torch.zeros_like(x)), name


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["chunk", "recurrent"])
def test_packed_sequences_that_are_all_empty_keep_their_states(op, backend, state):
    inputs = without_tokens(1, 0, cu=[0, 0, 0], state=state)
    o, final_state = OPS[op](**inputs, output_final_state=True, backend=backend)
    assert o.shape == (1, 0, 4, 3)
    assert torch.equal(final_state, inputs["initial_state"] if state else torch.zeros(2, 4, 4, 3, device=DEVICE))
    inputs["cu_seqlens"] = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 1\]"):
        OPS[op](**inputs | {"initial_state": None}, backend=backend)


@sizes
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_in_place_leaves_the_state_as_it_is(backend, B, T):
    inputs = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in without_tokens(B, T, **RAW).items()}
    state = inputs.pop("initial_state")
    before = state.clone()
    assert recurrent_gdn2_(**inputs, state=state, backend=backend).shape == (B, T, 4, 3)
    assert torch.equal(state, before)


@sizes
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_segment_is_the_identity_with_gradients_of_zero(backend, B, T):
    inputs = without_tokens(B, T, gate=True, state=False)
    given = {name: inputs[name] for name in ("k", "v", "g", "b", "w", "A_log", "dt_bias")}
    M, D = segment_summary(**given, use_gate_in_kernel=True, backend=backend)
    assert torch.equal(M, torch.eye(4, device=DEVICE).expand(B, 2, 4, 4)) and M.is_contiguous()
    assert torch.equal(D, torch.zeros(B, 4, 4, 3, device=DEVICE))
    for x, grad in zip(given.values(), torch.autograd.grad([M.sum(), D.sum()], list(given.values())), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def conv_arguments(B, T, N):
    shapes = {"x": (B, T, 6), "weight": (6, 4), "bias": (6,), "initial_state": (N, 6, 3)}
    return {name: torch.randn(shape, device=DEVICE).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("B, T, cu", [(*size, None) for size in SIZES] + [(1, 0, [0, 0, 0])])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_convolutions_state_passes_through_forward_and_backward(backend, activation, resets, B, T, cu):
    inputs = conv_arguments(B, T, B if cu is None else len(cu) - 1)
    options = dict(activation=activation, backend=backend, output_final_state=True)
    options["cu_seqlens"] = None if cu is None else torch.tensor(cu, device=DEVICE)
    options["resets"] = torch.zeros(B, T, dtype=torch.bool, device=DEVICE) if resets else None
    y, final_state = causal_conv1d(**inputs, **options)
    assert y.shape == (B, T, 6) and torch.equal(final_state, inputs["initial_state"])
    dfinal = torch.randn_like(final_state)
    grads = torch.autograd.grad([y, final_state], list(inputs.values()), [torch.ones_like(y), dfinal])
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        assert torch.equal(grad, dfinal if name == "initial_state" else torch.zeros_like(x)), name
    _, zeros = causal_conv1d(**inputs | {"initial_state": None}, **options)
    assert torch.equal(zeros, torch.zeros_like(final_state))


@pytest.mark.parametrize("B, T", SIZES[:2])
def test_the_operators_pass_opcheck(B, T):
    inputs = make(B=B, T=T, H=2, K=4, V=3, dtype=torch.float32, **RAW)
    torch.library.opcheck(torch.ops.gdn2_titan.chunk_gdn2, op_arguments(inputs))
    conv = conv_arguments(B, T, B)
    x, weight, bias, state = conv.values()
    torch.library.opcheck(torch.ops.gdn2_titan.causal_conv1d, (x, weight, bias, True, state, None, None))


@pytest.mark.slow
def test_a_compiled_call_with_dynamic_shapes_takes_them_too():
    torch._dynamo.reset()

    def loss(q, v, x, weight):
        o, state = chunk_gdn2(q, q, v, q, q, v, output_final_state=True)
        y, tail = causal_conv1d(x, weight, output_final_state=True)
        return o.sum() + state.sum() + y.sum() + tail.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(6, 4, requires_grad=True)
    for B, T in ((2, 5), *SIZES[:2]):
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((B, T, 2, 4), (B, T, 2, 3), (B, T, 6))]
        got, want = (torch.autograd.grad(f(*leaves, weight), [*leaves, weight]) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


def test_heads_of_none_or_of_no_size_are_refused_still():
    inputs = make(B=1, T=2, H=2, K=4, V=3)
    nothing = {name: inputs[name][..., :0] for name in ("q", "k", "g", "b")}
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 2, 0\); H and K of \[B, T, H, K\] must be at least 1"):
        chunk_gdn2(**inputs | nothing | {"initial_state": None})
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 0\); it must be \[B, T, D\], D at least 1"):
        causal_conv1d(torch.zeros(1, 2, 0), torch.zeros(0, 4))
