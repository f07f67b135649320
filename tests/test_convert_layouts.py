"""The layouts of flash-linear-attention and of the authors' trainer, against checkpoints made by hand from their key
names and shapes."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.convert.fla import config_for_fla, from_fla_mapping, to_fla_mapping
from gdn2_titan.convert.mapping import Renamed, check_fits, from_hf_name, tensors_of
from gdn2_titan.convert.nvlabs import from_nvlabs_mapping
from gdn2_titan.models import GDN2Model, GDN2ModelArgs, flavors
from tests.convert_cases import HYBRID, assert_equal, convert, load_safetensors, save_step, weights

FLA = dataclasses.replace(HYBRID, output_gate="sigmoid", expand_v=2.0)


def fla_shapes(args, prefix="model.layers.{}.", attn="attn."):
    """{name: shape} of the layers as flash-linear-attention 0.6.0 has them: read off its GatedDeltaNet2, its Attention
    and its decoders' blocks, for the sizes of ``args``."""
    D, K, V = args.hidden_size, args.num_heads * args.head_dim, int(args.head_dim * args.expand_v)
    VV = (args.num_v_heads or args.num_heads) * V
    gdn2 = {
        "q_proj.weight": (K, D), "k_proj.weight": (K, D), "v_proj.weight": (VV, D),
        "q_conv1d.weight": (K, 1, 4), "k_conv1d.weight": (K, 1, 4), "v_conv1d.weight": (VV, 1, 4),
        "f_proj.0.weight": (V, D), "f_proj.1.weight": (K, V), "b_proj.weight": (K, D), "w_proj.weight": (VV, D),
        "A_log": (args.num_heads,), "dt_bias": (K,),
        "g_proj.0.weight": (V, D), "g_proj.1.weight": (VV, V), "g_proj.1.bias": (VV,),
        "o_norm.weight": (V,), "o_proj.weight": (D, VV),
    }  # fmt: skip
    kv = D // args.attn_heads * (args.attn_kv_heads or args.attn_heads)
    softmax = {"q_proj.weight": (D, D), "k_proj.weight": (kv, D), "v_proj.weight": (kv, D), "o_proj.weight": (D, D)}
    shapes = {}
    for layer in range(args.n_layers):
        mixer = gdn2 if args.mixer(layer) == "gdn2" else softmax
        shapes |= {prefix.format(layer) + attn + name: shape for name, shape in mixer.items()}
    return shapes


def fla_checkpoint(args, device="cpu"):
    """{name: tensor} of a whole decoder in that library's layout."""
    D, M = args.hidden_size, args.mlp_size
    shapes = {"model.embeddings.weight": (args.vocab_size, D), "model.norm.weight": (D,)}
    shapes |= {"lm_head.weight": (args.vocab_size, D)} | fla_shapes(args)
    for layer in range(args.n_layers):
        block = {
            "attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.gate_proj.weight": (M, D),
            "mlp.up_proj.weight": (M, D), "mlp.down_proj.weight": (D, M),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


FLA_CONFIG = {
    "model_type": "some_decoder", "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2,
    "intermediate_size": 48, "norm_eps": 1e-5, "num_heads": 2, "head_dim": 16, "num_v_heads": 4, "expand_v": 2.0,
    "conv_size": 4, "allow_neg_eigval": False, "hidden_act": "swish", "use_short_conv": True,
    "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": 8,
             "rope_theta": 10000.0},
}  # fmt: skip


def fla_folder(folder, tensors, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FLA_CONFIG | changes))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ours(folder):
    return {from_hf_name(name): tensor for name, tensor in load_safetensors(folder).items()}


def test_an_fla_checkpoint_comes_in_and_out_bit_for_bit(tmp_path, capsys):
    theirs = fla_checkpoint(FLA)
    folder = fla_folder(tmp_path / "fla", theirs)
    assert convert(capsys, "from-fla", folder, tmp_path / "hf") == (0, "")
    found = ours(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["output_gate"] == "sigmoid" and config["layer_pattern"] == ["gdn2", "swa"] and config["window"] == 8
    expected = {"erase_proj": "b_proj", "write_proj": "w_proj", "decay_low_proj": "f_proj.0", "decay_proj": "f_proj.1"}
    expected |= {"gate_low_proj": "g_proj.0", "gate_proj": "g_proj.1", "q_proj": "q_proj", "o_norm": "o_norm"}
    for here, there in expected.items():
        assert torch.equal(found[f"layers.0.mixer.{here}.weight"], theirs[f"model.layers.0.attn.{there}.weight"])
    block = {"mixer_norm": "attn_norm", "mlp_norm": "mlp_norm"} | {
        f"mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up")
    }
    for here, there in block.items():
        assert torch.equal(found[f"layers.0.{here}.weight"], theirs[f"model.layers.0.{there}.weight"])
    conv = theirs["model.layers.0.attn.v_conv1d.weight"]
    assert torch.equal(found["layers.0.mixer.v_conv1d.weight"], conv[:, 0])
    assert torch.equal(found["layers.0.mixer.decay.dt_bias"][1], theirs["model.layers.0.attn.dt_bias"][16:])
    assert torch.equal(found["layers.1.mixer.o_proj.weight"], theirs["model.layers.1.attn.o_proj.weight"])
    assert torch.equal(found["tok_embeddings.weight"], theirs["model.embeddings.weight"])
    assert convert(capsys, "to-fla", tmp_path / "hf", tmp_path / "back") == (0, "")
    assert_equal(load_safetensors(tmp_path / "back"), theirs)
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: again[k] for k in FLA_CONFIG if k != "model_type"} == {k: v for k, v in FLA_CONFIG.items() if k in again}


def test_an_fla_checkpoint_loads_into_the_model(tmp_path, capsys):
    fla_folder(tmp_path / "fla", fla_checkpoint(FLA))
    assert convert(capsys, "from-fla", tmp_path / "fla", tmp_path / "hf") == (0, "")
    model = GDN2Model(FLA)
    model.load_state_dict(ours(tmp_path / "hf"), strict=True)
    assert model(torch.arange(8)[None]).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_short_conv": False}, "use_short_conv False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"hidden_act": "powlu"}, "hidden_act 'powlu'"),
        ({"attn": FLA_CONFIG["attn"] | {"qkv_bias": True}}, "qkv_bias True"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"attn": {"num_heads": 4}}, "damaged"),
        ({"attn": [FLA_CONFIG["attn"], FLA_CONFIG["attn"] | {"layers": [0], "window_size": 9}]}, "that differ"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split()[0],
)
def test_what_an_fla_model_has_and_ours_does_not_is_refused(tmp_path, capsys, changes, words):
    folder = fla_folder(tmp_path / "fla", fla_checkpoint(FLA), **changes)
    status, error = convert(capsys, "from-fla", folder, tmp_path / "hf")
    assert status == 1 and words in error and error.count("\n") == 1 and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("output_gate", "silu"), ("erase_gate", "scalar"), ("write_gate", "scalar"), ("decay", "scalar")],
)
def test_what_ours_has_and_flas_layer_does_not_is_refused(tmp_path, capsys, field, value):
    args = dataclasses.replace(FLA, **{field: value})
    step = save_step(tmp_path / "run" / "step-7", weights(args), args)
    status, error = convert(capsys, "to-fla", step, tmp_path / "fla")
    assert status == 1 and f"{field} is {value!r}" in error and not (tmp_path / "fla").exists()


@pytest.mark.parametrize("flavor", ["1.3B", "1.3B_hybrid"])
def test_the_papers_shapes_fit_flas_layout(flavor):
    args = dataclasses.replace(flavors[flavor], output_gate="sigmoid")
    source = type("Source", (), {"path": "fla", "tensors": fla_checkpoint(args, "meta")})
    renamed = Renamed(source, from_fla_mapping(args))
    check_fits(renamed, args)
    back = Renamed(renamed, to_fla_mapping(args))
    assert {n: t.shape for n, t in back.tensors.items()} == {n: t.shape for n, t in source.tensors.items()}
    assert config_for_fla(args)["num_hidden_layers"] == 18


def nvlabs_checkpoint(args, here, order, down="w3"):
    """{name: tensor} in the authors' layout from ``here``, tensors by our names."""
    up = {"w3": "w2", "w2": "w3"}[down]
    theirs = {
        "transformer.wte.weight": here["tok_embeddings.weight"],
        "transformer.ln_f.weight": here["norm.weight"],
        "lm_head.weight": here["lm_head.weight"],
    }
    mixer = {
        "erase_proj.": "b_proj.", "write_proj.": "w_proj.", "decay_low_proj.": "f_proj.0.", "decay_proj.": "f_proj.1.",
        "gate_low_proj.": "g_proj.0.", "gate_proj.": "g_proj.1.", "decay.": "",
    }  # fmt: skip
    size = args.hidden_size // args.attn_heads
    for layer in range(args.n_layers):
        prefix, block = f"layers.{layer}.", f"transformer.h.{layer}."
        mine = {n.removeprefix(prefix): t for n, t in here.items() if n.startswith(prefix)}
        theirs[block + "norm_1.weight"], theirs[block + "norm_2.weight"] = (
            mine["mixer_norm.weight"], mine["mlp_norm.weight"],
        )  # fmt: skip
        for w, name in (("w1", "gate_proj"), (up, "up_proj"), (down, "down_proj")):
            theirs[f"{block}mlp.{w}.weight"] = mine[f"mlp.{name}.weight"]
        if args.mixer(layer) == "gdn2":
            for name, tensor in mine.items():
                if name.startswith("mixer."):
                    name = name.removeprefix("mixer.")
                    for a, b in mixer.items():
                        name = b + name.removeprefix(a) if name.startswith(a) else name
                    tensor = tensor[:, None] if "conv1d" in name else tensor.flatten() if name == "dt_bias" else tensor
                    theirs[f"{block}attn.{name}"] = tensor
            continue
        q, k, v = (mine[f"mixer.{p}_proj.weight"] for p in "qkv")
        groups = k.shape[0] // size
        if order == "grouped":  # for each key head: its query heads, its key, its value
            rows = []
            for group in range(groups):
                share = q.shape[0] // groups
                rows.append(q[group * share : (group + 1) * share])
                rows += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
        else:
            rows = [q, k, v]
        theirs[block + "attn.attn.weight"] = torch.cat(rows)
        theirs[block + "attn.proj.weight"] = mine["mixer.o_proj.weight"]
    return theirs


DEBUG = flavors["debug_hybrid"]


@pytest.mark.parametrize("order", ["grouped", "concatenated"])
@pytest.mark.parametrize("down", ["w3", "w2"])
def test_the_authors_layout_comes_in_bit_for_bit(tmp_path, capsys, order, down):
    expected = weights(DEBUG)
    path = tmp_path / "iter-000100-ckpt.pth"
    torch.save({"model": nvlabs_checkpoint(DEBUG, expected, order, down)}, path)
    flags = ("--flavor", "debug_hybrid", "--qkv-order", order)
    assert convert(capsys, "from-nvlabs", path, tmp_path / "hf", *flags) == (0, "")
    assert_equal(ours(tmp_path / "hf"), expected)


@pytest.mark.parametrize("flavor", ["1.3B", "1.3B_hybrid"])
def test_the_papers_shapes_fit_the_authors_layout(flavor):
    args: GDN2ModelArgs = flavors[flavor]
    theirs = nvlabs_checkpoint(args, dict(tensors_of(args)), "grouped")
    source = type("Source", (), {"path": "nvlabs", "tensors": theirs})
    check_fits(Renamed(source, from_nvlabs_mapping(args, source, "grouped")), args)


def test_keys_whose_meaning_is_not_known_are_refused_by_name(tmp_path, capsys):
    theirs = nvlabs_checkpoint(DEBUG, weights(DEBUG), "grouped")
    theirs["transformer.h.0.attn.mystery.weight"] = torch.zeros(1)
    torch.save(theirs, tmp_path / "ckpt.pth")
    flags = ("from-nvlabs", tmp_path / "ckpt.pth", tmp_path / "hf", "--flavor", "debug_hybrid")
    status, error = convert(capsys, *flags)
    assert status == 1 and "--qkv-order" in error
    status, error = convert(capsys, *flags, "--qkv-order", "grouped")
    assert status == 1 and "'transformer.h.0.attn.mystery.weight'" in error
    del theirs["transformer.h.0.attn.mystery.weight"], theirs["transformer.h.1.attn.proj.weight"]
    torch.save(theirs, tmp_path / "ckpt.pth")
    status, error = convert(capsys, *flags, "--qkv-order", "grouped")
    assert status == 1 and "'transformer.h.1.attn.proj.weight'" in error and not (tmp_path / "hf").exists()


def test_mlp_matrices_that_cannot_be_told_apart_are_refused():
    args = dataclasses.replace(HYBRID, mlp_size=HYBRID.hidden_size)
    source = type("Source", (), {"path": "nvlabs", "tensors": nvlabs_checkpoint(args, weights(args), "grouped")})
    with pytest.raises(ConvertError, match="mlp_size equals hidden_size"):
        from_nvlabs_mapping(args, source, "grouped")
