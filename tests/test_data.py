"""Text from its source to batches: order, packing, resets, ranks, workers and exact resume."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchtitan")
from gdn2_titan.titan import corpus
from gdn2_titan.titan.corpus import check_source, load_source
from gdn2_titan.titan.dataloader import build_dataloader, build_validation_dataloader
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.packing import PackedText, epoch_order
from gdn2_titan.titan.stdlib import is_held_out, stdlib_documents
from tests.data_cases import (
    TEXTS,
    TOKENIZER,
    T,
    batches,
    check_ranks_may_change,
    check_resume_everywhere,
    config,
    memory,
    pack,
    plain,
    shuffled,
    stream,
    take,
)
from tests.generations import byte_tokenizer


@pytest.fixture(autouse=True)
def no_network_and_nothing_written_outside_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    # load_dataset counts loads, of local files too, with a request: seconds each where names do not resolve.
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


# ---------------------------------------------------------------------------------------------------------- packing


@given(
    st.lists(st.text(st.characters(exclude_characters="|", exclude_categories=["Cs"]), max_size=40), min_size=1),
    st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_windows_are_the_packed_documents_with_resets_at_their_first_tokens(texts, seq_len):
    expected = pack(shuffled(texts), seq_len)
    packed = PackedText(memory(texts), TOKENIZER, seq_len)
    if expected:
        assert plain(packed) == expected
    else:
        with pytest.raises(ConfigError, match="too few tokens"):
            list(packed)


def test_every_token_but_the_first_is_a_target_once():
    labels = [token for _, window in PackedText(memory(), TOKENIZER, T) for token in window.tolist()]
    tokens = [t for text in shuffled(TEXTS) if text for t in (256, *text.encode(), 257)]
    assert labels == tokens[1 : len(labels) + 1] and len(tokens) - len(labels) <= T


def test_a_window_that_continues_a_document_begins_without_a_reset():
    (_, _), (second, _) = take(PackedText(memory(["a" * 30]), TOKENIZER, T), 2)
    assert not second["resets"].any()


def test_shapes_types_and_no_resets_when_not_wanted():
    inputs, labels = next(iter(PackedText(memory(), TOKENIZER, T)))
    assert inputs["input"].dtype == labels.dtype == torch.int64 and inputs["resets"].dtype == torch.bool
    assert inputs["input"].shape == inputs["resets"].shape == labels.shape == (T,)
    assert set(next(iter(PackedText(memory(), TOKENIZER, T, with_resets=False)))[0]) == {"input"}


def test_infinite_reading_shuffles_each_epoch_anew_and_carries_left_over_tokens_on():
    packed = PackedText(memory(), TOKENIZER, T, infinite=True, shuffle_seed=3)
    expected = pack(shuffled(TEXTS, epochs=4, seed=3), T)
    assert plain(take(packed, len(expected))) == expected
    orders = [tuple(epoch_order(50, 3, epoch)) for epoch in range(4)] + [tuple(epoch_order(50, 4, 0))]
    assert len(set(orders)) == 5 and all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_of_an_epoch_is_the_same_on_every_machine_and_in_every_release():
    assert epoch_order(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert epoch_order(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]


def test_each_iteration_starts_over():
    packed = PackedText(memory(), TOKENIZER, T)
    assert plain(take(packed, 3)) == plain(packed)[:3] == plain(packed)[:3]


def test_a_loaded_state_is_for_the_next_iteration_only():
    packed = PackedText(memory(), TOKENIZER, T)
    whole = plain(packed)
    take(packed, 3)
    packed.load_state_dict(packed.state_dict())
    assert [plain(packed), plain(packed)] == [whole[3:], whole]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_at_all_is_an_error_even_when_infinite(texts):
    data = Dataset.from_dict({"text": texts}, features=datasets.Features({"text": datasets.Value("string")}))
    with pytest.raises(ConfigError, match="too few tokens"):
        next(iter(PackedText(data, TOKENIZER, T, infinite=True)))


# ------------------------------------------------------------------------------------------------ ranks and workers


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_interleave_to_the_sequence_of_one_process_with_equal_counts(ranks):
    alone = pack(shuffled(TEXTS), T)
    parts = [plain(PackedText(memory(), TOKENIZER, T, dp_rank=r, dp_world_size=ranks)) for r in range(ranks)]
    assert {len(part) for part in parts} == {len(alone) // ranks}
    assert [window for together in zip(*parts) for window in together] == alone[: len(alone) // ranks * ranks]


def test_streaming_splits_documents_between_ranks(tmp_path):
    for ranks in (1, 2, 3):
        for r in range(ranks):
            packed = PackedText(stream(tmp_path), TOKENIZER, 2, dp_rank=r, dp_world_size=ranks)
            assert plain(packed) == pack(TEXTS[r::ranks], 2)


@pytest.fixture
def corpus_file(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_the_kth_batches_of_two_ranks_are_the_kth_batch_of_one_whatever_the_number_of_workers(workers, corpus_file):
    loaders = [
        build_dataloader(2, rank, TOKENIZER, config(workers=workers, path=corpus_file), infinite=False)
        for rank in range(2)
    ]
    parts = [plain(loader) for loader in loaders]
    windows = pack(shuffled(TEXTS), T)
    windows = windows[: len(windows) // 4 * 4]
    assert parts == [batches(windows[rank::2], 2) for rank in range(2)]


@pytest.mark.parametrize("infinite", [False, True])
def test_streaming_workers_lose_and_repeat_nothing_and_surplus_workers_end(tmp_path, monkeypatch, infinite):
    monkeypatch.setattr(corpus, "load_dataset", lambda *_, **__: stream(tmp_path, ["a" * 14, "b" * 14], files=2))
    loader = build_dataloader(1, 0, TOKENIZER, config(workers=3, dataset="some/where", batch=1, seq_len=4), infinite)
    a, b = (pack([letter * 14] * 6, 4) for letter in "ab")
    if not infinite:
        a, b = a[:3], b[:3]
    expected = [batches([window], 1)[0] for pair in zip(a, b) for window in pair]
    assert plain(take(loader, len(expected))) == expected
    if not infinite:
        assert len(list(loader)) == len(expected)


# ----------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_resume_is_exact_at_every_window(infinite, ranks):
    count = 3 * len(pack(TEXTS, T)) // ranks if infinite else len(pack(TEXTS, T)) // ranks + 1
    for seq_len in (T, 3) if infinite else (T,):  # 3: windows that end exactly where documents do
        states = [
            check_resume_everywhere(
                lambda rank=rank, seq_len=seq_len: PackedText(
                    memory(), TOKENIZER, seq_len, dp_rank=rank, dp_world_size=ranks, infinite=infinite
                ),
                count,
            )
            for rank in range(ranks)
        ]
        assert all(state == states[0] for state in states), "the state depends on the rank"


def test_resume_is_exact_from_every_token_boundary_around_documents():
    # Documents of 4 tokens and windows of 1 to 9: ends of windows, documents and epochs meet in every way.
    for seq_len in range(1, 10):

        def build():
            return PackedText(memory(["ab"] * 3), TOKENIZER, seq_len, infinite=True)

        check_resume_everywhere(build, 30 // seq_len)


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_of_a_stream_is_exact_at_every_window(tmp_path, files, ranks):
    check_resume_everywhere(
        lambda: PackedText(
            stream(tmp_path, files=files), TOKENIZER, T, dp_rank=ranks - 1, dp_world_size=ranks, infinite=True
        ),
        30,
    )


def test_resume_of_a_parquet_stream_is_exact_at_every_window(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=4)
    check_resume_everywhere(
        lambda: PackedText(
            load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True),
            TOKENIZER,
            T,
            infinite=True,
        ),
        40,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_of_the_loader_is_exact_at_every_batch(workers, corpus_file):
    def build():
        return build_dataloader(2, 1, TOKENIZER, config(workers=workers, path=corpus_file))

    check_resume_everywhere(build, 12 if workers == 0 else 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_of_a_streaming_loader_is_exact(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "load_dataset", lambda *_, **__: stream(tmp_path, files=2))

    def build():
        return build_dataloader(1, 0, TOKENIZER, config(workers=workers, dataset="some/where"))

    check_resume_everywhere(build, 12 if workers == 0 else 6)


def test_a_checkpoint_written_by_two_ranks_continues_on_one_and_on_three(corpus_file, tmp_path):
    settings = config(path=corpus_file, batch=1)
    check_ranks_may_change(
        lambda ranks, rank: build_dataloader(ranks, rank, TOKENIZER, settings), plain, tmp_path / "checkpoint"
    )


def test_a_state_of_other_documents_is_refused():
    packed = PackedText(memory(TEXTS[1:]), TOKENIZER, T)
    packed.load_state_dict(PackedText(memory(), TOKENIZER, T).state_dict())
    with pytest.raises(ConfigError, match="written with 9 documents and there are 8 now"):
        next(iter(packed))


# ---------------------------------------------------------------------------------------------------------- sources


def test_stdlib_splits_are_disjoint_stable_and_about_one_in_twenty():
    train, held_out = stdlib_documents(held_out=False), stdlib_documents(held_out=True)
    assert not train.keys() & held_out.keys()
    assert list(train) == sorted(train) and list(held_out) == sorted(held_out)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.08
    assert {"random.py", "json/decoder.py"} <= train.keys() | held_out.keys()
    assert not [name for name in train if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]
    # The split of a file is its name's alone: these must never move.
    assert [name for name in ("abc.py", "os.py", "ast.py", "heapq.py", "bisect.py", "cmd.py") if name in held_out] == []
    assert is_held_out("asyncio/events.py") is False
    assert load_source("training", "stdlib", None, held_out=False)["text"] == list(train.values())
    assert load_source("validation", "stdlib", None, held_out=True)["text"] == list(held_out.values())


def test_stdlib_loaders_train_on_one_split_and_validate_on_the_other():
    held_out = stdlib_documents(held_out=True)
    loader = build_validation_dataloader(1, 0, TOKENIZER, config("validation", dataset="stdlib"), infinite=False)
    first = list(held_out.values())[epoch_order(len(held_out), 0, 0)[0]]
    assert next(iter(loader))[0]["input"][0].tolist() == [256, *first.encode()[: T - 1]]
    assert next(iter(loader))[0]["input"][0].tolist() == [256, *first.encode()[: T - 1]]
    train = stdlib_documents(held_out=False)
    loader = build_dataloader(1, 0, TOKENIZER, config(dataset="stdlib", resets=False))
    first = list(train.values())[epoch_order(len(train), 0, 0)[0]]
    inputs = next(iter(loader))[0]
    assert inputs["input"][0].tolist() == [256, *first.encode()[: T - 1]] and "resets" not in inputs


def load_files(path, **kwargs):
    return load_source("training", "files", str(path), held_out=False, **kwargs)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "odd [name]"
    path.mkdir()
    return path


def test_text_files_are_one_document_each_by_file_folder_and_glob(folder):
    (folder / "b.txt").write_text("two\n\nparagraphs\n")
    (folder / "a.txt").write_text("one")
    (folder / "README.md").write_text("not a document")
    assert load_files(folder)["text"] == ["one", "two\n\nparagraphs\n"]
    assert load_files(folder / "b.txt")["text"] == ["two\n\nparagraphs\n"]
    assert load_files(folder.parent / "odd*" / "*.txt")["text"] == ["one", "two\n\nparagraphs\n"]


def test_jsonl_and_parquet_give_the_column_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "no", "n": 1}\n{"body": "y", "text": "no", "n": 2}\n')
    pq.write_table(pa.table({"body": ["x", "y"], "n": [1, 2]}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        data = load_files(tmp_path / name, text_column="body")
        assert data.column_names == ["text"] and data["text"] == ["x", "y"]
        with pytest.raises(ConfigError, match=r"data\.text_column = 'story' is not a column of .*; allowed: body, "):
            load_files(tmp_path / name, text_column="story")
        with pytest.raises(ConfigError, match=r"data\.text_column = 'n' holds int64 in .*; allowed: a column of"):
            load_files(tmp_path / name, text_column="n")


def test_missing_column_of_a_stream_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.text_column = 'story' is not a column of .*; allowed: text"):
        next(iter(PackedText(stream(tmp_path), TOKENIZER, T, text_column="story")))


def test_a_repository_is_streamed_with_its_subset_and_the_split_of_its_section(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        corpus, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or stream(tmp_path)
    )
    build_dataloader(1, 0, TOKENIZER, config(dataset="a/b", hf_subset="en"))
    build_validation_dataloader(1, 0, TOKENIZER, config("validation", dataset="a/b", hf_validation_split="dev"), True)
    assert calls == [
        (("a/b", "en"), {"split": "train", "streaming": True}),
        (("a/b", None), {"split": "dev", "streaming": True}),
    ]
    with pytest.raises(ConfigError, match="validation.dataset = 'a/b' is a stream, which 2 data-parallel ranks cannot"):
        build_validation_dataloader(2, 0, TOKENIZER, config("validation", dataset="a/b"), infinite=False)


@pytest.mark.parametrize(
    "dataset, path, message",
    [
        ("c4", None, r"training\.dataset = 'c4' is not a known source; allowed: \"stdlib\", \"files\""),
        ("./some/folder", None, r"training\.dataset = './some/folder' is not a known source"),
        (None, None, r"training\.dataset = None is not a known source"),
        ("stdlib", "x.txt", r"training\.dataset_path = 'x\.txt' would be ignored with training\.dataset = 'stdlib'"),
        ("owner/name", "x.txt", r"training\.dataset_path = 'x\.txt' would be ignored"),
        ("files", None, r"training\.dataset_path = None must be set .*allowed: a \.txt, \.jsonl"),
        ("files", "TMP/absent.txt", r"training\.dataset_path = '.*/absent\.txt' matches no file; allowed: a \.txt"),
        ("files", "TMP", r"training\.dataset_path = .* names files of these kinds: \.jsonl, \.txt; allowed"),
        ("files", "TMP/c.pdf", r"training\.dataset_path = .* names files of these kinds: \.pdf; allowed"),
        ("files", "TMP/empty", r"training\.dataset_path = .* matches no file"),
    ],
)
def test_unusable_sources_are_refused_before_loading_naming_field_value_and_what_is_allowed(
    dataset, path, message, tmp_path
):
    for name in ("a.txt", "b.jsonl", "c.pdf"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        check_source("training", dataset, path and path.replace("TMP", str(tmp_path)))


def test_usable_sources_pass_the_check_and_the_section_is_named(corpus_file):
    check_source("training", "stdlib", None)
    check_source("training", "owner/name.v2", None)
    check_source("training", "files", corpus_file)
    with pytest.raises(ConfigError, match=r"^validation\.dataset = 'c4' "):
        check_source("validation", "c4", None)


def test_special_tokens_written_in_a_document_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("a<|eos|>b")
    tokenizer = byte_tokenizer()
    loader = build_dataloader(1, 0, tokenizer, config(path=str(tmp_path / "a.txt"), batch=1, seq_len=10))
    assert next(iter(loader))[1].tolist() == [[*b"a<|eos|>b", 257]]


def test_too_little_text_for_one_pass_says_so(corpus_file):
    loader = build_validation_dataloader(2, 0, TOKENIZER, config("validation", path=corpus_file, batch=64))
    with pytest.raises(ConfigError, match="too few tokens for one batch of 64 sequences of 8 tokens on each of 2"):
        next(iter(loader))
