"""Documents streamed from a repository: who reads which, how a run continues, and what ends it with one sentence.

The repository is a folder of the name that a run would give, which ``datasets`` opens as it opens one on the Hub.
"""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed.checkpoint as dcp

pytest.importorskip("torchtitan")
from gdn2_titan.titan.corpus import load_source
from gdn2_titan.titan.dataloader import build_dataloader, for_trainer
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.packing import PackedText
from gdn2_titan.titan.tokens import DocumentTokens
from tests.config_cases import assert_refused, check, write_toml
from tests.data_cases import TOKENIZER, check_resume_everywhere, config
from tests.gdn2_cases import slowly

REPOSITORY = "owner/name"
# No document is the beginning of another, and each fills windows of its own.
DOCUMENTS = [chr(ord("a") + index) * 22 for index in range(9)]


@pytest.fixture(autouse=True)
def shards(tmp_path, monkeypatch):
    """Writes the repository, of so many files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    folder = tmp_path / REPOSITORY / "data"
    folder.mkdir(parents=True)

    def write(count, documents=DOCUMENTS):
        for n in range(count):
            rows = pa.table({"text": documents[n::count]})
            pq.write_table(rows, folder / f"train-{n:05}-of-{count:05}.parquet", row_group_size=2)

    return write


def packed(rank=0, ranks=1, **options):
    data = load_source("training", REPOSITORY, None, held_out=False)
    return PackedText(data, TOKENIZER, 24, dp_rank=rank, dp_world_size=ranks, **options)


def loader(rank=0, ranks=1, workers=0, build=build_dataloader):
    return build(ranks, rank, TOKENIZER, config(dataset=REPOSITORY, batch=1, seq_len=24, workers=workers))


def letters(windows):
    """The documents that windows are of; 24 tokens are one, with bos and eos."""
    return [chr(window[0]["input"].flatten()[1]) for window in windows]


@pytest.mark.parametrize(("files", "ranks"), [(4, 4), (3, 4), *slowly((1, 4), (4, 2))])
def test_every_document_is_read_and_tokenized_by_one_rank(shards, files, ranks, monkeypatch):
    shards(files)
    tokenized, encode = [], DocumentTokens.__call__
    monkeypatch.setattr(DocumentTokens, "__call__", lambda self, text: tokenized.append(text) or encode(self, text))
    for rank in range(ranks):
        list(packed(rank, ranks))
    assert sorted(tokenized) == DOCUMENTS


@pytest.mark.parametrize(("files", "ranks"), [(2, 3), *slowly((3, 3))])
def test_with_loader_workers_too_every_document_is_read_by_one_rank(shards, files, ranks):
    shards(files)
    seen = [set(letters(batch for _, batch in zip(range(8), loader(rank, ranks, workers=2)))) for rank in range(ranks)]
    assert sorted(letter for some in seen for letter in some) == [text[0] for text in DOCUMENTS]


@pytest.mark.parametrize(("files", "workers"), [(2, 0), *slowly((3, 0), (2, 2), (3, 2))])
def test_a_rank_of_more_than_there_are_files_continues_at_every_batch(shards, files, workers):
    shards(files)
    check_resume_everywhere(lambda: loader(2, 4, workers), 9 if workers == 0 else 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_that_gets_no_document_ends_the_run_with_a_sentence(shards, workers):
    shards(1, DOCUMENTS[:2])
    sentence = "the stream has no document with text for data-parallel rank 2 of 3; allowed: more documents, or fewer"
    with pytest.raises(SystemExit, match=f"^Config error: {sentence}"):
        list(loader(2, 3, workers, for_trainer(build_dataloader)))


@pytest.mark.parametrize(
    ("was", "now"), [((2, 0), (3, 0)), ((2, 1), (2, 2)), *slowly(((2, 0), (1, 0)), ((2, 0), (2, 1)), ((2, 1), (2, 0)))]
)
def test_a_place_of_other_ranks_or_workers_is_refused(shards, was, now):
    shards(2)
    before = loader(0, *was)
    next(iter(before))
    sentence = "is of {} data-parallel ranks with {} loader workers each, and there are {} with {} now; it must be"
    with pytest.raises(ConfigError, match=sentence.format(*was, *now)):
        loader(0, *now).load_state_dict(before.state_dict())


PLACES = {
    "fewer ranks": (["dp_rank_0", "dp_rank_1"], {"training.dataset": REPOSITORY}, "on 1 data-parallel ranks"),
    "stream before": (["dp_rank_0"], {}, "continues from one place in the data for all ranks"),
    "stream now": (["all_dp_ranks"], {"training.dataset": REPOSITORY}, "has one place in the data for all ranks"),
    "workers now": (["all_dp_ranks"], {"training.dataloader.num_workers": 2}, "num_workers = 2 on 1"),
}


@pytest.mark.parametrize("case", ["fewer ranks", *slowly("stream before", "stream now", "workers now")])
def test_a_checkpoint_whose_place_in_the_data_is_of_no_use_is_refused_before_training(case, tmp_path):
    keys, changes, said = PLACES[case]
    place = {**dict.fromkeys(keys, b"x"), "world_size": len(keys)}
    dcp.save({"dataloader": place}, checkpoint_id=tmp_path / "run" / "checkpoint" / "step-3", no_dist=True)
    toml = {"checkpoint.enable": True, "job.dump_folder": str(tmp_path / "run"), **changes}
    assert_refused(write_toml(tmp_path / "x.toml", toml), [said, "step-3", "must have 'dataloader'"])
    check(write_toml(tmp_path / "x.toml", toml | {"checkpoint.exclude_from_loading": ["dataloader"]}))
