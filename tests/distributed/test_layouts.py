"""Every layout of processes trains as one process does: losses and gradient norms, in fp32.

Three steps of each layout and ten of the largest product, of a model that has every kind of mixer. A second generation
of TorchTitan runs one layout of each kind with each of its backends: the plans are the same objects.
"""

import signal

import pytest

from gdn2_titan.titan.pipeline import RUNS
from gdn2_titan.titan.torchtitan_version import IS_V02

from .runs import (
    OLDER_BACKEND,
    SHORT_RUN,
    WHOLE_RUN,
    assert_same,
    layouts,
    only_backends,
    run_from,
    train,
    train_until_a_rank_dies,
    without_pipelines,
)

TP2, TP4 = ("--parallelism.tensor_parallel_degree=2",), ("--parallelism.tensor_parallel_degree=4",)
CP2, CP4 = ("--parallelism.context_parallel_degree=2",), ("--parallelism.context_parallel_degree=4",)
CONTIGUOUS = ("--parallelism.context_parallel_load_balancer=none",)
PP2 = ("--parallelism.pipeline_parallel_degree=2",)
INTERLEAVED = (*PP2, "--parallelism.pipeline_parallel_schedule=Interleaved1F1B")
LAYOUTS = {  # processes, data parallel degree, overrides
    "fsdp2": (2, 2, ()),
    "fsdp4": (4, 4, ()),
    "tp2": (2, 1, TP2),
    "tp4": (4, 1, TP4),
    "pp2": (2, 1, PP2),
    "pp2-interleaved": (2, 1, INTERLEAVED),
    # Two batches to a step, of two microbatches each.
    "pp2-accumulation": (2, 2, (*PP2, "--training.global_batch_size=4", "--validation.steps=4")),
    "fsdp2-tp2": (4, 2, TP2),
    "fsdp2-tp2-pp2": (8, 2, (*TP2, *PP2)),
    "cp2": (2, 1, CP2),
    "cp2-contiguous": (2, 1, (*CP2, *CONTIGUOUS)),
    "fsdp2-cp4": (8, 2, CP4),
    "hsdp2-cp2": (4, 2, (*CP2, "--parallelism.data_parallel_replicate_degree=2")),
    "cp2-tp2": (4, 1, (*CP2, *TP2)),
    "cp2-pp2": (4, 1, (*CP2, *PP2)),
}


LARGEST = "fsdp2-tp2-pp2" if RUNS else "fsdp2-cp4"
# Each factor of a product is one of these, in some product with each other.
ONE_OF_EACH_KIND = ["fsdp2-tp2", "cp2-contiguous", "fsdp2-cp4", "hsdp2-cp2", "cp2-tp2", "fsdp2-tp2-pp2"]
MORE = ["tp4", "pp2", "pp2-interleaved", "pp2-accumulation", "cp2-pp2"]
OLDER = {f"{name}-partial_dtensor": LAYOUTS[name] for name in ONE_OF_EACH_KIND}
LAYOUTS |= {name: (world, shards, (*extra, OLDER_BACKEND)) for name, (world, shards, extra) in OLDER.items()}
# Every kind of parallelism in some.
QUICK = ["hsdp2-cp2", "fsdp2-tp2", "pp2", "cp2-contiguous"] if IS_V02 else ["fsdp2-tp2", "hsdp2-cp2"]


@pytest.mark.parametrize("name", layouts([*ONE_OF_EACH_KIND, *(MORE if IS_V02 else OLDER)], QUICK))
def test_a_layout_trains_as_one_process(seed, one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    steps, last = (WHOLE_RUN, 10) if name == LARGEST else (SHORT_RUN, 3)
    [found] = train(world, tmp_path / "out", run_from(seed, tmp_path, data_parallel, *extra, steps))
    assert_same(found, one_process, last_step=last)
    assert found.tokens == one_process.tokens[:last]


@pytest.mark.parametrize("name", layouts(["pp2", "fsdp2-tp2", "cp2"], []))
def test_a_layout_trains_as_one_process_when_blocks_are_compiled(seed, one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    extra = *extra, SHORT_RUN, "--compile.enable"
    [found] = train(world, tmp_path / "out", run_from(seed, tmp_path, data_parallel, *extra))
    assert_same(found, one_process, last_step=3)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("fsdp4", "tp2", marks=[pytest.mark.slow] * (not IS_V02)),
        pytest.param("fsdp2-tp2-partial_dtensor", "fsdp2", marks=only_backends),
        pytest.param("hsdp2-cp2", "cp2-contiguous-partial_dtensor", marks=[only_backends, pytest.mark.slow]),
        pytest.param("fsdp2-tp2", None, marks=pytest.mark.slow),
        pytest.param("pp2-interleaved", "fsdp2", marks=[without_pipelines, pytest.mark.slow]),
    ],
    ids=["fsdp4-tp2", "older-newer", "newer-older", "fsdp2-tp2-1", "pp2-fsdp2"],
)
def test_a_checkpoint_continues_under_another_layout(seed, one_process, tmp_path, before, after):
    world, data_parallel, extra = LAYOUTS[before]
    train(world, tmp_path / "before", run_from(seed, tmp_path, data_parallel, *extra, "--training.steps=4"))
    world, data_parallel, extra = LAYOUTS[after] if after else (1, 1, ())
    [found] = train(world, tmp_path / "after", run_from(seed, tmp_path, data_parallel, *extra, "--training.steps=7"))
    assert_same(found, one_process, first_step=5, last_step=7)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_fewer_ranks_resume(seed, one_process, tmp_path):
    timeout = "--comm.train_timeout_seconds=10"
    killed = run_from(seed, tmp_path, 1, *CP4, WHOLE_RUN, "--checkpoint.interval=2", "--validation.no-enable", timeout)
    second_block_of_step_6 = 5 * 4 + 2
    codes = train_until_a_rank_dies(4, tmp_path / "before", killed, victim=2, block=second_block_of_step_6)
    assert codes.pop(2) == -signal.SIGKILL
    assert 0 not in codes and None not in codes, "a rank trained on, or waits for the one that died"
    [found] = train(2, tmp_path / "after", run_from(seed, tmp_path, 1, *CP2, "--training.steps=7"))
    assert_same(found, one_process, first_step=5, last_step=7)
