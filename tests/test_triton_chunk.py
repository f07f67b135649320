"""The chunk kernels against the definition in fp64: in Triton's interpreter where there is no GPU, else on it.

A program of a kernel has one chunk of 64 tokens, in two halves of 32, of one head; the interpreter takes about 0.3 s
for all that is done to it. Hence few heads, and no more tokens than a case needs.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from gdn2_titan.ops import chunk_gdn2, recurrent_gdn2
from gdn2_titan.ops.gdn2.triton import scan, state
from gdn2_titan.ops.triton import launching
from tests.gdn2_cases import (
    DECAYS,
    DEVICE,
    RAW,
    RESULTS,
    assert_close,
    assert_norms_close,
    cases,
    cast,
    cotangents,
    examples,
    golden,
    in_half,
    leaves,
    make,
    norm_errors,
    on_device,
    op_arguments,
    random_resets,
    reversed_layout,
    run,
    run_on_device,
    slowly,
    strided,
)
from tests.kernel_launches import (
    OPCHECKS,
    fenced,
    memory_of_nan,
    narrow,
    with_other_candidates,
    without_pytorchs_kernels,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
OPS = torch.ops.gdn2_titan
triton_chunk_gdn2 = functools.partial(chunk_gdn2, backend="triton")


def small(**options):
    return make(**dict(T=70, H=1, K=16, V=16, dtype=FP32) | options)


def assert_exact(inputs, function=chunk_gdn2, through=RESULTS, compare=assert_norms_close):
    """Outputs and every gradient, each by its own norm or as compare does."""
    output_grads = cotangents(inputs)
    got = run_on_device(function, inputs, output_grads, through=through)
    for name, value in leaves(inputs).items():
        assert got[f"d{name}"].dtype == value.dtype, name
    compare(got, golden(inputs, output_grads, through), 1e-5)


RARE_DECAYS = ("moderate", "spikes of -inf", "none")


@pytest.mark.parametrize("decay", [*(x for x in DECAYS if x not in RARE_DECAYS), *slowly(*RARE_DECAYS)])
def test_every_strength_of_decay_is_exact_to_rounding_in_values_and_all_gradients(decay):
    assert_exact(small(T=150 if decay == "weak" else 70, groups=2, K=8, V=8, decay=decay))


@pytest.mark.parametrize("T", [1, 33, 64, 130, *slowly(31, 32, 65, 200)])
def test_any_length_is_exact_to_rounding(T):
    assert_exact(small(T=T))


@pytest.mark.parametrize(
    "K, V",
    [(1, 3), (20, 48), (128, 128), *slowly((48, 20), (64, 64), (80, 64), (16, 144), (256, 16), (16, 256))],
)
def test_any_head_sizes_are_exact_to_rounding(K, V):
    # Past a chunk where it does not take long, so that the state is used too.
    assert_exact(small(T=66 if K + V < 200 else 34, K=K, V=V))


@pytest.mark.slow
@pytest.mark.parametrize("through", [RESULTS, ("final_state",)], ids=" ".join)
def test_a_state_of_so_many_channels_that_it_is_worked_on_in_parts_is_exact_to_rounding(through):
    assert_exact(small(T=66, K=140, V=3), through=through)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are kept, whatever their functions are replaced by")
def test_a_state_in_parts_is_exact_to_rounding(monkeypatch):
    for module in (state, scan):
        monkeypatch.setattr(module, "part_size", lambda BK: 16)
    assert_exact(small(T=66, K=24, V=3))


OPTIONS = {
    "no state": dict(state=False, T=70),
    "norm": dict(l2norm=True),
    "raw decay": dict(gate=True),
    "raw decay, flat bias": dict(gate=True, dt_bias="[H * K]", H=2),
    "raw decay without a bias": dict(gate=True, dt_bias=None),
    "sigmoid": dict(sigmoid=True),
    "sigmoid, doubled": dict(sigmoid=True, erase_scale=2.0),
    "scale": dict(scale=-0.3),
    "all raw, grouped heads, batch": dict(B=2, H=2, groups=2, K=8, V=8, **RAW),
}
RARE_OPTIONS = {
    "norm over several blocks of channels": dict(K=80, **RAW),
    "scale of zero": dict(scale=0.0),
    "grouped heads, batch": dict(B=2, H=2, groups=3),
}


@pytest.mark.parametrize("case", [*OPTIONS, *slowly(*RARE_OPTIONS)])
def test_every_option_is_exact_to_rounding(case):
    assert_exact(small(**dict(T=40) | (OPTIONS | RARE_OPTIONS)[case]))


LENGTHS = [0, 1, 63, 64, 0, 0, 65, 0]
BOUNDS = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]
RICHEST = "raw, grouped, resets"
PACKED = {
    "states": dict(),
    "no states": dict(state=False),
    RICHEST: dict(**RAW, groups=2, K=8, V=8, resets=random_resets(1, BOUNDS[-1])),
    "raw without a bias, two heads, no states": dict(
        gate=True, dt_bias=None, H=2, T=40, cu=[0, 0, 3, 3, 40], state=False
    ),
}


@pytest.mark.parametrize("case", [RICHEST, *slowly(*(case for case in PACKED if case != RICHEST))])
def test_packed_sequences_empty_ones_too_are_exact_to_rounding(case):
    assert_exact(small(**dict(T=BOUNDS[-1], cu=BOUNDS) | PACKED[case]))


def test_packed_bounds_of_32_bits_are_exact_to_rounding():
    inputs = small(T=20, cu=[0, 3, 3, 20])
    assert_exact(inputs | {"cu_seqlens": inputs["cu_seqlens"].int()})


# A chunk has tokens 0 to 63, its halves meet at 32.
RESETS = {
    "first token": [0],
    "edge of a chunk": [64],
    "middle of a chunk": [32],
    "middle of a half of a chunk": [16],
    "inside blocks of two tokens": [7, 41],
    "last token": [69],
    "adjacent": [30, 31, 32, 33, 63, 64, 65],
    "every token": range(70),
}


@pytest.mark.parametrize(
    "case",
    ["edge of a chunk", "inside blocks of two tokens", "adjacent",
     *slowly("first token", "middle of a chunk", "middle of a half of a chunk", "last token", "every token")],
)  # fmt: skip
def test_resets_anywhere_are_exact_to_rounding(case):
    options = RAW if case == "adjacent" else {}
    assert_exact(small(**options, resets=[t in RESETS[case] for t in range(70)]))


@pytest.mark.parametrize("options", [RAW, *slowly({})], ids=["raw", "plain"])
@pytest.mark.parametrize("through", RESULTS)
def test_a_loss_on_one_output_alone_has_the_right_gradients(through, options):
    assert_exact(small(**options), through=(through,))


def test_final_state_is_none_unless_asked_for_and_o_and_gradients_are_right():
    inputs = small(**RAW)
    output_grads = cotangents(inputs)
    moved = on_device(inputs)
    o, none = triton_chunk_gdn2(**moved)
    assert none is None
    grads = torch.autograd.grad(o, list(leaves(moved).values()), output_grads[0].to(o))
    got = {"o": o.detach().cpu()} | {f"d{name}": grad.cpu() for name, grad in zip(leaves(moved), grads, strict=True)}
    want = golden(inputs, output_grads, ("o",))
    del want["final_state"]
    assert_norms_close(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP64], ids=str)
def test_the_initial_state_may_have_another_dtype(dtype):
    inputs = cast(small(T=20), dtype, only=("initial_state",))
    output_grads = cotangents(inputs)
    got, want = run_on_device(chunk_gdn2, inputs, output_grads), golden(inputs, output_grads)
    assert got["dinitial_state"].dtype == dtype
    last = {"dinitial_state": got.pop("dinitial_state")}
    assert_norms_close(last, {"dinitial_state": want.pop("dinitial_state")}, 2e-3 if dtype == BF16 else 1e-5)
    assert_norms_close(got, want, 1e-5)


@pytest.mark.parametrize("layout", [strided, *slowly(reversed_layout)], ids=lambda f: f.__name__)
def test_the_memory_layout_of_inputs_and_cotangents_does_not_matter(layout):
    inputs = small(B=2, T=34, K=8, V=8, groups=2, **RAW, resets=random_resets(2, 34))
    output_grads = cotangents(inputs)
    laid = on_device(inputs)
    laid |= {name: layout(x.detach()).requires_grad_() for name, x in leaves(laid).items()}
    assert not laid["q"].is_contiguous()
    got = run(triton_chunk_gdn2, laid, [layout(grad.to(DEVICE)) for grad in output_grads])
    assert_norms_close({name: x.cpu() for name, x in got.items()}, golden(inputs, output_grads), 1e-5)


def test_no_input_is_modified_and_results_are_contiguous_memory_of_their_own():
    # One head, one batch row and whole chunks: here a kernel's own layout is the input's.
    inputs = on_device(small(T=64, **RAW))
    output_grads = [grad.to(DEVICE, FP32) for grad in cotangents(inputs)]
    given = [*leaves(inputs).values(), *output_grads]
    before = [(x.detach().clone(), x._version) for x in given]
    outputs = triton_chunk_gdn2(**inputs, output_final_state=True)
    results = [*outputs, *torch.autograd.grad(outputs, list(leaves(inputs).values()), output_grads)]
    assert all(torch.equal(x, value) and x._version == version for x, (value, version) in zip(given, before))
    assert all(x.is_contiguous() for x in results)
    assert len({x.untyped_storage().data_ptr() for x in (*given, *results)}) == len(given) + len(results)


def test_gradients_through_the_recurrent_op_are_exact_to_rounding():
    assert_exact(small(**RAW, groups=2, resets=random_resets(1, 70)), function=recurrent_gdn2)


@pytest.mark.parametrize(
    "options",
    [dict(**RAW, resets=random_resets(1, 50)), dict(cu=[0, 0, 20, 50, 50])],
    ids=["raw, resets", "packed"],
)
def test_no_kernel_reads_or_writes_outside_its_tensors(monkeypatch, options):
    launched = fenced(monkeypatch)
    assert_exact(small(T=50, K=5, V=3, groups=2, **options))
    assert launched == {"prepare_kernel", "scan_kernel", "reverse_kernel", "gradient_kernel"}


@pytest.mark.parametrize("cu", [None, [0, 20, 50, 50]])
def test_no_result_depends_on_what_fresh_memory_holds(cu):
    """Packed: cu leaves room for an empty chunk."""
    with memory_of_nan():
        assert_exact(small(T=50, K=5, V=3, cu=cu, **RAW))


@pytest.mark.parametrize("g, tokens", [(-8.0, 70), (-60.0, 40), (-1e6, 40)], ids=["every token", "40", "40 of 1e6"])
def test_a_decay_of_many_strong_tokens_leaves_those_behind_them_exact_to_rounding(g, tokens):
    """Sums over all of a chunk are large numbers then, and the weak decays behind them small."""
    inputs = small(T=70, K=8, V=8)
    with torch.no_grad():
        inputs["g"][:, :tokens] = g
    assert_exact(inputs)


@pytest.mark.parametrize("strong", [slice(0, 32), slice(40, 64)], ids=["first channels", "last channels"])
def test_channels_of_weak_and_of_strong_decay_side_by_side_are_exact_to_rounding(strong):
    """The weak ones are one product for the whole chunk; the others, here, blocks of four tokens."""
    inputs = small(T=70, H=1, K=64)
    with torch.no_grad():
        inputs["g"][..., strong] -= 3.0
    assert_exact(inputs)


@pytest.mark.parametrize("length", [1e-3, 0.0])
def test_norms_of_vectors_of_next_to_no_length_are_exact_to_rounding(length):
    """There the constant under the root is all there is."""
    inputs = small(T=40, **RAW)
    with torch.no_grad():
        for name in ("q", "k"):
            inputs[name] *= length
    assert_exact(inputs)


@pytest.mark.parametrize("raw, rate", [(-15.0, 0.0), (100.0, -6.0)])
def test_raw_decays_far_from_zero_are_exact_relative_to_themselves(raw, rate):
    """exp(-15) added to 1 is mostly rounding; exp(100) overflows."""
    inputs = small(T=40, **RAW)
    with torch.no_grad():
        inputs["g"] += raw
        inputs["A_log"].fill_(rate)
    assert_exact(inputs)


def test_over_a_long_sequence_of_strong_decay_dg_is_exact_relative_to_itself():
    """A dg of 1e-26 beside gradients of 1: taken as a difference of sums it would be all rounding."""
    inputs = small(T=130, K=8, V=8)
    inputs["g"].data.fill_(-60.0)
    assert_exact(inputs)


def test_blocks_of_16_channels_are_exact_to_rounding(monkeypatch):
    """However few channels a configuration takes at a time."""
    with_other_candidates(monkeypatch, narrow)
    assert_exact(small(T=40, K=24, V=24, **RAW))


@pytest.mark.slow
def test_every_candidate_is_exact_to_rounding(monkeypatch):
    counts = []
    with_other_candidates(monkeypatch, lambda candidates: counts.append(len(candidates)) or candidates[0])
    assert_exact(small(T=1, K=64, V=64))
    for other in range(1, max(counts)):
        monkeypatch.undo()
        with_other_candidates(monkeypatch, lambda candidates: candidates[min(other, len(candidates) - 1)])
        assert_exact(small(T=66, K=64, V=64))


@examples(2, 16)
def test_values_and_all_gradients_equal_the_definition_for_any_sizes_and_options(count):
    # A gradient may be a sum that cancels (as through the norm of a single channel): then rounding is measured by the
    # largest tensor.
    loosely = functools.partial(assert_close, floor=32 * torch.finfo(FP32).eps)

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(cases(longest=100, heads=2, sizes=(1, 5, 16, 24)), st.sampled_from([RESULTS, *((n,) for n in RESULTS)]))
    def check(case, through):
        assert_exact(make(**case, dtype=FP32), through=through, compare=loosely)

    check()


HALF = {
    "weak": dict(),
    "mixed": dict(decay="mixed", state=False),
    "spikes": dict(decay="spikes of -1e6"),
    "raw, grouped, resets": dict(**RAW, groups=2, resets=random_resets(1, 150)),
}


@pytest.mark.parametrize(
    "case, dtype, decay_dtype",
    [
        ("weak", BF16, FP32),
        *slowly(
            ("weak", FP16, FP32),
            ("mixed", BF16, FP32),
            ("spikes", BF16, FP32),
            ("raw, grouped, resets", BF16, BF16),
            ("raw, grouped, resets", FP16, FP16),
        ),
    ],
    ids=str,
)
def test_half_precision_errs_at_most_twice_what_the_dtype_alone_costs(case, dtype, decay_dtype):
    assert_errs_at_most_twice_what_the_dtype_costs(
        make(**dict(T=150, H=1, K=64, V=64) | HALF[case]), dtype, decay_dtype
    )


@pytest.mark.slow
def test_in_fp16_a_decay_that_one_bf16_would_round_the_most_costs_no_more():
    """Sums of decays take their terms as two bf16. Rounded to one, this one adds up to 0.4 % of every exponent."""
    inputs = make(T=64, H=1, K=32, V=16)
    inputs["g"].data.fill_(-(1 + 0.99 / 256) / 16)
    assert_errs_at_most_twice_what_the_dtype_costs(inputs, FP16, FP32)


def assert_errs_at_most_twice_what_the_dtype_costs(exact_inputs, dtype, decay_dtype):
    """What it costs: the error of the PyTorch form, which rounds inputs and outputs and computes in fp32 between."""
    rounded = in_half(exact_inputs, dtype, decay_dtype)
    output_grads = cotangents(exact_inputs)
    want = golden(exact_inputs, output_grads)
    got = run_on_device(chunk_gdn2, rounded, output_grads)
    alone = norm_errors(run(functools.partial(chunk_gdn2, backend="torch"), rounded, output_grads), want)
    for name, value in leaves(rounded).items():
        assert got[f"d{name}"].dtype == value.dtype, name
    assert (got["o"].dtype, got["final_state"].dtype) == (dtype, FP32)
    for name, (error, size) in norm_errors(got, want).items():
        limit = 2 * alone[name][0]
        if name == "dA_log":  # a single number: how far off the PyTorch form is, is luck
            limit += torch.finfo(dtype).eps / 2 * size
        assert error <= limit, f"{name}: off by {error / size:.2e}, PyTorch by {alone[name][0] / size:.2e}"


@pytest.mark.parametrize("options", [RAW, *slowly({})], ids=["raw", "plain"])
@pytest.mark.parametrize("name", ["k", "g", "w", "initial_state", *slowly("q", "v", "b")])
def test_a_nan_in_an_input_is_not_hidden_and_stays_in_its_sequence(name, options):
    at, end = 20, 40
    inputs = small(T=50, K=5, V=3, cu=[0, end, 50], **options)
    with torch.no_grad():
        inputs[name][(0, 0, 2) if name == "initial_state" else (0, at, 0, 1)] = torch.nan
    with torch.no_grad():
        o, final_state = (x.cpu() for x in triton_chunk_gdn2(**on_device(inputs), output_final_state=True))
    assert o[0, at:end].isnan().any(-1).all() if name != "q" else o[0, at].isnan().all()
    assert final_state[0].isnan().any() or name == "q"
    assert o[0, end:].isfinite().all() and final_state[1].isfinite().all()


@pytest.mark.parametrize("name", ["g", "do"])
def test_a_nan_is_not_hidden_from_the_gradients(name):
    inputs = on_device(small(T=40, K=5, V=3))
    do = torch.ones_like(inputs["v"])
    with torch.no_grad():
        (do if name == "do" else inputs["g"])[0, 20, 0, 1] = torch.nan
    grads = torch.autograd.grad(triton_chunk_gdn2(**inputs)[0], list(leaves(inputs).values()), do)
    assert all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("function, known", [(chunk_gdn2, True), (recurrent_gdn2, False)], ids=["chunk", "recurrent"])
def test_the_backward_makes_A_and_A_qk_unless_the_chunked_forward_did(monkeypatch, function, known):
    makes, launch = [], launching.launch

    def start(kernel, grid, candidates, args, constants):
        if kernel.__name__ == "prepare_kernel":
            makes.append(args["A"] is not None and args["A_qk"] is not None)
        launch(kernel, grid, candidates, args, constants)

    monkeypatch.setattr(launching, "launch", start)
    inputs = on_device(small(T=5))
    o, _ = function(**inputs, backend="triton")
    forward = list(makes)
    o.sum().backward()
    assert makes == [*forward, not known]
    makes.clear()
    with torch.no_grad():
        triton_chunk_gdn2(**inputs)
    assert makes == [True]


def test_the_ops_pass_opcheck():
    inputs = on_device(small(T=5, K=3, V=2, **RAW, resets=[0, 1, 0, 0, 1]))
    output_grads = [grad.to(DEVICE, FP32) for grad in cotangents(inputs)]
    for op in (OPS.chunk_gdn2, OPS.chunk_gdn2_saving):
        torch.library.opcheck(op, (*op_arguments(inputs), "triton"), test_utils=OPCHECKS)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in op_arguments(inputs)]
    squares = OPS.chunk_gdn2_saving(*args, "triton")[2:]
    for more in ((), (None, *squares)):
        torch.library.opcheck(
            OPS.chunk_gdn2_backward, (*output_grads, *args, "triton", *more), test_utils=OPCHECKS
        )  # fmt: skip


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_equals_eager_bit_for_bit():
    torch._dynamo.reset()
    compiled = torch.compile(triton_chunk_gdn2, fullgraph=True, backend="aot_eager")
    inputs = on_device(small(**RAW, groups=2, resets=random_resets(1, 70)))
    output_grads = [grad.to(DEVICE) for grad in cotangents(inputs)]
    got, want = run(compiled, inputs, output_grads), run(triton_chunk_gdn2, inputs, output_grads)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_the_kernels_asked_for_run_and_nothing_in_their_place(monkeypatch):
    without_pytorchs_kernels(monkeypatch)
    inputs = small(T=3)
    run_on_device(chunk_gdn2, inputs, cotangents(inputs))


@pytest.mark.parametrize(
    "sizes, found, wanted",
    [
        (dict(K=257), "head size 257", "at most 256"),
        (dict(V=300), "head size 300", "at most 256"),
        (dict(dtype=FP64), "dtype torch.float64", "float16, bfloat16 or float32"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_refused_with_what_to_use_instead(sizes, found, wanted):
    inputs = on_device(small(**dict(T=1) | sizes))
    message = f"^q has {found}; for the Triton kernels it must be {wanted}, use backend='torch'$"
    with pytest.raises(ValueError, match=message):
        triton_chunk_gdn2(**inputs)


def test_tensors_on_the_cpu_are_refused_unless_the_kernels_are_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^backend is 'triton' and q is on cpu; it must be on a GPU"):
        triton_chunk_gdn2(**small(T=1))
