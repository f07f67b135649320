"""The Triton kernels of causal_conv1d against the definition in fp64; interpreted where there is no GPU.

The tiles are made small, so that few tokens and channels reach over several: forward owns ROWS - (W - 1) tokens of a
walk, backward ROWS - 2 (W - 1). With 16 rows and W = 4 that is 13 and 10.
"""

import pytest
import torch

pytest.importorskip("triton")

from gdn2_titan.ops.short_conv.api import causal_conv1d
from gdn2_titan.ops.short_conv.triton import launches as kernels
from gdn2_titan.ops.triton import launching
from tests.gdn2_cases import slowly

from .conv_cases import (
    BACKWARD,
    FORWARD,
    assert_close,
    gradients,
    in_fp64,
    leaves,
    make,
    op_arguments,
    output_gradients,
    permuted,
    results_of,
    run_both,
)
from .kernel_launches import OPCHECKS

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled, not interpreted, here: test_gpu.py", allow_module_level=True)
SMALL = dict(BD=16, GROUP=4, num_warps=1, num_stages=1)
CHANNELS = 20  # a block of channels and a part of one


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "FORWARD_ROWS", 16)
    monkeypatch.setattr(kernels, "BACKWARD_ROWS", 16)
    names = ("causal_conv1d_forward_kernel", "causal_conv1d_backward_kernel")
    for name in names:
        launching.pin(name, **SMALL)
    yield
    for name in names:
        launching.pin(name)


def at(*positions, B=1, T=27):
    """resets: True at these positions of the B * T tokens."""
    return [t in positions for t in range(B * T)]


# Arguments of make, and the channels where it is not 5, less than a block.
CASES = {
    "plain": dict(B=1, T=27, D=CHANNELS, bias=False, state=False),
    "width 2": dict(B=1, T=27, W=2),
    "width 3": dict(B=1, T=27, W=3),
    "width 4": dict(T=27),
    "as many tokens as a tile": dict(B=1, T=13),
    "shorter than the state": dict(T=2),
    "one token": dict(T=1),
    "resets at the first token": dict(B=1, T=12, resets=at(0, T=12)),
    "adjacent resets and resets at tiles' edges": dict(
        T=27, D=CHANNELS, resets=at(5, 6, 9, 10, 12, 13, 26, 27, 39, 47, B=2)
    ),
    "resets of width 2": dict(B=1, T=27, W=2, bias=False, resets=at(1, 2, 14, 15, 26)),
    "resets without state": dict(B=1, T=27, state=False, resets=at(3, 10, 13, 25)),
    "packed": dict(B=1, T=27, cu=[0, 0, 3, 4, 4, 13, 13, 14, 26, 27, 27]),
    "packed, a sequence over several tiles": dict(B=1, T=40, cu=[0, 33, 40]),
    "packed without state": dict(B=1, T=27, cu=[0, 3, 10, 11, 13, 27], state=False),
    "packed of width 3": dict(B=1, T=27, W=3, cu=[0, 1, 1, 2, 14, 27], bias=False),
    "packed with resets": dict(
        B=1, T=27, D=CHANNELS, cu=[0, 0, 3, 4, 12, 14, 26, 27], resets=at(1, 3, 5, 11, 13, 14, 16, 24, 26)
    ),
}
LINEAR_CASES = ("plain", "width 3", "packed with resets")
# What these say, others say together.
RARE_CASES = (
    "width 2", "width 4", "as many tokens as a tile", "resets at the first token", "packed", "packed of width 3",
    "packed without state",
)  # fmt: skip


def case_inputs(case, dtype):
    return make(**dict(D=5) | CASES[case], dtype=dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "case, activation",
    [
        *((case, "silu") for case in CASES if case not in RARE_CASES),
        (LINEAR_CASES[-1], None),
        *slowly(*((case, None) for case in LINEAR_CASES[:-1])),
        *slowly(*((case, "silu") for case in RARE_CASES)),
    ],
)
def test_outputs_and_all_gradients_equal_the_definition(case, activation):
    got, want = run_both(case_inputs(case, torch.float32), activation, backend="triton")
    assert_close(got, want, 1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("through", ["y", "final_state"])
@pytest.mark.parametrize("case", ["packed with resets", *slowly("shorter than the state")])
def test_gradients_through_one_output_alone_equal_the_definition(case, through):
    got, want = run_both(case_inputs(case, torch.float32), "silu", through, backend="triton")
    assert_close(got, want, 1e-5)


def test_the_tiles_and_configuration_in_use_equal_the_definition():
    got, want = run_both(make(B=1, T=70, D=3, dtype=torch.float32), "silu", backend="triton")
    assert_close(got, want, 1e-5)


def assert_errs_at_most_twice_what_pytorch_does(inputs):
    got, want = run_both(inputs, "silu", backend="triton")
    torch_path, _ = run_both(inputs, "silu", backend="torch")
    for name, exact in want.items():
        assert got[name].dtype == torch_path[name].dtype, name
        errors = [(result[name].double() - exact).abs().max().item() for result in (got, torch_path)]
        slack = torch.finfo(got[name].dtype).eps / 8 * exact.abs().max().item()
        assert errors[0] <= 2 * errors[1] + slack, f"{name}: off by {errors[0]:.2e}, PyTorch by {errors[1]:.2e}"


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "case, dtype",
    [
        ("width 4", torch.bfloat16),
        *slowly(
            ("width 4", torch.float16), ("packed with resets", torch.bfloat16), ("packed with resets", torch.float16)
        ),
    ],
)
def test_half_precision_errs_at_most_twice_what_the_pytorch_kernel_does(case, dtype):
    assert_errs_at_most_twice_what_pytorch_does(case_inputs(case, dtype))


@pytest.mark.usefixtures("small_tiles")
def test_weight_and_bias_may_have_another_dtype_and_gradients_keep_each_input_s_own():
    inputs = make(B=1, T=15, D=5, dtype=torch.bfloat16)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    inputs["bias"] = inputs["bias"].detach().half().requires_grad_()
    got, want = run_both(inputs, "silu", backend="triton")
    for name, tensor in leaves(inputs).items():
        assert got[f"d{name}"].dtype == tensor.dtype
    assert_close({"dweight": got["dweight"]}, {"dweight": want["dweight"]}, 1e-5)
    assert_errs_at_most_twice_what_pytorch_does(inputs)


def spoiled(inputs, past):
    """inputs with NaN for the tokens before position ``past`` and for the first sequence's initial state."""
    x, state = inputs["x"].detach().clone(), inputs["initial_state"].detach().clone()
    x[:, :past] = float("nan")
    state[0] = float("nan")
    return inputs | {"x": x.requires_grad_(), "initial_state": state.requires_grad_()}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("past", [13, *slowly(1, 10, 12, 15)])
@pytest.mark.parametrize("by", ["reset", "sequence"])
def test_nan_hidden_by_a_reset_or_in_another_sequence_never_shows_through(past, by):
    T = 16
    packing = dict(cu=[0, past, T]) if by == "sequence" else dict(resets=at(past, T=T))
    clean = make(B=1, T=T, dtype=torch.float32, **packing)
    results = []
    for inputs in (clean, spoiled(clean, past)):
        y, final_state = causal_conv1d(**inputs, activation="silu", output_final_state=True, backend="triton")
        grads = gradients(inputs, [y, final_state], output_gradients(y, final_state))
        # Of the last sequence. Where a reset hides the initial state, its gradient comes from before the reset.
        seen = [final_state[-1], y[:, past:], grads["x"][:, past:]]
        results.append([*seen, grads["initial_state"][1]] if by == "sequence" else seen)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("small_tiles")
def test_an_initial_state_of_nan_behind_a_reset_gives_finite_results_and_no_gradient():
    inputs = make(B=1, T=12, dtype=torch.float32, resets=at(0, T=12))
    with torch.no_grad():
        inputs["initial_state"].fill_(float("nan"))
    y, final_state = causal_conv1d(**inputs, activation="silu", output_final_state=True, backend="triton")
    grads = gradients(inputs, [y, final_state], output_gradients(y, final_state))
    assert all(torch.isfinite(tensor).all() for tensor in (y, final_state, *grads.values()))
    assert not grads["initial_state"].any()


@pytest.mark.usefixtures("small_tiles")
def test_a_token_that_would_overflow_after_the_end_leaves_the_gradients_finite():
    inputs = make(B=1, T=6, dtype=torch.float32)
    with torch.no_grad():
        inputs["x"][:, -1] = 1e37
        inputs["weight"][:, -2:] = torch.tensor([1e3, 1.0])
    # The PyTorch kernel: autograd of the definition is NaN where its exp overflows.
    want = results_of(in_fp64(inputs), "silu", "torch")
    assert_close(results_of(inputs, "silu", "triton"), want, 1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", ["permuted", *slowly("a slice of the channels")])
def test_other_layouts_than_contiguous_give_the_same(layout):
    inputs = make(B=2, T=6, D=5, dtype=torch.float32, resets=at(3, 8, B=2, T=6))
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in op_arguments(inputs, backend="triton")]
    wide = torch.nn.functional.pad(args[0], (4, 8))[..., 4:9]
    other = [permuted(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    if layout != "permuted":
        other = [wide, *args[1:]]
        assert not wide.is_contiguous() and wide.stride(2) == 1
    out_grads = output_gradients(*FORWARD(*args))
    pairs = [*zip(FORWARD(*args), FORWARD(*other), strict=True)]
    pairs += zip(BACKWARD(*out_grads, *args), BACKWARD(*map(permuted, out_grads), *other), strict=True)
    assert all(torch.equal(got, want) for want, got in pairs)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("far", ["batch", *slowly("row")])
def test_offsets_beyond_int32_are_reached(far):
    # Of the large buffer only the pages that hold x are ever touched.
    D = 5
    inputs = make(B=2, T=3, D=D, dtype=torch.bfloat16)
    strides = {"row": (D, 2**30 + 2**4, 1), "batch": (2**31 + 2**4, D, 1)}[far]
    size = 1 + sum((n - 1) * stride for n, stride in zip((2, 3, D), strides, strict=True))
    x = torch.empty(size, dtype=torch.bfloat16).as_strided((2, 3, D), strides)
    x.copy_(inputs["x"].detach())
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in op_arguments(inputs, backend="triton")]
    out_grads = output_gradients(*FORWARD(*args))
    for op, before in ((FORWARD, ()), (BACKWARD, out_grads)):
        for got, want in zip(op(*before, x, *args[1:]), op(*before, *args), strict=True):
            assert torch.equal(got, want)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "case", [dict(B=1, cu=[0, 0, 3, 5], resets=at(1, 3, T=5), bias=False), *slowly(dict())], ids=["packed", "plain"]
)
def test_both_ops_pass_opcheck(case):
    args = op_arguments(make(dtype=torch.float32, **case), backend="triton")
    torch.library.opcheck(FORWARD, args, test_utils=OPCHECKS)
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    torch.library.opcheck(BACKWARD, (*output_gradients(*FORWARD(*args)), *args), test_utils=OPCHECKS)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_compiles_without_graph_breaks_and_equals_eager():
    inputs = make(T=7, dtype=torch.float32, resets=at(3, 9, B=2, T=7))

    def function(inputs):
        return causal_conv1d(**inputs, activation="silu", output_final_state=True, backend="triton")

    want, got = function(inputs), torch.compile(function, fullgraph=True, backend="aot_eager")(inputs)
    out_grads = output_gradients(*want)
    eager, compiled = gradients(inputs, want, out_grads), gradients(inputs, got, out_grads)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_on_the_cpu_auto_means_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "forward", None)
    inputs = make(dtype=torch.float32)
    want = causal_conv1d(**inputs, backend="torch")[0]
    assert torch.equal(causal_conv1d(**inputs)[0], want)


def test_refusals_name_the_argument_what_came_and_what_is_allowed(monkeypatch):
    single, double = make(dtype=torch.float32), make()
    with pytest.raises(ValueError, match="backend is 'cuda'; it must be one of 'auto', 'triton', 'torch'"):
        causal_conv1d(**single, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("x", "weight", "bias"):
        mixed = single | {name: double[name]} | ({"initial_state": double["initial_state"]} if name == "x" else {})
        with pytest.raises(ValueError, match=f"{name} has dtype torch.float64; for the Triton kernels it must be"):
            causal_conv1d(**mixed, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend is 'triton' and x is on cpu; it must be on a GPU"):
        causal_conv1d(**single, backend="triton")
