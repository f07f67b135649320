"""recurrent_gdn2_, which updates its state in place: the numbers of recurrent_gdn2, compiled too, and what it refuses.

The kernel itself: test_triton_recurrent.py."""

import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.ops import naive_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_
from gdn2_titan.ops.gdn2.flops import forward_flops
from tests.gdn2_cases import LEAVES, assert_close, leaves, make

OP = torch.ops.gdn2_titan.recurrent_gdn2_
RAW = dict(l2norm=True, gate=True, sigmoid=True, erase_scale=2.0)
CASES = {
    "plain": dict(),
    "one token": dict(T=1, B=2),
    "raw, resets, grouped": dict(**RAW, groups=2, resets=[0, 0, 1, 0, 0]),
    "packed, empty sequences": dict(cu=[0, 0, 2, 5, 5]),
    "bf16": dict(**RAW, groups=2, dtype=torch.bfloat16),
}
no_compiler = not (shutil.which("g++") or shutil.which("c++"))
inductor = pytest.mark.skipif(no_compiler, reason="inductor needs a C++ compiler")
cases = pytest.mark.parametrize("case", CASES)


def given(**options):
    """Arguments of recurrent_gdn2_, which need no gradient."""
    inputs = make(**dict(T=5, K=4, V=3) | options)
    inputs |= {n: x.detach() for n, x in leaves(inputs).items()}
    state = inputs.pop("initial_state")
    return inputs | {"state": state.to(torch.promote_types(state.dtype, torch.float32))}


def op_arguments(inputs):
    tensors = [inputs.get(n) for n in ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "state")]
    options = [inputs[n] for n in ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_sigmoid_in_kernel")]
    scale = inputs["q"].shape[-1] ** -0.5
    return (*tensors, inputs["cu_seqlens"], inputs["resets"], scale, *options, inputs["erase_scale"])


def split(inputs):
    inputs = dict(inputs)
    return inputs, inputs.pop("state")


@cases
def test_the_mutating_op_passes_opcheck(case):
    torch.library.opcheck(OP, op_arguments(given(**CASES[case])))


@cases
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_output_and_updated_state_equal_those_of_the_functional_op(backend, case):
    inputs, state = split(given(**CASES[case]))
    want = recurrent_gdn2(**inputs, initial_state=state.clone(), output_final_state=True)
    memory, version = state.data_ptr(), state._version
    o = recurrent_gdn2_(**inputs, state=state, backend=backend)
    assert (o.dtype, state.data_ptr()) == (inputs["v"].dtype, memory) and state._version > version
    torch.testing.assert_close((o, state), want, rtol=1e-6, atol=1e-6)
    assert o.is_contiguous() and o.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


def test_a_state_inside_a_larger_cache_is_updated_there_and_nowhere_else():
    inputs, state = split(given(B=2))
    cache = torch.full((4, *state.shape), torch.nan, dtype=state.dtype)
    cache[2] = state
    o = recurrent_gdn2_(**inputs, state=cache[2])
    want = recurrent_gdn2(**inputs, initial_state=state, output_final_state=True)
    assert torch.equal(o, want[0]) and torch.equal(cache[2], want[1])
    assert cache[[0, 1, 3]].isnan().all()


POOLS = {  # case: state_indices of its sequences
    "one token": [3, 0],
    "raw, resets, grouped": [2],
    "packed, empty sequences": [4, -1, 1, 0],
    "bf16": [1],
}


def pool_of(state, indices, blocks=5):
    """A pool in larger memory, with the states of the sequences where the indices say."""
    memory = torch.full((blocks, state[0].numel() + 7), torch.nan, dtype=state.dtype)
    pool = memory[:, : state[0].numel()].view(blocks, *state.shape[1:])
    for block, x in zip(indices, state, strict=True):
        if block >= 0:
            pool[block] = x
    return memory, pool


def check_pool(inputs, state, indices, index_dtype=torch.int64, **options):
    """One call on a pool: the named blocks as the functional op's states, all other memory as it was."""
    want, states = recurrent_gdn2(**inputs, initial_state=state, output_final_state=True)
    memory, pool = pool_of(state, indices)
    expected_memory, expected = pool_of(states, indices)
    o = recurrent_gdn2_(**inputs, state=pool, state_indices=torch.tensor(indices, dtype=index_dtype), **options)
    cu = inputs["cu_seqlens"]
    counts = torch.tensor([inputs["q"].shape[1]] * len(indices)) if cu is None else cu.diff()
    used = (torch.tensor(indices) >= 0).repeat_interleave(counts).view(inputs["q"].shape[:2])
    want = torch.where(used[:, :, None, None], want, 0.0)
    torch.testing.assert_close((o, memory), (want, expected_memory), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", POOLS)
def test_the_blocks_of_a_pool_that_indices_name_are_updated_and_no_other_memory(case, backend, index_dtype):
    check_pool(*split(given(**CASES[case])), POOLS[case], index_dtype, backend=backend)


def test_a_step_on_a_pool_passes_opcheck_and_compiles():
    torch._dynamo.reset()
    inputs, state = split(given(**CASES["one token"]))
    indices = torch.tensor(POOLS["one token"])
    _, pool = pool_of(state, POOLS["one token"])
    torch.library.opcheck(OP, (*op_arguments(inputs | {"state": pool.clone()}), "auto", indices))
    expected = pool.clone()
    want = recurrent_gdn2_(**inputs, state=expected, state_indices=indices)
    step = torch.compile(recurrent_gdn2_, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(**inputs, state=pool, state_indices=indices), want)
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


BLOCKS = torch.zeros(3, 2, 4, 3, dtype=torch.float64)
POOL_REFUSALS = [
    (ValueError, r"state has shape \(3, 2, 3, 4\); it must be \[blocks, HV, K, V\]", BLOCKS.mT, torch.tensor([0])),
    (ValueError, r"state has strides .*; every block of it must be contiguous",
     BLOCKS.mT.contiguous().mT, torch.tensor([0])),
    (ValueError, r"state has shape \(2, 4, 3\); it must be \[blocks, HV, K, V\]", BLOCKS[0], torch.tensor([0])),
    (TypeError, "state_indices is a list; it must be a torch.Tensor or None", BLOCKS, [0]),
    (TypeError, "state_indices has dtype torch.float32; it must be int32 or int64", BLOCKS, torch.zeros(1)),
    (ValueError, r"state_indices has shape \(2,\); it must be \[N\] = \(1,\)", BLOCKS, torch.tensor([0, 1])),
    (ValueError, "state_indices is on meta; it must be on q's device cpu", BLOCKS,
     torch.zeros(1, dtype=torch.int64, device="meta")),
]  # fmt: skip


@pytest.mark.parametrize("error, sentence, state, indices", POOL_REFUSALS)
def test_a_pool_or_indices_that_cannot_serve_are_refused(error, sentence, state, indices):
    with pytest.raises(error, match=f"^{sentence}"):
        recurrent_gdn2_(**given() | {"state": state}, state_indices=indices)


def test_steps_of_one_token_equal_the_definition():
    inputs, state = split(given(B=2, T=9, **RAW))
    want = naive_recurrent_gdn2(**inputs, initial_state=state.clone(), output_final_state=True)
    per_token = ("q", "k", "v", "g", "b", "w")
    outs = [recurrent_gdn2_(**inputs | {n: inputs[n][:, t : t + 1] for n in per_token}, state=state) for t in range(9)]
    assert_close({"o": torch.cat(outs, 1), "state": state}, {"o": want[0], "state": want[1]}, 1e-10)


def around(inputs, state):
    """A step with work before and after it, on the state too."""
    state.mul_(0.5)
    o = recurrent_gdn2_(**inputs | {"q": 2 * inputs["q"]}, state=state)
    return o + 1, state.sum()


@pytest.mark.parametrize(
    "case, backend",
    [
        *((case, "aot_eager") for case in CASES),
        *(pytest.param(case, "inductor", marks=[inductor, pytest.mark.slow]) for case in CASES),
    ],
)
def test_a_compiled_step_equals_eager_and_updates_the_same_memory(case, backend):
    torch._dynamo.reset()
    inputs, state = split(given(**CASES[case]))
    expected = state.clone()
    want = around(inputs, expected)
    memory = state.data_ptr()
    got = torch.compile(around, fullgraph=True, backend=backend)(inputs, state)
    assert state.data_ptr() == memory
    torch.testing.assert_close((*got, state), (*want, expected), rtol=1e-6, atol=1e-6)


def test_compiled_steps_of_growing_batches_share_a_graph_and_keep_the_state_between_calls():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(around, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for B in (3, 5, 7):
        inputs, state = split(given(B=B, T=1, H=2, K=4, V=6))
        expected = state.clone()
        for _ in range(2):
            assert torch.equal(compiled(inputs, state)[0], around(inputs, expected)[0])
            assert torch.equal(state, expected)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


def test_autocast_changes_nothing():
    inputs, state = split(given(dtype=torch.float32, **RAW))
    expected = state.clone()
    want = recurrent_gdn2_(**inputs, state=expected)
    with torch.autocast("cpu", torch.bfloat16):
        o = recurrent_gdn2_(**inputs, state=state)
    assert torch.equal(o, want) and torch.equal(state, expected)


def test_flop_counter_reports_the_closed_form():
    inputs = given(B=2, H=2, groups=2, K=16, V=8)
    with FlopCounterMode(display=False) as counter:
        recurrent_gdn2_(**inputs)
    assert counter.get_total_flops() == forward_flops(10, 2, 16, 16)


@pytest.mark.parametrize("name", [*LEAVES[:-1], "state"])
def test_a_call_that_would_need_a_gradient_is_refused_with_the_op_to_use_instead(name):
    inputs = given(**RAW)
    before = inputs["state"].clone()
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="^recurrent_gdn2_ .* has no gradient; use recurrent_gdn2 or"):
        recurrent_gdn2_(**inputs)
    assert torch.equal(inputs["state"], before)
    with torch.no_grad():
        recurrent_gdn2_(**inputs)
    assert not torch.equal(inputs["state"], before)


def test_a_call_inside_func_grad_is_refused():
    inputs = given()
    with pytest.raises(RuntimeError, match="^recurrent_gdn2_ .* has no gradient; use recurrent_gdn2 or"):
        torch.func.grad(lambda q: recurrent_gdn2_(**inputs | {"q": q}).sum())(inputs["q"])


STATE = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
REFUSALS = [
    (TypeError, "is a NoneType; it must be a torch.Tensor", None),
    (TypeError, "is a float; it must be a torch.Tensor", 0.0),
    (TypeError, "has dtype torch.float32; it must be torch.float64", STATE.float()),
    (TypeError, "has dtype torch.int64; it must be torch.float64", STATE.long()),
    (ValueError, r"has shape \(2, 4, 3\); it must be \[N, HV, K, V\] = \(1, 2, 4, 3\)", STATE[0]),
    (ValueError, r"has shape \(1, 2, 3, 4\); it must be \[N, HV, K, V\] = \(1, 2, 4, 3\)", STATE.mT.contiguous()),
    (ValueError, r"has strides \(24, 12, 1, 4\); it must be contiguous", STATE.mT.contiguous().mT),
    (ValueError, "is on meta; it must be on q's device cpu", STATE.to("meta")),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("error, sentence, state", REFUSALS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_state_that_cannot_be_updated_is_refused(error, sentence, state, backend):
    with pytest.raises(error, match=f"^state {sentence}"):
        recurrent_gdn2_(**given() | {"state": state}, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_of_half_precision_inputs_is_fp32(dtype):
    inputs = given(dtype=dtype)
    with pytest.raises(TypeError, match="^state has dtype .*; it must be torch.float32"):
        recurrent_gdn2_(**inputs | {"state": inputs["state"].to(dtype)})


def test_the_other_arguments_are_refused_as_in_the_functional_op_and_the_state_stays():
    inputs = given(cu=[0, 2, 5])
    before = inputs["state"].clone()
    for changes, sentence in (
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, "cu_seqlens is"),
        ({"k": inputs["k"][..., :1]}, "k has shape"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            recurrent_gdn2_(**inputs | changes)
    assert torch.equal(inputs["state"], before)


def test_the_triton_backend_is_refused_for_tensors_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^backend is 'triton'"):
        recurrent_gdn2_(**given(dtype=torch.float32), backend="triton")
