"""What is wrong ends a conversion with one sentence and exit status 1, and leaves nothing behind."""

import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn2_titan.convert import atomic, commands, dcp_writer, safetensors_files, tokenizer
from tests.convert_cases import HYBRID, convert, hashes, load_safetensors, save_step, weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def step(tmp_path):
    return save_step(tmp_path / "run" / "step-7", weights(HYBRID), HYBRID)


@pytest.fixture
def folder(tmp_path, step):
    commands.to_hf(step, tmp_path / "hf", shard_size=40_000)
    return tmp_path / "hf"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def assert_refused(capsys, source, out, *words, command=None, flags=()):
    before, around = hashes(source) if source.is_dir() else source.read_bytes(), set(out.parent.iterdir())
    command = command or ("from-hf" if (source / "config.json").exists() else "to-hf")
    status, error = convert(capsys, command, source, out, *flags)
    assert status == 1
    assert error.startswith("Error: ") and error.count("\n") == 1
    for word in words:
        assert word in error, error
    assert set(out.parent.iterdir()) == around, "something is left"
    assert (hashes(source) if source.is_dir() else source.read_bytes()) == before, "the source changed"


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_distributed_file(tmp_path, capsys, step, keep):
    cut(step / "__0_0.distcp", keep)
    assert_refused(capsys, step, tmp_path / "out", "__0_0.distcp", "truncated")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_metadata(tmp_path, capsys, step, keep):
    cut(step / ".metadata", keep)
    assert_refused(capsys, step, tmp_path / "out", ".metadata", "damaged")


def test_a_missing_distributed_file(tmp_path, capsys, step):
    (step / "__0_0.distcp").unlink()
    assert_refused(capsys, step, tmp_path / "out", "__0_0.distcp is not there")


def test_a_distributed_file_with_other_content_of_the_same_length(tmp_path, capsys, step):
    file = step / "__0_0.distcp"
    file.write_bytes(b"x" * file.stat().st_size)
    assert_refused(capsys, step, tmp_path / "out", "__0_0.distcp", "damaged")


def test_a_part_of_a_tensor_that_nobody_saved(tmp_path, capsys, step):
    metadata = pickle.loads((step / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["lm_head.weight"]
    entry.size = torch.Size([entry.size[0] * 2, entry.size[1]])
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_refused(capsys, step, tmp_path / "out", "'lm_head.weight'", "do not add up")


def test_metadata_that_names_a_file_elsewhere(tmp_path, capsys, step):
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../step-7/__0_0.distcp"
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_refused(capsys, step, tmp_path / "out", "outside of the checkpoint")


def test_parts_that_the_writer_packed(tmp_path, capsys, step):
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_refused(capsys, step, tmp_path / "out", "packed by ['stream.zstd']")


class Attack:
    """Unpickled by a trusting reader, it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_metadata_does_not_run(tmp_path, capsys, step):
    (step / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "mark")))
    assert_refused(capsys, step, tmp_path / "out", "mkdir", "not loaded")


def test_code_in_a_distributed_file_does_not_run(tmp_path, capsys, step):
    stream = io.BytesIO()
    torch.save(Attack(tmp_path / "mark"), stream)
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(stream.getvalue())
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    (step / "__0_0.distcp").write_bytes(stream.getvalue())
    assert_refused(capsys, step, tmp_path / "out", "__0_0.distcp")


def test_code_in_the_authors_checkpoint_does_not_run(tmp_path, capsys):
    source = tmp_path / "ckpt.pth"
    torch.save({"model": Attack(tmp_path / "mark")}, source)
    assert_refused(capsys, source, tmp_path / "out", "ckpt.pth", command="from-nvlabs", flags=("--flavor", "debug"))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_safetensors_file(tmp_path, capsys, folder, keep):
    cut(shards(folder)[1], keep)
    assert_refused(capsys, folder, tmp_path / "out", shards(folder)[1].name, "damaged")


def test_a_missing_shard(tmp_path, capsys, folder):
    gone = shards(folder)[1]
    gone.unlink()
    assert_refused(capsys, folder, tmp_path / "out", f"{gone.name} is not there", INDEX)


def test_an_index_that_names_a_tensor_twice(tmp_path, capsys, folder):
    index = (folder / INDEX).read_text()
    line = next(line for line in index.splitlines() if "model.norm.weight" in line)
    (folder / INDEX).write_text(index.replace(line, line.rstrip(",") + ",\n" + line))
    assert_refused(capsys, folder, tmp_path / "out", INDEX, "'model.norm.weight' twice")


def test_a_tensor_that_is_in_two_files(tmp_path, capsys, folder):
    first, last = load_file(shards(folder)[0]), shards(folder)[-1]
    save_file(load_file(last) | first, last)
    assert_refused(capsys, folder, tmp_path / "out", last.name, "says it is in")


def test_an_index_that_names_a_tensor_its_file_does_not_have(tmp_path, capsys, folder):
    tensors = load_file(shards(folder)[0])
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, shards(folder)[0])
    assert_refused(capsys, folder, tmp_path / "out", f"does not have tensor {name!r}")


def test_an_index_that_names_a_file_elsewhere(tmp_path, capsys, folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(capsys, folder, tmp_path / "out", "'../secret.safetensors'")


def test_an_index_that_is_no_json(tmp_path, capsys, folder):
    cut(folder / INDEX, 50)
    assert_refused(capsys, folder, tmp_path / "out", INDEX, "damaged")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp_size": 64}, "of shape [48, 32]; the model's configuration makes it [64, 32]"),
        ({"n_layers": 3}, "has no tensor 'model.layers.2."),
        ({"n_layers": 1}, "has tensor 'model.layers.1."),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_v_heads": "4"}, "describes no model"),
        ({"allow_neg_eigval": "false"}, "allow_neg_eigval 'false'; it must be true or false"),
        ({"model_type": "llama"}, "model_type 'llama'"),
    ],
    ids=str,
)
def test_a_config_that_the_weights_do_not_fit(tmp_path, capsys, folder, changes, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert_refused(capsys, folder, tmp_path / "out", words)


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": '])
def test_a_damaged_config(tmp_path, capsys, folder, content):
    (folder / "config.json").write_text(content)
    assert_refused(capsys, folder, tmp_path / "out", "config.json")


def test_a_damaged_record_of_the_training(tmp_path, capsys, step):
    cut(step.parent / "gdn2.json", 40)
    assert_refused(capsys, step, tmp_path / "out", "gdn2.json", "damaged")


def test_a_source_that_is_not_there(tmp_path, capsys):
    for command in ("to-hf", "from-hf", "to-torch", "from-fla", "to-fla"):
        status, error = convert(capsys, command, tmp_path / "none", tmp_path / "out")
        assert status == 1 and "none" in error and "is not there" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["to-hf", "to-torch", "to-fla"])
def test_an_out_that_exists_is_left_alone(tmp_path, capsys, step, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert_refused(capsys, step, tmp_path / "out", "not empty", command=command)
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    assert_refused(capsys, step, tmp_path / "file", "exists", command=command)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_empty_folder_is_filled(tmp_path, capsys, step):
    (tmp_path / "out").mkdir()
    assert convert(capsys, "to-hf", step, tmp_path / "out") == (0, "")
    assert len(load_safetensors(tmp_path / "out")) == len(weights(HYBRID))


class FullDisk(io.FileIO):
    """A file on a disk with room for some bytes."""

    room = 60_000

    def write(self, data):
        FullDisk.room -= memoryview(data).nbytes
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("command", ["to-hf", "from-hf", "to-torch"])
def test_a_disk_that_fills_up_while_writing(tmp_path, capsys, monkeypatch, step, folder, command):
    def opened(path, mode="r", **options):
        return FullDisk(path, mode) if mode == "wb" else open(path, mode, **options)

    for module in (safetensors_files, dcp_writer, commands):
        monkeypatch.setattr(module, "open", opened, raising=False)
    monkeypatch.setattr(FullDisk, "room", 60_000)
    source = folder if command == "from-hf" else step
    assert_refused(capsys, source, tmp_path / "out", "No space left", command=command)
    assert FullDisk.room < 0


def test_a_disk_that_is_full_when_the_files_are_flushed(tmp_path, capsys, monkeypatch, step):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    assert_refused(capsys, step, tmp_path / "out", "No space left")


def test_a_disk_with_no_room_for_the_tokenizer(tmp_path, capsys, monkeypatch, step, folder):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    monkeypatch.setattr(tokenizer.shutil, "copyfile", full)
    assert_refused(capsys, step, tmp_path / "out", "No space left", flags=("--tokenizer", folder))


KILLED = """
import os, signal, sys
from gdn2_titan.convert import commands, mapping
read, count = mapping.Renamed.read, 0
def dying(self, name):
    global count
    count += 1
    if count > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name)
mapping.Renamed.read = dying
getattr(commands, sys.argv[1])(sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize(
    "command", ["to_hf", *(pytest.param(c, marks=pytest.mark.slow) for c in ("from_hf", "to_torch"))]
)
def test_a_process_killed_in_the_middle_leaves_no_out_and_a_second_try_works(tmp_path, step, folder, command):
    source, out = (folder if command == "from_hf" else step), tmp_path / "out"
    before = hashes(source)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED, command, str(source), str(out)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and hashes(source) == before
    getattr(commands, command)(source, out)
    assert out.exists()
