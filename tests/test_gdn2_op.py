"""chunk_gdn2 and recurrent_gdn2 against the token-by-token definition in fp64: values, states and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2_titan.ops import chunk_gdn2, fused_recurrent_gdn2, naive_recurrent_gdn2, recurrent_gdn2
from tests.gdn2_cases import (
    DECAYS,
    LEAVES,
    RAW,
    RESULTS,
    assert_close,
    assert_within_twice,
    cases,
    cast,
    collect,
    cotangents,
    examples,
    golden,
    in_half,
    leaves,
    make,
    random_resets,
    reversed_layout,
    run,
    slowly,
    strided,
)  # fmt: skip

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
RELATIVE = {FP32: 1e-5, FP64: 1e-10}
functions = pytest.mark.parametrize("function", [chunk_gdn2, recurrent_gdn2], ids=lambda f: f.__name__)
dtypes = pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)


@examples(40, 200)
def test_values_and_all_gradients_equal_the_definition_for_any_sizes_and_options(count):
    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(
        cases(),
        st.sampled_from([FP32, FP64]),
        st.sampled_from([chunk_gdn2, recurrent_gdn2]),
        st.sampled_from([RESULTS, ("o",), ("final_state",)]),
    )
    def check(case, dtype, function, through):
        inputs = make(**case, dtype=dtype)
        output_grads = cotangents(inputs)
        got = run(function, inputs, output_grads, through)
        # A gradient may be zero, or a sum that cancels (as through the norm of a single channel): then rounding is
        # measured by the largest tensor.
        assert_close(got, golden(inputs, output_grads, through), RELATIVE[dtype], floor=32 * torch.finfo(dtype).eps)

    check()


@functions
@dtypes
@pytest.mark.parametrize("decay", DECAYS)
def test_every_strength_of_decay_is_exact_to_rounding_in_values_and_all_gradients(decay, dtype, function):
    inputs = make(B=2, T=150, H=2, groups=2, K=16, V=8, decay=decay, dtype=dtype)
    output_grads = cotangents(inputs)
    got, want = run(function, inputs, output_grads), golden(inputs, output_grads)
    assert_close(got, want, RELATIVE[dtype], floor=0 if decay != "strong" else 4 * torch.finfo(dtype).eps)


def test_the_weak_decays_of_these_tests_carry_memory_across_chunks():
    inputs = make(B=2, T=150, H=2, groups=2, K=16, V=8, state=False)
    with torch.no_grad():
        whole, _ = naive_recurrent_gdn2(**inputs)
        cut = torch.zeros(2, 150, dtype=torch.bool)
        cut[:, ::64] = True
        dropped, _ = naive_recurrent_gdn2(**inputs | {"resets": cut})
    for chunk in (slice(64, 128), slice(128, 150)):
        assert (whole - dropped)[:, chunk].abs().max() > 1e-2 * whole.abs().max()


@functions
@pytest.mark.parametrize("spike", [-1e6, -torch.inf])
@dtypes
@pytest.mark.parametrize("at", [0, 1, 15, 16, 37, 63, 64, 90])
def test_after_one_token_of_total_decay_all_is_as_if_the_sequence_began_there(at, dtype, spike, function):
    T = 100
    inputs = make(T=T, K=8, V=8, dtype=dtype)
    with torch.no_grad():
        inputs["g"][:, at] = spike
    output_grads = cotangents(inputs)
    got = run(function, inputs, output_grads)
    fresh = {
        name: value.detach()[:, at:].double() if name in ("q", "k", "v", "g", "b", "w") else value
        for name, value in inputs.items()
    } | {"initial_state": None}
    fresh["g"] = torch.cat([torch.zeros_like(fresh["g"][:, :1]), fresh["g"][:, 1:]], 1)
    fresh = cast(fresh, FP64)
    want = run(naive_recurrent_gdn2, fresh, [output_grads[0][:, at:], output_grads[1]])
    assert all(torch.isfinite(tensor).all() for tensor in got.values())
    assert at > 0 or not got["dinitial_state"].any()
    tail = {name: got[name][:, at:] for name in ("o", "dq", "dk", "dv", "db", "dw")}
    tail |= {"dg": got["dg"][:, at + 1 :], "final_state": got["final_state"]}
    want["dg"] = want["dg"][:, 1:]
    assert_close(tail, want, RELATIVE[dtype])
    # The token's own decay has no influence any more; what is left is rounding.
    assert got["dg"][:, at].abs().max() <= 20 * torch.finfo(dtype).eps * max(t.abs().max() for t in want.values())


BF16_CASES = {
    "weak": dict(),
    "strong": dict(decay="strong"),
    "mixed": dict(decay="mixed"),
    "spikes": dict(decay="spikes of -1e6"),
    "raw": RAW,
    "raw, resets, grouped": dict(**RAW, groups=3, resets=random_resets(2, 150)),
}


@functions
@pytest.mark.parametrize(
    "case, decay_dtype",
    [*((case, BF16 if "raw" in case else FP32) for case in BF16_CASES),
     *slowly(*((case, FP32 if "raw" in case else BF16) for case in BF16_CASES))],
    ids=str,
)  # fmt: skip
def test_bf16_errs_at_most_twice_what_rounding_the_inputs_alone_does(case, decay_dtype, function):
    exact_inputs = make(**dict(B=2, T=150, H=2, K=16, V=16) | BF16_CASES[case])
    rounded, output_grads = in_half(exact_inputs, BF16, decay_dtype), cotangents(exact_inputs)
    rounded_grads = [output_grads[0].to(BF16).double(), output_grads[1].float().double()]
    got = run(function, rounded, rounded_grads)
    for name, value in leaves(rounded).items():
        assert got[f"d{name}"].dtype == value.dtype, name
    assert (got["o"].dtype, got["final_state"].dtype) == (BF16, FP32)
    assert_within_twice(got, golden(exact_inputs, output_grads), golden(rounded, rounded_grads), BF16)


@functions
def test_fp16_runs_forward_and_backward_close_to_the_definition(function):
    inputs = make(T=90, K=16, V=16, groups=2, **RAW, dtype=torch.float16)
    output_grads = [grad.half().double() for grad in cotangents(inputs)]
    got = run(function, inputs, output_grads)
    assert all(got[f"d{name}"].dtype == torch.float16 for name in leaves(inputs))
    assert_close(got, golden(inputs, output_grads), 2e-3)


GRADCHECK = {
    "states": dict(),
    "no state": dict(state=False),
    "grouped heads, batch": dict(B=2, groups=2, T=3),
    "raw": RAW,
    "raw, flat bias, grouped": dict(l2norm=True, gate=True, dt_bias="[H * K]", sigmoid=True, H=2, groups=2, T=4),
    "raw decay without a bias": dict(gate=True, dt_bias=None),
    "mixed decay": dict(decay="mixed"),
    "resets": dict(**RAW, resets=[0, 0, 1, 0, 0]),
    "resets at the first token": dict(resets=[1, 0, 0, 1, 0]),
    "packed": dict(**RAW, cu=[0, 0, 2, 5, 5]),
    "one token": dict(**RAW, T=1),
}


def assert_gradcheck(function, inputs, **options):
    names = list(leaves(inputs))

    def outputs(*values):
        return function(**inputs | dict(zip(names, values, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(outputs, tuple(leaves(inputs).values()), **options)


@functions
@pytest.mark.parametrize("case", GRADCHECK)
def test_gradients_pass_gradcheck_in_fp64(case, function):
    assert_gradcheck(function, make(**dict(T=5, H=1, K=2, V=2) | GRADCHECK[case]))


def test_gradients_across_chunks_pass_gradcheck_in_fp64():
    assert_gradcheck(chunk_gdn2, make(T=70, H=1, groups=2, K=3, V=2, **RAW), fast_mode=True)


OVER_TIME = ("q", "k", "v", "g", "b", "w", "resets")


def segment(inputs, start, end, state):
    part = {n: x[:, start:end] if n in OVER_TIME and x is not None else x for n, x in inputs.items()}
    return part | {"initial_state": state, "cu_seqlens": None}


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(
    "cuts, ops",
    [
        ([64], [chunk_gdn2, chunk_gdn2]),
        ([1, 70, 71], [recurrent_gdn2, chunk_gdn2, recurrent_gdn2, chunk_gdn2]),
        ([100, 130], [chunk_gdn2, recurrent_gdn2, chunk_gdn2]),
    ],
)
def test_segments_that_hand_on_their_state_equal_the_whole_in_values_and_gradients(cuts, ops, with_resets):
    T = 140
    resets = [t in (30, 70, 100) for t in range(2 * T)] if with_resets else None
    inputs = make(B=2, T=T, groups=2, K=6, V=5, gate=True, resets=resets)
    output_grads = cotangents(inputs)
    outs, state = [], inputs["initial_state"]
    for op, start, end in zip(ops, [0, *cuts], [*cuts, T], strict=True):
        o, state = op(**segment(inputs, start, end, state), output_final_state=True)
        outs.append(o)
    got = collect(inputs, (torch.cat(outs, 1), state), output_grads)
    assert_close(got, golden(inputs, output_grads), 1e-10)


@functions
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_each_sequence_run_alone(index_dtype, function):
    bounds = [0, 0, 70, 71, 71, 100, 165]
    inputs = make(T=165, groups=2, K=6, V=5, **RAW, cu=bounds)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].to(index_dtype)
    output_grads = cotangents(inputs)
    alone = cast(inputs, FP64)
    outs, states = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = alone["initial_state"][n : n + 1]
        if start < end:
            o, state = naive_recurrent_gdn2(**segment(alone, start, end, state), output_final_state=True)
            outs.append(o)
        states.append(state)
    want = collect(alone, (torch.cat(outs, 1), torch.cat(states)), output_grads)
    assert_close(run(function, inputs, output_grads), want, 1e-10)


@functions
def test_resets_equal_cu_seqlens_with_the_same_bounds(function):
    bounds = [0, 40, 64, 65, 130, 150]
    inputs = make(T=150, K=6, V=5, **RAW, state=False, resets=[t in bounds for t in range(150)])
    output_grads = cotangents(inputs)
    packed = cast(inputs | {"resets": None, "cu_seqlens": torch.tensor(bounds)}, FP64)
    o, states = naive_recurrent_gdn2(**packed, output_final_state=True)
    want = collect(packed, (o, states[-1:]), output_grads)
    assert_close(run(function, inputs, output_grads), want, 1e-10)


@functions
def test_a_reset_cuts_the_gradient_to_everything_before_it(function):
    inputs = make(T=100, resets=[t == 70 for t in range(100)])
    o, final_state = function(**inputs, output_final_state=True)
    grads = torch.autograd.grad([o[:, 70:], final_state], list(leaves(inputs).values()), [o[:, 70:], final_state])
    for name, grad in zip(leaves(inputs), grads, strict=True):
        if name == "initial_state":
            assert not grad.any()
        else:
            # dg is a difference of sums that cancel there.
            assert grad[:, :70].abs().max() <= (1e-13 if name == "g" else 0), name
            assert grad[:, 71:].any(), name
        if name == "g":
            assert not grad[:, 70].any()  # the decay that the reset stands in for was not read


@functions
@pytest.mark.parametrize("through", RESULTS)
def test_a_loss_on_one_output_alone_has_the_right_gradients(through, function):
    inputs = make(B=2, T=100, K=6, V=5, **RAW)
    output_grads = cotangents(inputs)
    got = run(function, inputs, output_grads, (through,))
    assert_close(got, golden(inputs, output_grads, (through,)), 1e-10, floor=1e-13)


@functions
def test_final_state_is_none_unless_asked_for_and_o_and_gradients_are_the_same(function):
    inputs = make(T=70, **RAW)
    o, none = function(**inputs)
    assert none is None
    do = cotangents(inputs)[0]
    want = golden(inputs, cotangents(inputs), ("o",))
    grads = torch.autograd.grad(o, list(leaves(inputs).values()), do)
    got = {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(leaves(inputs), grads, strict=True)}
    del want["final_state"]
    assert_close(got, want, 1e-10)


def test_fused_recurrent_gdn2_is_recurrent_gdn2():
    assert fused_recurrent_gdn2 is recurrent_gdn2


@functions
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_every_backend_serves_every_argument(backend, function):
    inputs = make(T=70, groups=2, **RAW, cu=[0, 30, 30, 70], resets=random_resets(1, 70, every=10), scale=0.7)
    output_grads = cotangents(inputs)

    def chosen(**kwargs):
        return function(**kwargs, backend=backend)

    assert_close(run(chosen, inputs, output_grads), golden(inputs, output_grads), 1e-10)


@functions
@pytest.mark.parametrize("layout", [reversed_layout, strided], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, RAW], ids=["plain", "raw"])
def test_the_memory_layout_of_inputs_and_cotangents_does_not_matter(options, layout, function):
    inputs = make(B=2, T=70, groups=2, **options, resets=random_resets(2, 70))
    output_grads = cotangents(inputs)
    want = golden(inputs, output_grads)
    laid = inputs | {name: layout(x.detach()).requires_grad_() for name, x in leaves(inputs).items()}
    laid["resets"] = layout(inputs["resets"]) if layout is reversed_layout else inputs["resets"]
    assert not laid["q"].is_contiguous()
    assert_close(run(function, laid, [layout(grad) for grad in output_grads]), want, 1e-10)


@functions
@pytest.mark.parametrize("options", [{}, dict(gate=True, sigmoid=True)], ids=["plain", "raw"])
def test_gates_expanded_from_one_number_per_head_work_and_get_the_summed_gradient(options, function):
    inputs = make(B=2, T=70, groups=2, K=6, V=5, **options)
    output_grads = cotangents(inputs)
    thin = {name: inputs[name].detach()[..., :1].clone().requires_grad_() for name in ("g", "b", "w")}
    full = {n: x.detach().expand(inputs[n].shape).clone().requires_grad_() for n, x in thin.items()}
    want = golden(inputs | full, output_grads)
    for name in thin:
        want[f"d{name}"] = want[f"d{name}"].sum(-1, keepdim=True)
    expanded = inputs | {name: x.expand(inputs[name].shape) for name, x in thin.items()}
    outputs = function(**expanded, output_final_state=True)
    assert_close(collect(inputs | thin, outputs, output_grads), want, 1e-10)


@functions
@pytest.mark.parametrize("options", [{}, RAW], ids=["plain", "raw"])
@pytest.mark.parametrize("T", [1, 64, 70])
def test_neither_forward_nor_backward_modifies_an_input(T, options, function):
    # One head and one batch row: here a kernel's own layout may be the input's memory itself.
    for H, resets in ((1, None), (2, random_resets(1, T))):
        inputs = make(T=T, H=H, **options, resets=resets)
        output_grads = cotangents(inputs)
        tensors = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)}
        tensors |= dict(zip(("do", "dfinal_state"), output_grads, strict=True))
        before = {name: (x.detach().clone(), x._version) for name, x in tensors.items()}
        run(function, inputs, output_grads)
        for name, (value, version) in before.items():
            assert torch.equal(tensors[name], value) and tensors[name]._version == version, name


@functions
@pytest.mark.parametrize("H, T", [(1, 1), (1, 64), (2, 70)])
def test_results_are_contiguous_and_share_memory_with_nothing(H, T, function):
    inputs = make(T=T, H=H)
    outputs = function(**inputs, output_final_state=True)
    output_grads = cotangents(inputs)
    grads = torch.autograd.grad(outputs, list(leaves(inputs).values()), output_grads)
    results = [*outputs, *grads]
    given = [*leaves(inputs).values(), *output_grads]
    assert len({x.untyped_storage().data_ptr() for x in (*results, *given)}) == len(results) + len(given)
    assert all(x.is_contiguous() for x in results)


@functions
@pytest.mark.parametrize("options", [{}, RAW], ids=["plain", "raw"])
def test_nothing_but_the_inputs_is_kept_for_backward(options, function):
    inputs = make(B=2, T=70, groups=2, **options, resets=random_resets(2, 70), dtype=BF16)
    given = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, torch.Tensor)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function(**inputs, output_final_state=True)
    assert len(kept) >= len(leaves(inputs))
    assert {x.untyped_storage().data_ptr() for x in kept} <= given


@functions
def test_inputs_that_need_no_gradient_get_none_and_the_others_are_right(function):
    for name in LEAVES:
        inputs = make(T=20, **RAW)
        frozen = inputs | {n: x.detach() for n, x in leaves(inputs).items() if n != name}
        outputs = function(**frozen, output_final_state=True)
        output_grads = cotangents(inputs)
        (grad,) = torch.autograd.grad(outputs, inputs[name], output_grads)
        want = golden(inputs, output_grads)
        assert_close({"d": grad}, {"d": want[f"d{name}"]}, 1e-10)
