"""Every layout of processes trains as one process does: losses and gradient norms of ten steps, in fp32."""

import pytest

from .runs import GLOBAL_BATCH, arguments, train, write_documents

pytestmark = pytest.mark.slow

CONFIGS = ("debug", "debug_hybrid")
TP2, TP4 = ("--parallelism.tensor_parallel_degree=2",), ("--parallelism.tensor_parallel_degree=4",)
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
    "fsdp2-tp2": (4, 2, TP2),
    "tp2-pp2": (4, 1, (*TP2, *PP2)),
    "fsdp2-tp2-pp2": (8, 2, (*TP2, *PP2)),
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process(seeds, one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    found = train(world, tmp_path / "out", *runs(seeds, tmp_path, data_parallel, *extra))
    for curves, expected in zip(found, one_process, strict=True):
        assert_same(curves, expected)


@pytest.mark.parametrize("name", ["fsdp2", "tp2", "pp2", "fsdp2-tp2"])
def test_a_layout_trains_as_one_process_when_blocks_are_compiled(seeds, one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    found = train(world, tmp_path / "out", *runs(seeds, tmp_path, data_parallel, *extra, "--compile.enable"))
    for curves, expected in zip(found, one_process, strict=True):
        assert_same(curves, expected)


@pytest.mark.parametrize(("before", "after"), [("fsdp4", "tp2"), ("fsdp2-tp2", None)], ids=["fsdp4-tp2", "fsdp2-tp2-1"])
def test_a_checkpoint_continues_under_another_layout(seeds, one_process, tmp_path, before, after):
    total = "--lr_scheduler.total_steps=10"
    world, data_parallel, extra = LAYOUTS[before]
    train(world, tmp_path / "before", *runs(seeds, tmp_path, data_parallel, *extra, total, "--training.steps=6"))
    world, data_parallel, extra = LAYOUTS[after] if after else (1, 1, ())
    found = train(world, tmp_path / "after", *runs(seeds, tmp_path, data_parallel, *extra, total))
    for curves, expected in zip(found, one_process, strict=True):
        assert_same(curves, expected, first_step=7)
