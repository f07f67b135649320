"""Every layout of processes trains as one process does: losses and gradient norms of ten steps, in fp32."""

import signal

import pytest

from .runs import GLOBAL_BATCH, arguments, layouts, train, train_until_a_rank_dies, without_pipelines, write_documents

pytestmark = pytest.mark.slow

CONFIGS = ("debug", "debug_hybrid")
TP2, TP4 = ("--parallelism.tensor_parallel_degree=2",), ("--parallelism.tensor_parallel_degree=4",)
CP2, CP4 = ("--parallelism.context_parallel_degree=2",), ("--parallelism.context_parallel_degree=4",)
CONTIGUOUS = ("--parallelism.context_parallel_load_balancer=none",)
PP2 = ("--parallelism.pipeline_parallel_degree=2",)
INTERLEAVED = (*PP2, "--parallelism.pipeline_parallel_schedule=Interleaved1F1B")
LAYOUTS = {  # processes, data parallel degree, overrides
    "fsdp2": (2, 2, ()),
    "fsdp4": (4, 4, ()),
    "hsdp2x2": (4, 4, ("--parallelism.data_parallel_replicate_degree=2",)),
    "tp2": (2, 1, TP2),
    "tp4": (4, 1, TP4),
    "pp2": (2, 1, PP2),
    "pp2-interleaved": (2, 1, INTERLEAVED),
    # Two batches to a step, of two microbatches each.
    "pp2-accumulation": (2, 2, (*PP2, "--training.global_batch_size=4", "--validation.steps=4")),
    "fsdp2-tp2": (4, 2, TP2),
    "tp2-pp2": (4, 1, (*TP2, *PP2)),
    "fsdp2-tp2-pp2": (8, 2, (*TP2, *PP2)),
    "cp2": (2, 1, CP2),
    "cp2-contiguous": (2, 1, (*CP2, *CONTIGUOUS)),
    "cp4": (4, 1, CP4),
    "fsdp2-cp4": (8, 2, CP4),
    "hsdp2-cp2": (4, 2, (*CP2, "--parallelism.data_parallel_replicate_degree=2")),
    "cp2-tp2": (4, 1, (*CP2, *TP2)),
    "cp2-pp2": (4, 1, (*CP2, *PP2)),
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A file of documents, and the folder of a seed checkpoint for each config."""
    folder = tmp_path_factory.mktemp("seeds")
    write_documents(folder / "documents.jsonl")
    seed = "--checkpoint.create_seed_checkpoint"
    train(1, folder / "out", *(arguments(c, folder / c, folder / "documents.jsonl", seed) for c in CONFIGS))
    return folder


def runs(seeds, folder, data_parallel, *extra):
    """Runs of all configs from their seed checkpoints."""
    return [
        arguments(
            config, folder / config, seeds / "documents.jsonl",
            f"--checkpoint.initial_load_path={seeds / config / 'checkpoint' / 'step-0'}",
            "--checkpoint.no-initial_load_model_only", *extra, batch=GLOBAL_BATCH // data_parallel,
        )
        for config in CONFIGS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(seeds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return train(1, folder / "out", *runs(seeds, folder, 1))


def assert_same(found, expected, first_step=1):
    assert len(expected.training) == 10 and len(expected.validation) == 2
    steps = range(first_step, 11)
    for step, now, then in zip(steps, found.training, expected.training[first_step - 1 :], strict=True):
        for name, a, b in zip(("loss", "gradient norm"), now, then, strict=True):
            assert a == pytest.approx(b, rel=1e-5), f"{name} of step {step}"
    assert found.validation[-1] == pytest.approx(expected.validation[-1], rel=1e-5)
    assert set(found.statistics) == set(expected.statistics)
    for (mean, _), worst in zip(found.training, found.worst, strict=True):
        assert worst >= mean * (1 - 1e-6)  # the greatest of what the mean is of


@pytest.mark.parametrize("name", layouts(LAYOUTS))
def test_a_layout_trains_as_one_process(seeds, one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    found = train(world, tmp_path / "out", *runs(seeds, tmp_path, data_parallel, *extra))
    for curves, expected in zip(found, one_process, strict=True):
        assert_same(curves, expected)
        assert curves.tokens == expected.tokens


@pytest.mark.parametrize("name", layouts(["fsdp2", "tp2", "pp2", "fsdp2-tp2", "cp2"]))
def test_a_layout_trains_as_one_process_when_blocks_are_compiled(seeds, one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    hybrid = runs(seeds, tmp_path, data_parallel, *extra, "--compile.enable")[-1]  # has every kind of block
    [found] = train(world, tmp_path / "out", hybrid)
    assert_same(found, one_process[-1])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp4", "tp2"),
        ("fsdp2-tp2", None),
        ("cp4", None),
        pytest.param("pp2-interleaved", "fsdp2", marks=without_pipelines),
    ],
    ids=["fsdp4-tp2", "fsdp2-tp2-1", "cp4-1", "pp2-fsdp2"],
)
def test_a_checkpoint_continues_under_another_layout(seeds, one_process, tmp_path, before, after):
    total = "--lr_scheduler.total_steps=10"
    world, data_parallel, extra = LAYOUTS[before]
    train(world, tmp_path / "before", *runs(seeds, tmp_path, data_parallel, *extra, total, "--training.steps=6"))
    world, data_parallel, extra = LAYOUTS[after] if after else (1, 1, ())
    found = train(world, tmp_path / "after", *runs(seeds, tmp_path, data_parallel, *extra, total))
    for curves, expected in zip(found, one_process, strict=True):
        assert_same(curves, expected, first_step=7)


def test_a_rank_that_dies_ends_the_others_and_fewer_ranks_resume(seeds, one_process, tmp_path):
    timeout = "--comm.train_timeout_seconds=10"
    run = runs(seeds, tmp_path, 1, *CP4, "--checkpoint.interval=2", "--validation.no-enable", timeout)[-1]
    second_block_of_step_6 = 5 * 4 + 2
    codes = train_until_a_rank_dies(4, tmp_path / "before", run, victim=2, block=second_block_of_step_6)
    assert codes.pop(2) == -signal.SIGKILL
    assert 0 not in codes and None not in codes, "a rank trained on, or waits for the one that died"
    [found] = train(2, tmp_path / "after", runs(seeds, tmp_path, 1, *CP2)[-1])
    assert_same(found, one_process[-1], first_step=5)
