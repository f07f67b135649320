"""Megatron-Core's layout against checkpoints made by hand from its names and shapes."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gdn2_titan.convert.mapping import from_hf_name
from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.ops import naive_recurrent_gdn2
from tests.convert_cases import assert_equal, convert, load_safetensors, weights

ARGS = GDN2ModelArgs(
    vocab_size=61, hidden_size=32, n_layers=2, mlp_size=48, num_heads=2, head_dim=8, num_v_heads=4, expand_v=2.0,
    attn_heads=4, attn_kv_heads=2, window=8, layer_pattern=("gdn2", "attention"), decay_rank=None, gate_rank=None,
)  # fmt: skip


def megatron(here, args):
    """{name: tensor} of Megatron-Core from ``here``, by our names; its vocabulary is padded to a multiple of 128."""
    theirs = {"decoder.final_layernorm.weight": here["norm.weight"]}
    for ours, name in (("tok_embeddings", "embedding.word_embeddings"), ("lm_head", "output_layer")):
        rows = here[f"{ours}.weight"]
        theirs[f"{name}.weight"] = torch.cat([rows, torch.randn(-len(rows) % 128, rows.shape[1])])
    for layer in range(args.n_layers):
        mine = {n.removeprefix(f"layers.{layer}."): t for n, t in here.items() if n.startswith(f"layers.{layer}.")}
        attention, mlp = f"decoder.layers.{layer}.self_attention.", f"decoder.layers.{layer}.mlp."
        if args.mixer(layer) == "gdn2":
            order = ("q", "k", "v", "gate", "decay", "erase", "write")
            theirs[attention + "in_proj.weight"] = torch.cat([mine[f"mixer.{n}_proj.weight"] for n in order])
            theirs[attention + "in_proj.layer_norm_weight"] = mine["mixer_norm.weight"]
            theirs[attention + "conv1d.weight"] = torch.cat([mine[f"mixer.{n}_conv1d.weight"] for n in "qkv"])[:, None]
            theirs[attention + "A_log"] = mine["mixer.decay.A_log"]
            theirs[attention + "dt_bias"] = mine["mixer.decay.dt_bias"].flatten()
            theirs[attention + "out_norm.weight"] = mine["mixer.o_norm.weight"]
            theirs[attention + "out_proj.weight"] = mine["mixer.o_proj.weight"]
        else:
            size = args.hidden_size // args.attn_heads
            q, k, v = (mine[f"mixer.{n}_proj.weight"].split(size) for n in "qkv")
            share = len(q) // len(k)
            groups = [(*q[i * share : (i + 1) * share], k[i], v[i]) for i in range(len(k))]
            theirs[attention + "linear_qkv.weight"] = torch.cat([x for group in groups for x in group])
            theirs[attention + "linear_qkv.layer_norm_weight"] = mine["mixer_norm.weight"]
            theirs[attention + "linear_proj.weight"] = mine["mixer.o_proj.weight"]
        theirs[mlp + "linear_fc1.layer_norm_weight"] = mine["mlp_norm.weight"]
        theirs[mlp + "linear_fc1.weight"] = torch.cat([mine["mlp.gate_proj.weight"], mine["mlp.up_proj.weight"]])
        theirs[mlp + "linear_fc2.weight"] = mine["mlp.down_proj.weight"]
    return theirs


def without_bias(args):
    return {n: torch.zeros_like(t) if n.endswith("gate_proj.bias") else t for n, t in weights(args).items()}


def config_of(path, args):
    """A TOML file of a model like ``args``, which says nothing of ranks."""
    fields = {"num_heads": args.num_heads, "head_dim": args.head_dim, "num_v_heads": args.num_v_heads}
    lines = [f"{name} = {value}" for name, value in fields.items()]
    path.write_text('[model]\nname = "gdn2"\nflavor = "debug_hybrid"\n[gdn2]\n' + "\n".join(lines))
    return path


DEBUG = GDN2ModelArgs(
    vocab_size=264, hidden_size=128, n_layers=4, mlp_size=352, num_heads=2, head_dim=16, num_v_heads=4, attn_heads=4,
    attn_kv_heads=2, window=128, layer_pattern=("gdn2", "swa"), decay_rank=None, gate_rank=None,
)  # fmt: skip


def test_megatron_cores_layout_comes_in_bit_for_bit(tmp_path, capsys):
    expected = without_bias(DEBUG)
    folder = tmp_path / "iter_0000100" / "mp_rank_00"
    folder.mkdir(parents=True)
    content = {"model": megatron(expected, DEBUG), "iteration": 100}
    content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    torch.save(content, folder / "model_optim_rng.pt")
    flags = ("--config", config_of(tmp_path / "x.toml", DEBUG))
    assert convert(capsys, "from-megatron", folder / "model_optim_rng.pt", tmp_path / "hf", *flags) == (0, "")
    assert_equal({from_hf_name(n): t for n, t in load_safetensors(tmp_path / "hf").items()}, expected)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["decay_rank"] is None and config["gate_rank"] is None

    save_file({n: t.contiguous() for n, t in megatron(expected, DEBUG).items()}, folder / "model.safetensors")
    assert convert(capsys, "from-megatron", folder, tmp_path / "again", *flags) == (0, "")
    assert_equal(load_safetensors(tmp_path / "again"), load_safetensors(tmp_path / "hf"))


def test_the_converted_layer_computes_what_megatron_cores_layer_does():
    """Its layer, from its names: [T, D] to [T, D]."""
    args = dataclasses.replace(ARGS, n_layers=1, layer_pattern=("gdn2",))
    here = without_bias(args)
    theirs = {n.split("self_attention.")[-1]: t.double() for n, t in megatron(here, args).items()}
    model = GDN2Model(args)
    model.load_state_dict(here)
    x, (H, K, HV, V) = torch.randn(5, 32, dtype=torch.float64), (2, 8, 4, 16)
    mixed = x @ theirs["in_proj.weight"].T
    qkv, gate, f, b, w = mixed.split([2 * H * K + HV * V, HV * V, H * K, H * K, HV * V], -1)
    padded = F.pad(qkv.T[None], (3, 0))
    qkv = F.silu(F.conv1d(padded, theirs["conv1d.weight"], groups=qkv.shape[1])[0].T)
    q, k, v = (y.reshape(5, -1, size) for y, size in zip(qkv.split([H * K, H * K, HV * V], -1), (K, K, V), strict=True))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    g = -theirs["A_log"].exp().repeat_interleave(K) * F.softplus(f + theirs["dt_bias"])
    g, b, w = g.view(5, H, K), b.sigmoid().view(5, H, K), w.sigmoid().view(5, HV, V)
    o, _ = naive_recurrent_gdn2(*(y[None] for y in (q, k, v, g, b, w)))
    o = o[0] / (o[0].square().mean(-1, keepdim=True) + 1e-5).sqrt() * theirs["out_norm.weight"]
    want = (o * F.silu(gate.view(5, HV, V))).flatten(1) @ theirs["out_proj.weight"].T
    got = model.layers["0"].mixer.double()(x[None])[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ("", "does not say which model"),
        ("tied_gates = true", "tied_gates is True; Megatron-Core's layer has False"),
        ("lower_bound = -5.0", "lower_bound is -5.0"),
        ("num_heads = 4", "in_proj.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, capsys, changes, words):
    torch.save(megatron(without_bias(DEBUG), DEBUG), tmp_path / "model.pt")
    flags = ()
    if changes:
        config = config_of(tmp_path / "x.toml", DEBUG)
        text = config.read_text().replace("num_heads = 2\n", "") if "num_heads" in changes else config.read_text()
        config.write_text(text + f"\n{changes}\n")
        flags = ("--config", config)
    status, error = convert(capsys, "from-megatron", tmp_path / "model.pt", tmp_path / "hf", *flags)
    assert status == 1 and words in error and error.count("\n") == 1 and not (tmp_path / "hf").exists()


def test_one_of_several_ranks_files_is_refused(tmp_path, capsys):
    for rank in ("mp_rank_00", "mp_rank_01"):
        (tmp_path / rank).mkdir()
        torch.save({"model": {}}, tmp_path / rank / "model_optim_rng.pt")
    path = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    status, error = convert(capsys, "from-megatron", path, tmp_path / "hf", "--flavor", "debug")
    assert status == 1 and "'mp_rank_01'; the model must have been saved by one rank" in error
