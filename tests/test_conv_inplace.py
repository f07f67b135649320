"""causal_conv1d_ and causal_conv1d_qkv_, which overwrite their states: the definition's numbers, pools of blocks,
compiled too, and what they refuse. On both backends, Triton's interpreted."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from gdn2_titan.ops import causal_conv1d, causal_conv1d_, causal_conv1d_qkv_
from gdn2_titan.ops.short_conv.arguments import ConvInputs
from gdn2_titan.ops.short_conv.triton import launches as kernels
from gdn2_titan.ops.triton import launching
from tests.conv_cases import assert_close, oracle, variant_inputs
from tests.gdn2_cases import slowly
from tests.kernel_launches import OPCHECKS

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled, not interpreted, here: test_gpu.py", allow_module_level=True)
OPS = torch.ops.gdn2_titan
BACKENDS = ("torch", "triton")
CHANNELS = (3, 6, 4)  # with blocks of 4: less than one, more than one, one
cases = pytest.mark.parametrize("case", ["one token", "resets", "packed with resets"])
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def small_blocks():
    launching.pin("causal_conv1d_update_kernel", BD=4, num_warps=1)
    yield
    launching.pin("causal_conv1d_update_kernel")


def given(case="one token", D=6, **changes):
    """Arguments of causal_conv1d_, which need no gradient."""
    inputs = variant_inputs(case, D=D, **dict(dtype=torch.float32) | changes)
    inputs = {n: x.detach() if torch.is_tensor(x) else x for n, x in inputs.items()}
    state = inputs.pop("initial_state")
    return inputs | {"activation": "silu"}, state


def definition(inputs, state):
    exact = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    return dict(zip(("y", "state"), oracle(**exact, initial_state=state.double()), strict=True))


@cases
@backends
def test_output_and_updated_state_equal_the_definition(case, backend):
    inputs, state = given(case)
    want, memory, version = definition(inputs, state), state.data_ptr(), state._version
    y = causal_conv1d_(**inputs, state=state, backend=backend)
    assert_close({"y": y, "state": state}, want, 1e-5)
    assert state.data_ptr() == memory and state._version > version and y.is_contiguous()


@pytest.mark.parametrize("W", [2, 3, 4])
@backends
def test_steps_of_one_token_equal_the_whole_sequence_for_every_width(W, backend):
    inputs, state = given("state", T=7, W=W, bias=False)
    want = definition(inputs, state)
    steps = [
        causal_conv1d_(**inputs | {"x": inputs["x"][:, t : t + 1]}, state=state, backend=backend) for t in range(7)
    ]
    assert_close({"y": torch.cat(steps, 1), "state": state}, want, 1e-5)


INDICES = {"one token": [3, -1], "resets": [0, 4], "packed with resets": [4, -1, 1, 0]}


def pool_of(states, indices, blocks=5):
    """Memory of NaN with the states in the blocks that the indices say, which lie apart; and the pool in it."""
    shape = states.shape[1:]
    memory = torch.full((blocks, shape.numel() + 7), torch.nan, dtype=states.dtype)
    pool = memory[:, : shape.numel()].view(blocks, *shape)
    for block, state in zip(indices, states, strict=True):
        if block >= 0:
            pool[block] = state
    return memory, pool


def left_out(y, inputs, indices):
    """y with zeros for the sequences at -1."""
    cu = inputs["cu_seqlens"]
    counts = torch.tensor([y.shape[1]] * len(indices)) if cu is None else cu.diff()
    used = (torch.tensor(indices) >= 0).repeat_interleave(counts).view(y.shape[:2])
    return torch.where(used[..., None], y, 0.0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@cases
@backends
def test_the_blocks_of_a_pool_that_indices_name_are_updated_and_no_other_memory(backend, case, index_dtype):
    (inputs, state), indices = given(case), INDICES[case]
    want, states = causal_conv1d(**inputs, initial_state=state, output_final_state=True)
    (memory, pool), (expected, _) = pool_of(state, indices), pool_of(states, indices)
    named = torch.tensor(indices, dtype=index_dtype)
    y = causal_conv1d_(**inputs, state=pool, state_indices=named, backend=backend)
    torch.testing.assert_close((y, memory), (left_out(want, inputs, indices), expected), equal_nan=True)


@cases
@backends
def test_q_k_and_v_step_in_one_pool_of_all_three_as_they_do_alone(backend, case):
    parts, indices = [given(case, D, bias=False, seed=D) for D in CHANNELS], INDICES[case]
    outputs = [causal_conv1d(**i, initial_state=s, output_final_state=True) for i, s in parts]
    before, after = (torch.cat(x, 1) for x in ([s for _, s in parts], [s for _, s in outputs]))
    (memory, pool), (expected, _) = pool_of(before, indices), pool_of(after, indices)
    shared = parts[0][0]
    ys = causal_conv1d_qkv_(
        *[i["x"] for i, _ in parts], *[i["weight"] for i, _ in parts], *pool.split(CHANNELS, 1), activation="silu",
        cu_seqlens=shared["cu_seqlens"], resets=shared["resets"], state_indices=torch.tensor(indices), backend=backend,
    )  # fmt: skip
    want = [left_out(y, shared, indices) for y, _ in outputs]
    torch.testing.assert_close((*ys, memory), (*want, expected), equal_nan=True)


def qkv_given(case="one token", dtype=torch.float32):
    """Positional arguments of causal_conv1d_qkv_."""
    parts = [given(case, D, bias=False, dtype=dtype, seed=D) for D in CHANNELS]
    return [*(i["x"] for i, _ in parts), *(i["weight"] for i, _ in parts), *(s for _, s in parts)]


def test_a_step_of_q_k_and_v_is_one_launch_of_one_candidate_that_reads_no_value_on_the_host(monkeypatch):
    launched = []
    monkeypatch.setattr(launching, "launch", lambda *args: launched.append(args))
    q, k, v, *others = (x.to("meta") for x in qkv_given())  # tensors of the meta device have no values
    of_each = zip((q, k, v), others[:3], others[3:], strict=True)
    parts = [ConvInputs(x, weight, None, True, state, None, None) for x, weight, state in of_each]
    kernels.update(parts, torch.zeros(2, dtype=torch.int32, device="meta"))
    ((kernel, _, candidates, *_),) = launched
    assert kernel.__name__ == "causal_conv1d_update_kernel"
    assert len(candidates) == 1, "tuning would take several steps in place"


def test_no_two_threads_hold_the_same_number_of_a_state():
    assert kernels.UPDATE_CONFIG["BD"] >= 64 * kernels.UPDATE_CONFIG["num_warps"]  # AMD's warps have 64 threads


def test_a_row_that_is_left_out_reads_no_block_and_may_hold_nan():
    inputs, state = given()
    inputs["x"][1] = torch.nan
    _, pool = pool_of(state, [2, -1])
    y = causal_conv1d_(**inputs, state=pool, state_indices=torch.tensor([2, -1]), backend="triton")
    assert not y[1].any() and y.isfinite().all()


@pytest.mark.parametrize("backend, checks", [("auto", None), *slowly(("triton", OPCHECKS))])
@pytest.mark.parametrize("case", ["packed with resets", *slowly("one token", "resets")])
def test_the_mutating_operators_pass_opcheck(case, backend, checks):
    options = {} if checks is None else {"test_utils": checks}
    inputs, state = given(case)
    packing = inputs["cu_seqlens"], inputs["resets"], backend
    _, pool = pool_of(state, INDICES[case])
    indices = torch.tensor(INDICES[case])
    one = inputs["x"], inputs["weight"], inputs["bias"], True
    for args in ((*one, state, *packing), (*one, pool.nan_to_num(), *packing, indices)):
        torch.library.opcheck(OPS.causal_conv1d_, args, **options)
    *tensors, q_state, k_state, v_state = qkv_given(case)
    for end in ((), (torch.tensor([*range(len(q_state))]),)):
        args = (*tensors, True, q_state, k_state, v_state, *packing, *end)
        torch.library.opcheck(OPS.causal_conv1d_qkv_, args, **options)


def around(inputs, state, indices):
    """A step with work before and after it, on the state too."""
    state.mul_(0.5)
    y = causal_conv1d_(**inputs | {"x": 2 * inputs["x"]}, state=state, state_indices=indices)
    return y + 1, state.sum()


@pytest.mark.parametrize("indices", [None, torch.tensor([1, 0])], ids=["states", "pool"])
def test_a_compiled_step_equals_eager_and_updates_the_same_memory(indices):
    torch._dynamo.reset()
    inputs, state = given()
    expected, memory = state.clone(), state.data_ptr()
    want = around(inputs, expected, indices)
    got = torch.compile(around, fullgraph=True, backend="aot_eager")(inputs, state, indices)
    assert state.data_ptr() == memory
    torch.testing.assert_close((*got, state), (*want, expected), rtol=0, atol=0)


def test_compiled_steps_of_growing_batches_of_q_k_and_v_share_a_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(causal_conv1d_qkv_, fullgraph=True, dynamic=True, backend=counter)
    for B in (5, 7, 9):
        parts = [given("one token", D, bias=False, B=B) for D in CHANNELS]
        tensors = [*(i["x"] for i, _ in parts), *(i["weight"] for i, _ in parts)]
        states, expected = [s for _, s in parts], [s.clone() for _, s in parts]
        want = causal_conv1d_qkv_(*tensors, *expected, "silu")
        torch.testing.assert_close((*compiled(*tensors, *states, "silu"), *states), (*want, *expected), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_flop_counter_counts_a_step():
    with FlopCounterMode(display=False) as counter:
        causal_conv1d_qkv_(*qkv_given())
    assert counter.get_total_flops() == 2 * 2 * sum(CHANNELS) * 4  # 2 rows of 1 token


def test_a_sequence_of_no_tokens_keeps_its_state():
    inputs, state = given("state", T=0)
    before = state.clone()
    assert causal_conv1d_(**inputs, state=state, backend="triton").shape == inputs["x"].shape
    assert torch.equal(state, before)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "state"])
def test_a_call_that_would_need_a_gradient_is_refused_with_the_operator_to_use_instead(name):
    inputs, state = given()
    inputs["state"], before = state, state.clone()
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="^causal_conv1d_ .* has no gradient; use causal_conv1d or"):
        causal_conv1d_(**inputs)
    assert torch.equal(state, before)
    with torch.no_grad():
        causal_conv1d_(**inputs)
    assert not torch.equal(state, before)


def test_a_step_of_q_k_and_v_that_would_need_a_gradient_is_refused():
    tensors = qkv_given()
    tensors[4].requires_grad_()
    with pytest.raises(RuntimeError, match="^causal_conv1d_qkv_ .* has no gradient; use causal_conv1d_qkv or"):
        causal_conv1d_qkv_(*tensors)


STATE = torch.zeros(2, 6, 3)
REFUSALS = [
    (TypeError, "state is a NoneType; it must be a torch.Tensor", None, None),
    (TypeError, "state has dtype torch.float64; it must be x's dtype torch.float32", STATE.double(), None),
    (ValueError, r"state has shape \(6, 3\); it must be \[N, D, W-1\] = \(2, 6, 3\)", STATE[0], None),
    (ValueError, r"state has shape \(3, 6, 3\); it must be \[N, D, W-1\]", torch.zeros(3, 6, 3), None),
    (ValueError, r"state has strides \(18, 1, 6\); every entry", torch.zeros(2, 3, 6).mT, None),
    (ValueError, r"state has strides \(0, 3, 1\); its entries .* must not overlap", STATE[:1].expand(2, 6, 3), None),
    (ValueError, "state is on meta; it must be on x's device cpu", STATE.to("meta"), None),
    (ValueError, r"state has shape \(2, 3, 6\); it must be \[blocks, D, W-1\]", STATE.mT, torch.tensor([0, 1])),
    (TypeError, "state_indices is a list; it must be a torch.Tensor or None", STATE, [0, 1]),
    (TypeError, "state_indices has dtype torch.float32; it must be int32 or int64", STATE, torch.zeros(2)),
    (ValueError, r"state_indices has shape \(3,\); it must be \[N\] = \(2,\)", STATE, torch.tensor([0, 1, 2])),
    (ValueError, "state_indices is on meta; it must be on x's device cpu", STATE,
     torch.zeros(2, dtype=torch.int64, device="meta")),
]  # fmt: skip


@pytest.mark.parametrize("error, sentence, state, indices", REFUSALS, ids=range(len(REFUSALS)))
def test_a_state_or_indices_that_cannot_serve_are_refused(error, sentence, state, indices):
    inputs, _ = given()
    with pytest.raises(error, match=f"^{sentence}"):
        causal_conv1d_(**inputs, state=state, state_indices=indices)


@pytest.mark.parametrize("which, name", [(0, "q_state"), (1, "k_state"), (2, "v_state")])
def test_of_q_k_and_v_the_state_that_cannot_serve_is_named(which, name):
    tensors = qkv_given()
    tensors[6 + which] = tensors[6 + which].double()
    with pytest.raises(TypeError, match=f"^{name} has dtype torch.float64; it must be {name[0]}'s dtype torch.float32"):
        causal_conv1d_qkv_(*tensors)


def test_bad_cu_seqlens_are_refused_before_the_state_is_touched():
    inputs, state = given("packed with resets")
    before = state.clone()
    inputs["cu_seqlens"] = torch.tensor([0, 5, 3, 4, 7])
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="^cu_seqlens is"):
            causal_conv1d_(**inputs, state=state, backend=backend)
    assert torch.equal(state, before)


def test_bf16_states_hold_the_inputs_exactly():
    inputs, state = given("state", dtype=torch.bfloat16, T=6)
    xs = torch.cat((state.mT, inputs["x"]), 1)
    for t, backend in zip(range(6), itertools.cycle(BACKENDS)):
        causal_conv1d_(**inputs | {"x": inputs["x"][:, t : t + 1]}, state=state, backend=backend)
        assert torch.equal(state, xs[:, t + 1 : t + 4].mT)
