"""Local files of text: what is read from which, and the one sentence about what cannot be read."""

import gzip
import os
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torchtitan")

from gdn2_titan.convert.toml_table import read_toml
from gdn2_titan.titan import corpus, local_files
from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from gdn2_titan.titan.corpus import check_source, load_source
from gdn2_titan.titan.dataloader import build_dataloader, for_trainer
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.tokens import check_tokenizer
from tests.data_cases import TOKENIZER, config, stream


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def load(path):
    check_source("training", "files", str(path), "text")
    return load_source("training", "files", str(path), held_out=False)["text"]


def refused(call, *parts):
    with pytest.raises(ConfigError) as refusal:
        call()
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


READ = {
    "upper.TXT": (b"one\r\ntwo", ["one\ntwo"]),
    "marked.txt": (b"\xef\xbb\xbfone", ["one"]),
    "blank.txt": (b" \n", [" \n"]),
    "upper.JSONL": (
        b'{"text": "x"}\r\n\r\n{"text": null, "n": 1}\n{"n": 2}\n{"text": "y", "m": []}', ["x", None, None, "y"],
    ),
    "marked.jsonl": (b'\xef\xbb\xbf{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "list.json": (b'[{"text": "x"},\n {"text": "y"}]', ["x", "y"]),
    "one.json": (b'{\n  "text": "x"\n}\n', ["x"]),
    "read.MD": (b"# one\n", ["# one\n"]),
    "packed.txt.gz": (gzip.compress(b"one\r\n") + gzip.compress(b"\xc3\xa9"), ["one\n\u00e9"]),
    "packed.json.gz": (gzip.compress(b'[{"text": "x"},\n {"text": "y"}]'), ["x", "y"]),
    "packed.md.zst": (pa.compress(b"one", "zstd", asbytes=True), ["one"]),
    "packed.JSONL.ZST": (pa.compress(b'{"text": "x"}\n{"text": "y"}', "zstd", asbytes=True), ["x", "y"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_text_is_read_as_it_is_meant(folder, name):
    content, texts = READ[name]
    (folder / name).write_bytes(content)
    assert load(folder / name) == texts


DAMAGED = {
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 (byte 0xe9)"),
    "utf16.txt": ("x".encode("utf-16"), "utf16.txt is not UTF-8 (byte 0xff)"),
    "latin.jsonl": (b'{"text": "x"}\n{"text": "caf\xe9"}', "latin.jsonl, line 2, is not UTF-8 (byte 0xe9)"),
    "utf16.jsonl": ('{"text": "x"}'.encode("utf-16"), "utf16.jsonl, line 1, is not UTF-8"),
    "half.jsonl": (b'{"text": "x"}\n{"text": "y \\ud800 z"}', "half.jsonl, line 2, has the lone surrogate \\ud800"),
    "cut.jsonl": (b'{"text": "x"}\n{"text": "y', "cut.jsonl, line 2, is not JSON"),
    "cut.json": (b'{"text": "y', "cut.json, line 1, is not JSON"),
    "text.jsonl": (b"x\n", "text.jsonl, line 1, is not JSON"),
    "list.jsonl": (b'{"text": "x"}\n["y"]', "list.jsonl, line 2, holds list"),
    "number.jsonl": (b'{"text": "x"}\n{"text": 3}', "data.text_column = 'text' holds int64 in"),
    "column.jsonl": (b'{"a": "x"}\n{"b": 3}', "data.text_column = 'text' is not a column of"),
    "cut.parquet": (b"PAR1 and no more", "cut.parquet cannot be read"),
    "empty.txt": (b"", "names an empty file"),
    "empty.parquet": (b"", "names an empty file"),
    "packed.txt.gz": (b"x", "packed.txt.gz cannot be read: Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(b"text " * 99)[:-9], "cut.txt.gz cannot be read: Compressed file ended before"),
    "cut.jsonl.zst": (b"(\xb5/\xfd$\x05", "cut.jsonl.zst cannot be read: Truncated compressed stream"),
    "packed.parquet.gz": (b"x", "names files of these kinds: .parquet.gz"),
    "tables.csv.zst": (b"x", "names files of these kinds: .csv.zst"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_named_in_one_sentence(folder, name):
    content, sentence = DAMAGED[name]
    (folder / name).write_bytes(content)
    refused(lambda: load(folder / name), sentence, name)


def test_a_damaged_page_of_parquet_is_named(folder):
    file = folder / "a.parquet"
    table = pa.table({"text": ["x" * 50 + str(i) for i in range(100)]})
    pq.write_table(table, file, compression="gzip", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[30:200] = bytes(170)
    file.write_bytes(content)
    refused(lambda: load(file), "a.parquet cannot be read")
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())}), file)
    refused(lambda: load(file), "a.parquet is not UTF-8 (byte 0xe9)")
    pq.write_table(pa.table({"text": [["x"]]}), file)
    refused(lambda: check_source("training", "files", str(file), "text"), "holds nested values in", "a.parquet")


def test_a_folder_stands_for_the_files_in_its_subfolders_but_not_for_hidden_ones(folder):
    for name, text in {"b/x.txt": "2", "a/deep/y.TXT": "1", ".git/z.txt": "no", "a/.hidden.txt": "no"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "x.txt").mkdir()  # a directory with a file's name
    assert load(folder) == ["1", "2"]
    (folder / "top.txt").write_text("0")
    refused(lambda: load(folder), "has .txt files and subfolders with .txt files", "*.txt")
    assert load(folder / "*.txt") == ["0"]
    (folder / "top.txt").rename(folder / "top.md")
    assert load(folder) == ["1", "2"]  # notes beside documents
    with gzip.open(folder / "top.txt.gz", "wb") as stream:
        stream.write(b"0")
    refused(lambda: load(folder), "has .txt.gz files and subfolders with .txt files", "*.txt.gz", "**'")
    assert load(folder / "**") == ["1", "2", "0"]
    (folder / "tokens").mkdir()
    (folder / "tokens" / "gdn2_tokens.json").write_text("[]")  # tokens of the same texts are no documents
    assert load(folder / "**") == ["1", "2", "0"]


def test_of_a_folder_packed_copies_are_left_out_and_notes_beside_documents_too(folder):
    for name in ("a.txt", "a.txt.gz", "b.txt.gz", "README.md", "in/c.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(gzip.compress(name.encode()) if name.endswith(".gz") else name.encode())
    assert load(folder / "*.gz") == ["a.txt.gz", "b.txt.gz"]
    assert load(folder / "*.md") == ["README.md"]
    (folder / "in" / "c.txt").unlink()
    assert load(folder) == ["a.txt", "b.txt.gz"]
    for name in ("a.txt", "a.txt.gz", "b.txt.gz"):
        (folder / name).unlink()
    assert load(folder) == ["README.md"]


def test_two_stars_stand_for_all_documents_below(folder):
    for name in ("top.txt", "in/deep/x.txt", "in/x.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert load(folder / "**") == load(folder / "**" / "*.txt") == ["in/deep/x.txt", "top.txt"]


def test_links_to_nowhere_and_files_without_permission_are_named(folder, monkeypatch):
    (folder / "a.txt").write_text("x")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    for path in (folder, folder / "gone.txt", folder / "*.txt"):
        refused(lambda: load(path), "training.dataset_path", "gone.txt, a link to a file that is not there")
    (folder / "gone.txt").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # a test may run as root, who may read everything
    refused(lambda: load(folder), "training.dataset_path", "a.txt, which this user may not read")


def test_a_file_that_vanishes_is_named(folder, monkeypatch):
    (folder / "a.txt").write_text("x")
    found = local_files.find_files("training", str(folder))
    monkeypatch.setattr(corpus, "find_files", lambda *_: found)
    shutil.rmtree(folder)
    refused(lambda: load(folder), "a.txt cannot be read: No such file or directory")


def test_a_changed_file_is_read_anew(folder):
    for text in ("one", "two, longer"):
        (folder / "a.txt").write_text(text)
        assert load(folder) == [text]


def test_a_stream_that_resumes_wrongly_is_refused(monkeypatch):
    check_source("training", "owner/name", None)
    monkeypatch.setattr(datasets, "__version__", "5.0.0")
    refused(lambda: check_source("training", "owner/name", None), "training.dataset = 'owner/name'", "datasets 5.0.0")
    check_source("training", "stdlib", None)


def test_a_stream_continues_at_every_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "load_dataset", lambda *_, **__: stream(tmp_path))

    def build():
        return build_dataloader(1, 0, TOKENIZER, config(dataset="some/where", batch=1))

    whole = [batch[1].tolist() for _, batch in zip(range(18), build())]
    state, read = None, []
    for _ in range(6):
        loader = build()
        if state is not None:
            loader.load_state_dict(state)
        read += [batch[1].tolist() for _, batch in zip(range(3), loader)]
        state = loader.state_dict()
    assert read == whole


def test_a_repository_that_cannot_be_opened_and_a_stream_that_breaks_off_are_one_sentence(monkeypatch):
    def fails(*_, **__):
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: ['y']")

    monkeypatch.setattr(corpus, "load_dataset", fails)
    refused(lambda: load_source("training", "a/b", None, held_out=False, hf_subset="x"), "'a/b'", "'x'", "not found.")

    def texts():
        yield {"text": "x" * 30}
        raise ConnectionError("the line\nis dead")

    broken = datasets.IterableDataset.from_generator(texts)
    monkeypatch.setattr(corpus, "load_dataset", lambda *_, **__: broken)
    loader = build_dataloader(1, 0, TOKENIZER, config(dataset="a/b", batch=1))
    sentence = "the stream of documents broke off: ConnectionError, the line is dead."
    refused(lambda: list(zip(loader, range(50))), sentence)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_met_in_the_middle_of_a_run_ends_it_with_its_sentence(tmp_path, monkeypatch, workers):
    def texts():
        yield {"text": "a" * 20}
        yield {"text": "half \ud800"}

    data = datasets.IterableDataset.from_generator(texts)
    monkeypatch.setattr(corpus, "load_dataset", lambda *_, **__: data)
    loader = for_trainer(build_dataloader)(1, 0, TOKENIZER, config(dataset="a/b", batch=1, workers=workers))
    with pytest.raises(SystemExit) as end:
        list(zip(loader, range(9)))
    assert str(end.value).startswith("Config error: a document's 'text', has the lone surrogate \\ud800")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xef\xbb\xbf[job]\n", "begins with a byte order mark"),
        ("[job]\n".encode("utf-16"), "must be UTF-8, which it is not at line 1 (byte 0xff)"),
        (b"[job]\n# caf\xe9\n", "must be UTF-8, which it is not at line 2 (byte 0xe9)"),
        (b"[job\n", "must be valid TOML"),
        (b"[a]\nx = 1\nx = 2\n", "must be valid TOML"),
        (None, "must be a readable TOML file (Is a directory)"),
    ],
)
def test_a_toml_file_that_cannot_be_read_is_named(tmp_path, content, sentence):
    path = tmp_path / "x.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    refused(lambda: read_toml(str(path)), f"job.config_file is {str(path)!r}", sentence)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_damaged_files_of_a_tokenizer_are_one_sentence(tmp_path, name, content):
    shutil.copytree(BYTE_TOKENIZER_DIR, tmp_path / "t")
    check_tokenizer(str(tmp_path / "t"))
    (tmp_path / "t" / name).write_bytes(content)
    refused(lambda: check_tokenizer(str(tmp_path / "t")), "model.hf_assets_path is", str(tmp_path / "t"))
