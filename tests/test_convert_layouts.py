"""The layout of flash-linear-attention, against checkpoints made by hand from its key names and shapes."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from gdn2_titan.convert.fla import config_for_fla, from_fla_mapping, to_fla_mapping
from gdn2_titan.convert.mapping import Renamed, check_fits, from_hf_name
from gdn2_titan.models import GDN2Model, flavors
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


def test_a_bounded_decay_comes_in_and_out_of_fla_without_A_log_too(tmp_path, capsys):
    theirs = fla_checkpoint(FLA)
    A_log = theirs.pop("model.layers.0.attn.A_log")
    folder = fla_folder(tmp_path / "fla", theirs, lower_bound=-5, safe_gate=True)
    assert convert(capsys, "from-fla", folder, tmp_path / "hf", "--dtype", "bfloat16") == (0, "")
    found, config = ours(tmp_path / "hf"), json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["lower_bound"] == -5.0 and found["layers.0.mixer.decay.A_log"].dtype == torch.float32
    assert torch.equal(found["layers.0.mixer.decay.A_log"], torch.zeros_like(A_log))
    assert torch.equal(found["layers.0.mixer.decay.dt_bias"].flatten(), theirs["model.layers.0.attn.dt_bias"])
    assert convert(capsys, "to-fla", tmp_path / "hf", tmp_path / "back") == (0, "")
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert again["lower_bound"] == -5.0 and again["safe_gate"] is True
    back = load_safetensors(tmp_path / "back")
    assert not back["model.layers.0.attn.A_log"].any() and back.keys() == {*theirs, "model.layers.0.attn.A_log"}


def test_without_a_bound_an_fla_checkpoint_must_have_its_A_log(tmp_path, capsys):
    theirs = fla_checkpoint(FLA)
    del theirs["model.layers.0.attn.A_log"]
    status, error = convert(capsys, "from-fla", fla_folder(tmp_path / "fla", theirs), tmp_path / "hf")
    assert status == 1 and "'model.layers.0.attn.A_log'" in error


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
        ({"safe_gate": True}, "safe_gate True and no lower_bound"),
        ({"lower_bound": 5.0}, "lower_bound is 5.0"),
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
    [
        ("output_gate", "silu"),
        ("erase_gate", "scalar"),
        ("write_gate", "mean"),
        ("decay", "scalar"),
        ("decay_rank", None),
        ("gate_rank", 3),
    ],
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
