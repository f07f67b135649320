"""Every layout of processes trains as one process does: losses and gradient norms of ten steps, in fp32."""

import pytest

from .runs import arguments, train

pytestmark = pytest.mark.slow

CONFIGS = ("debug", "debug_hybrid")
TP2, TP4 = ("--parallelism.tensor_parallel_degree=2",), ("--parallelism.tensor_parallel_degree=4",)
PP2 = ("--parallelism.pipeline_parallel_degree=2",)
INTERLEAVED = (*PP2, "--parallelism.pipeline_parallel_schedule=Interleaved1F1B")
LAYOUTS = {
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
    """Folder of a seed checkpoint for each config."""
    folder = tmp_path_factory.mktemp("seeds")
    runs = [arguments(c, folder / c, "--checkpoint.create_seed_checkpoint") for c in CONFIGS]
    train(1, folder / "out", *runs)
    return {config: folder / config / "checkpoint" / "step-0" for config in CONFIGS}


def runs_from(seeds, folder, *extra):
    return [
        arguments(config, folder / config, f"--checkpoint.initial_load_path={seeds[config]}",
                  "--checkpoint.no-initial_load_model_only", *extra)
        for config in CONFIGS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(seeds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return train(1, folder / "out", *runs_from(seeds, folder))


def assert_same_curves(found, expected):
    assert len(found) == len(expected)
    for step, (now, then) in enumerate(zip(found, expected, strict=True), 1):
        for name, a, b in zip(("loss", "gradient norm"), now, then, strict=True):
            assert a == pytest.approx(b, rel=1e-5), f"{name} of step {step}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process(seeds, one_process, tmp_path, name):
    world, data_parallel, extra = LAYOUTS[name]
    batch = f"--training.local_batch_size={4 // data_parallel}"
    found = train(world, tmp_path / "out", *runs_from(seeds, tmp_path, batch, *extra))
    for curve, expected in zip(found, one_process, strict=True):
        assert len(expected) == 10
        assert_same_curves(curve, expected)
