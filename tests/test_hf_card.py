"""The model card and what lies beside it: its lines run as they are written, and nothing names a local path."""

import json
import os
import re
import subprocess
import sys

import pytest
from transformers import PreTrainedTokenizerFast

from gdn2_titan.convert.hf_folder import without_folders
from gdn2_titan.models import GDN2Model
from tests.convert_cases import HYBRID, TOKENIZER, convert, save_step

# With what a card says of it.
JOB = {
    "job": {"dump_folder": "./outputs/debug", "config_file": "/home/alice/a b/run.toml", "description": "a and/or b"},
    "checkpoint": {"folder": "runs/ckpt", "initial_load_path": "~/old/step-5", "interval": 100},
    "model": {"hf_assets_path": None, "converters": ["C:\\Users\\alice\\mine"]},
    "training": {"dataset": "text", "dataset_path": "/home/alice/my texts/*.jsonl", "steps": 7, "lr": 1e-3},
    "data": {"mirror": "https://example.org/a/b", "command": "read --from=/home/alice/x/y.bin"},
}


def written(tmp_path, capsys, name="this folder", job=JOB, tokenizer=None, options=()):
    """A folder of to-hf, of a run that was trained with the tokenizer's folder."""
    job = job | {"model": job["model"] | {"hf_assets_path": None if tokenizer is None else str(tokenizer)}}
    save_step(tmp_path / "run" / "step-7", GDN2Model(HYBRID).state_dict(), HYBRID, job)
    status, error = convert(capsys, "to-hf", tmp_path / "run", tmp_path / name, *options)
    assert status == 0, error
    return tmp_path / name


def snippet(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("tokenizer", [TOKENIZER, None], ids=["with a tokenizer", "without"])
def test_the_lines_of_a_card_load_the_folder(tmp_path, capsys, monkeypatch, tokenizer):
    code = snippet(written(tmp_path, capsys, tokenizer=tokenizer))
    assert "trust_remote_code" not in code and ("AutoTokenizer" in code) == (tokenizer is not None)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["model"].config.model_args() == HYBRID
    if tokenizer is not None:
        expected = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
        assert names["tokenizer"]("ab")["input_ids"] == expected("ab")["input_ids"]


def with_code(tmp_path, capsys):
    code = snippet(written(tmp_path, capsys, tokenizer=TOKENIZER, options=["--with-code"]))
    assert "gdn2_titan" not in code and code.count("trust_remote_code=True") == 2
    return code


def test_the_lines_of_a_card_with_code_name_transformers_alone(tmp_path, capsys):
    assert "import AutoModelForCausalLM" in with_code(tmp_path, capsys)


@pytest.mark.slow
def test_the_lines_of_a_card_with_code_load_the_folder_without_this_package_and_without_a_question(tmp_path, capsys):
    code = with_code(tmp_path, capsys)
    ends = [
        'assert type(model).__module__.startswith("transformers_modules.")',
        'batch = tokenizer(["ab", "c"], return_tensors="pt", padding=True, padding_side="left")',
        "assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 5)",
        "from transformers import AutoModelForSequenceClassification as Labels",
        'labels = Labels.from_pretrained("this folder", trust_remote_code=True, num_labels=3)',
        "assert labels(**batch).logits.shape == (2, 3)",
        # Not trusted, with nobody to answer: the tokenizer is no code and comes all the same.
        "import contextlib, io",
        "with contextlib.redirect_stdout(io.StringIO()):",
        '    plain = AutoTokenizer.from_pretrained("this folder")',
        'assert plain("ab")["input_ids"] == tokenizer("ab")["input_ids"]',
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    code = "\n".join(['import sys; sys.modules["gdn2_titan"] = None', code, *ends])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    assert "trust_remote_code" not in run.stdout + run.stderr and "Do you wish" not in run.stdout


def test_no_file_of_a_folder_names_a_local_path_and_the_rest_of_the_config_stays(tmp_path, capsys):
    tokenizer = tmp_path / "alice" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_bytes((TOKENIZER / name).read_bytes())
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    origin = {name: str(tmp_path / name) for name in ("name_or_path", "special_tokens_map_file", "tokenizer_file")}
    code = {"auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | origin | code))
    folder = written(tmp_path, capsys, tokenizer=tokenizer, options=["--with-code"])
    for path in folder.iterdir():
        content = path.read_bytes()
        for local in (str(tmp_path).encode(), b"alice", b"outputs/debug", b"runs/ckpt", b"~/old"):
            assert local not in content, (path, local)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == config
    (card,) = re.findall(r"```json\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    card = json.loads(card)
    assert card["training"] == {"dataset": "text", "dataset_path": "*.jsonl", "steps": 7, "lr": 1e-3}
    assert card["job"] == {"dump_folder": "debug", "config_file": "run.toml", "description": "a and/or b"}
    assert card["checkpoint"] == {"folder": "ckpt", "initial_load_path": "step-5", "interval": 100}
    assert card["data"] == {"mirror": "https://example.org/a/b", "command": "read --from=y.bin"}


@pytest.mark.parametrize(
    ("field", "value", "left"),
    [
        ("dataset_path", "HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb"),
        ("dataset_path", "data/mine.jsonl", "mine.jsonl"),
        ("dataset_path", "my texts/*.txt", "*.txt"),
        ("dump_folder", "outputs/debug", "debug"),
        ("x", "../up/here", "here"),
        ("x", "file:///srv/x", "x"),
        ("x", "\\\\server\\share\\x", "x"),
        ("x", "D:/data/x", "x"),
        ("x", ["/a/b", {"y": "/c/d"}], ["b", {"y": "d"}]),
        ("description", "more? yes/no, at https://a.b/c/d", "more? yes/no, at https://a.b/c/d"),
        ("description", "was in /srv/a/b of C:\\runs\\c", "was in b of c"),
        ("steps", 7, 7),
        ("compile", True, True),
        ("path", None, None),
    ],
)
def test_of_a_path_its_last_name_is_left(field, value, left):
    assert without_folders(value, field) == left
