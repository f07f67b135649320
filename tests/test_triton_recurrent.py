"""The decode kernel against the definition in fp64: in Triton's interpreter where there is no GPU, else on it."""

import pytest
import torch

from gdn2_titan.ops import naive_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_
from gdn2_titan.ops.gdn2.triton.recurrent import configuration, padded
from gdn2_titan.ops.triton import launching
from tests.gdn2_cases import (
    DECAYS,
    DEVICE,
    RAW,
    RESULTS,
    assert_close,
    cast,
    errors,
    leaves,
    make,
    reversed_layout,
    slowly,
)

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def moved(inputs):
    return {n: x.detach().to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


def kernel(inputs):
    """{"o", "final_state"} of the functional op, after a look whether the mutating one does the very same."""
    outputs = recurrent_gdn2(**inputs, output_final_state=True, backend="triton")
    q, v, initial_state = inputs["q"], inputs["v"], inputs.get("initial_state")
    state = torch.zeros_like(outputs[1]) if initial_state is None else initial_state.float().contiguous().clone()
    o = recurrent_gdn2_(**{n: x for n, x in inputs.items() if n != "initial_state"}, state=state, backend="triton")
    assert torch.equal(o, outputs[0]) and torch.equal(state, outputs[1])
    assert (o.dtype, o.shape, state.dtype, o.device) == (v.dtype, v.shape, FP32, q.device)
    return dict(zip(RESULTS, outputs, strict=True))


def definition(inputs):
    with torch.no_grad():
        outputs = naive_recurrent_gdn2(**cast(inputs, FP64), output_final_state=True)
    return {name: x.cpu() for name, x in zip(RESULTS, outputs, strict=True)}


def compare(inputs):
    got = kernel(moved(inputs))
    assert_close({name: x.cpu() for name, x in got.items()}, definition(inputs), 1e-5)


# The options of test_gdn2_reference, of another implementation.
OPTIONS = {
    "plain": dict(),
    "no state": dict(state=False),
    "one token": dict(T=1),
    "one token, raw": dict(T=1, **RAW),
    "norm": dict(l2norm=True),
    "raw decay": dict(gate=True),
    "raw decay, flat bias": dict(gate=True, dt_bias="[H * K]"),
    "raw decay without a bias": dict(gate=True, dt_bias=None),
    "sigmoid": dict(sigmoid=True),
    "sigmoid, doubled": dict(sigmoid=True, erase_scale=2.0),
    "scale": dict(scale=-0.3),
    "grouped heads": dict(groups=3),
    "resets": dict(resets=[1, 0, 0, 0, 0, 0, 0, 0, 1, 0]),
    "resets, raw, grouped": dict(**RAW, groups=2, resets=[0, 0, 1, 1, 0, 1, 0, 0, 0, 0]),
    "packed": dict(B=1, cu=[0, 1, 5]),
    "packed, empty sequences, raw": dict(B=1, cu=[0, 0, 2, 2, 5, 5], **RAW, groups=2),
    "packed, no states": dict(B=1, cu=[0, 0, 2, 2, 5, 5], state=False),
    "packed, resets": dict(B=1, cu=[0, 2, 2, 5], resets=[0, 1, 0, 0, 1]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_equals_the_definition(case):
    compare(make(**dict(B=2, T=5, H=2, K=8, V=6, dtype=FP32) | OPTIONS[case]))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_both_index_dtypes_of_cu_seqlens_serve(index_dtype):
    inputs = make(B=1, T=5, K=8, V=6, cu=[0, 3, 3, 5], dtype=FP32)
    compare(inputs | {"cu_seqlens": inputs["cu_seqlens"].to(index_dtype)})


@pytest.mark.parametrize("T", [24, *slowly(1)])
@pytest.mark.parametrize("decay", DECAYS)
def test_every_strength_of_decay_equals_the_definition(decay, T):
    compare(make(B=1, T=T, H=2, K=4, V=4, decay=decay, dtype=FP32))


@pytest.mark.parametrize("token", [0, 1])
@pytest.mark.parametrize("decay", [-torch.inf, -1e6])
def test_a_token_of_total_decay_forgets_the_state_however_large_it_is(decay, token):
    inputs = make(T=2, K=4, V=4, dtype=FP32)
    with torch.no_grad():
        inputs["g"][:, token] = decay
        inputs["initial_state"].mul_(1e30)
    got = {name: x.cpu() for name, x in kernel(moved(inputs)).items()}
    want = definition(inputs)
    assert_close({"o": got["o"][:, token:]}, {"o": want["o"][:, token:]}, 1e-5)
    assert_close({"final_state": got["final_state"]}, {"final_state": want["final_state"]}, 1e-5)


@pytest.mark.parametrize("g", [-1e6, -100.0, -20.0, 20.0, 1e6])
@pytest.mark.parametrize("A_log", [-20.0, 0.0, 3.0])
def test_the_raw_decay_is_exact_at_both_ends_of_the_softplus(A_log, g):
    inputs = make(T=2, K=4, V=4, gate=True, dt_bias=None, dtype=FP32)
    inputs["g"].data.fill_(g)
    inputs["A_log"].data.fill_(A_log)
    compare(inputs)


def test_a_small_raw_decay_adds_up_over_many_tokens():
    # softplus(-17) = 4.1e-8 is less than half a rounding of 1: computed as log(1 + e) it would be nothing.
    inputs = make(T=40, H=1, K=2, V=2, gate=True, dt_bias=None, dtype=FP32)
    inputs["g"].data.fill_(-17.0)
    inputs["A_log"].data.fill_(14.0)  # -0.05 a token
    for name in ("b", "w"):
        inputs[name].data.zero_()
    compare(inputs)
    state, final_state = inputs["initial_state"], definition(inputs)["final_state"]
    assert (final_state.norm() / state.norm()).item() == pytest.approx(0.137, rel=0.02)  # exp(-40 * 0.0498)


@pytest.mark.parametrize("K, V", [(1, 1), (17, 33), (24, 40), (64, 80), (5, 256), (256, 3)])
def test_any_head_sizes_equal_the_definition(K, V):
    compare(make(B=1, T=2, H=1, groups=2, K=K, V=V, dtype=FP32))
    compare(make(B=1, T=1, H=2, K=K, V=V, **RAW, dtype=FP32))


@pytest.mark.parametrize("dtype", [BF16, *slowly(FP16)], ids=str)
@pytest.mark.parametrize("case", ["plain", "one token", "resets, raw, grouped", "packed, empty sequences, raw"])
def test_half_precision_errs_by_the_rounding_of_inputs_and_output_alone(case, dtype):
    exact = make(**dict(B=2, T=5, H=2, K=16, V=16) | OPTIONS[case])
    if case != "plain":
        exact = cast(exact, dtype, only=("g", "b", "w"))
    rounded = cast(cast(exact, dtype, only=("q", "k", "v", "b", "w")), FP32, only=("A_log", "dt_bias", "initial_state"))
    got = {name: x.cpu() for name, x in kernel(moved(rounded)).items()}
    alone, eps = definition(rounded), torch.finfo(dtype).eps
    # Nothing but o is rounded to the inputs' dtype on the way.
    assert_close({"final_state": got["final_state"]}, {"final_state": alone["final_state"]}, 1e-5)
    size = alone["o"].abs().max()
    assert ((got["o"].double() - alone["o"]).abs() <= eps / 2 * alone["o"].abs() + 1e-5 * size).all()
    want = definition(exact)
    allowed = errors(alone, want)
    for name, (error, size) in errors(got, want).items():
        floor = (eps if name == "o" else 1e-5) * size
        assert error <= 2 * allowed[name][0] + floor, name


@pytest.mark.parametrize("state_dtype", [FP16, BF16, FP64], ids=str)
def test_the_initial_state_may_have_any_float_dtype(state_dtype):
    inputs = cast(make(B=2, T=2, K=4, V=4, dtype=FP32), state_dtype, only=("initial_state",))
    compare(inputs)


@pytest.mark.parametrize("names", [("g", "b", "w"), ("A_log", "dt_bias")], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP64], ids=str)
def test_gates_and_parameters_may_have_other_dtypes_than_q(dtype, names):
    compare(cast(make(T=2, **RAW, dtype=FP32), dtype, only=names))


def test_the_memory_layout_of_inputs_does_not_matter():
    inputs = make(B=2, T=3, groups=2, **RAW, dtype=FP32)
    laid = inputs | {n: reversed_layout(x) for n, x in leaves(inputs).items()}
    laid |= {n: inputs[n][..., :1].expand(inputs[n].shape) for n in ("g", "b")}
    assert not any(x.is_contiguous() for x in leaves(laid).values() if x.ndim > 1)
    compare(laid)


def test_steps_of_one_token_in_place_equal_the_whole_sequence():
    inputs = make(B=2, T=6, groups=2, **RAW, resets=[t in (3, 10) for t in range(12)], dtype=FP32)
    want = definition(inputs)
    given = moved(inputs)
    state = given.pop("initial_state").clone()
    memory, outs = state.data_ptr(), []
    for t in range(6):
        step = {n: x[:, t : t + 1] if n in "qkvgbw" or n == "resets" else x for n, x in given.items()}
        outs.append(recurrent_gdn2_(**step, state=state, backend="triton"))
    assert state.data_ptr() == memory
    assert_close({"o": torch.cat(outs, 1).cpu(), "final_state": state.cpu()}, want, 1e-5)


def test_nothing_is_written_outside_the_state_in_place():
    inputs = moved(make(B=2, T=2, K=5, V=3, dtype=FP32))
    want = recurrent_gdn2(**inputs, output_final_state=True, backend="triton")
    state = inputs.pop("initial_state")
    cache = torch.full((3, *state.shape), torch.nan, device=DEVICE)
    cache[1] = state
    o = recurrent_gdn2_(**inputs, state=cache[1], backend="triton")
    assert torch.equal(o, want[0]) and torch.equal(cache[1], want[1])
    assert cache[[0, 2]].isnan().all()


@pytest.mark.parametrize("case", ["one token, raw", "packed"])
def test_a_pools_blocks_are_updated_where_the_indices_say_and_no_other_memory(case):
    inputs = moved(cast(make(**dict(K=20, V=40) | POOLS[case]), FP32))
    state = inputs.pop("initial_state")
    N = len(state)
    indices = [3, -1, 0, 5][:N]
    want, states = recurrent_gdn2(**inputs, initial_state=state, output_final_state=True, backend="triton")
    memory = torch.full((6, state[0].numel() + 8), torch.nan, device=DEVICE)
    pool = memory[:, : state[0].numel()].view(6, *state.shape[1:])
    expected = memory.clone()
    for block, before, after in zip(indices, state, states, strict=True):
        if block >= 0:
            pool[block] = before
            expected[block, : after.numel()] = after.flatten()
    o = recurrent_gdn2_(
        **inputs, state=pool, backend="triton", state_indices=torch.tensor(indices, dtype=torch.int32, device=DEVICE)
    )
    cu = inputs["cu_seqlens"]
    counts = torch.tensor([inputs["q"].shape[1]] * N) if cu is None else cu.diff().cpu()
    used = (torch.tensor(indices) >= 0).repeat_interleave(counts).view(inputs["q"].shape[:2]).to(DEVICE)
    assert torch.equal(o, torch.where(used[:, :, None, None], want, 0.0))
    torch.testing.assert_close(memory, expected, rtol=0, atol=0, equal_nan=True)


POOLS = {"one token, raw": dict(B=4, T=1, **RAW), "packed": dict(T=9, cu=[0, 3, 4, 9])}


def test_inputs_are_left_alone_and_results_are_contiguous_memory_of_their_own():
    inputs = moved(make(B=1, T=1, H=1, groups=2, **RAW, dtype=FP32))
    before = {n: inputs[n].clone() for n in leaves(inputs)}
    outputs = recurrent_gdn2(**inputs, output_final_state=True, backend="triton")
    assert all(torch.equal(inputs[n], x) for n, x in before.items())
    memory = {x.untyped_storage().data_ptr() for x in (*outputs, *leaves(inputs).values())}
    assert len(memory) == 2 + len(leaves(inputs)) and all(x.is_contiguous() for x in outputs)


@pytest.mark.parametrize("bounds", [[1, 4], [0, 3], [0, 5], [0, 3, 2, 4], [-1, 4]], ids=str)
def test_bad_cu_seqlens_are_refused_before_the_state_is_touched(bounds):
    inputs = moved(make(T=4, cu=[0] * (len(bounds) - 1) + [4], dtype=FP32))
    inputs["cu_seqlens"] = torch.tensor(bounds, device=DEVICE)
    state = inputs.pop("initial_state")
    before = state.clone()
    for call in (
        lambda: recurrent_gdn2(**inputs, initial_state=state, backend="triton"),
        lambda: recurrent_gdn2_(**inputs, state=state, backend="triton"),
    ):
        with pytest.raises(ValueError, match="^cu_seqlens is .*; it must start at 0, never fall, and end at T = 4"):
            call()
    assert torch.equal(state, before)


@pytest.mark.parametrize("sizes, found", [(dict(K=257), "head size 257"), (dict(dtype=FP64), "dtype torch.float64")])
def test_what_the_kernel_cannot_do_is_refused(sizes, found):
    inputs = moved(make(**dict(T=1, dtype=FP32) | sizes))
    with pytest.raises(ValueError, match=f"^q has {found}; for the Triton kernels it must be"):
        recurrent_gdn2(**inputs, backend="triton")


def test_a_call_is_one_launch_of_one_candidate(monkeypatch):
    launches, launch = [], launching.launch
    monkeypatch.setattr(launching, "launch", lambda *args: launches.append(args) or launch(*args))
    inputs = moved(make(T=2, **RAW, dtype=FP32))
    for count, call in enumerate((recurrent_gdn2, recurrent_gdn2), 1):
        call(**inputs, backend="triton")
        assert len(launches) == count
        assert len(launches[-1][2]) == 1, "tuning would take several steps in place"


def test_no_two_threads_hold_the_same_number_of_a_state_that_is_updated_in_place():
    for K in range(1, 257):
        for V in range(1, 257):
            config = configuration(padded(K), V)
            assert padded(K) * config["BV"] >= 4 * 64 * config["num_warps"]  # AMD's warps have 64 threads
