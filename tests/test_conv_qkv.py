"""causal_conv1d_qkv: the convolutions of q, k and v as one operator, on both backends (Triton's interpreted)."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from gdn2_titan.models import GatedDeltaNet2
from gdn2_titan.ops import causal_conv1d, causal_conv1d_qkv
from gdn2_titan.ops.short_conv.triton import launches as kernels
from gdn2_titan.ops.triton import launching
from tests.conv_cases import VARIANTS, assert_close, make, oracle, variant_inputs
from tests.gdn2_cases import slowly
from tests.kernel_launches import OPCHECKS

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled, not interpreted, here: test_gpu.py", allow_module_level=True)
OPS = torch.ops.gdn2_titan
CHANNELS = (3, 6, 4)  # with blocks of 4: less than one, more than one, one
BACKENDS = ("torch", "triton")
FORWARD, BACKWARD = "causal_conv1d_forward_kernel", "causal_conv1d_backward_kernel"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in ("FORWARD_ROWS", "BACKWARD_ROWS"):
        monkeypatch.setattr(kernels, name, 16)
    for name in (FORWARD, BACKWARD):
        launching.pin(name, BD=4, GROUP=4, num_warps=1, num_stages=1)
    yield
    for name in (FORWARD, BACKWARD):
        launching.pin(name)


def given(variant="state", channels=CHANNELS, **changes):
    """Arguments of causal_conv1d for each of q, k and v, which share what packs them; no bias."""
    return [
        variant_inputs(variant, D=D, **dict(bias=False, dtype=torch.float32, seed=seed) | changes)
        for seed, D in enumerate(channels)
    ]


def together(parts, **options):
    """causal_conv1d_qkv of them: (y, final_state) of each."""
    q, k, v = parts
    tensors = {f"{n}{suffix}": part[name] for n, part in zip("qkv", parts, strict=True)
               for suffix, name in (("", "x"), ("_weight", "weight"), ("_state", "initial_state"))}  # fmt: skip
    options = dict(activation="silu", output_final_state=True) | options
    *ys, finals = causal_conv1d_qkv(**tensors, cu_seqlens=q["cu_seqlens"], resets=q["resets"], **options)
    return list(zip(ys, finals, strict=True))


def apart(parts, **options):
    return [causal_conv1d(**part, **dict(activation="silu", output_final_state=True) | options) for part in parts]


def leaves(parts):
    return [part[name] for part in parts for name in ("x", "weight", "initial_state") if part[name] is not None]


def gradients(parts, results):
    outputs = list(itertools.chain.from_iterable(results))
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, leaves(parts), seeds)


@pytest.mark.parametrize(
    "variant, backend",
    [*itertools.product(("resets", "packed with resets", "plain"), ["torch"]),
     *slowly(*itertools.product(VARIANTS, ["triton"]))],
)  # fmt: skip
def test_outputs_states_and_gradients_are_those_of_three_calls_bit_for_bit(variant, backend):
    parts = given(variant)
    got, want = together(parts, backend=backend), apart(parts, backend=backend)
    assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    for a, b in zip(gradients(parts, got), gradients(parts, want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_several_tiles_outputs_and_gradients_equal_the_definition_and_outputs_three_calls(backend):
    parts = given(B=1, T=14, resets=[t in (3, 9, 13) for t in range(14)])
    exact = [{n: x.detach().double().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
              for n, x in part.items()} for part in parts]  # fmt: skip
    got, wanted = together(parts, backend=backend), [oracle(**part, activation="silu") for part in exact]
    results = []
    for inputs, outputs in ((parts, got), (exact, wanted)):
        grads = gradients(inputs, outputs)
        results.append(dict(enumerate([*itertools.chain.from_iterable(outputs), *grads])))
    assert_close(*results, 1e-5)
    for x, y in zip(got, apart(parts, backend=backend), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("sizes", slowly(((1, 1, 1),), ((4, 1, 8),)), ids=str)
def test_any_numbers_of_channels_serve(sizes):
    parts = given("one token", sizes)
    got, want = together(parts, backend="triton"), apart(parts, backend="torch")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_q_k_and_v_keep_their_dtype_and_weights_may_have_another(dtype):
    parts = given(dtype=dtype)
    for part in parts:
        part["weight"] = part["weight"].detach().float().requires_grad_()
    got, want = together(parts), apart(parts)
    assert all(x.dtype == dtype for x in itertools.chain.from_iterable(got))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_on_triton_it_is_one_launch_forward_and_two_backward(monkeypatch):
    launched, launch = [], launching.launch
    monkeypatch.setattr(
        launching, "launch", lambda kernel, *args: launched.append(kernel.__name__) or launch(kernel, *args)
    )
    parts = given()
    results = together(parts, backend="triton")
    assert launched == [FORWARD]
    gradients(parts, results)
    assert launched == [FORWARD, BACKWARD, "causal_conv1d_sum_kernel"]


@pytest.mark.parametrize("through, backend", [((0,), "torch"), ((4,), "torch"), *slowly(((1, 5), "triton"))])
def test_outputs_that_nobody_used_have_no_share_in_the_gradients(through, backend):
    parts = given()
    found = []
    for function in (together, apart):
        ys, finals = zip(*function(parts, backend=backend), strict=True)
        used = [(*ys, *finals)[i] for i in through]
        grads = torch.autograd.grad(used, leaves(parts), [torch.ones_like(x) for x in used], materialize_grads=True)
        found.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def op_arguments(parts, backend="auto"):
    x, weight, state = ([part[name] for part in parts] for name in ("x", "weight", "initial_state"))
    return *x, *weight, True, *state, parts[0]["cu_seqlens"], parts[0]["resets"], backend


@pytest.mark.parametrize("backend, checks", [("auto", None), *slowly(("triton", OPCHECKS))])
@pytest.mark.parametrize("variant", ["packed with resets", *slowly("plain")])
def test_both_operators_pass_opcheck(variant, backend, checks):
    options = {} if checks is None else {"test_utils": checks}
    args = op_arguments(given(variant), backend)
    torch.library.opcheck(OPS.causal_conv1d_qkv, args, **options)
    args = [x.detach() if torch.is_tensor(x) else x for x in args]
    torch.library.opcheck(OPS.causal_conv1d_qkv_backward, (*OPS.causal_conv1d_qkv(*args), *args), **options)


def test_compiled_it_is_one_graph_for_every_length():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(together, fullgraph=True, dynamic=True, backend=counter)
    for T in (5, 9, 14):
        parts = given(T=T, resets=[t % 4 == 1 for t in range(2 * T)])
        got, want = compiled(parts), together(parts)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        torch.testing.assert_close(gradients(parts, got), gradients(parts, want), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_flop_counter_counts_all_three_forward_and_backward():
    parts = given()
    flops = 2 * 2 * 5 * sum(CHANNELS) * 4  # 2 rows of 5 tokens
    with FlopCounterMode(display=False) as counter:
        results = together(parts)
    assert counter.get_total_flops() == flops
    with FlopCounterMode(display=False) as counter:
        gradients(parts, results)
    assert counter.get_total_flops() == 2 * flops


def test_differentiating_twice_raises():
    parts = given()
    (dx,) = torch.autograd.grad(together(parts)[0][0].square().sum(), parts[0]["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d_qkv cannot be differentiated twice"):
        torch.autograd.grad(dx.sum(), parts[0]["x"])


def test_no_tokens_pass_the_states_through():
    parts = given(T=0)
    for part, (y, final_state) in zip(parts, together(parts, backend="triton"), strict=True):
        assert y.shape == part["x"].shape and torch.equal(final_state, part["initial_state"])


BATCH, WIDTH = r"must be \[B, T, D\] with q's B and T", r"must be \[D, W\] with q_weight's W"
NO_STATE = {"initial_state": None}
REFUSALS = [
    (0, {"x": None}, TypeError, "q is a NoneType"),
    (1, {"weight": [1.0]}, TypeError, "k_weight is a list"),
    (1, {"x": torch.zeros(2, 6, 6)}, ValueError, rf"k has shape \(2, 6, 6\); it {BATCH}"),
    (2, {"x": torch.zeros(2, 5)}, ValueError, r"v has shape \(2, 5\); it must be \[B, T, D\]"),
    (2, {"x": torch.zeros(2, 5, 4).double()}, TypeError, "v_state has dtype torch.float32; it must be v's dtype"),
    (1, {"x": torch.zeros(2, 5, 6).half()} | NO_STATE, TypeError, "k has dtype torch.float16; it must be q's"),
    (2, {"weight": torch.zeros(4, 4).half()}, TypeError, "v_weight has dtype torch.float16; it must be q_weight's"),
    (1, {"weight": torch.zeros(6, 3)} | NO_STATE, ValueError, rf"k_weight .* {WIDTH}"),
    (1, {"weight": torch.zeros(7, 4)}, ValueError, r"k_weight has shape \(7, 4\); it must be \[D, W\] with k's D"),
    (2, {"initial_state": torch.zeros(2, 4, 2)}, ValueError, r"v_state has shape .* \[N, D, W-1\] = \(2, 4, 3\)"),
    (1, NO_STATE, ValueError, "k_state is None; q_state, k_state and v_state must be given together"),
    (2, {"x": torch.zeros(2, 5, 4, device="meta")}, ValueError, "v is on meta; it must be on q's device cpu"),
]


@pytest.mark.parametrize("which, changes, error, sentence", REFUSALS, ids=[case[3][:20] for case in REFUSALS])
def test_what_one_launch_cannot_take_is_refused_by_name(which, changes, error, sentence):
    parts = given()
    parts[which] |= changes
    with pytest.raises(error, match=f"^{sentence}"):
        together(parts)


def layer():
    torch.manual_seed(0)
    return GatedDeltaNet2(32, 2, 16, num_v_heads=4, backend="triton")


def test_a_layers_decoding_step_on_triton_is_two_launches_convolutions_and_all_else(monkeypatch):
    built, launched = layer(), []
    monkeypatch.setattr(launching, "launch", lambda kernel, *args: launched.append(kernel.__name__))
    with torch.no_grad():
        _, state = built(torch.randn(2, 1, 32), return_state=True)
        launched.clear()
        built(torch.randn(2, 1, 32), state=state, return_state=True)
    assert launched == [FORWARD, "recurrent_kernel"]


def test_a_layers_training_step_on_triton_convolves_in_one_launch_forward_and_two_backward(monkeypatch):
    built, launched = layer(), []
    monkeypatch.setattr(launching, "launch", lambda kernel, *args: launched.append(kernel.__name__))
    built(torch.randn(1, 70, 32)).sum().backward()
    assert [name for name in launched if "conv1d" in name] == [FORWARD, BACKWARD, "causal_conv1d_sum_kernel"]


def test_given_alone_a_convolution_of_the_layer_gives_what_the_layer_convolves():
    built = GatedDeltaNet2(32, 2, 16)
    x = torch.randn(1, 7, 32)
    want = causal_conv1d(x, built.q_conv1d.weight, activation="silu")[0]
    assert torch.equal(built.q_conv1d(x), want)


def test_the_memory_layout_of_inputs_does_not_matter():
    parts = given(B=1, T=2)
    want = together(parts, backend="triton")
    joined = torch.cat([part["x"] for part in parts], 2)  # as a projection of all three gives them
    for part, x in zip(parts, joined.detach().split(CHANNELS, 2), strict=True):
        assert not x.is_contiguous()
        part["x"] = x
    torch.testing.assert_close(together(parts, backend="triton"), want, rtol=0, atol=0)


def test_it_reads_and_writes_in_place_and_allocates_nothing_but_results_and_their_sums(monkeypatch):
    """No copy lays the three side by side: every tensor of a launch is an argument, a result or a sum."""
    given_to = []
    monkeypatch.setattr(launching, "launch", lambda *args: given_to.append(args[3]))
    parts = [make(B=1, T=6, D=D, bias=False, dtype=torch.float32, seed=D) for D in CHANNELS]
    results = together(parts, backend="triton")
    known = {x.data_ptr() for x in (*leaves(parts), *itertools.chain.from_iterable(results))}
    assert {x.data_ptr() for x in given_to[0].values() if torch.is_tensor(x)} <= known
