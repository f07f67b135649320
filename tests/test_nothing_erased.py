"""``b=None``, gated linear attention: against its own recurrence in fp64, in every way that the operator is called.

By PyTorch's kernels; test_triton_nothing_erased has Triton's."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.ops import (
    chunk_gdn2,
    context_parallel_gdn2,
    naive_recurrent_gdn2,
    recurrent_gdn2,
    recurrent_gdn2_,
    segment_summary,
)
from gdn2_titan.ops.context_parallel.layout import SequenceShards
from gdn2_titan.ops.gdn2 import chunked, intra
from tests.context_parallel_cases import shard
from tests.gdn2_cases import (
    RAW,
    RESULTS,
    assert_close,
    cases,
    cotangents,
    examples,
    golden,
    make,
    op_arguments,
    run,
)
from tests.processes import run as run_processes

OPS = torch.ops.gdn2_titan
OPTIONS = RAW | {"erase_scale": 1.0}
in_segments = functools.partial(chunk_gdn2, num_segments=3)
functions = pytest.mark.parametrize(
    "function", [chunk_gdn2, recurrent_gdn2, in_segments], ids=["chunk", "token", "cut"]
)


def unerased(**options):
    return make(**options) | {"b": None}


def textbook(inputs):
    """Gated linear attention as its authors write it: S = Diag(a) S + k v^T, o = S^T q; v already times its gate."""
    q, k, v, w, g = (inputs[name].detach() for name in "qkvwg")
    groups = v.shape[2] // q.shape[2]
    q, k, a = (x.repeat_interleave(groups, 2) for x in (q, k, g.exp()))
    S, outputs = inputs["initial_state"].detach(), []
    for t in range(q.shape[1]):
        S = a[:, t, :, :, None] * S + k[:, t, :, :, None] * (w * v)[:, t, :, None, :]
        outputs.append((S.mT @ q[:, t, :, :, None])[..., 0] * inputs["scale"])
    return {"o": torch.stack(outputs, 1), "final_state": S}


@pytest.mark.parametrize(
    "function",
    [naive_recurrent_gdn2, chunk_gdn2, recurrent_gdn2, in_segments, functools.partial(chunk_gdn2, backend="reference")],
    ids=["naive", "chunk", "token", "cut", "reference"],
)
def test_without_b_the_operator_is_gated_linear_attention(function):
    inputs = unerased(B=2, T=150, H=2, groups=2, K=5, V=3, scale=0.7)
    with torch.no_grad():
        got = dict(zip(RESULTS, function(**inputs, output_final_state=True), strict=True))
    assert_close(got, textbook(inputs), 1e-12)


@examples(15, 100)
def test_values_and_all_gradients_equal_the_definition_for_any_sizes_and_options(count):
    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(cases(longest=130), st.sampled_from([torch.float32, torch.float64]),
           st.sampled_from([chunk_gdn2, recurrent_gdn2, in_segments]))  # fmt: skip
    def check(case, dtype, function):
        inputs = unerased(**case | {"erase_scale": 1.0}, dtype=dtype)
        output_grads = cotangents(inputs)
        got, want = run(function, inputs, output_grads), golden(inputs, output_grads)
        floor = 32 * torch.finfo(dtype).eps
        assert_close(got, want, 1e-5 if dtype == torch.float32 else 1e-10, floor=floor)

    check()


def test_the_gradients_are_those_of_a_gate_of_zeros():
    inputs = make(B=2, T=100, K=8, V=4)
    output_grads = cotangents(inputs)
    got = run(chunk_gdn2, inputs | {"b": None}, output_grads)
    want = golden(inputs | {"b": torch.zeros_like(inputs["b"], requires_grad=True)}, output_grads)
    assert "db" not in got
    assert_close(got, {name: x for name, x in want.items() if name != "db"}, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("indices", [None, [2, 0]])
def test_a_step_in_place_leaves_the_final_state(indices):
    inputs = unerased(B=2, T=1, K=4, V=3)
    o, want = naive_recurrent_gdn2(**inputs, output_final_state=True)
    given = inputs.pop("initial_state")
    pool = given.clone() if indices is None else torch.stack((given[1], torch.zeros_like(given[0]), given[0]))
    at = None if indices is None else torch.tensor(indices)
    torch.testing.assert_close(recurrent_gdn2_(**inputs, state=pool, state_indices=at), o)
    torch.testing.assert_close(pool if indices is None else pool[at], want)


@pytest.mark.parametrize("name", ["chunk_gdn2", "recurrent_gdn2"])
@pytest.mark.parametrize("options", [dict(), dict(cu=[0, 2, 2, 5], **OPTIONS)], ids=["plain", "packed, raw"])
def test_the_operators_pass_opcheck(name, options):
    torch.library.opcheck(getattr(OPS, name), op_arguments(unerased(T=5, K=2, V=3, **options)))


def test_the_segmented_operator_passes_opcheck():
    inputs = unerased(T=6, K=2, V=3)
    tensors, resets, rest = op_arguments(inputs)[:9], inputs["resets"], op_arguments(inputs)[11:]
    torch.library.opcheck(OPS.segmented_gdn2, (*tensors, resets, 3, *rest))


def test_it_exports_and_compiles_in_one_graph():
    inputs = {name: x.detach() for name, x in unerased(T=70, K=8, V=8).items() if name in "qkvgw"}

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, g, w):
            return chunk_gdn2(q, k, v, g, None, w)[0]

    want, values = Attention()(**inputs), tuple(inputs[name] for name in "qkvgw")
    torch.testing.assert_close(torch.export.export(Attention(), values).module()(*values), want)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*(x.requires_grad_() for x in values)), want)


def test_torch_func_takes_gradients_of_it_one_of_each_of_a_batch():
    inputs = unerased(B=3, T=20, K=4, V=4, state=False)
    xs = [inputs[name].detach().unsqueeze(1) for name in "qkvgw"]

    def loss(q, k, v, g, w):
        return chunk_gdn2(q, k, v, g, None, w)[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss, (1, 3)))(*xs)
    leaves = [x.squeeze(1).requires_grad_() for x in xs]
    want = torch.autograd.grad(naive_recurrent_gdn2(*leaves[:4], None, leaves[4])[0].square().sum(), leaves)
    for a, b in zip(got, (want[1], want[3]), strict=True):
        torch.testing.assert_close(a.squeeze(1), b)


def test_a_segment_as_a_map_has_a_diagonal_transition():
    inputs = unerased(B=2, T=100, K=6, V=3, resets=None)
    M, D = segment_summary(*(inputs[name] for name in ("k", "v", "g", "b", "w")))
    torch.testing.assert_close(M, inputs["g"].sum(1).exp().diag_embed())
    _, want = naive_recurrent_gdn2(**inputs, output_final_state=True)
    torch.testing.assert_close(M @ inputs["initial_state"] + D, want)


def test_nothing_is_solved_and_a_product_is_left_of_every_two(monkeypatch):
    """As FlopCounterMode sees the PyTorch kernels work, and as the operator's formula has it."""
    inputs = make(B=1, T=256, H=2, K=32, V=32, dtype=torch.float32)

    def counted(inputs):
        with FlopCounterMode(display=False) as counter:
            run(functools.partial(chunk_gdn2, backend="torch"), inputs, cotangents(inputs))
        return counter.get_total_flops()

    def worked(inputs):
        records = chunked.GDN2Inputs(*(x if x is None else x.detach() for x in (inputs[n] for n in "qkvgbw")))
        with FlopCounterMode(display=False) as counter:
            chunked.chunk_forward(records, chunked.GDN2Options(1.0))
        return counter.get_total_flops()

    without = inputs | {"b": None}
    assert counted(without) < 0.55 * counted(inputs)
    assert worked(without) < 0.55 * worked(inputs)
    empty = torch.empty(1, 8, 1, 4)
    assert intra.intra_chunk(empty, empty[:, :, 0], empty[:, :, 0])[1] is None


def test_an_erase_scale_without_an_erase_gate_is_refused():
    with pytest.raises(ValueError, match=r"^erase_scale is 2.0; with b = None it must be 1.0, nothing is erased$"):
        chunk_gdn2(**unerased(**RAW))


def _heads_shared(rank, inputs, output_grads, want):
    mesh = init_device_mesh("cpu", (2,))
    axes = dict.fromkeys("qkvgw", 2) | {"initial_state": 1, "A_log": 0, "dt_bias": 0}
    shards = {
        name: distribute_tensor(x.detach(), mesh, [Shard(axes[name])]).requires_grad_() if name in axes else x
        for name, x in inputs.items() if x is not None
    } | {"b": None}  # fmt: skip
    outputs = chunk_gdn2(**shards, output_final_state=True)
    grads = [distribute_tensor(x, mesh, out.placements) for x, out in zip(output_grads, outputs, strict=True)]
    names = [name for name in axes if name in shards]
    found = torch.autograd.grad(outputs, [shards[name] for name in names], grads)
    got = dict(zip(RESULTS, outputs, strict=True)) | {f"d{n}": x for n, x in zip(names, found, strict=True)}
    assert all(x.placements != (Replicate(),) for x in got.values())
    assert_close({name: x.detach().full_tensor() for name, x in got.items()}, {n: want[n] for n in got}, 1e-12)


def _sequence_shared(rank, inputs, output_grads, want):
    shards = SequenceShards.of(torch.distributed.group.WORLD, "contiguous")
    local = inputs["q"].shape[1] // 2
    at = shards.positions(local)
    part = shard(inputs, at)
    group = torch.distributed.group.WORLD
    o, final_state = context_parallel_gdn2(
        **{n: x for n, x in part.items() if n != "cu_seqlens"}, group=group, output_final_state=True
    )
    names = "qkvgw"
    grads = output_grads[0][:, at], output_grads[1] / 2
    found = torch.autograd.grad((o, final_state), [part[n] for n in names], grads)
    got = {"o": o.detach(), "final_state": final_state.detach()} | {
        f"d{n}": x for n, x in zip(names, found, strict=True)
    }
    keep = {n: want[n] if n == "final_state" else want[n][:, at] for n in got}
    assert_close(got, keep, 1e-10)


def test_two_ranks_share_heads_or_sequence_as_one_has_them(tmp_path):
    inputs = unerased(B=2, T=70, H=2, K=4, V=3, **OPTIONS)
    output_grads = cotangents(inputs)
    want = golden(inputs, output_grads)
    detached = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    run_processes(_both, 2, tmp_path / "store", detached, output_grads, want)


def _both(rank, *arguments):
    _heads_shared(rank, *arguments)
    _sequence_shared(rank, {n: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                            for n, x in arguments[0].items()}, *arguments[1:])  # fmt: skip
