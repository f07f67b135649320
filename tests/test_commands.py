"""The command lines: answered without torch, with a run's folder as the model, and without the noise of libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.convert.run_folders import checkpoint_folder
from tests.convert_cases import HYBRID, TOKENIZER, convert, save_step, weights

JOB = {"model": {"hf_assets_path": str(TOKENIZER)}}


def command(*arguments):
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"} | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


PARSED = [
    "generate --help", "generate --nothing", "generate --model nowhere --prompt x", "convert --help",
    "convert to-hf --help", "convert from-hf --help", "convert to-torch --help", "convert from-fla --help",
    "convert to-fla --help", "convert from-nvlabs --help", "convert to-nvlabs --help",
    "convert from-megatron --help",
    "convert to-hf nowhere out", "study --help",
    "evaluate --help", "evaluate --model nowhere --tasks paper", "evaluate --model . --tasks s-niah-2",
    "study gates --help", "study recall --help", "study gates --model nowhere --text x",
]  # fmt: skip


def test_help_and_wrong_command_lines_are_answered_without_torch_and_transformers():
    program = (
        "import runpy, sys\n"
        "for line in sys.argv[1:]:\n"
        "    name, *sys.argv[1:] = line.split()\n"
        "    try:\n"
        "        runpy.run_module(f'gdn2_titan.{name}', run_name='__main__')\n"
        "    except SystemExit as exit:\n"
        "        assert bool(exit.code) == ('--help' not in line), line\n"
        "    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), line\n"
    )
    done = command("-c", program, *PARSED)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder (job.dump_folder) as TorchTitan leaves it, with a step that was not finished."""
    folder = tmp_path_factory.mktemp("outputs") / "debug"
    for step in (9, 10):
        save_step(folder / "checkpoint" / f"step-{step}", weights(HYBRID, seed=step), HYBRID, JOB)
    (folder / "checkpoint" / "step-11").mkdir()
    (folder / "tb" / "20260101-0000").mkdir(parents=True)
    return folder


def test_a_run_its_checkpoints_and_a_step_are_the_same_checkpoint(run):
    newest = run / "checkpoint" / "step-10"
    assert [checkpoint_folder(path) for path in (run, run / "checkpoint", newest)] == [newest] * 3
    assert checkpoint_folder(run / "checkpoint" / "step-9") == run / "checkpoint" / "step-9"


def test_every_conversion_takes_a_runs_folder(run, tmp_path, capsys):
    for name in ("to-hf", "to-torch"):
        for number, path in enumerate((run, run / "checkpoint", run / "checkpoint" / "step-10")):
            assert convert(capsys, name, path, tmp_path / f"{name}{number}") == (0, "")
    status, error = convert(capsys, "to-fla", run, tmp_path / "fla")
    assert status == 1 and "flash-linear-attention" in error  # of what is in it, not of where it is
    status, error = convert(capsys, "from-hf", run, tmp_path / "back")
    assert status == 1 and "step-10 is a TorchTitan checkpoint; checkpoint.initial_load_path reads it" in error
    (tmp_path / "hf_run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "to-hf0").rename(tmp_path / "hf_run" / "checkpoint" / "step-10")
    assert convert(capsys, "from-hf", tmp_path / "hf_run", tmp_path / "back") == (0, "")


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        ([], "has no checkpoint; it must be a checkpoint"),
        (["tb"], "has no checkpoint; it must be a checkpoint"),
        (["checkpoint/step-5"], "has no complete checkpoint: of checkpoint/step-5 not all is there"),
        (["step-5", "step-6"], "has no complete checkpoint: of step-5, step-6 not all is there"),
        (["a/step-1/", "b/step-2/"], "has more than one folder of checkpoints: a, b; it must be one of them"),
    ],
)
def test_a_folder_without_one_complete_checkpoint_is_refused_in_one_sentence(tmp_path, folders, sentence):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        if folder.endswith("/"):
            (tmp_path / folder / ".metadata").touch()
    with pytest.raises(ConvertError) as refusal:
        checkpoint_folder(tmp_path)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_plain_terminal_sees_the_text_the_rate_and_nothing_else(run, tmp_path):
    done = command("-m", "gdn2_titan.generate", "--model", run, "--prompt", "x", "--greedy", "--max-tokens", 3)
    assert done.returncode == 0
    (rate,) = done.stderr.splitlines()
    assert "tokens/s after the first; prompt of 2 tokens" in rate
    done = command("-m", "gdn2_titan.convert", "to-hf", run, tmp_path / "hf", "--with-code")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Wrote {tmp_path / 'hf'}\n", "")
