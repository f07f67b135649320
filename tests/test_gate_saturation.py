"""Raw gates at the ends of what their dtypes hold: -exp(A_log) * softplus(g + dt_bias) by its logarithm, in fp64."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gdn2_titan.models import GatedDeltaNet2
from gdn2_titan.ops import chunk_gdn2, naive_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_, segment_summary
from gdn2_titan.ops.gdn2.gates import activate, activate_backward
from tests.gdn2_cases import (
    DEVICE,
    assert_close,
    collect,
    cotangents,
    golden,
    leaves,
    make,
    on_device,
    run,
    run_on_device,
    slowly,
)  # fmt: skip
from tests.segment_cases import segment, segment_by_definition, without_gradients

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LARGEST = torch.finfo(FP32).max


def sums(*terms):
    """The exact sum of numbers that may cancel, rounded once."""
    shape = torch.broadcast_shapes(*(x.shape for x in terms))
    values = zip(*(x.expand(shape).flatten().tolist() for x in terms), strict=True)
    return torch.tensor([math.fsum(numbers) for numbers in values], dtype=FP64).view(shape)


class LogDecay(torch.autograd.Function):
    """The log-decay and its derivatives, each by its logarithm, fp64. A decay that forgets all learns nothing."""

    @staticmethod
    def forward(ctx, g, A_log, dt_bias):
        A_log = A_log[:, None]
        x = sums(g, dt_bias)
        near = A_log + F.softplus(x).clamp_min(1e-300).log()
        decay = -torch.where(x < -40, sums(A_log, g, dt_bias), near).exp()  # log softplus(x) is x on the far left
        slope = -torch.where(x < -40, sums(A_log, g, dt_bias), A_log + F.logsigmoid(x)).exp()
        ctx.save_for_backward(decay, slope)
        return decay

    @staticmethod
    def backward(ctx, grad):
        decay, slope = ctx.saved_tensors
        dx = torch.where(grad == 0, 0, grad * slope)
        dA_log = torch.where(grad == 0, 0, grad * decay).sum((0, 1, 3))
        return dx, dA_log, dx.sum((0, 1))


def definition(inputs, output_grads):
    """Outputs and gradients of the recurrence in fp64, with decays by ``LogDecay``."""
    exact = inputs | {name: x.detach().double().requires_grad_() for name, x in leaves(inputs).items()}
    bias = exact.get("dt_bias", torch.zeros(exact["g"].shape[2:], dtype=FP64))
    options = {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None}
    decay = LogDecay.apply(exact["g"], exact["A_log"], bias)
    outputs = naive_recurrent_gdn2(**exact | {"g": decay} | options, output_final_state=True)
    return collect(exact, outputs, output_grads)


# A_log of a head, and the raw gates of its channels: decays of a few tenths, none, and too strong for any number.
HEADS = (
    (0.5, (-2.0, -200.0, 200.0, -1e4)),
    (50.0, (-51.0, -200.0, 0.0, 1e4)),
    (89.0, (-90.5, -88.75, -1e4, 0.0)),
    (1e4, (-1e4 - 1, -9.9e3, -200.0, -LARGEST)),
    (LARGEST, (-LARGEST, -200.0, 1e4, LARGEST)),
    (-80.0, (LARGEST / 2, 1e34, -200.0, 0.0)),
    (-88.5, (LARGEST, LARGEST / 4, -LARGEST, 3.0)),
    (-1e4, (LARGEST, 1e4, -200.0, -LARGEST)),
)


def saturated(dtype=FP32, heads=range(len(HEADS)), bias=True, T=5, V=3, **options):
    """Arguments of the op. The gates of each head and channel of HEADS, and of another channel at every third token."""
    chosen = [HEADS[i] for i in heads]
    inputs = make(T=T, H=len(chosen), K=4, V=V, gate=True, dt_bias="[H, K]" if bias else None, dtype=dtype, **options)
    g = torch.tensor([gates for _, gates in chosen], dtype=FP64).repeat(T, 1, 1)
    g[::3] = g[::3].roll(1, -1)
    # Fractions that numbers as large as 1e4 can be added to: a rounded argument of exp is no fault of it.
    g += torch.where(g.abs() < 2e4, torch.randint(-64, 64, g.shape) / 128, 0.0)
    largest = min(LARGEST, torch.finfo(dtype).max)
    values = {"A_log": torch.tensor([A_log for A_log, _ in chosen], dtype=FP64), "g": g[None].clamp(-largest, largest)}
    if bias:
        values["dt_bias"] = torch.randint(-64, 64, g.shape[1:]).double() / 128
        values["dt_bias"][values["A_log"] == -88.5] = LARGEST / 2  # with g more than fp32 holds, and a decay of 2
    return inputs | {name: x.to(inputs[name].dtype).requires_grad_() for name, x in values.items()}


BACKENDS = {
    "reference": functools.partial(chunk_gdn2, backend="reference"),
    "chunk": functools.partial(chunk_gdn2, backend="torch"),
    "recurrent": functools.partial(recurrent_gdn2, backend="torch"),
    "segments": functools.partial(chunk_gdn2, backend="torch", num_segments=2),
}


@pytest.mark.parametrize("bias", [True, False], ids=["dt_bias", "no dt_bias"])
@pytest.mark.parametrize("dtype, relative", [(FP64, 1e-11), (FP32, 2e-6)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_finite_and_right_at_the_ends_of_fp32(backend, dtype, relative, bias):
    inputs = saturated(dtype, bias=bias)
    output_grads = cotangents(inputs)
    assert_close(run(BACKENDS[backend], inputs, output_grads), definition(inputs, output_grads), relative)


@pytest.mark.parametrize("backend", ["reference", "chunk", "recurrent"])
def test_bf16_gates_at_their_ends_are_right_to_rounding(backend):
    inputs = saturated(BF16)
    inputs |= {name: inputs[name].detach().float().requires_grad_() for name in ("A_log", "dt_bias", "initial_state")}
    output_grads = cotangents(inputs)
    assert_close(run(BACKENDS[backend], inputs, output_grads), definition(inputs, output_grads), 2e-2)


@pytest.mark.parametrize("bias", [True, *slowly(False)], ids=["dt_bias", "no dt_bias"])
def test_the_chunk_kernels_are_right_at_the_ends_of_fp32(bias):
    inputs = saturated(heads=(0, 2, 3, 4, 6, 7), bias=bias)
    output_grads = cotangents(inputs)
    assert_close(run_on_device(chunk_gdn2, inputs, output_grads), definition(inputs, output_grads), 5e-6)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_step_in_place_and_the_recurrent_kernel_are_right_at_the_ends_of_fp32(backend):
    inputs = saturated()
    exact = definition(inputs, cotangents(inputs))
    given = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in on_device(inputs).items()}
    o, final_state = recurrent_gdn2(**given, output_final_state=True, backend=backend)
    assert_close({"o": o.cpu(), "final_state": final_state.cpu()}, {n: exact[n] for n in ("o", "final_state")}, 2e-6)
    state = given.pop("initial_state")
    o = recurrent_gdn2_(**given, state=state, backend=backend)
    assert_close({"o": o.cpu(), "final_state": state.cpu()}, {n: exact[n] for n in ("o", "final_state")}, 2e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_segments_map_is_right_at_the_ends_of_fp32(backend):
    inputs = without_gradients(saturated(heads=(2, 3, 6), state=False))
    decay = LogDecay.apply(*(inputs[name].double() for name in ("g", "A_log", "dt_bias")))
    exact = inputs | {"g": decay, "A_log": None, "dt_bias": None, "use_gate_in_kernel": False}
    got = segment({n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}, backend)
    assert_close({name: x.cpu() for name, x in got.items()}, segment_by_definition(exact), 5e-6)


def test_segment_summary_has_finite_gradients_where_a_gate_saturates():
    inputs = saturated(state=False)
    names = ("k", "v", "g", "b", "w", "A_log", "dt_bias")
    tensors = {name: inputs[name] for name in names}
    results = segment_summary(**tensors, use_gate_in_kernel=True)
    grads = torch.autograd.grad([x.sum() for x in results], list(tensors.values()))
    assert all(torch.isfinite(grad).all() for grad in grads)


# What the ends are made of; and anything between.
numbers = st.sampled_from([0.0, -0.0, 89.0, -89.0, 104.0, -104.0, 200.0, -200.0, 1e4, -1e4, LARGEST, -LARGEST, 1e-45])
numbers |= st.floats(-LARGEST, LARGEST, width=32) | st.floats(-128, 128, width=32)


@given(numbers, numbers, st.none() | numbers, st.booleans(), st.sampled_from([FP32, FP64]))
def test_any_finite_gate_gives_the_decay_and_its_derivatives_in_log_space(A_log, g, dt_bias, balanced, dtype):
    if balanced:  # a moderate decay from large numbers
        g = max(-LARGEST, min(LARGEST, g - A_log - (dt_bias or 0.0)))
    A_log, g = torch.tensor([A_log], dtype=dtype), torch.tensor(g, dtype=dtype).view(1, 1, 1, 1)
    dt_bias = None if dt_bias is None else torch.tensor([[dt_bias]], dtype=dtype)
    options = dict(l2norm=False, gate=True, sigmoid=False, erase_scale=1.0)
    empty = g.new_zeros(1, 1, 1, 1)
    decay = activate(empty, empty, g, empty, empty, A_log, dt_bias, None, **options)[2]

    exact = [x.double().requires_grad_() for x in (g, A_log, g.new_zeros(1, 1) if dt_bias is None else dt_bias)]
    want = LogDecay.apply(*exact)
    upstream = want.detach().exp()  # what comes back through the decay itself
    wanted = torch.autograd.grad(want, exact, upstream)
    zero = torch.zeros_like(empty)
    _, _, dg, _, _, dA_log, ddt_bias = activate_backward(
        (zero, zero, upstream.to(dtype), zero, zero), zero, zero, g, zero, zero, A_log, dt_bias, None, **options
    )
    pairs = [(dg, wanted[0]), (dA_log, wanted[1])] + ([] if dt_bias is None else [(ddt_bias, wanted[2])])
    assert not decay.isnan().any() and all(torch.isfinite(got).all() for got, _ in pairs)
    # The three are added in the dtype, and exp makes of a rounding of its argument a relative error.
    relative = torch.finfo(dtype).eps * (8 + 4 * sum(abs(x.item()) for x in exact))
    if relative < 0.1:
        for got, right in [(decay.double().exp(), want.exp()), *pairs]:
            assert torch.allclose(got.double(), right, rtol=relative, atol=relative), (got, right)


@pytest.mark.parametrize("raw", [-1e4, -torch.inf])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_token_of_very_negative_logits_leaves_the_state_exactly_as_it_is_and_gets_no_gradient(backend, raw):
    """What a pad is made of: no decay, nothing erased, nothing written."""
    inputs = make(T=3, H=1, K=2, V=2, gate=True, sigmoid=True, dtype=FP32)
    for name in ("g", "b", "w"):
        inputs[name] = inputs[name].detach().index_fill(1, torch.tensor([1]), raw).requires_grad_()
    without = inputs | {
        name: inputs[name].detach()[:, [0, 2]].requires_grad_() for name in ("q", "k", "v", "g", "b", "w")
    }
    do, dfinal = cotangents(inputs)
    do[:, 1] = 0
    got = run_on_device(chunk_gdn2, inputs, [do, dfinal], backend)
    want = run_on_device(chunk_gdn2, without, [do[:, [0, 2]], dfinal], backend)
    for name in ("g", "b", "w"):
        assert (got["d" + name][:, 1] == 0).all()
    for name in ("q", "k", "v", "g", "b", "w"):
        got["d" + name] = got["d" + name][:, [0, 2]]
    got["o"] = got["o"][:, [0, 2]]
    assert_close(got, {name: x.double() for name, x in want.items()}, 1e-5)


@pytest.mark.parametrize("decay", [-torch.inf, -1e30, -LARGEST, -1e-45, -0.0])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_plain_decay_at_the_ends_of_fp32_is_right(backend, decay):
    inputs = make(T=5, H=1, K=3, V=2, dtype=FP32)
    g = inputs["g"].detach().clone()
    g[:, 2, :, ::2] = decay
    inputs["g"] = g.requires_grad_()
    output_grads = cotangents(inputs)
    got = run(functools.partial(chunk_gdn2, backend=backend), inputs, output_grads)
    assert_close(got, golden(inputs, output_grads), 2e-6)


def test_the_layers_statistics_of_a_saturated_gate_are_numbers():
    torch.manual_seed(0)
    layer = GatedDeltaNet2(64, 2, 32)
    layer.init_weights()
    layer.record_statistics = True
    with torch.no_grad():
        layer.decay.A_log.copy_(torch.tensor([89.0, 1e4]))
        layer.decay.dt_bias.fill_(-200.0)
        layer(torch.randn(1, 5, 64))
    assert torch.isfinite(layer.statistics).all()
