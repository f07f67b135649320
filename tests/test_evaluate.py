"""``python -m gdn2_titan.evaluate``: the tables it prints, what it leaves out and says of it, and what it refuses."""

import json
import os
import re
import sys
import urllib.error

import pytest
import torch

from gdn2_titan.convert.hf import GDN2Decoder, load_checkpoint
from gdn2_titan.evaluate import __main__ as command
from gdn2_titan.evaluate import answers, network, run
from gdn2_titan.evaluate.paper import AVERAGED, PAPER_ROWS, TABLE_2, TABLE_3, needle_column
from gdn2_titan.evaluate.report import Result, mean, text_of
from tests.convert_cases import assert_one_sentence, hybrid, save_run

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def decoder():
    return hybrid()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, decoder):
    """A run's checkpoints, with a Hugging Face folder beside and a text."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, decoder)
    (folder / "text.txt").write_text("A text. It says little. " * 100)
    return folder


def evaluated(capsys, *arguments):
    """stdout and stderr of a command that ends well."""
    capsys.readouterr()
    assert command.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


# What a model says.


def alone(decoder, prompt, count):
    """Greedy ids until eos, by computing everything again for every token."""
    ids = torch.tensor(prompt)
    while len(ids) < len(prompt) + count and ids[-1] != EOS:
        ids = torch.cat((ids, decoder(ids[None])[0, -1:].argmax(-1)))
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("piece", [10, 2048])
@torch.no_grad()
def test_prompts_of_different_lengths_in_a_batch_and_in_pieces_are_answered_as_each_alone(
    folder, decoder, monkeypatch, piece
):
    monkeypatch.setattr(answers, "PIECE", piece)
    lengths, forward = [], GDN2Decoder.forward

    def counted(self, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, **kwargs)

    monkeypatch.setattr(GDN2Decoder, "forward", counted)
    options = command._parser().parse_args(["--model", str(folder / "hf"), "--tasks", "paper"])
    checkpoint, tokenizer = run.open_model(options)
    model = load_checkpoint(checkpoint)
    prompts = [[BOS, *text.encode()] for text in ("def f(x):", "The code of the amber anchor is ", "x", "def é" * 9)]
    said = answers.greedy_answers(model, tokenizer, batch_size=3, new_tokens=20)(prompts)
    expected = [alone(decoder, prompt, 20) for prompt in prompts]
    assert said == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert max(lengths) <= piece


# The command, with needles.


@pytest.mark.parametrize("kind", ["hf", "checkpoint", "checkpoint/step-7"])
def test_every_kind_of_folder_has_its_row_beside_the_papers_and_its_file(folder, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(run, "NEW_TOKENS", 8)  # that are generated; fewer take less time
    out = tmp_path / "results.json"
    printed = evaluated(
        capsys, "--model", folder / kind, "--tasks", "s-niah-1,MK-NIAH-1", "--haystack", folder / "text.txt",
        "--lengths", 440, "--samples", 2, "--batch-size", 2, "--output", out,
    )  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.out.splitlines() if "|" in line]
    assert rows[0] == ["", "S-NIAH-1 440", "MK-NIAH-1 440"]
    assert [row[0] for row in rows[2:]] == [*PAPER_ROWS, kind.split("/")[-1], "standard error", "n"]
    assert rows[4][1:] == ["0.0", "0.0"] and rows[6][1:] == ["2", "2"] and rows[2][1:] == ["-", "-"]
    written = json.loads(out.read_text())
    assert [(r["task"], r["length"], r["value"], r["n"]) for r in written["results"]] == [
        ("s-niah-1", 440, 0.0, 2), ("mk-niah-1", 440, 0.0, 2),
    ]  # fmt: skip
    assert written["settings"]["haystack"]["characters"] == 2400 and written["left_out"] == []
    assert list(written["paper"]) == list(PAPER_ROWS) and written["versions"]["torch"] == torch.__version__


def test_what_is_missing_is_left_out_with_its_reason_and_the_rest_runs(folder, capsys, monkeypatch):
    monkeypatch.setattr(run, "NEW_TOKENS", 8)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gdn2_titan.evaluate.harness", raising=False)
    printed = evaluated(
        capsys, "--model", folder / "hf", "--tasks", "paper", "--lengths", "200,420", "--samples", 1
    ).out  # fmt: skip
    assert "S-NIAH-1 420" in printed and "NIAH-2" not in printed and "PIQA" not in printed
    sentences = printed.strip().split("\n\n")[2:]
    assert len(sentences) == 3
    assert re.fullmatch(r"wikitext, lambada_openai, .*, boolq are left out: .*lm_eval.* pip install .*\.", sentences[0])
    assert re.fullmatch(
        r"s-niah-1 at 200 tokens is left out: --lengths has 200; .* must be more than \d+.*", sentences[1]
    )
    assert sentences[2] == "s-niah-2, s-niah-3, mk-niah-1 are left out: --haystack names no text to hide needles in."


def test_what_was_measured_before_a_task_fails_is_in_the_file(folder, tmp_path, monkeypatch):
    def failing(task, length, *others):
        if length == 500:
            raise RuntimeError("out of memory")
        return Result(task, "contains", length, 50.0, None, 1)

    monkeypatch.setattr(run, "needle_result", failing)
    out = tmp_path / "results.json"
    line = f"--model {folder / 'hf'} --tasks s-niah-1 --lengths 400,500 --output {out}"
    with pytest.raises(RuntimeError):
        command.main(line.split())
    assert [result["length"] for result in json.loads(out.read_text())["results"]] == [400]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


WRONG = {
    "--model nowhere --tasks paper": r"nowhere is not there; it must be a folder with a checkpoint",
    "--model HF --tasks s-niah-3": r"--tasks has s-niah-3, which hides needles in a text; --haystack must .*",
    "--model HF --tasks paper --haystack nowhere": r"--haystack is 'nowhere', which cannot be read: .*",
    "--model HF --tasks paper --haystack HF": r"--haystack is '\S+', which cannot be read: .*",
    "--model HF --tasks paper --haystack EMPTY": r"--haystack is '\S+', which has no text",
    "--model HF --tasks paper --haystack BINARY": r"--haystack is '\S+'; it must be text in UTF-8",
    "--model HF --tasks a,,b": r"argument --tasks: is 'a,,b'; it must be different names with commas between them",
    "--model HF --tasks paper,paper": r"argument --tasks: is 'paper,paper'; it must be different names .*",
    "--model HF --tasks paper --lengths 1k": r"argument --lengths: is '1k'; it must be whole numbers of at least 1 .*",
    "--model HF --tasks paper --samples 0": r"argument --samples: is '0'; it must be a whole number of at least 1",
    "--model HF --tasks paper --limit x": r"argument --limit: is 'x'; it must be a whole number of at least 1",
    "--model HF --tasks paper --output nowhere/a.json": r"--output is 'nowhere/a.json'; its folder must be there",
    "--model HF --tasks paper --output HF": r"--output is '\S+', a folder; it must be a file",
    "--model HF --tasks paper --include-path nowhere": r"--include-path is 'nowhere'; it must be a folder",
    "--model HF --tasks piqa --samples 9": r"--samples is given, and --tasks has none of needle tasks",
    "--model HF --tasks s-niah-1 --max-length 9": r"--max-length is given, and --tasks has none of lm-eval's tasks",
    "--model HF --tasks s-niah-1 --haystack EMPTY": r"--haystack is given, and --tasks has none that hides .*",
    "--model HF --tasks s-niah-1 --lengths 100": r"s-niah-1 at 100 tokens is left out: --lengths has 100; .*",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_answered_by_one_sentence(line, folder, tmp_path, capsys):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    places = {"HF": folder / "hf", "EMPTY": tmp_path / "empty", "BINARY": tmp_path / "binary"}
    assert_one_sentence(capsys, command.main, [places.get(word, word) for word in line.split()], WRONG[line])


# The tables.


def test_the_papers_rows_have_the_papers_averages():
    averages = [round(sum(row[column] for column in AVERAGED) / len(AVERAGED), 2) for row in PAPER_ROWS.values()]
    assert averages == [53.11, 53.97] and len(AVERAGED) == 9
    assert all(list(row) == [*TABLE_2, *TABLE_3] for row in PAPER_ROWS.values()) and len(TABLE_3) == 14


def full(value=50.0):
    return [Result(column.task, column.metric, None, value, 0.5, 1000) for column in TABLE_2]


def test_the_average_is_that_of_all_nine_accuracies_or_is_not_there():
    values = [17.0, 12.0, *range(10, 19)]
    results = [Result(c.task, c.metric, None, v, None, 9) for c, v in zip(TABLE_2, values, strict=True)]
    assert mean(results) == 14
    assert mean(results[:-1]) is None
    assert text_of(results[:-1], [], "mine").endswith("nine accuracies, of which some are missing.")


def test_a_table_has_the_papers_columns_and_rows_and_lines_up():
    results = full() + [Result(c.task, c.metric, c.length, 12.34, 1.0, 500) for c in TABLE_3]
    results += [Result("own", "acc", None, 25.0, None, 4), Result("swde", "contains", None, 1.0, None, 9)]
    results += [Result("s-niah-1", "contains", 16384, 1.0, 0.1, 500)]
    second, third, other = text_of(results, [], "mine").split("\n\n")[1::2]
    for table, columns in ((second, 12), (third, 15)):
        lines = table.splitlines()
        assert len(lines) == 7 and len({len(line) for line in lines}) == 1
        assert all(line.count("|") == columns + 2 for line in lines)
    assert re.search(r"\| GDN-2 1.3B \(paper\) +\| +15.90 \| +11.41 \|.* 53.11 \|\n", second)
    assert re.search(r"\| mine +\| +50.00 \|.* +50.00 \|\n\| standard error +\| +0.50 .*\n\| n +\| +1,000", second)
    assert re.search(r"S-NIAH-1 8K .* MK-NIAH-1 4K \| S-NIAH-1 16K \|\n", third) and "12.3 |" in third
    assert re.search(r"\| own +\| +acc \| 25.00 \| +- \| +4 \|", other)


def test_lengths_of_ones_own_have_columns_without_the_papers_figures():
    column = needle_column("s-niah-1", 3000)
    assert column.head == "S-NIAH-1 3,000" and needle_column("s-niah-1", 4096) in TABLE_3
    assert all(column not in row for row in PAPER_ROWS.values())


# Without a network.


@pytest.mark.parametrize("answer", ["nothing", "refusal", "page"])
def test_the_hub_is_asked_once_and_left_alone_only_where_it_does_not_answer(monkeypatch, answer):
    asked = []

    def urlopen(url, timeout):
        asked.append((url, timeout))
        if answer == "refusal":
            raise urllib.error.HTTPError(url, 403, "Forbidden", None, None)
        if answer == "nothing":
            raise urllib.error.URLError("Name or service not known")
        return open(os.devnull)

    monkeypatch.setattr(network.urllib.request, "urlopen", urlopen)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    network.leave_the_hub_alone_where_there_is_none()
    assert asked == [("https://huggingface.co", 5)]
    assert os.environ.get("HF_HUB_OFFLINE") == ("1" if answer == "nothing" else None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    network.leave_the_hub_alone_where_there_is_none()
    assert len(asked) == 1
