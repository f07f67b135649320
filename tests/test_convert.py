"""Checkpoints out to Hugging Face folders and in again: every tensor, every bit, and what lies beside them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdn2_titan.convert.checkpoint_info import find_info
from gdn2_titan.convert.commands import from_hf, to_hf
from gdn2_titan.convert.mapping import from_hf_name, to_hf_name
from gdn2_titan.convert.safetensors_files import write_safetensors
from gdn2_titan.models import GDN2ModelArgs
from tests.convert_cases import (
    HYBRID,
    TOKENIZER,
    VARIANTS,
    assert_equal,
    convert,
    hashes,
    load_safetensors,
    load_step,
    save_sharded,
    save_step,
    weights,
)
from tests.processes import run

JOB = {"model": {"hf_assets_path": str(TOKENIZER), "flavor": "debug"}, "optimizer": {"lr": 0.123}}


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("layers.11.mixer.decay.A_log", "model.layers.11.mixer.decay.A_log"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_are_the_agreed_ones_both_ways(name, there):
    assert to_hf_name(name) == there
    assert from_hf_name(there) == name


def test_a_name_from_elsewhere_is_refused():
    with pytest.raises(ValueError, match="'transformer.wte.weight'"):
        from_hf_name("transformer.wte.weight")


@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_tensors_come_out_and_in_bit_for_bit(tmp_path, args):
    expected = weights(args)
    step = save_step(tmp_path / "run" / "step-7", expected, args)
    before = hashes(step)
    to_hf(step, tmp_path / "hf", shard_size=20_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert_equal(load_safetensors(tmp_path / "hf"), {to_hf_name(n): t for n, t in expected.items()})
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_equal(load_step(tmp_path / "back", args), expected)
    assert find_info(tmp_path / "back").model_args == args
    assert hashes(step) == before


@pytest.mark.parametrize(
    ("world", "tensor_parallel"),
    [(4, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_what_several_processes_saved_comes_out_and_in_bit_for_bit(tmp_path, world, tensor_parallel):
    run(save_sharded, world, tmp_path / "store", tmp_path, world, tensor_parallel, HYBRID)
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    to_hf(tmp_path, tmp_path / "hf")
    assert_equal(load_safetensors(tmp_path / "hf"), {to_hf_name(n): t for n, t in expected.items()})
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert_equal(load_step(tmp_path / "back", HYBRID), expected)


def test_the_folder_has_config_tokenizer_and_card(tmp_path):
    save_step(tmp_path / "run" / "step-7", weights(HYBRID), HYBRID, JOB)
    to_hf(tmp_path / "run", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["dtype"]) == ("gdn2", ["GDN2ForCausalLM"], "float32")
    assert GDN2ModelArgs(**{f.name: config[f.name] for f in dataclasses.fields(GDN2ModelArgs)}) == dataclasses.replace(
        HYBRID, layer_pattern=["gdn2", "swa"]
    )
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256, 257, 258]
    assert (config["tie_word_embeddings"], config["use_cache"]) == (False, True)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 257
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (TOKENIZER / name).read_bytes()
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Step: 7" in card and '"lr": 0.123' in card


def test_a_hugging_face_folder_goes_out_again_with_its_step_and_the_tokenizer_that_is_named(tmp_path, capsys):
    to_hf(save_step(tmp_path / "run" / "step-7", weights(HYBRID), HYBRID), tmp_path / "step-7")
    assert not (tmp_path / "step-7" / "tokenizer.json").exists()
    assert convert(capsys, "to-hf", tmp_path / "step-7", tmp_path / "hf", "--tokenizer", TOKENIZER) == (0, "")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 257
    assert "Step: 7" in (tmp_path / "hf" / "README.md").read_text()
    assert_equal(load_safetensors(tmp_path / "hf"), load_safetensors(tmp_path / "step-7"))


def test_a_tokenizer_that_is_gone_is_missed_by_the_command_that_writes_one_only(tmp_path, capsys):
    tensors = weights(HYBRID)
    step = save_step(tmp_path / "run" / "step-7", tensors, HYBRID, {"model": {"hf_assets_path": "/gone/tokenizer"}})
    status, error = convert(capsys, "to-hf", step, tmp_path / "hf")
    assert status == 1 and "'/gone/tokenizer', which is not there; name the tokenizer with --tokenizer" in error
    assert convert(capsys, "to-torch", step, tmp_path / "model.pt") == (0, "")
    assert_equal(torch.load(tmp_path / "model.pt"), tensors)


def test_of_a_runs_folder_the_latest_complete_step_is_taken(tmp_path):
    for step in (9, 10):
        save_step(tmp_path / "run" / f"step-{step}", weights(HYBRID, seed=step), HYBRID)
    (tmp_path / "run" / "step-11").mkdir()
    to_hf(tmp_path / "run", tmp_path / "hf")
    assert torch.equal(load_safetensors(tmp_path / "hf")["lm_head.weight"], weights(HYBRID, seed=10)["lm_head.weight"])


def test_dtype_changes_every_tensor_but_the_decays(tmp_path, capsys):
    expected = weights(HYBRID)
    step = save_step(tmp_path / "run" / "step-7", expected, HYBRID)
    assert convert(capsys, "to-hf", step, tmp_path / "hf", "--dtype", "bfloat16", "--shard-size", "16KB")[0] == 0
    wanted = {
        to_hf_name(n): t if n.endswith(("A_log", "dt_bias")) else t.to(torch.bfloat16) for n, t in expected.items()
    }
    assert_equal(load_safetensors(tmp_path / "hf"), wanted)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_keep_to_the_size_that_was_asked_for(tmp_path, capsys):
    step = save_step(tmp_path / "run" / "step-7", weights(HYBRID), HYBRID)
    assert convert(capsys, "to-hf", step, tmp_path / "hf", "--shard-size", "40KB")[0] == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {file.name for file in files}
    tensors = load_safetensors(tmp_path / "hf")
    sizes = {}
    for name, file in index["weight_map"].items():
        sizes[file] = sizes.get(file, 0) + tensors[name].nbytes
    assert max(sizes.values()) <= 40_000 and index["metadata"]["total_size"] == sum(sizes.values())


@pytest.mark.parametrize(("size", "counts"), [(300, [3, 3, 1]), (299, [2, 2, 2, 1]), (99, [1] * 7), (700, [7])])
def test_a_shard_is_filled_to_the_last_byte_and_no_further(tmp_path, size, counts):
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(7)}
    write_safetensors(tmp_path, tensors, tensors.__getitem__, size)
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == counts
    assert_equal(load_safetensors(tmp_path), tensors)


def test_to_torch_is_one_file_of_plain_tensors(tmp_path, capsys):
    expected = weights(HYBRID)
    save_step(tmp_path / "run" / "step-7", expected, HYBRID)
    assert convert(capsys, "to-torch", tmp_path / "run", tmp_path / "model.pt") == (0, "")
    assert_equal(torch.load(tmp_path / "model.pt", weights_only=True), expected)


def test_converting_takes_neither_transformers_nor_torchtitan():
    code = "import sys, gdn2_titan.convert.__main__; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"transformers", "torchtitan", "accelerate", "gdn2_titan.titan"}


def _peak(command, small, large, tmp_path):
    """Bytes that a command on ``large`` adds to the most that its process ever held. What the first use of PyTorch's
    lazily loaded parts takes is not counted: the process has run the same command on ``small`` before."""
    program = (
        "import sys\n"
        "from gdn2_titan.convert.commands import from_hf, to_hf\n"
        "def peak():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "small, large, out = sys.argv[1:]\n"
        "suffix = '-small'\n"
        f"{command.format('small', 'out + suffix')}\n"
        "before = peak()\n"
        f"{command.format('large', 'out')}\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(small), str(large), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_memory_stays_below_two_largest_tensors_and_a_shard(tmp_path):
    args = GDN2ModelArgs(
        vocab_size=16000, hidden_size=512, n_layers=20, mlp_size=2048, num_heads=4, head_dim=128, attn_heads=4,
        layer_pattern=("gdn2", "swa"),
    )  # fmt: skip
    tensors = weights(args)
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    step, shard = save_step(tmp_path / "run" / "step-7", tensors, args), 40_000_000
    bound = 2 * largest + shard
    assert total > 4 * bound
    save_step(tmp_path / "small" / "step-7", weights(HYBRID), HYBRID)
    command = "to_hf({}, {}, shard_size=40_000_000)"
    assert _peak(command, tmp_path / "small", step, tmp_path / "hf") < bound
    assert _peak("from_hf({}, {})", tmp_path / "hf-small", tmp_path / "hf", tmp_path / "back") < bound
    assert_equal(load_step(tmp_path / "back", args), tensors)
