"""Bounded decays: lower_bound * sigmoid(exp(A_log) * (g + dt_bias)), in every backend, by the formula in fp64."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdn2_titan.ops import chunk_gdn2, naive_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_, segment_summary
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.gates import activate, activate_backward
from tests.gdn2_cases import (
    DEVICE,
    assert_close,
    assert_within_twice,
    cast,
    collect,
    cotangents,
    in_half,
    leaves,
    make,
    on_device,
    run,
    run_on_device,
    slowly,
)  # fmt: skip
from tests.segment_cases import segment_by_definition, without_gradients

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LARGEST = torch.finfo(FP32).max
BOUND = -5.0

BACKENDS = {
    "reference": functools.partial(chunk_gdn2, backend="reference"),
    "chunk": functools.partial(chunk_gdn2, backend="torch"),
    "recurrent": functools.partial(recurrent_gdn2, backend="torch"),
    "segments": functools.partial(chunk_gdn2, backend="torch", num_segments=2),
}
TRITON = {
    "chunk": chunk_gdn2,
    "recurrent": recurrent_gdn2,
    "segments": functools.partial(chunk_gdn2, num_segments=2),
}


def bounded(A_log=True, **sizes):
    """Arguments of the op in fp64, with decays of all strengths below the bound."""
    inputs = make(gate=True, sigmoid=True, l2norm=True, lower_bound=BOUND, **sizes)
    inputs["g"] = (inputs["g"].detach() + 2).requires_grad_()
    return inputs if A_log else inputs | {"A_log": None}


def decay_by_formula(inputs):
    """fp64, with autograd."""
    x = inputs["g"]
    if inputs.get("dt_bias") is not None:
        x = x + inputs["dt_bias"].reshape(x.shape[2:])
    if inputs["A_log"] is not None:
        x = x * inputs["A_log"][:, None].exp()
    return inputs["lower_bound"] * torch.sigmoid(x)


def definition(inputs, output_grads):
    """Outputs and gradients of the recurrence in fp64, which is given the decays."""
    exact = cast(inputs, FP64)
    plain = {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "lower_bound": None}
    outputs = naive_recurrent_gdn2(**exact | {"g": decay_by_formula(exact)} | plain, output_final_state=True)
    return collect(exact, outputs, output_grads)


@pytest.mark.parametrize("A_log", [True, False], ids=["A_log", "no A_log"])
def test_the_definition_is_the_paper_s_recurrence_with_the_bounded_decay(A_log):
    inputs = bounded(A_log, T=7, H=2, groups=2) | {"scale": 1.0}
    o, final_state = naive_recurrent_gdn2(**inputs, output_final_state=True)
    A = inputs["A_log"].exp() if A_log else torch.ones(2, dtype=FP64)
    for hv in range(4):
        h, S = hv // 2, inputs["initial_state"][0, hv]
        for t in range(7):
            q, k = (x / (x.square().sum() + 1e-6).sqrt() for x in (inputs["q"][0, t, h], inputs["k"][0, t, h]))
            g = BOUND * torch.sigmoid(A[h] * (inputs["g"][0, t, h] + inputs["dt_bias"][h]))
            b, w = inputs["b"][0, t, h].sigmoid(), inputs["w"][0, t, hv].sigmoid()
            S = g.exp()[:, None] * S
            S = S + torch.outer(k, w * inputs["v"][0, t, hv] - S.T @ (b * k))
            torch.testing.assert_close(o[0, t, hv], S.T @ q)
        torch.testing.assert_close(final_state[0, hv], S)


@pytest.mark.parametrize("A_log, dt_bias", [(True, "[H, K]"), (True, None), (False, "[H * K]"), (False, None)])
@pytest.mark.parametrize("dtype, relative", [(FP64, 1e-11), (FP32, 1e-5)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_the_definition_s(backend, dtype, relative, A_log, dt_bias):
    inputs = cast(bounded(A_log, T=70, H=2, groups=2, K=5, V=3, dt_bias=dt_bias), dtype)
    output_grads = cotangents(inputs)
    assert_close(run(BACKENDS[backend], inputs, output_grads), definition(inputs, output_grads), relative)


@pytest.mark.parametrize(
    "function, A_log, dt_bias",
    [("chunk", True, "[H, K]"), ("chunk", False, None), ("recurrent", False, "[H * K]"), ("segments", True, None),
     *slowly(("chunk", True, None), ("recurrent", True, None), ("segments", False, "[H, K]"))],
)  # fmt: skip
def test_the_triton_kernels_outputs_and_gradients_are_the_definition_s(function, A_log, dt_bias):
    T = 66 if function == "chunk" else 6
    inputs = cast(bounded(A_log, T=T, H=1, groups=2, K=4, V=3, dt_bias=dt_bias), FP32)
    output_grads = cotangents(inputs)
    assert_close(run_on_device(TRITON[function], inputs, output_grads), definition(inputs, output_grads), 1e-5)


# Raw gates of the channels of a head, for A_log from -100 to 100: decays between, none, and the bound.
ENDS = (
    (-100.0, (-1e4, 1e4, 0.0, 1.0)),
    (-8.0, (-1e4, 1e4, 3.0, -3e3)),
    (0.0, (-1e4, 1e4, 0.5, -60.0)),
    (50.0, (-1e4, 1e4, -1e-21, 1e-22)),
    (100.0, (-1e4, 1e4, 1e-30, -1e-3)),
)


def at_the_ends(dtype=FP32, heads=ENDS, T=5, V=3, **options):
    inputs = cast(bounded(T=T, H=len(heads), K=4, V=V, dt_bias=None, **options), dtype)
    g = torch.tensor([gates for _, gates in heads], dtype=FP64).repeat(T, 1, 1)
    g[::3] = g[::3].roll(1, -1)
    values = {"A_log": torch.tensor([A_log for A_log, _ in heads], dtype=FP64), "g": g[None]}
    return inputs | {name: x.to(dtype).requires_grad_() for name, x in values.items()}


@pytest.mark.parametrize(
    "backend, dtype, relative",
    [*((backend, FP64, 1e-11) for backend in BACKENDS), *((backend, FP32, 5e-6) for backend in (*BACKENDS, "triton"))],
)
def test_outputs_and_gradients_are_finite_and_right_for_every_A_log_and_raw_gate(backend, dtype, relative):
    heads = ENDS[::2] if backend == "triton" else ENDS
    inputs = at_the_ends(dtype, heads)
    output_grads = cotangents(inputs)
    want = definition(inputs, output_grads)
    if backend == "triton":
        got = run_on_device(chunk_gdn2, inputs, output_grads)
    else:
        got = run(BACKENDS[backend], inputs, output_grads)
    assert_close(got, want, relative)
    for h in range(1, len(heads)):  # the slopes of the last two are far the largest, those of the first are nothing
        assert_close({"dg": got["dg"][:, :, h]}, {"dg": want["dg"][:, :, h]}, 1e-4)


@pytest.mark.parametrize(
    "backend, dtype, lower_bound",
    [*((backend, FP32, lower_bound) for backend in BACKENDS for lower_bound in (None, BOUND, -1e30)),
     *slowly(*(("triton", dtype, lower_bound) for dtype in (FP32, BF16) for lower_bound in (None, BOUND, -1e30)))],
)  # fmt: skip
def test_no_A_log_and_no_raw_gate_makes_a_number_that_is_not_finite(backend, dtype, lower_bound):
    """Raw gates of 0 too, where the derivative of a bounded one may be more than any dtype holds."""
    A_logs = (-LARGEST, -100.0, -10.0, 10.0, 88.0, 100.0, LARGEST)
    heads = [(A_log, (-1e4, -1.0, 0.0, 1e4)) for A_log in A_logs]
    inputs = at_the_ends(dtype, heads, T=3) | {"lower_bound": lower_bound}
    output_grads = cotangents(inputs)
    if backend == "triton":
        got = run_on_device(chunk_gdn2, inputs, output_grads)
    else:
        got = run(BACKENDS[backend], inputs, output_grads)
    for name, x in got.items():
        assert torch.isfinite(x).all(), name


numbers = st.sampled_from([0.0, -0.0, 60.0, -60.0, 100.0, -100.0, 1e4, -1e4, LARGEST, -LARGEST, 1e-45, 1e-30])
numbers |= st.floats(-LARGEST, LARGEST, width=32) | st.floats(-128, 128, width=32)


@given(numbers, numbers, st.none() | numbers)
def test_any_finite_gate_gives_the_decay_and_finite_derivatives(A_log, g, dt_bias):
    A_log, g = torch.tensor([A_log]), torch.tensor(g).view(1, 1, 1, 1)
    dt_bias = None if dt_bias is None else torch.tensor([[dt_bias]])
    options = GDN2Options(1.0, gate=True, lower_bound=BOUND)
    one = g.new_ones(1, 1, 1, 1)
    inputs = GDN2Inputs(one, one, one, g, one, one, A_log, dt_bias)
    x = g if dt_bias is None else g + dt_bias
    x = x.double().clamp(-LARGEST, LARGEST)
    # By its logarithm: exp(A_log) alone may be no number.
    z = x.sign() * (x.abs().clamp_min(1e-300).log() + A_log.double()).clamp(max=100).exp()
    got, want = activate(inputs, options)[3].double(), BOUND * z.sigmoid()
    assert torch.allclose(got, want, rtol=1e-5 * (1 + min(abs(A_log.item()), 100.0)), atol=1e-36)
    zero = torch.zeros_like(one)
    grads = activate_backward((zero, zero, zero, one, zero, zero), inputs, options)
    for grad in (grads.g, grads.A_log, grads.dt_bias):
        assert grad is None or torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["torch", *slowly("triton")])
def test_bf16_is_as_near_as_rounding_its_inputs_allows(backend):
    exact = bounded(T=40, K=8, V=4)
    inputs = in_half(exact, BF16, BF16)
    output_grads = cotangents(inputs)
    got = run_on_device(chunk_gdn2, inputs, output_grads, backend)
    assert_within_twice(got, definition(exact, output_grads), definition(inputs, output_grads), BF16)


@pytest.mark.parametrize("A_log", [True, False], ids=["A_log", "no A_log"])
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_step_in_place_is_the_definition_s(backend, A_log):
    inputs = cast(bounded(A_log, B=2, T=1), FP32)
    exact = definition(inputs, cotangents(inputs))
    given = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in on_device(inputs).items()}
    state = given.pop("initial_state")
    pool = torch.stack([state[1], torch.zeros_like(state[0]), state[0]])
    o = recurrent_gdn2_(**given, state=pool, state_indices=torch.tensor([2, 0], device=DEVICE), backend=backend)
    got = {"o": o.cpu(), "final_state": pool[[2, 0]].cpu()}
    assert_close(got, {name: exact[name] for name in got}, 2e-6)
    assert not pool[1].any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_segment_s_map_is_the_definition_s(backend):
    inputs = without_gradients(cast(bounded(state=False, T=20), FP32))
    exact = inputs | {"g": decay_by_formula(cast(inputs, FP64)).detach(), "A_log": None, "dt_bias": None}
    want = segment_by_definition(exact | {"lower_bound": None, "use_gate_in_kernel": False})
    names = "k", "v", "g", "b", "w", "A_log", "dt_bias", "lower_bound"
    flags = dict(use_gate_in_kernel=True, use_sigmoid_in_kernel=True, use_qk_l2norm_in_kernel=True, backend=backend)
    M, D = segment_summary(**{name: on_device(inputs)[name] for name in names}, **flags)
    got = {"transition": M.detach().cpu(), "contribution": D.detach().cpu()}
    assert_close(got, {name: want[name] for name in got}, 5e-6)


def positions(inputs):
    """The arguments of an operator."""
    given = inputs | {"scale": 1.0, "backend": "auto"}
    flags = "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_sigmoid_in_kernel"
    names = *GDN2Inputs._fields, "scale", *flags, "erase_scale", "backend", "lower_bound"
    return tuple(given.get(name) for name in names)


@pytest.mark.parametrize(
    "name, A_log",
    [("chunk_gdn2_backward", True),
     *slowly(("chunk_gdn2", True), ("chunk_gdn2", False), ("chunk_gdn2_backward", False), ("recurrent_gdn2", True))],
)  # fmt: skip
def test_the_operators_pass_opcheck(name, A_log):
    inputs = bounded(A_log, T=3, K=2, V=2)
    args = positions(inputs)
    if name == "chunk_gdn2_backward":
        args = (*cotangents(inputs), *(x.detach() if isinstance(x, torch.Tensor) else x for x in args))
    torch.library.opcheck(getattr(torch.ops.gdn2_titan, name).default, args)


def test_a_compiled_call_is_one_graph_with_the_eager_numbers():
    torch._dynamo.reset()
    inputs = bounded(False, T=5)
    compiled = torch.compile(chunk_gdn2, fullgraph=True, backend="aot_eager")
    output_grads = cotangents(inputs)
    got, want = (run(function, inputs, output_grads) for function in (compiled, chunk_gdn2))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_gradcheck():
    inputs = bounded(T=3, H=1, K=2, V=2)
    given = leaves(inputs)
    options = {name: x for name, x in inputs.items() if name not in given}
    assert torch.autograd.gradcheck(
        lambda *x: chunk_gdn2(**dict(zip(given, x, strict=True)), **options, output_final_state=True),
        tuple(given.values()),
    )
