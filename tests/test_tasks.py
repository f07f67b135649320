"""Recall tasks: every label is what the sequence says, the splits are apart, the order is the same for all layouts."""

import copy
import dataclasses
import functools
import hashlib
import random

import pytest
import torch

pytest.importorskip("torchtitan")
from gdn2_titan.titan import settings as sections
from gdn2_titan.titan.dataloader import build_dataloader, build_task_dataloader
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.job_config import JobConfig, validate
from gdn2_titan.titan.stdlib import stdlib_documents
from gdn2_titan.titan.tasks import TASKS, conditions, mentions, score_rules
from gdn2_titan.titan.tasks.needle import FIRST, SECOND
from tests.config_cases import assert_refused, check, write_toml
from tests.data_cases import TOKENIZER, check_ranks_may_change, check_resume_everywhere, plain, take
from tests.generations import only_toml
from tests.task_cases import READERS, RECALL, VALIDATED, dataset, fields_of

CASES = {
    "mqar": ("mqar", 128, {}),
    "mqar-sizes": ("mqar", 97, {"pairs": [1, 5, 32], "keys": 33, "values": 3}),
    "mqar-full": ("mqar", 48, {"pairs": [16], "keys": 16, "values": 5}),
    "mqar-interference": ("mqar", 256, {"pairs": [4, 8], "interference": 0.6}),
    "overwrite": ("overwrite", 128, {}),
    "overwrite-often": ("overwrite", 90, {"pairs": [2, 9, 10], "writes": 4, "values": 2, "keys": 12}),
    "overwrite-once": ("overwrite", 40, {"writes": 1}),
    "selective_erase": ("selective_erase", 128, {}),
    "selective_erase-tight": ("selective_erase", 56, {"pairs": [3, 16], "erased": 0.25}),
    "stale": ("stale", 128, {}),
    "stale-often": ("stale", 100, {"pairs": [2, 5], "writes": 5, "values": 5, "keys": 7}),
    "rejected": ("rejected", 128, {}),
    "rejected-twice": ("rejected", 64, {"pairs": [1, 6], "writes": 2, "keys": 16}),
    "locked": ("locked", 128, {}),
    "locked-often": ("locked", 100, {"pairs": [3, 6], "writes": 5}),
    "alias": ("alias", 128, {}),
    "alias-tight": ("alias", 80, {"pairs": [2, 16], "keys": 16, "values": 7}),
    "version": ("version", 128, {}),
    "version-often": ("version", 100, {"pairs": [3, 6], "writes": 5}),
    "parity": ("parity", 65, {}),
    "permutations": ("permutations", 64, {}),
    "permutations-all": ("permutations", 33, {"generators": "all"}),
    "copying": ("copying", 64, {}),
    "copying-tight": ("copying", 32, {"symbols": [16, 7], "alphabet": 3}),
    "needle-s1": ("needle", 512, {}),
    "needle-s2": ("needle", 700, {"variant": "s2"}),
    "needle-s3": ("needle", 600, {"variant": "s3"}),
    "needle-mk1": ("needle", 700, {"variant": "mk1"}),
    "needle-mk1-two": ("needle", 700, {"variant": "mk1", "needles": 2}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held-out"])
def test_every_label_is_what_a_reader_of_the_sequence_answers_and_there_are_no_others(case, held_out):
    name, length, settings = CASES[case]
    task = TASKS[name](**settings)
    read = READERS[name]
    for inputs, labels in take(dataset(name, length, held_out=held_out, **settings), 30):
        assert set(inputs) == {"input"} and inputs["input"].dtype == labels.dtype == torch.int64
        assert inputs["input"].shape == labels.shape == (length,)
        answers, _ = read(inputs["input"].tolist(), task)
        assert {i: label for i, label in enumerate(labels.tolist()) if label != -100} == answers
        if (count := task.answers(length)) is not None:
            assert len(answers) == count


@pytest.mark.parametrize("case", CASES)
def test_the_shortest_length_is_just_long_enough(case):
    name, _, settings = CASES[case]
    task, read, full = TASKS[name](**settings), READERS[name], 0
    task.prepare(TOKENIZER, False)
    for inputs, labels in take(dataset(name, task.shortest(), **settings), 100):
        tokens = inputs["input"].tolist()
        answers, _ = read(tokens, task)
        assert {i: label for i, label in enumerate(labels.tolist()) if label != -100} == answers
        full += 0 not in tokens
    # Of rejected, a sequence without filler is one that takes back as much as it can.
    assert full or name in ("parity", "permutations", "needle", "rejected", "stale")


def numbers_of(name, content):
    """Whole numbers that say what is to be remembered."""
    if name == "needle":
        (first, second), code = content[0].split(), content[1].replace("-", "")
        return [FIRST.index(first) * len(SECOND) + SECOND.index(second), *(int(digit, 16) for digit in code)]
    return [n for pair in content for n in pair] if isinstance(content[0], tuple) else content


@pytest.mark.parametrize("case", CASES)
def test_one_in_eight_contents_is_held_out_by_the_rule_written_here_anew(case):
    name, length, settings = CASES[case]
    task = TASKS[name](**settings)
    for held_out in (False, True):
        for inputs, _ in take(dataset(name, length, held_out=held_out, **settings), 100):
            content = numbers_of(name, READERS[name](inputs["input"].tolist(), task)[1])
            data = b"".join(number.to_bytes(8, "little") for number in content)
            number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            assert (number % 8 == 0) == held_out


def test_the_smallest_content_that_is_allowed_has_both_splits_and_they_share_nothing():
    # 16 keys, one pair, 16 values: 256 contents, all of which are seen in 6,000 draws.
    settings = {"pairs": [1], "keys": 16, "values": 16}
    seen = [
        {
            tuple(inputs["input"][inputs["input"] > 0].tolist())
            for inputs, _ in take(dataset("mqar", 8, held_out=h, **settings), 3000)
        }
        for h in (False, True)
    ]
    assert len(seen[0]) + len(seen[1]) == 256 and not seen[0] & seen[1]
    assert 15 < len(seen[1]) < 60


def test_training_draws_all_sizes_alike_and_the_codes_depth_and_places_vary():
    sizes = [int((labels != -100).sum()) for _, labels in take(dataset("mqar", pairs=[2, 5, 9]), 3000)]
    assert all(0.27 < sizes.count(size) / 3000 < 0.4 for size in (2, 5, 9))
    texts = [bytes(inputs["input"].tolist()).decode() for inputs, _ in take(dataset("needle", 512), 200)]
    depths = [text.index("The code of the ") for text in texts]
    assert (
        min(depths) < 90 and max(depths) > 350 and len({text.split("The code of the ")[1][:10] for text in texts}) > 50
    )
    first = [int((labels != -100).nonzero()[0]) for _, labels in take(dataset("mqar"), 200)]
    assert len(set(first)) > 20


def test_interference_takes_its_share_of_the_gap():
    for interference in (0.0, 0.5, 0.9):
        filler = [
            (inputs["input"] == 0).sum().item()
            for inputs, _ in take(dataset("mqar", 256, pairs=[8], interference=interference), 20)
        ]
        gap = (256 - 24) // 2
        assert set(filler) == {256 - 24 - 2 * (int(interference * gap) // 2)}


# What the rules say, worked out from what a reader knows of each key: its mentions in order, and the right one.


def said_of(name, tokens, task):
    """[(mentions of what is asked, the right answer)] of each question, read anew."""
    answers, _ = READERS[name](tokens, task)
    follow = range(1, task.keys + 1) if name == "alias" else range(task.keys + 1, task.keys + task.values + 1)
    pairs = list(zip(tokens, tokens[1:]))
    return [([b for a, b in pairs if a == tokens[i] and b in follow], answers[i]) for i in sorted(answers)]


@pytest.mark.parametrize("name", ["stale", "rejected", "locked", "alias", "version"])
def test_on_tasks_with_histories_the_last_mention_is_the_designed_wrong_answer_to_every_question(name):
    data, task, designed = dataset(name, 128, held_out=True, pairs=[4]), TASKS[name](pairs=[4]), 0
    for index in range(60):
        tokens, labels = data.sequence(index)
        found = mentions(task, tokens, labels)
        for (said, right), first, last in zip(said_of(name, tokens.tolist(), task), *found.values(), strict=True):
            assert first == said[0] and last == said[-1] != right
            if name == "stale":
                assert last in said[: task.writes - 1] and right == said[task.writes - 1]  # an old value
            elif name == "alias":
                assert said == [first] and 1 <= first <= task.keys  # the key, not its value
            else:
                assert last == said[task.writes - 1]  # the write that is void, or newer than was asked for
            designed += 1
    assert designed == 240
    assert score_rules(task, 128, 0, 60)["last mention"] == {"accuracy": 0.0, "exact": 0.0}


@pytest.mark.parametrize(
    ("name", "settings", "first", "last"),
    [("mqar", {}, 1, 1), ("overwrite", {}, 0, 1), ("selective_erase", {}, 0.5, 0.5), ("alias", {}, 0, 0),
     ("rejected", {"writes": 2}, 1, 0), ("locked", {"writes": 2}, 1, 0), ("version", {"writes": 2}, 1, 0),
     ("stale", {"writes": 2}, 0, 0)],
)  # fmt: skip
def test_the_rules_are_right_as_often_as_a_task_lets_them(name, settings, first, last):
    found = score_rules(TASKS[name](pairs=[4], **settings), 128, 0, 20)
    assert (found["first mention"]["accuracy"], found["last mention"]["accuracy"]) == (first, last)


def test_the_rules_are_scored_on_the_sequences_that_validation_sees():
    settings = config("validation", name="version", length=64, pairs=[2], seed=3)
    [condition] = conditions(settings)
    loader = build_task_dataloader(condition, 1, 0, TOKENIZER, settings)
    task, right = condition.task, []
    for tokens, labels in rows(take(loader, 10)):
        for said, answer in said_of("version", tokens, task):
            right.append(said[0] == answer)
        assert sum(label != -100 for label in labels) == 2
    assert score_rules(task, 64, 3, 20)["first mention"]["accuracy"] == sum(right) / len(right)
    assert 0.2 < sum(right) / len(right) < 0.8


def test_the_haystack_of_validation_is_text_of_files_that_are_held_out():
    for held_out in (False, True):
        text = "\n".join(stdlib_documents(held_out=held_out).values()).encode()
        for inputs, _ in take(dataset("needle", 900, held_out=held_out, variant="s2"), 5):
            hay = bytes(inputs["input"].tolist()).split(b"\n", 1)[1]
            before, rest = hay.split(b"\nThe code of the ", 1)
            after = rest.split(b".\n", 1)[1].split(b"\nWhich code was told?")[0]
            pieces = [piece for piece in (before, after) if len(piece) > 20]
            assert pieces and all(piece in text for piece in pieces)


# ------------------------------------------------------------------------------------------------------------- order


def test_a_sequence_is_the_same_whenever_it_is_made_and_differs_by_number_seed_and_split():
    for name in TASKS:
        length = 512 if name == "needle" else 96
        first = plain(take(dataset(name, length), 5))
        assert plain(take(dataset(name, length), 5)) == first
        others = [take(dataset(name, length, seed=1), 5), take(dataset(name, length, held_out=True), 5)]
        rows = first + [row for other in others for row in plain(other)]
        assert len({repr(row) for row in rows}) == 15


def test_sequences_are_the_same_on_every_machine_and_in_every_release():
    tokens, labels = dataset("mqar", 12, pairs=[2]).sequence(7)
    assert tokens.tolist() == [0, 45, 104, 0, 54, 118, 0, 0, 0, 0, 45, 54]
    assert labels.tolist() == [-100, -100, -100, -100, -100, -100, -100, -100, -100, -100, 104, 118]


def config(section="training", *, workers=0, batch=2, length=24, name="mqar", **task):
    job_config = JobConfig()
    for part in (job_config.training, job_config.validation):
        part.dataset, part.local_batch_size, part.seq_len = name, batch, length
        part.dataloader.num_workers = workers
    job_config.validation.enable = section == "validation"
    job_config.task = sections.Task(**task)
    return job_config


def rows(batches):
    """[(tokens, labels)] of a list of batches, row by row."""
    return [row for inputs, labels in batches for row in zip(inputs["input"].tolist(), labels.tolist())]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 3), (3, 2)])
def test_the_kth_batches_of_all_ranks_are_the_kth_batch_of_one_whatever_the_number_of_workers(ranks, workers):
    alone = [
        (tokens.tolist(), labels.tolist())
        for tokens, labels in map(dataset("mqar", 24, pairs=[2, 8]).sequence, range(60))
    ]
    for rank in range(ranks):
        loader = build_dataloader(ranks, rank, TOKENIZER, config(workers=workers, pairs=[2, 8]))
        assert rows(take(loader, 5)) == alone[rank::ranks][:10]


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_sees_the_same_held_out_sequences_each_time_from_the_first_on(workers):
    settings = config(
        "validation", workers=workers, pairs=[2], validation_pairs=[3, 4], validation_lengths=[24, 32], seed=5
    )
    for condition, (pairs, length) in zip(conditions(settings), [(3, 24), (3, 32), (4, 24), (4, 32)], strict=True):
        assert (
            condition.settings == {"pairs": pairs, "length": length}
            and str(condition) == f"pairs={pairs},length={length}"
        )
        loader = build_task_dataloader(condition, 1, 0, TOKENIZER, settings)
        expected = dataset("mqar", length, 5, held_out=True, pairs=[pairs])
        expected = [(tokens.tolist(), labels.tolist()) for tokens, labels in map(expected.sequence, range(8))]
        assert rows(take(loader, 4)) == rows(take(loader, 4)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_at_every_batch(workers):
    check_resume_everywhere(
        lambda: build_dataloader(2, 1, TOKENIZER, config(workers=workers)), 8 if workers == 0 else 5
    )


def test_resume_is_exact_at_a_random_place_far_in():
    place = random.randrange(1000, 100_000)
    resumed = dataset("parity", 32, dp_rank=1, dp_world_size=2)
    resumed.load_state_dict({"task": "parity", "sequences": 2 * place})
    [(inputs, labels)] = take(resumed, 1)
    tokens, expected = dataset("parity", 32).sequence(2 * place + 1)
    assert inputs["input"].tolist() == tokens.tolist() and labels.tolist() == expected.tolist(), place
    assert resumed.state_dict() == {"task": "parity", "sequences": 2 * place + 2}


def test_a_checkpoint_written_by_two_ranks_continues_on_one_and_on_three(tmp_path):
    check_ranks_may_change(
        lambda ranks, rank: build_dataloader(ranks, rank, TOKENIZER, config(batch=1)), rows, tmp_path / "checkpoint"
    )


def test_a_state_of_other_data_is_refused():
    for state in ({"task": "mqar", "sequences": 4}, {"mark": {}, "offset": 0, "windows": 0}):
        with pytest.raises(ConfigError, match="not written with training.dataset = 'parity'"):
            dataset("parity", 32).load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------- refusals


def of(name, **changes):
    return RECALL | {"training.dataset": name} | {f"task.{field}": value for field, value in changes.items()}


def validated(name="mqar", **changes):
    return VALIDATED | {"validation.dataset": name} | of(name, **changes)


REFUSALS = [
    ({"task.pairs": [4]},
     ["task.pairs is [4]", "'stdlib'", "ignore", "'mqar', 'overwrite', 'selective_erase', 'stale', 'rejected'"]),
    ({"task.seed": 3}, ["task.seed is 3", "'stdlib'"]),
    (of("parity", interference=0.5),
     ["task.interference is 0.5; dataset 'parity' would ignore it; it takes: seed, validation_lengths"]),
    (of("mqar", writes=3), ["task.writes is 3", "'mqar'", "pairs, keys, values, interference, seed, validation_pairs"]),
    (of("mqar", validation_symbols=[3]), ["task.validation_symbols is [3]", "'mqar'"]),
    (of("mqar", pairs=[]), ["task.pairs is []", "at least 1"]),
    (of("mqar", pairs=[0, 4]), ["task.pairs is [0, 4]", "at least 1"]),
    (of("mqar", pairs=[8, 20], keys=16), ["task.pairs is [8, 20]", "at most keys = 16"]),
    (of("mqar", pairs=[43]), ["training.seq_len is 128", "task.pairs = [43]", "at least 129"]),
    (of("mqar", keys=0), ["task.keys is 0", "at least 1"]),
    (of("mqar", values=0), ["task.values is 0", "at least 1"]),
    (of("mqar", values=300), ["task.keys is 64 and values is 300", "365 symbols", "at most vocab_size = 264"]),
    (of("mqar", interference=1.0), ["task.interference is 1.0", "less than 1"]),
    (of("mqar", interference=-0.1), ["task.interference is -0.1", "at least 0"]),
    (of("mqar", interference=0.5, pairs=[16], keys=16), ["task.interference is 0.5", "keys = 16 more"]),
    (of("mqar", pairs=[1], keys=5, values=51), ["255 different", "at least 256"]),
    (of("mqar", seed=-1), ["task.seed is -1", "0 or more"]),
    (of("overwrite", writes=0), ["task.writes is 0", "at least 1"]),
    (of("overwrite", values=1), ["task.values is 1", "writes = 2", "at least 2"]),
    (of("stale", writes=1), ["task.writes is 1", "at least 2"]),
    (of("locked", values=3, writes=4), ["task.values is 3", "writes = 4", "at least 4"]),
    (of("alias", writes=2), ["task.writes is 2", "'alias'", "pairs, keys, values, seed, validation_pairs"]),
    (of("alias", keys=128), ["task.keys is 128 and values is 64", "321 symbols", "at most vocab_size = 264"]),
    (of("version", writes=8, values=194), ["266 symbols", "264"]),
    (of("rejected", pairs=[12]), ["training.seq_len is 128", "[12]", "at least 132"]),
    (of("version", pairs=[17]), ["training.seq_len is 128", "[17]", "at least 136"]),
    (of("overwrite", pairs=[26]), ["training.seq_len is 128", "[26]", "at least 130"]),
    (of("selective_erase", erased=1.0), ["task.erased is 1.0", "less than 1"]),
    (of("selective_erase", erased=0.1, pairs=[3]), ["task.erased is 0.1", "pairs = 3", "at least one"]),
    (of("selective_erase", values=198), ["264"]),
    (of("selective_erase", pairs=[33]), ["training.seq_len is 128", "[33]", "at least 131"]),
    (of("needle", variant="s4"), ["task.variant is 's4'", "s1, s2, s3, mk1"]),
    (of("needle", needles=3), ["task.needles is 3", "unless variant is 'mk1'"]),
    (of("needle", variant="mk1", needles=1), ["task.needles is 1", "at least 2"]),
    (of("parity") | {"training.seq_len": 1}, ["training.seq_len is 1", "at least 2"]),
    (of("parity") | {"training.seq_len": 8}, ["training.seq_len is 8", "128 different", "at least 256"]),
    (of("permutations", generators="some"), ["task.generators is 'some'", "'swaps' or 'all'"]),
    (of("permutations") | {"training.seq_len": 5}, ["training.seq_len is 5", "at least 6"]),
    (of("permutations") | {"training.seq_len": 7}, ["training.seq_len is 7", "100 different"]),
    (of("copying", symbols=[65]), ["training.seq_len is 128", "task.symbols = [65]", "at least 130"]),
    (of("copying", symbols=[0]), ["task.symbols is [0]", "at least 1"]),
    (of("copying", alphabet=263), ["task.alphabet is 263", "265 symbols", "264"]),
    (of("copying", alphabet=2, symbols=[7, 9]), ["128 different", "at least 256"]),
    (of("mqar") | {"training.dataset_path": "x.txt"}, ["training.dataset_path", "ignored"]),
    ({"training.dataset": "recall"}, ["training.dataset", "'recall'", '"mqar"', '"needle"']),
    ({"validation.enable": True, "validation.dataset": "mqar"}, ["validation.dataset is 'mqar'", "'stdlib'"]),
    (VALIDATED | {"validation.dataset": "parity"}, ["validation.dataset is 'parity'", "'mqar'"]),
    (VALIDATED | {"validation.steps": -1}, ["validation.steps is -1", "at least 1"]),
    (validated(validation_pairs=[8, 65]), ["task.validation_pairs is [8, 65]", "keys = 64"]),
    (validated(validation_pairs=[4, 43]), ["validation.seq_len is 128", "task.validation_pairs = [43]", "129"]),
    (validated(validation_pairs=[4, 60], validation_lengths=[256, 128]),
     ["task.validation_lengths is 128", "task.validation_pairs = [60]", "at least 180"]),
    (validated(validation_lengths=[0]), ["task.validation_lengths is [0]", "at least 1"]),
    (validated(validation_lengths=[64, 64]), ["task.validation_lengths is [64, 64]", "different"]),
    (validated(pairs=[16], validation_lengths=[32]), ["task.validation_lengths is 32", "task.pairs = [16]", "48"]),
    (validated("parity", validation_lengths=[8]), ["task.validation_lengths is 8", "128 different"]),
    ({"gdn2.mlp_size": 0}, ["gdn2.mlp_size", "0", "at least 1"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The job config of a file that says no more than it must."""
    return check(write_toml(tmp_path_factory.mktemp("base") / "x.toml", {}))


@pytest.mark.parametrize(("changes", "parts"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_a_task_that_cannot_be_made_is_refused_in_one_sentence(base, monkeypatch, changes, parts):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("NGPU", raising=False)
    job_config = copy.deepcopy(base)
    for field, value in changes.items():
        section, name = field.split(".")
        setattr(getattr(job_config, section), name, value)
    with pytest.raises(ConfigError) as refusal:
        validate(job_config)
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (of("mqar", pairs=4), ["task.pairs is 4", "a list of a whole number"]),
        (of("mqar", pairs=[4, 4]), ["task.pairs is [4, 4]", "different"]),
    ],
)
def test_a_file_with_such_a_task_is_refused(tmp_path, changes, parts):
    assert_refused(write_toml(tmp_path / "x.toml", changes), parts)


LAYOUTS = [
    ({"parallelism.context_parallel_degree": 4}, {"task.validation_lengths": [128, 100]}, ["100", "multiple of 8"]),
    ({"parallelism.pipeline_parallel_degree": 2}, {"task.validation_lengths": [128, 256]},
     ["task.validation_lengths is 256", "= 128"]),
    pytest.param(
        {"parallelism.pipeline_parallel_degree": 2}, {"task.pairs": [4, 8]},
        ["pipeline_parallel_degree is 2", "answers"], marks=only_toml,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "task", "parts"), LAYOUTS)
def test_a_layout_that_the_sequences_do_not_fit_is_refused_in_one_sentence(tmp_path, monkeypatch, layout, task, parts):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert_refused(write_toml(tmp_path / "x.toml", VALIDATED | layout | task), parts)
    check(write_toml(tmp_path / "x.toml", VALIDATED | layout))


def test_needles_too_long_for_the_sequence_are_refused_when_the_tokenizer_is_known(tmp_path):
    loader = functools.partial(build_dataloader, 1, 0, TOKENIZER)
    with pytest.raises(
        ConfigError, match="training.seq_len is 100; with training.dataset = 'needle' it must be at least"
    ):
        loader(config(name="needle", length=100))
    settings = config("validation", name="needle", length=300, validation_lengths=[300, 150])
    loader(settings)
    with pytest.raises(ConfigError, match="task.validation_lengths is 150; "):
        for condition in conditions(settings):
            build_task_dataloader(condition, 1, 0, TOKENIZER, settings)


def test_the_section_has_what_the_tasks_take_and_nothing_else(tmp_path):
    taken = set().union(*map(fields_of, TASKS)) | {f"validation_{cls.sizes}" for cls in TASKS.values() if cls.sizes}
    found = {field.name for field in dataclasses.fields(sections.Task)}
    assert found == taken | {"seed", "validation_lengths"}
    settings = check(write_toml(tmp_path / "x.toml", of("mqar", pairs=[2, 3])), "--task.pairs", "4", "5")
    assert settings.task.pairs == [4, 5]
    validate(settings)


def test_a_task_may_be_trained_on_and_text_be_validated_with(tmp_path):
    settings = check(write_toml(tmp_path / "x.toml", VALIDATED | {"validation.dataset": "stdlib"}))
    assert conditions(settings) == []
