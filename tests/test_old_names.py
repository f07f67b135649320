"""Checkpoints with the names of before the low-rank projections were two linear layers each, through every door."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from gdn2_titan.convert.hf import GDN2ForCausalLM
from gdn2_titan.models import GatedDeltaNet2, GDN2Model
from tests.convert_cases import VARIANTS, assert_equal, convert, load_safetensors, load_step, save_step, weights
from tests.hf_cases import config, pair, tokens
from tests.old_name_cases import old_names

variants = pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)


def renamed_folder(folder):
    """Gives the tensors of a Hugging Face folder their old names, in every file and in the index."""
    for file in folder.glob("*.safetensors"):
        save_file(old_names(load_file(file)), file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        index.write_text(json.dumps(content | {"weight_map": old_names(content["weight_map"])}))
    assert "model.layers.0.mixer.gate_proj.1.bias" in load_safetensors(folder)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_and_whatever_holds_it_load_old_names(assign):
    layer = GatedDeltaNet2(32, 2, 16)
    wanted = {name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
    for module, prefix in ((layer, ""), (torch.nn.ModuleDict({"any": copy.deepcopy(layer)}), "any.")):
        old = {prefix + name: tensor for name, tensor in old_names(wanted).items()}
        names = list(old)
        module.load_state_dict(old, assign=assign)
        assert_equal(module.state_dict(), {prefix + name: tensor for name, tensor in wanted.items()})
        assert list(old) == names
    again = pickle.loads(pickle.dumps(layer))
    again.load_state_dict(old_names(wanted))
    assert_equal(again.state_dict(), wanted)


def test_an_old_name_that_is_missing_or_has_another_shape_is_still_an_error():
    layer = GatedDeltaNet2(32, 2, 16)
    old = old_names(layer.state_dict())
    bias = old.pop("gate_proj.1.bias")
    with pytest.raises(RuntimeError, match='Missing key.*"gate_proj.bias"'):
        layer.load_state_dict(old)
    with pytest.raises(RuntimeError, match="size mismatch for gate_proj.bias"):
        layer.load_state_dict(old | {"gate_proj.1.bias": bias[:-1]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(old | {"gate_proj.1.bias": bias, "gate_proj.2.bias": bias})


@variants
def test_a_decoder_loads_old_names(args):
    wanted, model = weights(args), GDN2Model(args)
    model.load_state_dict(old_names(wanted, args.decay == "scalar"))
    assert_equal(model.state_dict(), wanted)


def test_the_order_of_parameters_and_their_first_values_are_those_of_old_checkpoints_optimizers():
    torch.manual_seed(0)
    layer = GatedDeltaNet2(32, 2, 16)
    order = [name for name, _ in layer.named_parameters()]
    of_decay, of_gate = order.index("decay_low_proj.weight"), order.index("gate_low_proj.weight")
    assert order[of_decay - 1 : of_decay + 3] == [
        "v_conv1d.weight", "decay_low_proj.weight", "decay_proj.weight", "decay.A_log"
    ]  # fmt: skip
    assert order[of_gate - 1 : of_gate + 4] == [
        "write_proj.weight", "gate_low_proj.weight", "gate_proj.weight", "gate_proj.bias", "o_norm.weight"
    ]  # fmt: skip
    # What the layout of before drew from this seed, and the number after it.
    assert sum(p.double().sum().item() for p in layer.parameters()) == pytest.approx(-122.0964819256751, rel=1e-6)
    assert torch.rand(1).item() == pytest.approx(0.8605697154998779, rel=1e-6)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_transformers_loads_an_old_folder_and_saves_todays_names(shard, tmp_path):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "old", max_shard_size=shard)
    renamed_folder(tmp_path / "old")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_equal(loaded.state_dict(), theirs.state_dict())
    body = AutoModel.from_pretrained(tmp_path / "old", dtype=torch.float32)
    assert_equal(body.state_dict(), theirs.model.state_dict())
    for name, model in (("again", loaded), ("body", body)):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        assert load_safetensors(tmp_path / name).keys() == model.state_dict().keys()
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict(), theirs.state_dict())


def test_transformers_loads_an_old_folder_in_part_from_disk(tmp_path):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "old")
    renamed_folder(tmp_path / "old")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "old", device_map=places, offload_folder=tmp_path / "offload"
    )
    ids = tokens(1, 20)
    torch.testing.assert_close(loaded(ids).logits, ours(ids), rtol=0, atol=1e-5)


def test_transformers_takes_a_state_dict_with_old_names_and_a_key_mapping_of_the_callers(tmp_path):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path)
    old = old_names(theirs.state_dict())
    loaded = GDN2ForCausalLM.from_pretrained(None, config=config(), state_dict=old)
    assert_equal(loaded.state_dict(), theirs.state_dict())
    assert old.keys() != theirs.state_dict().keys()
    assert_equal(loaded.state_dict(), theirs.state_dict())
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("lm_head", "head"): t for name, t in old_names(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping={"^head": "lm_head"})
    assert_equal(loaded.state_dict(), theirs.state_dict())
    loaded.save_pretrained(tmp_path / "again")  # the caller's mapping is undone, as transformers has it
    assert {"head.weight", "model.layers.0.mixer.gate_low_proj.weight"} <= load_safetensors(tmp_path / "again").keys()


@variants
def test_the_converter_takes_old_checkpoints_and_old_folders(args, tmp_path, capsys):
    tensors = weights(args)
    old = old_names(tensors, args.decay == "scalar")
    step = save_step(tmp_path / "run" / "step-7", old, args)
    assert convert(capsys, "to-hf", step, tmp_path / "hf") == (0, "")
    expected = load_safetensors(tmp_path / "hf")
    assert_equal({name.removeprefix("model."): t for name, t in expected.items() if ".mixer." in name},
                 {name: t for name, t in tensors.items() if ".mixer." in name})  # fmt: skip
    assert convert(capsys, "to-torch", step, tmp_path / "x.pt") == (0, "")
    assert_equal(torch.load(tmp_path / "x.pt", weights_only=True), tensors)
    save_file(old_names(expected, args.decay == "scalar"), tmp_path / "hf" / "model.safetensors")
    assert convert(capsys, "from-hf", tmp_path / "hf", tmp_path / "dcp") == (0, "")
    assert_equal(load_step(tmp_path / "dcp", args), tensors)


def test_the_converter_says_which_of_todays_tensors_an_old_checkpoint_lacks(tmp_path, capsys):
    args = VARIANTS["recurrent"]
    old = old_names(weights(args))
    del old["layers.1.mixer.decay_proj.0.weight"]
    status, error = convert(capsys, "to-hf", save_step(tmp_path / "run" / "step-7", old, args), tmp_path / "hf")
    assert status == 1 and "no tensor 'layers.1.mixer.decay_low_proj.weight'" in error


def test_an_old_checkpoint_goes_to_flash_linear_attentions_names(tmp_path, capsys):
    args = dataclasses.replace(VARIANTS["recurrent"], output_gate="sigmoid")
    tensors = weights(args)
    step = save_step(tmp_path / "run" / "step-7", old_names(tensors), args)
    assert convert(capsys, "to-fla", step, tmp_path / "fla") == (0, "")
    found = load_safetensors(tmp_path / "fla")
    for here, there in (("decay_low_proj", "f_proj.0"), ("decay_proj", "f_proj.1"), ("gate_low_proj", "g_proj.0"),
                        ("gate_proj", "g_proj.1")):  # fmt: skip
        assert torch.equal(found[f"model.layers.0.attn.{there}.weight"], tensors[f"layers.0.mixer.{here}.weight"])
