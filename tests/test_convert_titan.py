"""What the plug leaves beside checkpoints, what a TOML file says of them, and TorchTitan's own Hugging Face folders."""

import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file

from gdn2_titan import generate
from gdn2_titan.convert.checkpoint_info import INFO_FILE, CheckpointInfo, find_info
from gdn2_titan.convert.commands import from_hf, to_hf
from gdn2_titan.convert.hf_folder import write_model_files
from gdn2_titan.convert.mapping import from_hf_name, to_hf_name
from gdn2_titan.convert.safetensors_files import write_safetensors
from gdn2_titan.models import flavors
from gdn2_titan.titan.checkpoint import GDN2StateDictAdapter, write_checkpoint_files
from gdn2_titan.titan.checks.settings import check_settings as validate_config
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.job_config import JobConfig
from tests.convert_cases import (
    HYBRID,
    TOKENIZER,
    assert_equal,
    convert,
    load_safetensors,
    load_step,
    save_step,
    weights,
)
from tests.training import SHORT, train

DEBUG = flavors["debug"]
HF = ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")


def job(folder, **checkpoint):
    config = JobConfig()
    config.job.dump_folder, config.training.steps, config.training.dataset = str(folder), 10, "stdlib"
    for name, value in ({"enable": True, "interval": 4} | checkpoint).items():
        setattr(config.checkpoint, name, value)
    return config


def test_the_record_is_written_with_a_checkpoint_and_not_before(tmp_path):
    # TorchTitan does not load initial_load_path once the folder of checkpoints exists: a run that is killed before its
    # first checkpoint and starts again must still do so.
    config = job(tmp_path)
    for step in (1, 2, 3):
        write_checkpoint_files(config, DEBUG, step)
    assert not any(tmp_path.iterdir())
    write_checkpoint_files(config, DEBUG, 4)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [INFO_FILE]
    record = find_info(tmp_path / "checkpoint" / "step-4")
    assert record.model_args == DEBUG
    assert record.job_config == json.loads(json.dumps(config.to_dict(), default=str))


@pytest.mark.parametrize(
    ("step", "changes", "written"),
    [
        (10, {}, True),
        (1, {"enable_first_step_checkpoint": True}, True),
        (4, {"enable": False}, False),
        (4, {"load_only": True}, False),
    ],
)
def test_it_is_written_where_torchtitan_saves(tmp_path, step, changes, written):
    write_checkpoint_files(job(tmp_path, **changes), DEBUG, step)
    assert (tmp_path / "checkpoint" / INFO_FILE).exists() == written


def test_the_last_steps_hugging_face_folder_gets_config_and_tokenizer(tmp_path):
    config = job(tmp_path, last_save_in_hf=True, export_dtype="bfloat16")
    write_checkpoint_files(config, DEBUG, 8)
    assert not (tmp_path / "checkpoint" / "step-8").exists()
    write_checkpoint_files(config, DEBUG, 10)
    folder = tmp_path / "checkpoint" / "step-10"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()
    assert "Step: 10" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "other"),
    [("last_save_in_hf", "last_save_model_only"), ("initial_load_in_hf", "initial_load_model_only")],
)
def test_what_torchtitan_would_find_out_too_late_is_refused_at_the_start(tmp_path, name, other):
    with pytest.raises(ConfigError, match=f"checkpoint.{name} is true; then checkpoint.{other} must be true"):
        validate_config(job(tmp_path, **{name: True, other: False}))
    for file in (".metadata", "model.safetensors"):  # of checkpoints of either format
        (tmp_path / file).touch()
    validate_config(job(tmp_path, initial_load_path=str(tmp_path), **{name: True, other: True}))


def test_quantized_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="initial_load_in_hf_quantized"):
        validate_config(job(tmp_path, initial_load_in_hf=True, initial_load_in_hf_quantized=True))


def test_the_adapter_renames_both_ways_and_saves_one_file(tmp_path):
    for assets in (None, str(tmp_path), str(TOKENIZER)):
        adapter = GDN2StateDictAdapter(DEBUG, assets)
        assert adapter.fqn_to_index_mapping is None
    tensors = weights(DEBUG)
    assert_equal(adapter.to_hf(tensors), {to_hf_name(name): tensor for name, tensor in tensors.items()})
    assert_equal(adapter.from_hf(adapter.to_hf(tensors)), tensors)


def test_the_adapter_keeps_the_files_of_this_models_weights_and_no_other_models(tmp_path):
    tensors = {to_hf_name(name): tensor for name, tensor in weights(DEBUG).items()}
    write_safetensors(tmp_path, tensors, tensors.__getitem__, 500_000)
    numbers = GDN2StateDictAdapter(DEBUG, str(tmp_path)).fqn_to_index_mapping
    for file in tmp_path.glob("*.safetensors"):
        assert {numbers[name] for name in load_file(file)} == {int(file.name.split("-")[1])}
    assert GDN2StateDictAdapter(flavors["debug_hybrid"], str(tmp_path)).fqn_to_index_mapping is None


def test_a_tokenizer_that_the_model_has_no_room_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bos_token_id 256; vocab_size is 100"):
        write_model_files(tmp_path, CheckpointInfo(dataclasses.replace(DEBUG, vocab_size=100)), TOKENIZER, "float32")


def test_a_checkpoint_that_does_not_say_its_model_takes_a_flavor_or_a_toml(tmp_path, capsys):
    args = dataclasses.replace(HYBRID, hidden_size=128, n_layers=4, mlp_size=352, head_dim=32, num_v_heads=None)
    step = save_step(tmp_path / "run" / "step-7", weights(args), None)
    status, error = convert(capsys, "to-hf", step, tmp_path / "hf")
    assert status == 1 and "--config or --flavor" in error
    status, error = convert(capsys, "to-hf", step, tmp_path / "hf", "--flavor", "debug_hybrid")
    assert status == 1 and "of shape" in error and not (tmp_path / "hf").exists()
    toml = tmp_path / "x.toml"
    toml.write_text('[model]\nflavor = "debug_hybrid"\n[gdn2]\nhead_dim = 32\nwindow = 8\n')
    assert convert(capsys, "to-hf", step, tmp_path / "hf", "--config", toml) == (0, "")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["head_dim"], config["window"], config["eos_token_id"]) == (32, 8, 257)


@pytest.mark.slow
def test_torchtitan_saves_and_loads_hugging_face_folders(tmp_path):
    args, assets = flavors["debug_hybrid"], tmp_path / "assets"
    shutil.copytree(TOKENIZER, assets)
    tensors = {to_hf_name(name): tensor for name, tensor in weights(args).items()}
    write_safetensors(assets, tensors, tensors.__getitem__, 1_000_000)
    saved, loaded, resumed = (tmp_path / name for name in ("saved", "loaded", "resumed"))
    for folder in (saved, loaded, resumed):
        folder.mkdir()
    train(2, saved, *SHORT, "--checkpoint.enable", "--training.steps=2", *HF, f"--model.hf_assets_path={assets}")
    step = saved / "checkpoint" / "step-2"
    expected = load_safetensors(step)
    assert expected.keys() == tensors.keys()
    # In the files of the index that lies beside the tokenizer.
    assert {f.name for f in step.glob("*.safetensors")} == {f.name for f in assets.glob("*.safetensors")}

    # One step without learning writes what was loaded.
    still = [*SHORT, "--checkpoint.enable", "--training.steps=1", "--optimizer.lr=0.0"]
    train(1, loaded, *still, "--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={step}")
    to_hf(loaded / "checkpoint", tmp_path / "hf")
    assert_equal(load_safetensors(tmp_path / "hf"), expected)

    from_hf(step, tmp_path / "dcp")
    assert_equal({to_hf_name(n): t for n, t in load_step(tmp_path / "dcp", args).items()}, expected)
    train(1, resumed, *still, f"--checkpoint.initial_load_path={tmp_path / 'dcp'}")
    to_hf(resumed / "checkpoint", tmp_path / "again")
    assert_equal(load_safetensors(tmp_path / "again"), expected)


@pytest.mark.slow
def test_depth_and_width_of_the_section_are_resumed_exported_converted_and_generated_from(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    changes = [
        "--gdn2.n_layers=3", "--gdn2.hidden_size=64", "--gdn2.mlp_size=80", "--checkpoint.enable",
        "--checkpoint.interval=2", "--checkpoint.async_mode=disabled", "--training.dataset=stdlib",
    ]  # fmt: skip
    train(1, run, *SHORT, *changes, "--training.steps=2")
    assert f"from {run / 'checkpoint' / 'step-2'}" in train(1, run, *SHORT, *changes, *HF, "--training.steps=4")
    args = dataclasses.replace(flavors["debug_hybrid"], n_layers=3, hidden_size=64, mlp_size=80)
    shapes = {name: tensor.shape for name, tensor in weights(args).items()}
    for source, out in (("step-2", "a"), ("step-4", "b")):
        assert convert(capsys, "to-hf", run / "checkpoint" / source, tmp_path / out) == (0, "")
        found = load_safetensors(tmp_path / out)
        assert {from_hf_name(name): tensor.shape for name, tensor in found.items()} == shapes
        options = ["--model", str(tmp_path / out), "--prompt", "x", "--max-tokens", "2", "--greedy"]
        assert generate.main(options) == 0
