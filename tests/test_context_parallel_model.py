"""The decoder under the context parallel plan on processes over gloo, compared with one process."""

import dataclasses
import itertools
import shutil

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.models.rows import Rows
from gdn2_titan.ops.context_parallel.layout import LAYOUTS
from gdn2_titan.parallel import (
    apply_compile,
    apply_context_parallel,
    apply_tensor_parallel,
    check_context_parallel,
)
from tests.context_parallel_cases import part, summed
from tests.gdn2_cases import slowly
from tests.processes import run

no_compiler = not (shutil.which("g++") or shutil.which("c++"))
ARGS = GDN2ModelArgs(
    vocab_size=50, hidden_size=32, n_layers=3, mlp_size=48, num_heads=2, num_v_heads=4, head_dim=8,
    attn_heads=4, attn_kv_heads=2, window=8, layer_pattern=("gdn2", "swa", "attention"),
)  # fmt: skip


def build(args=ARGS, mesh=None):
    """The model in fp64, the same on all ranks; with a mesh, tensor parallel over it."""
    with torch.device("meta"):
        model = GDN2Model(args).double()
    if mesh is not None:
        apply_tensor_parallel(model, mesh, loss_parallel=False)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    return model


def batch(B, T, documents):
    generator = torch.Generator().manual_seed(B * T)
    tokens, targets = torch.randint(0, 50, (2, B, T), generator=generator)
    resets = torch.rand(B, T, generator=generator) < 0.1
    resets[0, T // 2], resets[-1, T // 2 - 1] = True, True  # on an edge of segments, and right before it
    return tokens, targets, resets if documents else None


def step(model, tokens, targets, resets):
    """Logits, and gradients of the summed loss."""
    model.zero_grad()
    logits = model(tokens, resets)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    grads = {name.replace("_orig_mod.", ""): param.grad for name, param in model.named_parameters()}
    return logits.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


def mine(inputs, shards):
    return [None if x is None else part(x, shards) for x in inputs]


def assert_equal(sharded, single, inputs, tolerance=1e-10, group=None):
    want_logits, want = step(single, *inputs)
    logits, got = step(sharded, *mine(inputs, sharded.shards))
    want_logits = part(want_logits, sharded.shards)
    assert (logits - want_logits).abs().max() <= tolerance * want_logits.abs().max()
    assert got.keys() == want.keys()
    for name, grad in want.items():
        error = (summed(got[name], group) - grad).abs().max() / grad.abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def _equals_one_process(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    variants = {
        "window shorter than a segment": {},
        "window longer than a segment": {"window": 30},
        "scalar and mean gates": {"erase_gate": "mean", "write_gate": "scalar", "decay": "scalar", "conv_size": 2},
        "tied gates": {"tied_gates": True, "allow_neg_eigval": True, "attn_kv_heads": None, "lower_bound": -5.0},
        "no decay": {"tied_gates": True, "decay": "none"},
    }
    for changes, layout in itertools.product(variants.values(), LAYOUTS):
        args = dataclasses.replace(ARGS, **changes)
        single, sharded = build(args), build(args)
        apply_context_parallel(sharded, mesh, layout)
        assert list(sharded.state_dict()) == list(single.state_dict())
        for documents in (False, True) if not changes else (True,):
            assert_equal(sharded, single, batch(2, 96, documents))
    assert_equal(sharded, single, batch(1, 4 * world, True))  # two tokens to a segment


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_logits_and_gradients_of_a_hybrid_equal_one_process(tmp_path, world):
    run(_equals_one_process, world, tmp_path / "store", world)


def _layer(rank):
    mesh = init_device_mesh("cpu", (2,))
    single, sharded = build(), build()
    apply_context_parallel(sharded, mesh, "head_tail")
    mixer, shards = sharded.layers["0"].mixer, sharded.shards
    torch.manual_seed(0)
    x = torch.randn(1, 48, ARGS.hidden_size, dtype=torch.float64)
    mixer.record_statistics = single.layers["0"].mixer.record_statistics = True
    with torch.no_grad():
        mixer(part(x, shards))
        single.layers["0"].mixer(x)
    torch.testing.assert_close(mixer.statistics[-1], single.layers["0"].mixer.statistics[-1], rtol=1e-12, atol=0)
    state = single.layers["0"].mixer(x, return_state=True)[1]
    rule = "with context parallelism states pass between ranks only, so it must be left out"
    with pytest.raises(ValueError, match=f"^state is given; {rule}$"):
        mixer(x, state=state)
    with pytest.raises(ValueError, match=f"^return_state is True; {rule}$"):
        mixer(x, return_state=True)
    rows = Rows(1, 48, 48, torch.tensor([48]), torch.arange(48), torch.tensor([0, 48]), None, None)
    with pytest.raises(ValueError, match="^rows is given; with context parallelism rows are of one length"):
        mixer(x, rows=rows)

    # Stages of a pipeline take and give hidden states of the rank's tokens.
    tokens, _, resets = mine(batch(2, 48, True), shards)
    with torch.no_grad():
        want = sharded(tokens, resets)
        first, second = sharded, build()
        apply_context_parallel(second, mesh, "head_tail")
        del first.layers["1"], first.layers["2"], second.layers["0"]
        first.norm = first.lm_head = second.tok_embeddings = None
        hidden = first(tokens, resets)
        assert hidden.shape == (2, 24, ARGS.hidden_size)
        torch.testing.assert_close(second(hidden, resets), want, rtol=0, atol=0)


def test_the_state_norm_is_that_of_the_whole_sequence_states_are_refused_and_stages_hand_on_shards(tmp_path):
    run(_layer, 2, tmp_path / "store")


def _with_tensor_parallel(rank, compiled):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    args = dataclasses.replace(ARGS, num_heads=4, num_v_heads=8)
    group, inputs = mesh["cp"].get_group(), batch(2, 96, True)
    for layout in LAYOUTS:
        single, sharded = build(args), build(args, mesh["tp"])
        apply_context_parallel(sharded, mesh["cp"], layout)
        if compiled:
            apply_compile(sharded, "aot_eager")
        assert_equal(sharded, single, inputs, group=group)


@pytest.mark.parametrize("compiled", [False, *slowly(True)], ids=["eager", "compiled"])
def test_with_tensor_parallelism_on_top_they_do_too(tmp_path, compiled):
    run(_with_tensor_parallel, 4, tmp_path / "store", compiled)


def _compiled(rank, args, layout, backend, shapes, options):
    mesh = init_device_mesh("cpu", (2,))
    single, sharded = build(args), build(args)
    apply_context_parallel(sharded, mesh, layout)
    apply_compile(sharded, backend, **options)
    for B, T, documents in shapes:
        assert_equal(sharded, single, batch(B, T, documents))


ONE_BLOCK = dataclasses.replace(ARGS, n_layers=1, layer_pattern=("gdn2",))


@pytest.mark.parametrize(
    "args, layout, shapes, options",
    [
        (ONE_BLOCK, "head_tail", ((2, 96, True),), {}),
        *slowly(
            (ARGS, "head_tail", ((2, 96, True), (3, 64, True)), {}),
            (ARGS, "contiguous", ((2, 96, True), (3, 64, True)), {"dynamic": True}),
            (ARGS, "head_tail", ((2, 96, False),), {"whole": True}),
        ),
    ],
    ids=["one block", "other shapes later", "any shape", "whole"],
)
def test_blocks_and_the_model_compile_without_a_graph_break(tmp_path, args, layout, shapes, options):
    run(_compiled, 2, tmp_path / "store", args, layout, "aot_eager", shapes, options)


@pytest.mark.slow
@pytest.mark.skipif(no_compiler, reason="inductor needs a C++ compiler")
def test_through_inductor_they_give_eagers_numbers(tmp_path):
    # Of what is exchanged, rank 0 receives nothing of the halo: the compiler must not leave the call out there.
    run(_compiled, 2, tmp_path / "store", ONE_BLOCK, "contiguous", "inductor", ((2, 96, True),), {})


def test_a_length_that_the_ranks_cannot_share_is_refused_with_both_numbers():
    for length, degree, layout, multiple in ((10, 4, "contiguous", 4), (12, 4, "head_tail", 8)):
        with pytest.raises(ValueError) as raised:
            check_context_parallel(length, degree, layout)
        assert str(raised.value) == (
            f"the sequence length is {length}; with context parallel degree {degree} and layout {layout!r} "
            f"it must be a multiple of {multiple}"
        )
        check_context_parallel(2 * length // multiple * multiple, degree, layout)
    with pytest.raises(ValueError, match="^layout is 'zigzag'; it must be one of 'contiguous', 'head_tail'$"):
        check_context_parallel(16, 4, "zigzag")
