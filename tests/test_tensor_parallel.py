"""The tensor parallel plan on processes over gloo, compared with one process."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs
from gdn2_titan.parallel import (
    apply_compile,
    apply_float8,
    apply_fsdp,
    apply_mixer_tensor_parallel,
    apply_tensor_parallel,
    check_tensor_parallel,
    sum_gradients,
    tensor,
)
from tests.processes import run

ARGS = GDN2ModelArgs(
    vocab_size=50, hidden_size=32, n_layers=2, mlp_size=64, num_heads=4, num_v_heads=8, head_dim=8,
    attn_heads=4, window=8, layer_pattern=("gdn2", "swa"),
)  # fmt: skip
VARIANTS = {
    "channel gates": {},
    "scalar gates": {"erase_gate": "scalar", "write_gate": "scalar", "decay": "scalar"},
    "mean gates, other ranks, bounded decay": {
        "erase_gate": "mean",
        "write_gate": "mean",
        "allow_neg_eigval": True,
        "decay_rank": 3,
        "gate_rank": "full",
        "lower_bound": -5.0,
    },
    "tied gates": {"tied_gates": True, "layer_pattern": ("gdn2", "attention")},
    "no decay": {"tied_gates": True, "decay": "none"},
}


def pair(args, mesh, **options):
    """The same model, whole and as this rank's part of it, in fp64."""
    models = []
    for shard in (False, True):
        with torch.device("meta"):
            model = GDN2Model(args).double()
        if shard:
            apply_tensor_parallel(model, mesh, **options)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        model.init_weights()
        models.append(model)
    return models


def batch(sequences=2, length=96):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (sequences, length + 1), generator=generator)
    resets = torch.zeros(sequences, length, dtype=torch.bool)
    resets[:, 70] = True
    return tokens, resets


def loss(model, tokens, resets):
    logits = model(tokens[:, :-1], resets).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")


def assert_same_gradients(single, sharded, tolerance=1e-11):
    expected = dict(single.named_parameters())
    for name, param in sharded.named_parameters():
        name = name.replace("_orig_mod.", "")
        grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        error = (grad - expected[name].grad).abs().max() / expected[name].grad.abs().max()
        assert error < tolerance, f"{name} is off by {error:.1e}"


def _equals_one_process(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    tokens, resets = batch()
    for name, changes in VARIANTS.items():
        single, sharded = pair(dataclasses.replace(ARGS, **changes), mesh)
        expected = loss(single, tokens, resets)
        expected.backward()
        with loss_parallel():
            found = loss(sharded, tokens, resets)
            found.backward()
        torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-12, atol=0, msg=name)
        assert_same_gradients(single, sharded)
        memory = {n: p.to_local().numel() for n, p in sharded.named_parameters() if "o_norm" not in n}
        for name, param in single.named_parameters():
            shared = not any(part in name for part in ("norm", "decay_low_proj", "gate_low_proj"))
            if shared and param.shape[0] % world == 0:
                assert memory[name] == param.numel() // world, name


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_loss_and_gradients_equal_one_process_for_every_gate_structure(tmp_path, world):
    run(_equals_one_process, world, tmp_path / "store", world)


def _whole_logits_and_stages(rank):
    mesh = init_device_mesh("cpu", (2,))
    tokens, resets = batch()
    single, sharded = pair(ARGS, mesh, loss_parallel=False)
    logits = sharded(tokens[:, :-1], resets)
    torch.testing.assert_close(logits, single(tokens[:, :-1], resets), rtol=1e-11, atol=1e-12)

    first, second = pair(ARGS, mesh, loss_parallel=False)[1], sharded
    del first.layers["1"], second.layers["0"]
    first.norm = first.lm_head = second.tok_embeddings = None
    hidden = first(tokens[:, :-1], resets)
    assert hidden.shape[1] == 48  # a stage hands on this rank's part of the sequence
    torch.testing.assert_close(second(hidden, resets), logits, rtol=0, atol=0)


def test_without_loss_parallel_logits_are_whole_and_stages_hand_on_parts_of_the_sequence(tmp_path):
    run(_whole_logits_and_stages, 2, tmp_path / "store")


def _one_mixer(rank, sharded_input):
    mesh = init_device_mesh("cpu", (2,))
    single, sharded = (GatedDeltaNet2(32, 4, 8, num_v_heads=8).double() for _ in range(2))
    sharded.load_state_dict(single.state_dict())
    apply_mixer_tensor_parallel(sharded, mesh)
    x, (_, resets) = torch.randn(2, 96, 32, dtype=torch.float64), batch()
    expected = single(x, resets)
    expected.square().sum().backward()
    part = x.chunk(2, 1)[rank]  # the hidden states that this rank has between layers
    found = sharded(DTensor.from_local(part, mesh, [Shard(1)]) if sharded_input else part, resets)
    torch.testing.assert_close(found, expected.chunk(2, 1)[rank], rtol=1e-11, atol=1e-12)
    found.square().sum().backward()
    assert_same_gradients(single, sharded)


@pytest.mark.parametrize("sharded_input", [False, True], ids=["tensors", "dtensors"])
def test_a_mixer_in_anybodys_block_gives_this_ranks_part_of_what_one_process_gives(tmp_path, sharded_input):
    run(_one_mixer, 2, tmp_path / "store", sharded_input)


def test_a_mixer_whose_heads_the_mesh_cannot_share_is_refused_with_both_numbers():
    mesh = SimpleNamespace(size=lambda: 3)
    with pytest.raises(ValueError, match="^num_heads is 4; the tensor parallel degree 3 must divide it$"):
        apply_mixer_tensor_parallel(GatedDeltaNet2(32, 4, 8), mesh)


def _compiled(rank, fsdp):
    mesh = init_device_mesh("cpu", (2, 2) if fsdp else (1, 2), mesh_dim_names=("fsdp", "tp"))
    tokens, resets = batch()
    single, sharded = (model.float() for model in pair(ARGS, mesh["tp"]))
    apply_compile(sharded, backend="aot_eager")
    mine = slice(None)
    if fsdp:
        apply_fsdp(sharded, mesh["fsdp"], torch.float32, torch.float32)
        sum_gradients(sharded)
        mine = slice(mesh["fsdp"].get_local_rank(), mesh["fsdp"].get_local_rank() + 1)
    loss(single, tokens, resets).backward()
    with loss_parallel():
        loss(sharded, tokens[mine], resets[mine]).backward()
    assert_same_gradients(single, sharded, 1e-4)


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tp", "fsdp-tp"])
def test_blocks_compile_without_a_graph_break_and_combine_with_fsdp(tmp_path, fsdp):
    run(_compiled, 4 if fsdp else 2, tmp_path / "store", fsdp)


WIDE = dataclasses.replace(ARGS, hidden_size=128, mlp_size=256, num_v_heads=None, head_dim=32, attn_heads=4)


def _let_gloo_move_float8():
    """As bytes; in this process, which ends with the test."""
    from torchao.float8.float8_ops import FLOAT8_OPS_TABLE

    tensor._moves_float8 = lambda mesh: True
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    stock = FLOAT8_OPS_TABLE[gather]

    def as_bytes(data, *args):
        return gather(data.view(torch.uint8), *args).view(data.dtype)

    FLOAT8_OPS_TABLE[gather] = lambda op, args, kwargs=None: stock(as_bytes, args, kwargs)


def _in_float8(rank, recipe, moves_float8):
    if moves_float8:
        _let_gloo_move_float8()
    mesh = init_device_mesh("cpu", (2,))
    tokens, resets = batch()
    models = {}
    for name, converted, shard in (("exact", False, False), ("single", True, False), ("sharded", True, True)):
        with torch.device("meta"):
            model = GDN2Model(WIDE)
        if converted:
            names = apply_float8(model, recipe, emulate=True)
            assert len(names) == 6 + 4 + 2 * 3, names
        if shard:
            apply_tensor_parallel(model, mesh)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        model.init_weights()
        with loss_parallel() if shard else contextlib.nullcontext():
            value = loss(model, tokens, resets)
            value.backward()
        grads = {n: p.grad.full_tensor() if shard else p.grad for n, p in model.named_parameters()}
        models[name] = (value.full_tensor() if shard else value).item(), grads

    def distance(a, b):
        return max(((x - b[1][n]).norm() / b[1][n].norm()).item() for n, x in a[1].items())

    rounding = distance(models["single"], models["exact"])
    assert rounding > 0.02
    # A number that lies between two of float8 falls to either side: some of the rounding's error, not more.
    assert distance(models["sharded"], models["single"]) < rounding
    assert models["sharded"][0] == pytest.approx(models["single"][0], rel=1e-3)


@pytest.mark.parametrize(
    "recipe",
    ["tensorwise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rowwise", "rowwise_with_gw_hp"))],
)
def test_float8_layers_give_what_one_process_gives_in_float8(tmp_path, recipe):
    run(_in_float8, 2, tmp_path / "store", recipe, False)


def test_so_they_do_where_activations_are_gathered_in_float8(tmp_path):
    run(_in_float8, 2, tmp_path / "store", "tensorwise", True)


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_both_numbers():
    check_tensor_parallel(ARGS, 4)
    for changes in ({"num_heads": 3, "num_v_heads": 6}, {"attn_heads": 2}, {"attn_kv_heads": 2}, {"mlp_size": 66}):
        field, value = next(iter(changes.items()))
        with pytest.raises(ValueError, match=f"^{field} is {value}; the tensor parallel degree 4 must divide it$"):
            check_tensor_parallel(dataclasses.replace(ARGS, **changes), 4)
