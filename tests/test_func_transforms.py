"""torch.func and second derivatives: what the ops can do there is right, and what they cannot do raises."""

import functools

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

from gdn2_titan.ops import causal_conv1d, chunk_gdn2, recurrent_gdn2
from tests.gdn2_cases import LEAVES, leaves, make, slowly

RAW = dict(l2norm=True, gate=True, sigmoid=True, erase_scale=2.0)
CONV_LEAVES = ("x", "weight", "bias", "initial_state")


def conv_inputs(**options):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 7, 3), "weight": (3, 4), "bias": (3,), "initial_state": (1, 3, 3)}
    inputs = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return inputs | options


CASES = {
    "chunk": (chunk_gdn2, functools.partial(make)),
    "chunk, raw, resets, grouped": (chunk_gdn2, functools.partial(make, **RAW, groups=2, resets=[0, 1, 0, 0, 0, 1, 0])),
    "chunk, packed": (chunk_gdn2, functools.partial(make, cu=[0, 2, 2, 7], state=False)),
    "recurrent": (recurrent_gdn2, functools.partial(make)),
    "recurrent, raw": (recurrent_gdn2, functools.partial(make, **RAW, dt_bias=None)),
    "conv": (causal_conv1d, conv_inputs),
    "conv, no bias, no state": (causal_conv1d, functools.partial(conv_inputs, bias=None, initial_state=None)),
    "conv, silu, resets": (
        causal_conv1d,
        functools.partial(conv_inputs, activation="silu", resets=torch.tensor([[0, 0, 1, 0, 0, 0, 0]]).bool()),
    ),
}


def case(name):
    """loss(leaves by name) of an op, in both of its outputs, and the leaves."""
    function, inputs = CASES[name]
    if function is causal_conv1d:
        inputs = inputs()
        given = {n: inputs[n] for n in CONV_LEAVES if inputs[n] is not None}
    else:
        inputs = inputs(T=7, K=3, V=2)
        given = {n: x.detach() for n, x in leaves(inputs).items()}

    def loss(tensors):
        o, final_state = function(**inputs | tensors, output_final_state=True)
        return o.sin().sum() + (final_state * final_state).sum()

    return loss, given


def ordinary(loss, given):
    given = {n: x.detach().clone().requires_grad_() for n, x in given.items()}
    return dict(zip(given, torch.autograd.grad(loss(given), given.values()), strict=True))


def close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


def batch(given, size=3):
    """Stacked leaves, the first row being those given."""
    return {n: torch.stack([x * (1 - 0.1 * i) for i in range(size)]) for n, x in given.items()}


cases = pytest.mark.parametrize("name", CASES)
slow_loop = pytest.mark.filterwarnings("ignore:There is a performance drop")


@cases
def test_func_grad_equals_ordinary_autograd(name):
    loss, given = case(name)
    close(grad(loss)(given), ordinary(loss, given))


@slow_loop
@cases
def test_vmap_of_func_grad_equals_ordinary_autograd_of_each_row(name):
    loss, given = case(name)
    rows = batch(given)
    got = vmap(grad(loss))(rows)
    for i in range(3):
        close({n: x[i] for n, x in got.items()}, ordinary(loss, {n: x[i] for n, x in rows.items()}))


@slow_loop
@cases
def test_vmap_over_one_argument_leaves_the_others_shared(name):
    loss, given = case(name)
    varied = next(iter(given))
    shared = {n: x for n, x in given.items() if n != varied}
    rows = batch({varied: given[varied]})[varied]
    got = vmap(lambda row: grad(lambda tensors: loss(tensors | {varied: row}))(shared))(rows)
    for i in range(3):
        want = ordinary(lambda tensors, i=i: loss(tensors | {varied: rows[i]}), shared)
        close({n: x[i] for n, x in got.items()}, want)


@slow_loop
@pytest.mark.parametrize("name", ["chunk", "recurrent", "conv"])
def test_a_jacobian_in_reverse_mode_equals_ordinary_autograd(name):
    loss, given = case(name)
    first = next(iter(given))

    def two(x):
        return torch.stack([loss(given | {first: x}), 2 * loss(given | {first: x}) + 1])

    want = ordinary(loss, given)[first]
    torch.testing.assert_close(jacrev(two)(given[first]), torch.stack([want, 2 * want]), rtol=1e-12, atol=1e-12)


@cases
def test_forward_mode_raises_rather_than_taking_the_op_for_a_constant(name):
    loss, given = case(name)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(loss, (given,), (given,))
    with torch.autograd.forward_ad.dual_level():
        dual = {n: torch.autograd.forward_ad.make_dual(x, x) for n, x in given.items()}
        with pytest.raises(NotImplementedError, match="jvp"):
            loss(dual)


TWICE = {
    "chunk": "chunk_gdn2 and recurrent_gdn2",
    "recurrent": "chunk_gdn2 and recurrent_gdn2",
    "conv": "causal_conv1d",
}


@pytest.mark.parametrize("name", TWICE)
def test_a_second_derivative_raises_with_one_sentence_whatever_it_is_of(name):
    loss, given = case(name)
    sentence = f"^{TWICE[name]} cannot be differentiated twice; .*_backward has no derivative$"
    for of in given:
        for by in given:
            inputs = {n: x.clone().requires_grad_() for n, x in given.items()}
            (first,) = torch.autograd.grad(loss(inputs), inputs[of], create_graph=True)
            with pytest.raises(RuntimeError, match=sentence):
                torch.autograd.grad(first.sum(), inputs[by])
    with pytest.raises(RuntimeError, match=sentence):
        grad(lambda tensors: sum(x.sum() for x in grad(loss)(tensors).values()))(given)


@pytest.mark.parametrize("name", ["chunk_gdn2", "recurrent_gdn2"])
def test_a_second_derivative_raises_through_the_bare_operator_too(name):
    inputs = make(T=3)
    tensors = [inputs.get(n) for n in LEAVES]
    o, _ = getattr(torch.ops.gdn2_titan, name)(*tensors, None, None, 1.0, False, False, False, 1.0)
    (dq,) = torch.autograd.grad(o.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(dq.sum(), inputs["k"])


def test_the_first_derivative_of_a_graph_made_for_more_is_right():
    loss, given = case("chunk")
    inputs = {n: x.clone().requires_grad_() for n, x in given.items()}
    got = torch.autograd.grad(loss(inputs), inputs.values(), create_graph=True)
    close(dict(zip(inputs, (x.detach() for x in got), strict=True)), ordinary(loss, given))


@pytest.mark.parametrize(
    "name",
    ["chunk, raw, resets, grouped", "recurrent", "conv, silu, resets",
     *slowly("chunk", "chunk, packed", "recurrent, raw", "conv", "conv, no bias, no state")],
)  # fmt: skip
def test_func_grad_around_a_compiled_function_and_inside_one_is_right(name):
    loss, given = case(name)
    want = ordinary(loss, given)
    torch._dynamo.reset()
    close(grad(torch.compile(loss, backend="aot_eager"))(given), want)
    torch._dynamo.reset()
    close(torch.compile(grad(loss), backend="aot_eager")(given), want)


@pytest.mark.parametrize("name", ["chunk", "recurrent", "conv"])
def test_torch_func_inside_one_graph_is_refused(name):
    # There the compiler would take the op for a constant in forward mode, and fail on it in reverse mode.
    loss, given = case(name)
    for transform in (grad(loss), lambda tensors: jvp(loss, (tensors,), (tensors,))):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="differentiated by torch.func in eager PyTorch only"):
            torch.compile(transform, fullgraph=True, backend="aot_eager")(given)


@pytest.mark.parametrize("name", ["chunk", "recurrent", "conv"])
def test_forward_mode_raises_around_a_compiled_function_and_inside_one(name):
    loss, given = case(name)
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(torch.compile(loss, backend="aot_eager"), (given,), (given,))
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.compile(lambda tensors: jvp(loss, (tensors,), (tensors,)), backend="aot_eager")(given)


def test_func_grad_of_a_whole_layer_equals_ordinary_autograd():
    from gdn2_titan.models import GatedDeltaNet2

    torch.manual_seed(0)
    layer = GatedDeltaNet2(hidden_size=8, num_heads=2, head_dim=4).double()
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    x = torch.randn(1, 6, 8, dtype=torch.float64)

    def loss(parameters):
        return functional_call(layer, parameters, (x,)).square().sum()

    close(grad(loss)(parameters), ordinary(loss, parameters))
