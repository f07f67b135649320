"""``b=None`` by the Triton kernels, which then leave out all that erases: against the definition in fp64, in Triton's
interpreter where there is no GPU, else on it."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from gdn2_titan.ops import chunk_gdn2, naive_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_
from gdn2_titan.ops.triton import launching
from tests.gdn2_cases import (
    DECAYS,
    DEVICE,
    RAW,
    RESULTS,
    assert_close,
    assert_norms_close,
    assert_within_twice,
    cases,
    cast,
    cotangents,
    golden,
    in_half,
    make,
    norm_errors,
    on_device,
    op_arguments,
    random_resets,
    run_on_device,
    slowly,
)
from tests.kernel_launches import OPCHECKS, fenced, memory_of_nan, narrow, with_other_candidates
from tests.segment_cases import segment, segment_by_definition

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
OPS = torch.ops.gdn2_titan
LOGITS = RAW | {"erase_scale": 1.0}
in_segments = functools.partial(chunk_gdn2, num_segments=2)


def small(**options):
    return make(**dict(T=70, H=1, K=8, V=8, dtype=FP32) | options) | {"b": None}


def assert_exact(inputs, function=chunk_gdn2, through=RESULTS, compare=assert_norms_close):
    """Outputs and every gradient, each by its own norm or as compare does."""
    output_grads = cotangents(inputs)
    got = run_on_device(function, inputs, output_grads, through=through)
    compare(got, golden(inputs, output_grads, through), 1e-5)


@pytest.mark.parametrize("decay", ["weak", "mixed", *slowly(*(x for x in DECAYS if x not in ("weak", "mixed")))])
def test_every_strength_of_decay_is_exact_to_rounding_in_values_and_all_gradients(decay):
    assert_exact(small(T=130 if decay == "weak" else 70, groups=2, decay=decay))


OPTIONS = {
    "logits, grouped heads, documents": dict(groups=2, T=66, K=5, V=3, **LOGITS, resets=random_resets(1, 66)),
    "packed, empty ones too": dict(T=70, cu=[0, 0, 1, 5, 5, 70, 70]),
}
RARE_OPTIONS = {
    "batch of several heads": dict(B=2, H=2, groups=2, **LOGITS),
    "no state, several blocks of channels": dict(T=66, K=80, V=48, state=False),
    "packed documents of logits": dict(T=90, cu=[0, 0, 3, 90], groups=2, **LOGITS, resets=random_resets(1, 90)),
    "bounded decay": dict(gate=True, lower_bound=-5.0),
    "raw decay, activated gates": dict(gate=True, scale=1.0),
    "large heads": dict(T=34, K=128, V=128),
}


@pytest.mark.parametrize("case", [*OPTIONS, *slowly(*RARE_OPTIONS)])
def test_every_option_is_exact_to_rounding(case):
    assert_exact(small(**(OPTIONS | RARE_OPTIONS)[case]))


def test_segments_side_by_side_are_exact_to_rounding():
    assert_exact(small(T=100, groups=2, **LOGITS, resets=random_resets(1, 100)), in_segments)


@pytest.mark.slow
@pytest.mark.parametrize("through", RESULTS)
def test_a_loss_on_one_output_alone_has_the_right_gradients(through):
    assert_exact(small(**LOGITS), through=(through,))


@pytest.mark.slow
def test_values_and_all_gradients_equal_the_definition_for_any_sizes_and_options():
    # A gradient may be a sum that cancels: then rounding is measured by the largest tensor.
    loosely = functools.partial(assert_close, floor=32 * torch.finfo(FP32).eps)

    @settings(max_examples=16, deadline=None, derandomize=True)
    @given(cases(longest=100, heads=2, sizes=(1, 5, 16, 24)), st.sampled_from([chunk_gdn2, recurrent_gdn2]))
    def check(case, function):
        assert_exact(make(**case | {"erase_scale": 1.0}, dtype=FP32) | {"b": None}, function, compare=loosely)

    check()


@pytest.mark.parametrize("options", [{}, *slowly(dict(**LOGITS, groups=2))], ids=["plain", "logits"])
def test_bf16_errs_at_most_twice_what_its_rounding_of_the_inputs_costs(options):
    exact = make(T=150, H=1, K=32, V=32, **options) | {"b": None}
    rounded, output_grads = in_half(exact, BF16, BF16 if options else FP32), cotangents(exact)
    got = run_on_device(chunk_gdn2, rounded, output_grads)
    assert_within_twice(got, golden(exact, output_grads), golden(rounded, output_grads), BF16)


SEGMENTS = {
    "weak": dict(T=150, groups=2),
    "logits, batch": dict(B=2, H=2, T=40, K=5, V=3, **LOGITS),
    "documents": dict(T=140, resets=[t == 80 for t in range(140)]),
}


@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("blocks", ["default", *slowly("of 16 channels")])
def test_the_map_of_a_segment_is_exact_to_rounding_and_its_transition_diagonal(case, blocks, monkeypatch):
    inputs = small(**SEGMENTS[case] | dict(state=False) | (dict(K=24, V=40) if blocks != "default" else {}))
    if blocks != "default":
        with_other_candidates(monkeypatch, narrow)
    want = segment_by_definition(inputs)
    got = {name: x.detach().cpu() for name, x in segment(on_device(inputs)).items()}
    for name, (error, size) in norm_errors(got, want).items():
        assert error <= 1e-5 * size, f"{name}: off by {error:.2e}, its norm is {size:.2e}"
    assert torch.equal(got["transition"], got["transition"].diagonal(dim1=-2, dim2=-1).diag_embed())


STEPS = {
    "one token": dict(B=2, T=1, H=2),
    "logits, documents, grouped": dict(B=2, T=5, groups=2, **LOGITS, resets=random_resets(2, 5, every=3)),
    "packed": dict(T=5, cu=[0, 0, 2, 5]),
}


@torch.no_grad()
@pytest.mark.parametrize("case", STEPS)
def test_token_by_token_and_in_place_equal_the_definition(case):
    inputs = small(K=20, V=6, **STEPS[case])
    want = dict(zip(RESULTS, naive_recurrent_gdn2(**cast(inputs, FP64), output_final_state=True), strict=True))
    moved = on_device(inputs)
    o, final_state = recurrent_gdn2(**moved, output_final_state=True, backend="triton")
    assert_close({"o": o.cpu(), "final_state": final_state.cpu()}, want, 1e-5)
    given = moved.pop("initial_state").detach()
    N, order = len(given), torch.arange(len(given), device=DEVICE).flip(0)
    pool = torch.full((N + 1, *given.shape[1:]), torch.nan, device=DEVICE)
    pool[1 + order] = given
    assert torch.equal(recurrent_gdn2_(**moved, state=pool, state_indices=1 + order, backend="triton"), o)
    assert torch.equal(pool[1 + order], final_state) and pool[0].isnan().all()


def test_no_kernel_reads_or_writes_outside_its_tensors(monkeypatch):
    launched = fenced(monkeypatch)
    assert_exact(small(T=100, K=5, V=3, groups=2, **LOGITS, resets=random_resets(1, 100)), in_segments)
    kernels = "prepare", "segment", "fold", "scan", "reverse", "gradient"
    assert launched == {f"{name}_kernel" for name in kernels}


@pytest.mark.slow
def test_no_result_depends_on_what_fresh_memory_holds():
    with memory_of_nan():
        assert_exact(small(T=50, K=5, V=3, cu=[0, 20, 50, 50], **LOGITS))


@pytest.mark.parametrize("function, known", [(chunk_gdn2, True), (recurrent_gdn2, False)], ids=["chunk", "recurrent"])
def test_no_kernel_is_given_what_erases_and_the_backward_has_A_qk_of_the_chunked_forward(monkeypatch, function, known):
    launches, launch = [], launching.launch

    def start(kernel, grid, candidates, args, constants):
        launches.append((kernel.__name__, args))
        launch(kernel, grid, candidates, args, constants)

    monkeypatch.setattr(launching, "launch", start)
    inputs = on_device(small(T=5))
    o, _ = function(**inputs, backend="triton")
    before = len(launches)
    o.sum().backward()
    assert all(args.get(name) is None for _, args in launches for name in ("b", "db", "E", "A", "R"))
    (made,) = [args["A_qk"] is not None for name, args in launches[before:] if name == "prepare_kernel"]
    assert made == (not known)


def test_the_ops_pass_opcheck():
    inputs = on_device(small(T=5, K=3, V=2, **LOGITS))
    output_grads = [grad.to(DEVICE, FP32) for grad in cotangents(inputs)]
    torch.library.opcheck(OPS.chunk_gdn2_saving, (*op_arguments(inputs), "triton"), test_utils=OPCHECKS)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in op_arguments(inputs)]
    _, _, A, A_qk = OPS.chunk_gdn2_saving(*args, "triton")
    assert (A.shape[0], A_qk.shape[0]) == (0, 1)
    backward = (*output_grads, *args, "triton", None, None, A_qk)
    torch.library.opcheck(OPS.chunk_gdn2_backward, backward, test_utils=OPCHECKS)
