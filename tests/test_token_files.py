"""Local files as tokens: pieces that give the ids of the whole, written once, noticed when they change."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import datasets
import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models

pytest.importorskip("torchtitan")

from gdn2_titan.titan import pieces, token_cache, token_files, tokenize
from gdn2_titan.titan.corpus import check_source, load_source
from gdn2_titan.titan.dataloader import build_dataloader
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.packing import PackedText
from gdn2_titan.titan.pieces import Encoder
from gdn2_titan.titan.settings import Data
from gdn2_titan.titan.token_cache import tokens_of_files
from gdn2_titan.titan.token_files import TokenFiles
from tests.data_cases import TEXTS, TOKENIZER, T, check_resume_everywhere, config, pack, plain, shuffled, take
from tests.generations import byte_tokenizer
from tests.tokenizer_cases import TEXT, TOKENIZERS, tokenizer
from tests.training import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "gdn2_titan"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, None]))
    return path


def tokens(path, **data):
    return tokens_of_files("training", str(path), Data(**data), TOKENIZER)


def ids(text):
    return [256, *text.encode(), 257] if text else []


# ----------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("chunk", [700, 10**6])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_of_a_text_have_the_ids_of_the_whole(name, chunk, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 1500)
    encoder = Encoder(tokenizer(name))
    found = list(encoder.pieces(TEXT[i : i + chunk] for i in range(0, len(TEXT), chunk)))
    assert "".join(piece.text for piece in found) == TEXT
    longest = max(len(piece.text) for piece in found)
    assert longest == len(TEXT) if name == "without words" else longest < 3300
    whole = tokenizer(name).encode(TEXT, add_special_tokens=False).ids
    assert np.concatenate(encoder.encode(found)).tolist() == whole


@pytest.mark.parametrize("name", ["bytes", "GPT-2", "Llama 2"])
@pytest.mark.parametrize("text", ["a" * 9000, "\n" * 9000, "12 " * 3000, "a \n\n" * 2000, "é\n\u0301a" * 2000, " "])
def test_texts_of_few_places_have_the_ids_of_the_whole(name, text, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 1500)
    encoder = Encoder(tokenizer(name))
    found = np.concatenate(encoder.encode(list(encoder.pieces([text]))))
    assert found.tolist() == tokenizer(name).encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------------------------------ files


def test_documents_are_those_of_the_files_between_bos_and_eos(corpus):
    found = tokens(corpus)
    assert [found[i].tolist() for i in range(len(found))] == [ids(text) for text in [*TEXTS, None]]
    assert found.tokens == sum(len(ids(text)) for text in TEXTS) and found[1].dtype == np.uint16
    again = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 500 and again[5].tolist() == ids(TEXTS[5])


def test_parts_of_files_are_documents_in_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_PART", 5)
    monkeypatch.setattr(token_files, "_BATCH", 3)
    texts = ["", "ab", "cdefghijk", "l", "m", "", "nopq"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    found = tokens(tmp_path)
    assert [found[i].tolist() for i in range(len(found))] == [ids(text) for text in texts]


@pytest.mark.parametrize("ranks", [1, 3])
def test_windows_of_tokens_are_those_of_texts_and_resume_everywhere(corpus, ranks):
    found = tokens(corpus)
    texts = Dataset.from_dict({"text": [*TEXTS, None]})

    def build(data, rank):
        return PackedText(data, TOKENIZER, T, dp_rank=rank, dp_world_size=ranks, infinite=True)

    expected = pack(shuffled([*TEXTS, None], epochs=6), T)
    for rank in range(ranks):
        states = check_resume_everywhere(lambda: build(found, rank), 18 // ranks)
        of_texts = build(texts, rank)
        for state, window in zip(states, expected[rank::ranks]):
            assert state == of_texts.state_dict(), "a checkpoint of before would not continue"
            assert plain(take(build_from(build(found, rank), state), 1)) == [window]
            of_texts.load_state_dict(state)
            take(of_texts, 1)


def build_from(packed, state):
    packed.load_state_dict(state)
    return packed


def test_many_symbols_take_four_bytes(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 3, "z": 70_000, "?": 0}, unk_token="?"))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("z")
    found = tokens_of_files("training", str(tmp_path / "a.txt"), Data(), byte_tokenizer(tmp_path))
    assert found[0].tolist() == [70_000] and found[0].dtype == np.uint32


def test_the_cache_is_where_it_is_said_and_is_used_again(corpus, cache, tmp_path, monkeypatch):
    tokens(corpus)
    assert len(list(cache.iterdir())) == 1
    tokens(corpus, cache_dir=str(tmp_path / "mine"))
    assert len(list((tmp_path / "mine").iterdir())) == 1
    monkeypatch.setattr(token_files, "_write_parts", None)
    assert len(tokens(corpus)) == len(TEXTS) + 1


def test_changed_files_columns_and_tokenizers_are_noticed(corpus, tmp_path):
    tokens(corpus)
    corpus.write_text('{"text": "new", "other": "word"}\n')
    assert tokens(corpus)[0].tolist() == ids("new")
    assert tokens(corpus, text_column="other")[0].tolist() == ids("word")
    without = byte_tokenizer()
    without.eos_id = without.eos_token = None
    assert tokens_of_files("training", str(corpus), Data(), without)[0].tolist() == [256, *b"new"]


def test_a_column_that_no_file_has_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_PART", 1)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    assert [len(tokens(tmp_path)[i]) for i in range(2)] == [0, 3]
    with pytest.raises(
        ConfigError, match="data.text_column = 'words' is not a column of .*a.jsonl; allowed: body, text"
    ):
        tokens(tmp_path, text_column="words")


def test_a_file_that_is_damaged_leaves_nothing_that_is_taken_for_whole(tmp_path, cache):
    (tmp_path / "a.txt").write_bytes(b"good " * 99 + b"\xff")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8"):
            tokens(tmp_path)
    assert not list(cache.glob("*/gdn2_tokens.json"))


def test_a_cut_file_of_tokens_is_named_and_a_folder_that_cannot_be_written(corpus, cache, tmp_path):
    tokens(corpus)
    [file] = cache.glob("*/00000.tokens")
    os.truncate(file, 10)
    with pytest.raises(ConfigError, match="holds no tokens that can be read .00000.tokens has 10 bytes of"):
        tokens(corpus)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match="the tokens cannot be written to .*Not a directory.*data.cache_dir must name"
    ):
        tokens(corpus, cache_dir=str(tmp_path / "file"))


def test_one_process_tokenizes_and_the_others_wait(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 1000)
    writes, write, waits = [], token_files._write_parts, []

    def slowly(*args):
        writes.append(1)
        time.sleep(0.3)
        write(*args)

    monkeypatch.setattr(token_files, "_write_parts", slowly)
    monkeypatch.setattr(token_cache._Log, "waits", lambda _: waits.append(1))
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(tokens(tmp_path / "a.txt")[0]))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [1002] * 4 and len(writes) == 1 and len(waits) == 3


def test_64_ranks_tokenize_the_files_once_and_copy_each_window_once(corpus, monkeypatch):
    ranks, steps, read = 64, 3, []
    tokenized, encode, example = [], Encoder.encode, PackedText._example
    monkeypatch.setattr(Encoder, "encode", lambda self, some: tokenized.extend(some) or encode(self, some))
    monkeypatch.setattr(PackedText, "_example", lambda *args: read.append(args[2]) or example(*args))
    loaders = [build_dataloader(ranks, rank, TOKENIZER, config(path=str(corpus), batch=1)) for rank in range(ranks)]
    for loader in loaders:
        take(loader, steps)
    assert sorted(piece.text for piece in tokenized) == sorted(filter(None, TEXTS))
    assert sorted(read) == [T * window for window in range(ranks * steps)]


def command(*arguments, **options):
    code = "from gdn2_titan.titan import token_files, tokenize; token_files._PART = 1; tokenize.main()"
    run = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(run, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
def test_a_killed_command_continues_with_the_parts_that_are_there(tmp_path):
    (tmp_path / "a.txt").write_text("a word")
    (tmp_path / "b.txt").write_text("b word\n" * 4_000_000)
    out = tmp_path / "tokens"
    running = command(tmp_path, "--out", out)
    while not (out / "00000.ends").is_file():
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (out / "gdn2_tokens.json").is_file()
    with pytest.raises(ConfigError, match="unfinished"):
        build_dataloader(1, 0, TOKENIZER, config(path=str(out)))
    before = (out / "00000.tokens").stat().st_mtime_ns
    said, errors = command(tmp_path, "--out", out).communicate()
    assert said.startswith("2 documents, "), errors
    assert (out / "00000.tokens").stat().st_mtime_ns == before
    assert [TokenFiles(out)[i][:3].tolist() for i in (0, 1)] == [[256, *b"a "], [256, *b"b "]]
    assert not [path for path in out.iterdir() if path.name.endswith(".part") or "unfinished" in path.name]


def test_tokens_among_documents_are_no_documents(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"text": "x"}')
    monkeypatch.setattr(sys, "argv", ["tokenize", str(tmp_path), "--out", str(tmp_path / "out")])
    assert tokenize.main() == tokenize.main() == 0
    assert len(tokens(tmp_path)) == 1


def test_a_folder_of_tokens_trains_without_its_files(corpus, tmp_path, monkeypatch, capsys):
    arguments = ["tokenize", str(corpus), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert tokenize.main() == tokenize.main() == 0
    assert capsys.readouterr().out.count(f"{len(TEXTS) + 1} documents, ") == 2
    expected = plain(take(PackedText(Dataset.from_dict({"text": [*TEXTS, None]}), TOKENIZER, T, infinite=True), 9))
    corpus.write_text('{"text": "changed"}\n')
    loader = build_dataloader(1, 0, TOKENIZER, config(path=str(tmp_path / "out"), batch=1))
    assert [labels.tolist() for _, labels in take(loader, 9)] == [[labels] for _, labels in expected]
    check_source("training", "files", str(tmp_path / "out"), "text")
    with pytest.raises(ConfigError, match="holds tokens and no text any more"):
        load_source("training", "files", str(tmp_path / "out"), held_out=False)
    assert tokenize.main() == 2
    assert "holds tokens of other files, or of these before they changed" in capsys.readouterr().err
    other = byte_tokenizer()
    other.eos_id = other.eos_token = None
    with pytest.raises(ConfigError, match="holds tokens of another tokenizer than that of model.hf_assets_path"):
        build_dataloader(1, 0, other, config(path=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent.txt"], "Error: FILES = 'absent.txt' matches no file"),
        (["a.txt", "b.jsonl"], "FILES are of these kinds: json, text; allowed: one of text, json, parquet."),
        (["a.txt", "--tokenizer", "."], "--tokenizer is '.', whose files make no tokenizer"),
        (["b.jsonl", "--text_column", "words"], "Error: --text_column = 'words' is not a column of"),
        (["a.txt", "--out", "full"], "full is not empty; tokens go to a new or an empty folder."),
        (["a.txt", "--out", "a.txt"], "--out 'a.txt' cannot be written"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    monkeypatch.setattr(sys, "argv", ["tokenize", "--out", "out", *arguments])
    assert tokenize.main() == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
