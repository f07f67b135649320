"""Texts, an oracle of how they are packed, the loaders' settings, and what every resume is held to."""

import json

import torch.distributed.checkpoint as dcp
from datasets import Dataset, load_dataset

from gdn2_titan.titan.job_config import JobConfig
from gdn2_titan.titan.packing import epoch_order
from tests.generations import byte_tokenizer

__all__ = [
    "T",
    "TEXTS",
    "TOKENIZER",
    "batches",
    "check_resume_everywhere",
    "check_ranks_may_change",
    "config",
    "memory",
    "pack",
    "plain",
    "shuffled",
    "stream",
    "take",
]

TOKENIZER = byte_tokenizer()
# Lengths chosen so that with T = 8 documents end inside, at the end of, and one token beyond a window.
TEXTS = ["", "abcdef", "x", "ten-bytes!", "é", "0123456789" * 7, "yz", "quite a long one, longer than others", "last"]
T = 8


def plain(items):
    """Examples as lists, which compare with ==."""
    return [({k: v.tolist() for k, v in inputs.items()}, labels.tolist()) for inputs, labels in items]


def take(iterable, count):
    return [item for _, item in zip(range(count), iterable)]


def pack(texts, seq_len):
    """The oracle: one long list of tokens, cut by hand."""
    tokens, first = [], []
    for text in filter(None, texts):
        ids = [256, *text.encode(), 257]
        tokens += ids
        first += [True] + [False] * (len(ids) - 1)
    return [
        ({"input": tokens[i : i + seq_len], "resets": first[i : i + seq_len]}, tokens[i + 1 : i + seq_len + 1])
        for i in range(0, len(tokens) - seq_len, seq_len)
    ]


def shuffled(texts, epochs=1, seed=0):
    return [texts[i] for epoch in range(epochs) for i in epoch_order(len(texts), seed, epoch)]


def memory(texts=TEXTS):
    return Dataset.from_dict({"text": texts})


def stream(tmp_path, texts=TEXTS, files=1):
    """Stands in for a repository on the network: the same class, read from local shards."""
    paths = []
    for n in range(files):
        paths.append(tmp_path / f"shard{n}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[n::files]))
    return load_dataset("json", data_files=[str(path) for path in paths], split="train", streaming=True)


def config(section="training", *, workers=0, batch=2, seq_len=T, resets=True, dataset="files", path=None, **data):
    job_config = JobConfig()
    part = getattr(job_config, section)
    part.dataset, part.dataset_path, part.local_batch_size, part.seq_len = dataset, path, batch, seq_len
    part.dataloader.num_workers = workers
    job_config.gdn2.document_resets = resets
    for name, value in data.items():
        setattr(job_config.data, name, value)
    return job_config


def batches(windows, size):
    columns = [windows[i : i + size] for i in range(0, len(windows) - size + 1, size)]
    return [({k: [w[0][k] for w in c] for k in c[0][0]}, [w[1] for w in c]) for c in columns]


def check_resume_everywhere(build, count):
    """A fresh object, given the state at any position, yields what the uninterrupted one yielded from there."""
    whole, states = [], []
    running = build()
    iterator = iter(running)
    for _ in range(count):
        states.append(running.state_dict())
        whole += plain(take(iterator, 1))
    iterator = None
    for position, state in enumerate(states):
        resumed = build()
        resumed.load_state_dict(state)
        assert plain(take(resumed, len(whole) - position)) == whole[position:], f"resumed at {position}"
    return states


def check_ranks_may_change(build, rows, folder):
    """A checkpoint that two ranks wrote after three batches of one row goes on where one, two or three ranks load it.

    build(ranks, rank): a loader; rows(batches): what is compared of a list of batches.
    """

    def together(loaders, count):
        return [row for step in zip(*(rows(take(loader, count)) for loader in loaders)) for row in step]

    def loaders(ranks):
        return [build(ranks, rank) for rank in range(ranks)]

    whole = together(loaders(1), 24)
    before = loaders(2)
    assert together(before, 3) == whole[:6]
    dcp.save({"dataloader": before[1]}, checkpoint_id=folder)
    for ranks in (1, 2, 3):
        after = loaders(ranks)
        for loader in after:
            dcp.load({"dataloader": loader}, checkpoint_id=folder)
        assert together(after, 18 // ranks) == whole[6:]
