"""context_parallel_gdn2 in 2 to 8 processes against chunk_gdn2 in one: outputs, final state and every gradient."""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gdn2_titan.ops import chunk_gdn2, context_parallel_gdn2
from gdn2_titan.ops.context_parallel.api import begin_gdn2
from gdn2_titan.ops.context_parallel.layout import LAYOUTS, SequenceShards
from gdn2_titan.ops.gdn2 import maps
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from tests.context_parallel_cases import SEQUENCES, shard
from tests.gdn2_cases import RAW, cast, cotangents, leaves, make, random_resets, run
from tests.processes import run as run_processes

BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5}


def resets_around_edges(B, T, parts):
    """Documents that begin at, right before and right after the edges of segments, and inside; the first row has none
    but one far from any edge, so that memory crosses all others."""
    resets = random_resets(B, T, every=40)
    edges = torch.arange(0, T, T // parts)
    resets[:, edges] = True
    resets[:, (edges[1::2] + 1) % T] = True
    resets[:, edges[2::3] - 1] = True
    resets[:, edges[3::4]] = False
    resets[0] = False
    resets[0, T // parts // 2] = True
    return resets


def lasting(options):
    """``make`` with erase gates and decays so weak that memory lasts for the whole sequence, in numbers of fp32."""
    inputs = make(**options)
    if not inputs["use_sigmoid_in_kernel"] and options.get("decay", "weak") == "weak":
        inputs |= {"g": 0.1 * inputs["g"], "b": 0.03 * inputs["b"]}
    return cast(inputs, torch.float32)


def begin(shards, output_final_state=False, exchange="auto", **arguments):
    """``begin_gdn2`` with the arguments of ``chunk_gdn2``."""
    inputs = GDN2Inputs(**{name: arguments.get(name) for name in GDN2Inputs._fields})
    names = "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_sigmoid_in_kernel"
    flags = [arguments.get(name, False) for name in names]
    rest = arguments.get("erase_scale", 1.0), arguments.get("backend", "auto")
    return begin_gdn2(inputs, GDN2Options(arguments.get("scale"), *flags, *rest), shards, output_final_state, exchange)


def gradients(inputs, outputs, weights):
    """By the name of the leaf, of what is not None."""
    given = [(x, weight) for x, weight in zip(outputs, weights, strict=True) if weight is not None]
    found = torch.autograd.grad([x for x, _ in given], list(leaves(inputs).values()), [weight for _, weight in given])
    return dict(zip(leaves(inputs), found, strict=True))


def assert_near(name, got, want, bound):
    error, size = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
    assert error <= bound * max(size, 1), f"{name} is off by {error:.2e} where the largest is {size:.2e}"


def compare(rank, size, layout, exchange, inputs, want, final, through, bound, backend="auto"):
    """``through``: what the loss reads. Of the final state, only the loss of the last rank reads it."""
    grads = cotangents(inputs)
    positions = SequenceShards.of(dist.group.WORLD, layout).positions(inputs["q"].shape[1] // size)
    local = shard(inputs, positions)
    o, state = context_parallel_gdn2(
        **local, group=dist.group.WORLD, layout=layout, exchange=exchange, output_final_state=final, backend=backend
    )
    assert (state is not None) == final
    assert_near("o", o, want["o"][:, positions], bound)
    if final:
        assert_near("the final state", state, want["final_state"], bound)
    reads_state = "final_state" in through and rank == size - 1
    weights = [grads[0][:, positions].to(o.dtype) if "o" in through else torch.zeros_like(o)]
    weights.append(grads[1].to(state.dtype) if reads_state else None)
    if final and "final_state" in through and not reads_state:
        weights[1] = torch.zeros_like(state)
    found = gradients(local, (o, state), weights)
    for name, grad in found.items():
        assert grad.dtype == local[name].dtype
        if name in SEQUENCES:
            assert_near(f"d{name}", grad, want[f"d{name}"][:, positions], bound)
        else:  # of the sum of all ranks' losses
            if name == "initial_state":
                assert rank == 0 or not grad.any()
            total = grad.double()
            dist.all_reduce(total)
            assert_near(f"d{name}", total, want[f"d{name}"], bound)


def cases(size):
    """Arguments of ``make`` and what is asked for, a label first."""
    both = ("o", "final_state")
    T = 2 * size * 37  # segments of 74 or 37 tokens: they cross a chunk, or do not fill one
    yield "a batch of one, a state", dict(B=1, T=T, H=2, K=8, V=8), True, both
    yield "a batch of three, grouped heads", dict(B=3, T=T, H=2, groups=2, K=5, V=3), True, both
    yield "no state, none asked for", dict(B=2, T=T, H=2, K=8, V=4, state=False), False, ("o",)
    yield "raw gates", dict(B=2, T=T, H=2, K=8, V=8, **RAW), True, both
    yield "bounded gates", dict(B=1, T=T, H=2, K=8, V=8, lower_bound=-0.5, **RAW), True, both
    yield "no decay at all", dict(B=1, T=T, H=1, K=8, V=8, decay="none"), True, both
    yield "mixed decays", dict(B=1, T=T, H=2, K=8, V=8, decay="mixed"), True, both
    yield "spikes of -inf", dict(B=2, T=T, H=2, K=8, V=8, decay="spikes of -inf"), True, both
    resets = resets_around_edges(3, T, 2 * size)
    yield "documents", dict(B=3, T=T, H=2, K=8, V=8, resets=resets), True, both
    yield "documents, no state", dict(B=3, T=T, H=2, K=8, V=8, resets=resets, state=False), False, ("o",)
    yield "a loss of the state alone", dict(B=1, T=T, H=2, K=8, V=8), True, ("final_state",)
    yield "a state asked for, a loss without it", dict(B=1, T=T, H=2, K=8, V=8), True, ("o",)
    yield "segments of one token", dict(B=2, T=2 * size, H=2, K=8, V=8), True, both


def exchanges(size):
    return ("gather", "scan") if size & (size - 1) == 0 else ("gather",)


def _compare_all(rank, size):
    for label, options, final, through in cases(size):
        exact = cast(lasting(options), torch.float64)
        want = run(chunk_gdn2, exact, cotangents(exact), through)
        for layout, exchange, (dtype, bound) in itertools.product(LAYOUTS, exchanges(size), BOUNDS.items()):
            try:
                compare(rank, size, layout, exchange, cast(exact, dtype), want, final, through, bound)
            except AssertionError as error:
                raise AssertionError(f"{layout}, {exchange}, {label}, {dtype}: {error}") from error


@pytest.mark.parametrize("size", [3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_ranks_that_share_sequences_compute_what_one_computes(size, tmp_path):
    run_processes(_compare_all, size, tmp_path / "store", size)


def _compare_triton(rank, size):
    T = 2 * size * 5
    options = dict(B=1, T=T, H=1, groups=2, K=5, V=3, resets=resets_around_edges(1, T, 2 * size), **RAW)
    exact = cast(lasting(options), torch.float64)
    want = run(chunk_gdn2, exact, cotangents(exact))
    bound, both = BOUNDS[torch.float32], ("o", "final_state")
    with mock.patch.object(maps, "fold", None):  # PyTorch's
        for layout, exchange in itertools.product(LAYOUTS, exchanges(size)):
            compare(rank, size, layout, exchange, cast(exact, torch.float32), want, True, both, bound, "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks have CPU tensors, of which compiled kernels take none")
def test_tritons_kernels_compute_it_too(tmp_path):
    pytest.importorskip("triton")
    run_processes(_compare_triton, 4, tmp_path / "store", 4)


def test_memory_crosses_every_segment_in_these_tests():
    """What the first of sixteen segments writes is read in the last."""
    inputs = lasting(dict(B=1, T=16 * 37, H=2, K=8, V=8))
    o, _ = chunk_gdn2(**inputs)
    (dv,) = torch.autograd.grad(o[:, -37:].sum(), inputs["v"])
    assert dv[:, :37].abs().max() > 0.1


def test_bf16_errs_at_most_twice_what_one_process_does(tmp_path):
    run_processes(_compare_bf16, 4, tmp_path / "store")


def _compare_bf16(rank):
    size, positions = 4, SequenceShards.of(dist.group.WORLD, "head_tail").positions(96)
    inputs = cast(make(B=2, T=4 * 96, H=2, K=32, V=32, **RAW), torch.bfloat16, only=SEQUENCES)
    inputs = cast(inputs, torch.float32, only=("A_log", "dt_bias", "initial_state"))
    grads = cotangents(inputs)
    want, alone = run(chunk_gdn2, cast(inputs, torch.float64), grads), run(chunk_gdn2, inputs, grads)
    local = shard(inputs, positions)
    o, state = context_parallel_gdn2(**local, group=dist.group.WORLD, layout="head_tail", output_final_state=True)
    weights = [grads[0][:, positions].to(o.dtype), (grads[1] / size).to(state.dtype)]
    found = gradients(local, (o, state), weights)
    found = {"o": o, "final_state": state} | {f"d{name}": grad for name, grad in found.items()}
    for name, got in found.items():
        sequence = name == "o" or name[1:] in SEQUENCES
        got = got.detach().double()
        if not sequence and name != "final_state":
            dist.all_reduce(got)
        ours, theirs = ((x.double() - want[name]) for x in (got, alone[name])) if not sequence else (
            got - want[name][:, positions], alone[name].double() - want[name]
        )  # fmt: skip
        rounding = torch.finfo(torch.bfloat16).eps * want[name].abs().max()
        assert ours.abs().max() <= 2 * theirs.abs().max() + rounding, name


@pytest.mark.parametrize(
    ("backend", "ways"),
    [
        pytest.param("aot_eager", [("head_tail", "gather")], marks=pytest.mark.slow),
        pytest.param("aot_eager", [("contiguous", "scan")], marks=pytest.mark.slow),
        pytest.param("inductor", [("head_tail", "gather"), ("contiguous", "scan")], marks=pytest.mark.slow),
    ],
    ids=["gather", "scan", "inductor"],
)
def test_compiles_as_one_graph_that_serves_other_lengths(backend, ways, tmp_path):
    run_processes(_compile, 2, tmp_path / "store", backend, ways)


def _compile(rank, backend, ways):
    for layout, exchange in ways:
        torch._dynamo.reset()
        shards = SequenceShards.of(dist.group.WORLD, layout)
        projection = torch.randn(10, 12, dtype=torch.float64, requires_grad=True)

        def step(inputs, x, shards=shards, exchange=exchange, projection=projection):
            finish = begin(**inputs, shards=shards, exchange=exchange, output_final_state=True)
            gate = (x @ projection).sigmoid()
            o, state = finish()
            return o.flatten(2) * gate, state

        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for T in (52, 26):
            inputs = make(B=2, T=T, H=2, groups=2, K=5, V=3, resets=random_resets(2, T), seed=rank, **RAW)
            del inputs["cu_seqlens"]
            x = torch.randn(2, T, 10, dtype=torch.float64)
            wanted = [*leaves(inputs).values(), projection]
            eager, graph = step(inputs, x), compiled(inputs, x)
            weights = [torch.randn_like(y) for y in eager]
            eager = [*eager, *torch.autograd.grad(eager, wanted, weights)]
            graph = [*graph, *torch.autograd.grad(graph, wanted, weights)]
            for a, b in zip(graph, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

        def look(inputs, x, step=step):
            o, state = step(inputs, x)
            return (
                o,
                state.detach().norm(),
            )  # its gradient is then a constant, which a compiler may add up when it likes

        o, _ = torch.compile(look, fullgraph=True, backend=backend)(inputs, x)
        found = torch.autograd.grad(o, wanted, weights[0])
        want = torch.autograd.grad(step(inputs, x)[0], wanted, weights[0])
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_checkpointing_by_op_neither_runs_the_mixer_nor_sends_again(tmp_path):
    run_processes(_checkpoint, 2, tmp_path / "store")


def _checkpoint(rank):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    from gdn2_titan.parallel.activation_checkpoint import _policy

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append(func)
            return func(*args, **(kwargs or {}))

    messages = [
        torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default,
        torch.ops._c10d_functional.all_to_all_single.default,
    ]
    inputs = make(B=1, T=40, H=2, K=8, V=8, state=False)
    del inputs["cu_seqlens"]
    for exchange, expected in (("gather", 2), ("scan", 2)):

        def step(*tensors, exchange=exchange):
            named = dict(zip(SEQUENCES, tensors, strict=True))
            return context_parallel_gdn2(**inputs | named, group=dist.group.WORLD, exchange=exchange)[0]

        tensors = [inputs[name] for name in SEQUENCES]
        want = torch.autograd.grad(step(*tensors).square().sum(), tensors)
        with Count() as count:
            o = checkpoint(
                step, *tensors, use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(_policy),
            )  # fmt: skip
            got = torch.autograd.grad(o.square().sum(), tensors)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
        assert count.calls.count(torch.ops.gdn2_titan.segment_gdn2.default) == 1
        assert sum(count.calls.count(op) for op in messages) == expected  # one forward, one backward


def test_one_rank_is_the_ordinary_op(tmp_path):
    run_processes(_one, 1, tmp_path / "store")


def _one(rank):
    inputs = make(B=2, T=70, H=2, K=8, V=8)
    del inputs["cu_seqlens"]
    for layout in LAYOUTS:
        got = context_parallel_gdn2(**inputs, group=dist.group.WORLD, layout=layout, output_final_state=True)
        for a, b in zip(got, chunk_gdn2(**inputs, output_final_state=True), strict=True):
            assert torch.equal(a, b)


def shards_without_a_group(rank, size, per_rank=1):
    return SequenceShards("none", rank, size, per_rank)


def test_refusals_name_the_argument_what_came_and_what_is_wanted():
    inputs = make(T=5)
    del inputs["cu_seqlens"]
    shards = shards_without_a_group(0, 4, 2)
    for changes, sentence in (
        ({}, "q has 5 tokens; with layout 'head_tail' they must be an even number"),
        ({"exchange": "ring"}, "exchange is 'ring'; it must be one of 'auto', 'gather', 'scan'"),
        ({"backend": "reference"}, "backend is 'reference'; it must be one of 'auto', 'triton', 'torch'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            begin(**inputs | changes, shards=shards)
    with pytest.raises(ValueError, match="exchange is 'scan'; with 6 ranks it must be 'gather' or 'auto'"):
        begin(**inputs, shards=shards_without_a_group(0, 6), exchange="scan")
    with pytest.raises(ValueError, match="layout is 'zigzag'; it must be one of 'contiguous', 'head_tail'"):
        SequenceShards.of(mock.Mock(), "zigzag")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_on_one_rank_and_what_all_gather_comes_back_in_order(layout):
    whole = torch.arange(24)
    ranks = [SequenceShards("none", rank, 3, LAYOUTS.index(layout) + 1) for rank in range(3)]
    parts = [whole[shards.positions(8)] for shards in ranks]
    assert torch.equal(torch.cat(parts).sort().values, whole)
    assert torch.equal(ranks[1].global_order(torch.cat(parts)[None], 1), whole[None])
