"""``python -m gdn2_titan.generate``: what it prints, from which folders, and what it says to wrong input."""

import argparse
import dataclasses
import io
import re
import shutil
import subprocess
import sys

import pytest
import torch

from gdn2_titan import generate
from gdn2_titan.models import GDN2Model
from gdn2_titan.models.decoding import Decoding
from tests.convert_cases import HYBRID, JOB, assert_one_sentence, hybrid, save_run, save_step

BOS, EOS, SPACE = 256, 257, 32


@pytest.fixture(scope="module")
def decoder():
    return hybrid()


@pytest.fixture(scope="module")
def run(tmp_path_factory, decoder):
    """The folder of a run's checkpoints, whose latest is the decoder's, with a Hugging Face folder of it beside."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, decoder)
    return folder


def constant(token):
    """A decoder that says one token whatever it reads."""
    built = GDN2Model(HYBRID)
    with torch.no_grad():
        for name, p in built.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                p.zero_()
        built.tok_embeddings.weight.fill_(1.0)
        built.lm_head.weight[token] = 1.0
    return built


def said(capsys, *arguments):
    """What is printed, and the report."""
    assert generate.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err.strip().splitlines()[-1]


@torch.no_grad()
def greedy(decoder, text, count):
    """By computing everything again for every token, as the byte tokenizer's text."""
    ids = torch.tensor([BOS, *text.encode()])
    for _ in range(count):
        ids = torch.cat((ids, decoder(ids[None])[0, -1:].argmax(-1)))
    new = ids[-count:].tolist()
    assert EOS not in new
    return bytes(token for token in new if token < 256).decode(errors="replace")


# "<|eos|>" is text here, as it is in training.
PROMPT = "def é<|eos|>("


@pytest.mark.parametrize("kind", ["hf", "checkpoint", "checkpoint/step-7"])
def test_every_kind_of_folder_gives_the_greedy_text_of_the_decoder(kind, run, decoder, capsys):
    text, report = said(capsys, "--model", run / kind, "--prompt", PROMPT, "--greedy", "--max-tokens", 40)
    assert text == greedy(decoder, PROMPT, 40) + "\n"
    assert re.fullmatch(
        r"40 tokens in \d+\.\d\d s, \d+\.\d tokens/s after the first; prompt of 15 tokens in \d+\.\d\d s", report
    )


def test_a_long_prompt_is_read_in_pieces_and_gives_the_same_text(run, decoder, capsys, monkeypatch):
    monkeypatch.setattr(generate, "PIECE", 10)
    lengths, forward = [], Decoding.__call__

    def counted(self, tokens):
        lengths.append(tokens.shape[1])
        return forward(self, tokens)

    monkeypatch.setattr(Decoding, "__call__", counted)
    text, _ = said(capsys, "--model", run / "hf", "--prompt", "x" * 36, "--greedy", "--max-tokens", 5)
    assert lengths == [10, 10, 10, 7, 1, 1, 1, 1]
    assert text == greedy(decoder, "x" * 36, 5) + "\n"


def test_a_seed_repeats_the_text_and_sampling_options_narrow_it_to_the_greedy_one(run, decoder, capsys):
    def sampled(*options):
        return said(capsys, "--model", run / "hf", "--prompt", PROMPT, "--max-tokens", 40, *options)[0]

    assert sampled("--seed", 1) == sampled("--seed", 1) != sampled("--seed", 2)
    for options in (("--temperature", 1e-4), ("--top-k", 1), ("--top-p", 1e-6)):
        assert sampled("--seed", 1, *options) == greedy(decoder, PROMPT, 40) + "\n", options


def test_the_text_ends_where_the_model_ends_the_document(tmp_path, capsys):
    save_step(tmp_path / "checkpoint" / "step-1", constant(EOS).state_dict(), HYBRID, JOB)
    text, report = said(capsys, "--model", tmp_path / "checkpoint", "--prompt", "", "--greedy", "--max-tokens", 40)
    assert text == "\n" and report.startswith("1 tokens in ") and "prompt of 1 tokens" in report


def test_text_is_printed_as_it_comes(tmp_path, monkeypatch):
    save_step(tmp_path / "checkpoint" / "step-1", constant(SPACE).state_dict(), HYBRID, JOB)
    calls, printed, forward = [], [], Decoding.__call__

    class Terminal:
        def write(self, text):
            printed.append((len(calls), text))

        def flush(self):
            pass

    def counted(*args):
        calls.append(1)
        return forward(*args)

    monkeypatch.setattr(Decoding, "__call__", counted)
    monkeypatch.setattr(sys, "stdout", Terminal())
    arguments = ["--model", str(tmp_path / "checkpoint"), "--prompt", "x", "--greedy", "--max-tokens", "6"]
    assert generate.main(arguments) == 0
    assert [call for call, text in printed if text == " "] == [1, 2, 3, 4, 5, 6]


def test_decays_stay_in_fp32_where_the_rest_is_bf16(run, monkeypatch, capsys):
    dtypes, begin = {}, Decoding.__init__

    def seen(self, model):
        dtypes.update({name: p.dtype for name, p in model.named_parameters()})
        begin(self, model)

    monkeypatch.setattr(Decoding, "__init__", seen)
    said(capsys, "--model", run / "hf", "--prompt", "x", "--dtype", "bfloat16", "--max-tokens", 2)
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name


def test_a_text_ends_before_the_first_string_that_stops_it(run, decoder, capsys):
    whole = greedy(decoder, PROMPT, 40)
    first, second = whole[12:15], whole[20:22]
    stop = min(whole.index(first), whole.index(second))
    text, report = said(capsys, "--model", run / "hf", "--prompt", PROMPT, "--greedy", "--max-tokens", 40,
                        "--stop", second, "--stop", first)  # fmt: skip
    assert text == whole[:stop] + "\n" and int(report.split()[0]) < 40
    text, _ = said(
        capsys, "--model", run / "hf", "--prompt", PROMPT, "--greedy", "--max-tokens", 40, "--stop", "no such"
    )
    assert text == whole + "\n"


def test_a_prompt_comes_from_stdin_or_a_file_as_it_is(run, decoder, tmp_path, capsys, monkeypatch):
    text, options = f"{PROMPT}é\n", ("--model", run / "hf", "--greedy", "--max-tokens", 4)
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    assert said(capsys, *options, "--prompt-file", tmp_path / "prompt.txt")[0] == greedy(decoder, text, 4) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert said(capsys, *options, "--prompt", "-")[0] == greedy(decoder, text, 4) + "\n"


def test_samples_differ_and_the_first_is_the_one_that_a_seed_gives_alone(run, capsys):
    options = ("--model", run / "hf", "--prompt", PROMPT, "--seed", 3, "--max-tokens", 20)
    alone, _ = said(capsys, *options)
    text, report = said(capsys, *options, "--num-samples", 3)
    _, *samples = re.split(r"--- \d of 3 ---\n", text)
    assert len(set(samples)) == 3 and samples[0] == alone
    assert report.startswith("60 tokens in ") and "prompt of 15 tokens" in report


def test_top_p_and_top_k_keep_the_likeliest(monkeypatch):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()

    def kept(*options):
        parsed = generate._parser().parse_args(["--model", "x", "--prompt", "x", "--seed", "0", *options])
        choose = generate._choice(argparse.Namespace(**vars(parsed) | {"device": "cpu"}))
        return {choose(logits).item() for _ in range(200)}

    assert kept() == {0, 1, 2, 3}
    assert kept("--top-k", "2") == {2, 3} == kept("--top-p", "0.6")
    assert kept("--top-p", "0.4") == {3} and kept("--top-p", "0.41") == {2, 3}


SLOW = {
    "datasets", "sympy", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "torchtitan",
    "transformers",
}  # fmt: skip


def test_generating_takes_no_module_that_imports_for_half_a_second(run):
    code = (
        "import sys; from gdn2_titan import generate\n"
        f"for folder in ({str(run / 'hf')!r}, {str(run / 'checkpoint')!r}):\n"
        "    generate.main(['--model', folder, '--prompt', 'x', '--max-tokens', '2'])\n"
        f"sys.exit(str({SLOW} & {{*sys.modules}}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.stderr.strip().splitlines()[-1] == "set()"


WRONG = {
    "--model nowhere": r"nowhere is not there; it must be a folder with a checkpoint",
    "--model HF --greedy --seed 1": r"--greedy and --seed are both given; it must be one of them",
    "--model HF --greedy --top-k 5": r"--greedy and --top-k are both given; it must be one of them",
    "--model HF --device abacus": r"--device is 'abacus'; it must be a device that torch has here",
    "--model HF --tokenizer nowhere": r"--tokenizer is nowhere; it must be a folder",
    "--model HF --tokenizer EMPTY": r"\S+ cannot be read, it is damaged or of another kind: .*",
    "--model NONE": r"\S+ does not say which tokenizer it was trained with; name it by --tokenizer",
    "--model CUT": r"\S+model\.safetensors .*",
    "--model HF --temperature 0": r"argument --temperature: is '0'; it must be a number greater than 0",
    "--model HF --top-p 1.5": r"argument --top-p: is '1.5'; it must be a number greater than 0 and at most 1",
    "--model HF --top-k x": r"argument --top-k: is 'x'; it must be a whole number of at least 1",
    "--model HF --max-tokens 0": r"argument --max-tokens: is '0'; it must be a whole number of at least 1",
    "--model HF --greedy --num-samples 2": r"--num-samples is 2; with --greedy, .* it must be 1",
    "--model HF --num-samples 0": r"argument --num-samples: is '0'; it must be a whole number of at least 1",
    "--model HF --stop=": r"argument --stop: is ''; it must be at least one character",
    "--model HF --prompt-file nowhere": r"--prompt-file nowhere cannot be read: No such file or directory",
    "--model HF --prompt-file WEIGHTS": r"--prompt-file \S+ is not UTF-8 at byte \d+; it must be text in UTF-8",
    "--model HF --seed -1": r"argument --seed: is '-1'; it must be a whole number from 0 to 2\^63 - 1",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_answered_by_one_sentence(line, run, decoder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    save_step(tmp_path / "none" / "step-1", decoder.state_dict(), HYBRID)
    shutil.copytree(run / "hf", tmp_path / "cut")
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[:-100])
    places = {"HF": run / "hf", "EMPTY": tmp_path / "empty", "NONE": tmp_path / "none", "CUT": tmp_path / "cut"}
    places["WEIGHTS"] = run / "hf" / "model.safetensors"
    arguments = [places.get(word, word) for word in line.split()]
    arguments += [] if "--prompt-file" in line else ["--prompt", "x"]
    assert_one_sentence(capsys, generate.main, arguments, WRONG[line])


def test_a_tokenizer_with_more_symbols_than_the_model_is_refused(tmp_path, capsys):
    args = dataclasses.replace(HYBRID, vocab_size=200)
    save_step(tmp_path / "checkpoint" / "step-1", GDN2Model(args).state_dict(), args, JOB)
    assert generate.main(["--model", str(tmp_path / "checkpoint"), "--prompt", "x"]) == 1
    assert "the tokenizer gives id 256; it must be below the model's vocab_size, 200" in capsys.readouterr().err
