"""What a training says of itself: numbers of its log, of TensorBoard, and what it leaves unsaid."""

import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gdn2_titan.titan import label_bytes
from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from gdn2_titan.titan.label_bytes import LabelBytes, bytes_of_symbols
from gdn2_titan.titan.training_log import duration
from tests.training import LOSS, SHORT, scalars, tags, train

BITS, PERPLEXITY = "loss_metrics/bits_per_byte", "loss_metrics/perplexity"
TEXT = "Ein Haus, größer als 12 Häuser 家"


def test_every_step_says_how_far_the_run_is_and_what_it_costs_in_bits_per_byte(tmp_path):
    document = "é" * 400  # longer than all that is read: only its first label is no byte of text
    (tmp_path / "documents.txt").write_text(document, encoding="utf-8")
    printed = train(
        1, tmp_path, *SHORT, "--training.steps=3", "--training.dataset=files", "--training.seq_len=32",
        f"--training.dataset_path={tmp_path / 'documents.txt'}", "--gdn2.statistics_freq=0",
    )  # fmt: skip
    loss, bits, perplexity = (scalars(tmp_path, tag) for tag in (LOSS, BITS, PERPLEXITY))
    assert set(bits) == set(perplexity) == {1, 2, 3}
    for step in loss:
        assert perplexity[step] == pytest.approx(math.exp(loss[step]), rel=1e-5)
        assert bits[step] == pytest.approx(loss[step] / math.log(2), rel=1e-5)
        assert re.search(rf"step: {step}/3 .*ppl: .*bits/byte: {bits[step]:.4f} ", printed)
    assert "left: " in printed and set(scalars(tmp_path, "time_metrics/left(s)")) == {2}
    assert not any("mfu" in tag for tag in tags(tmp_path))
    for noise in ("mfu", "A100", "lspci", "Peak FLOPS", "NCCL", "set_vital", "autocast", "Failed to load"):
        assert noise not in printed, noise


def test_a_task_has_no_bytes(tmp_path):
    printed = train(1, tmp_path, *SHORT, "--training.steps=1", "--training.dataset=mqar", "--training.seq_len=64",
                    "--task.pairs=4")  # fmt: skip
    assert PERPLEXITY in tags(tmp_path) and BITS not in tags(tmp_path) and "bits/byte" not in printed


def test_the_end_of_a_run_names_commands_with_its_paths_and_a_finished_run_says_that_it_is(tmp_path):
    start = [*SHORT, "--training.steps=2", "--checkpoint.enable"]
    printed, again = (train(1, tmp_path, *start) for _ in range(2))
    for said in (printed, again):
        assert f"tensorboard.main --logdir {tmp_path}/tb" in said
        assert f"gdn2_titan.generate --model {tmp_path}/checkpoint/step-2 " in said
        assert f"gdn2_titan.convert to-hf {tmp_path}/checkpoint/step-2 {tmp_path}/hf" in said
    sentence = f"Nothing to train: {tmp_path} is at step 2 of 2 already; "
    assert sentence in again and "Nothing to train" not in printed


def test_on_the_cpu_a_profile_is_written(tmp_path):
    train(1, tmp_path, *SHORT, "--training.steps=2", "--profiling.enable_profiling", "true",
          "--profiling.profile_freq=2", "--profiling.profiler_warmup=0")  # fmt: skip
    [trace] = tmp_path.rglob("rank0_trace.json*")
    assert trace.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7501, "2h05m"), (86399, "23h59m"), (356400, "4d03h")],
)
def test_a_time_is_said_in_two_units(seconds, said):
    assert duration(seconds) == said


def _counted(folder, texts):
    """Labels per byte of these texts by a tokenizer, with a document's eos and what is not learnt beside."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    counter = LabelBytes(bytes_of_symbols(folder))
    for text in texts:
        counter.add(torch.tensor([[*tokenizer.encode(text, add_special_tokens=False).ids, -100, -100]]))
    return counter.take(None)


def test_the_bytes_of_labels_are_those_of_the_text(tmp_path):
    size = len(TEXT.encode())
    assert _counted(BYTE_TOKENIZER_DIR, [TEXT, TEXT]) == 1.0
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    byte_level.save(str(tmp_path / "tokenizer.json"))
    tokens = len(byte_level.encode(TEXT).ids)
    assert tokens < size and _counted(tmp_path, [TEXT]) == tokens / size
    # As Llama 2's: what is not in the vocabulary comes byte by byte, and a space is a sign of its own.
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "E": 257, "i": 258, "n": 259, "Ein": 260}
    merges = [("i", "n"), ("E", "in")]
    vocabulary["in"] = 261
    fallback = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    fallback.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fallback.save(str(tmp_path / "tokenizer.json"))
    ids = fallback.encode(TEXT).ids
    assert 260 in ids and 256 in ids and 0xC3 in ids
    assert _counted(tmp_path, [TEXT]) == len(ids) / size


@pytest.mark.parametrize("change", ["WordPiece", "Lowercase", "none"])
def test_bits_per_byte_are_left_out_where_symbols_do_not_tell_bytes(change, tmp_path):
    if change == "WordPiece":
        Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    elif change == "Lowercase":
        content = json.loads((BYTE_TOKENIZER_DIR / "tokenizer.json").read_text()) | {"normalizer": {"type": change}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert bytes_of_symbols(tmp_path) is None


def test_only_losses_with_gradients_count_as_training(monkeypatch):
    table = torch.ones(3, dtype=torch.long)
    monkeypatch.setattr(label_bytes, "counters", {name: LabelBytes(table) for name in ("training", "validation")})
    label_bytes.count(torch.tensor([0, 1, 2]))
    with torch.no_grad():
        label_bytes.count(torch.tensor([5, 1]))  # a symbol that is not the tokenizer's has no bytes
    assert label_bytes.counters["training"].take(None) == 1.0
    assert label_bytes.counters["validation"].take(None) == 2.0
    assert label_bytes.counters["training"].take(None) is None
