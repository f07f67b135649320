"""segment_gdn2's kernels against the definition in fp64: in Triton's interpreter where there is no GPU, else on it."""

import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

from gdn2_titan.ops.triton import launching
from tests.gdn2_cases import (
    DECAYS,
    DEVICE,
    RAW,
    assert_close,
    assert_norms_close,
    cases,
    cast,
    examples,
    in_half,
    leaves,
    make,
    norm_errors,
    on_device,
    random_resets,
    slowly,
    strided,
)  # fmt: skip
from tests.kernel_launches import (
    OPCHECKS,
    fenced,
    memory_of_nan,
    narrow,
    with_other_candidates,
    without_pytorchs_kernels,
)
from tests.segment_cases import (
    RESULTS,
    composed,
    part,
    segment,
    segment_arguments,
    segment_by_definition,
    without_gradients,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
OPS = torch.ops.gdn2_titan


def small(**options):
    return make(**dict(T=70, H=1, K=16, V=16, dtype=FP32, state=False) | options)


def run(inputs, backend="triton"):
    """Results here of the op there."""
    return {name: x.detach().cpu() for name, x in segment(on_device(inputs), backend).items()}


def rounding(name, want):
    """The transition begins as the identity: erased to a small remainder, it keeps rounding of what was erased."""
    return torch.finfo(FP32).eps * want[name][..., 0].numel() ** 0.5 if name == "transition" and want[name].any() else 0


def assert_exact(inputs):
    """Each result by its own norm."""
    got, want = run(inputs), segment_by_definition(inputs)
    for name, (error, size) in norm_errors(got, want).items():
        limit = 1e-5 * size + rounding(name, want)
        assert error <= limit, f"{name}: off by {error:.2e}, its norm is {size:.2e}"


@pytest.mark.parametrize("decay", DECAYS)
def test_every_strength_of_decay_is_exact_to_rounding(decay):
    assert_exact(small(T=150 if decay == "weak" else 70, groups=2, K=8, V=8, decay=decay))


@pytest.mark.parametrize("T", [1, 33, 64, 65, *slowly(32, 63, 200)])
def test_any_length_is_exact_to_rounding(T):
    assert_exact(small(T=T))


@pytest.mark.parametrize("K, V", [(1, 3), (20, 48), *slowly((48, 20), (128, 128), (16, 144), (144, 16), (256, 16))])
def test_any_head_sizes_are_exact_to_rounding(K, V):
    assert_exact(small(T=66 if K + V < 200 else 34, K=K, V=V))


OPTIONS = {
    "norm": dict(l2norm=True),
    "raw decay": dict(gate=True),
    "raw decay, flat bias": dict(gate=True, dt_bias="[H * K]", H=2),
    "raw decay without a bias": dict(gate=True, dt_bias=None),
    "sigmoid": dict(sigmoid=True),
    "sigmoid, doubled": dict(sigmoid=True, erase_scale=2.0),
    "scale": dict(scale=-0.3),
    "grouped heads, batch": dict(B=2, H=2, groups=3, V=8),
    "all raw, grouped heads, batch": dict(B=2, H=2, groups=2, K=8, **RAW),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_is_exact_to_rounding(case):
    assert_exact(small(**dict(T=40) | OPTIONS[case]))


RESETS = {
    "first token": [0],
    "edge of a chunk": [64],
    "middle of a chunk": [32],
    "last token of a chunk": [63],
    "last token": [99],
    "several": [40, 41, 70],
}


@pytest.mark.parametrize("case", RESETS)
def test_behind_a_reset_nothing_of_the_entering_state_is_left_and_all_else_is_exact_to_rounding(case):
    inputs = small(T=100, groups=2, K=8, V=8, resets=[t in RESETS[case] for t in range(100)])
    assert_exact(inputs)
    got = run(inputs)
    assert not got["transition"].any()
    assert not got["read"][:, RESETS[case][0] :].any()


def test_a_reset_in_one_sequence_of_a_batch_leaves_the_others_alone():
    assert_exact(small(B=3, T=70, resets=[[t == 0 for t in range(70)], [False] * 70, [t == 69 for t in range(70)]]))


@pytest.mark.parametrize("T, resets, unread", [(200, [70], 2), *slowly((1100, [1030], 17), (1100, [6, 1030], 1))])
def test_behind_the_chunk_of_a_reset_the_transition_reads_and_multiplies_nothing(T, resets, unread, monkeypatch):
    """What it must not read is NaN. The resets are searched 1,024 tokens at a time."""
    launch = launching.launch

    def poison(kernel, grid, candidates, args, constants):
        if kernel.__name__ == "segment_kernel":
            for name in ("Q", "E", "Kt", "A_qk", "A", "total"):
                args[name][unread:] = torch.nan
        launch(kernel, grid, candidates, args, constants)

    inputs = small(T=T, K=4, V=4, resets=[t in resets for t in range(T)])
    want = segment_by_definition(inputs)
    monkeypatch.setattr(launching, "launch", poison)
    got = run(inputs)
    assert got["contribution"].isnan().any()
    for name in ("read", "transition"):
        assert_norms_close({name: got[name]}, {name: want[name]}, 1e-5)


@pytest.mark.parametrize("decay", ["-inf", "-1e6"])
def test_a_token_that_forgets_in_every_channel_is_a_reset(decay):
    inputs = small(T=100)
    inputs["g"].data[:, 50] = float(decay)
    assert_exact(inputs)
    assert not run(inputs)["transition"].any()


@pytest.mark.parametrize("options", [{}, RAW | dict(groups=2, resets=random_resets(1, 100))], ids=["plain", "raw"])
@pytest.mark.parametrize("at", [70, *slowly(64)])
def test_the_maps_of_two_parts_compose_to_that_of_the_whole(at, options):
    inputs = without_gradients(small(T=100, V=8, **options))
    first, second = (run(part(inputs, *span)) for span in ((0, at), (at, 100)))
    assert_norms_close(composed(first, second), segment_by_definition(inputs), 1e-5)


@examples(2, 16)
def test_the_map_equals_the_definition_for_any_sizes_and_options(count):
    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(cases(longest=100, heads=2, sizes=(1, 5, 16, 24)))
    def check(case):
        inputs = make(**case | {"cu": None, "state": False}, dtype=FP32)
        assert_close(run(inputs), segment_by_definition(inputs), 1e-5, floor=32 * torch.finfo(FP32).eps)

    check()


HALF = {
    "weak": dict(),
    "mixed": dict(decay="mixed"),
    "spikes": dict(decay="spikes in some channels"),
    "raw, grouped": dict(**RAW, groups=2),
    "raw, resets": dict(**RAW, resets=[t == 100 for t in range(150)]),
}


# The cases and the bound of test_triton_chunk, of another kernel.
@pytest.mark.parametrize(
    "case, dtype, decay_dtype",
    [
        ("raw, resets", BF16, BF16),
        *slowly(
            ("raw, grouped", BF16, BF16),
            ("weak", FP16, FP32),
            ("weak", BF16, FP32),
            ("mixed", BF16, FP32),
            ("spikes", BF16, FP32),
            ("raw, grouped", FP16, FP16),
        ),
    ],
    ids=str,
)
def test_half_precision_errs_at_most_twice_what_the_dtype_alone_costs(case, dtype, decay_dtype):
    """What it costs: the error of the PyTorch form, which rounds inputs and outputs and computes in fp32 between."""
    exact_inputs = make(**dict(T=150, H=1, K=64, V=64, state=False) | HALF[case])
    rounded = in_half(exact_inputs, dtype, decay_dtype)
    want = segment_by_definition(exact_inputs)
    got = run(rounded)
    alone = norm_errors(segment(without_gradients(rounded), "torch"), want)
    assert [got[name].dtype for name in RESULTS] == [dtype, dtype, FP32, FP32]
    for name, (error, size) in norm_errors(got, want).items():
        limit = 2 * alone[name][0] + rounding(name, want)
        assert error <= limit, f"{name}: off by {error:.2e} of {size:.2e}, PyTorch by {alone[name][0]:.2e}"


@pytest.mark.parametrize("V", [3, 40])
def test_blocks_of_16_channels_are_exact_to_rounding(V, monkeypatch):
    """However few channels a configuration takes at a time: then heads have several programs of either kind."""
    with_other_candidates(monkeypatch, narrow)
    assert_exact(small(T=66, K=24, V=V, groups=2, **RAW))


def test_no_kernel_reads_or_writes_outside_its_tensors(monkeypatch):
    launched = fenced(monkeypatch)
    assert_exact(small(T=70, K=5, V=3, groups=2, **RAW, resets=[t == 20 for t in range(70)]))
    assert launched == {"prepare_kernel", "segment_kernel"}


def test_no_result_depends_on_what_fresh_memory_holds():
    with memory_of_nan():
        assert_exact(small(T=140, K=5, V=3, groups=2, **RAW, resets=[t == 20 for t in range(140)]))


def test_the_memory_layout_of_inputs_does_not_matter():
    inputs = without_gradients(small(B=2, T=40, H=2, K=8, V=8, **RAW, resets=random_resets(2, 40)))
    laid = inputs | {name: strided(x) for name, x in leaves(inputs).items()}
    assert not laid["q"].is_contiguous()
    assert_norms_close({n: x.cpu() for n, x in segment({n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
                       for n, x in laid.items()}).items()}, segment_by_definition(inputs), 1e-5)  # fmt: skip


def test_gradients_of_all_inputs_are_exact_to_rounding():
    inputs = small(groups=2, V=8, **RAW)
    generator = torch.Generator().manual_seed(1)

    def gradients(results, given):
        output_grads = [torch.randn(x.shape, generator=generator.manual_seed(1), dtype=torch.float64).to(x)
                        for x in results.values()]  # fmt: skip
        grads = torch.autograd.grad(list(results.values()), list(leaves(given).values()), output_grads)
        return {name: grad.cpu() for name, grad in zip(leaves(given), grads, strict=True)}

    moved, exact = on_device(inputs), cast(inputs, torch.float64)
    assert_norms_close(gradients(segment(moved), moved), gradients(segment_by_definition(exact), exact), 1e-5)


def test_the_op_passes_opcheck():
    inputs = on_device(small(T=5, K=3, V=2, **RAW, resets=[0, 1, 0, 0, 1]))
    torch.library.opcheck(OPS.segment_gdn2, (*segment_arguments(inputs), "triton"), test_utils=OPCHECKS)


def test_the_kernels_asked_for_run_and_nothing_in_their_place(monkeypatch):
    without_pytorchs_kernels(monkeypatch)
    run(small(T=3))
