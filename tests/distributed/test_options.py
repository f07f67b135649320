"""Options that change how a step is computed, but not what it computes, train as one plain process does."""

import pytest

from .runs import SHORT_RUN, assert_same, run_from, train

BY_OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
ACCUMULATION = ("--training.global_batch_size=4", "--validation.steps=4")
RESHARD = "--parallelism.fsdp_reshard_after_forward=always"
INDUCTOR = ("--compile.enable", "--compile.backend=inductor")
slow = pytest.mark.slow
OPTIONS = [
    # processes, sequences in a rank's batch, overrides
    pytest.param(1, 2, ACCUMULATION, id="accumulation"),
    pytest.param(
        2, 1, (*ACCUMULATION, "--activation_checkpoint.mode=full"),
        id="fsdp-accumulation-whole blocks checkpointed", marks=slow,
    ),
    pytest.param(2, 2, (*BY_OP, RESHARD), id="fsdp-operations checkpointed-reshard"),
    pytest.param(2, 2, (*BY_OP, "--compile.enable"), id="fsdp-operations checkpointed-compiled", marks=slow),
    pytest.param(1, 4, ("--activation_checkpoint.mode=selective",), id="every second block checkpointed", marks=slow),
    pytest.param(1, 4, INDUCTOR, id="inductor", marks=slow),
    pytest.param(1, 4, (*INDUCTOR, "--activation_checkpoint.mode=memory_budget"), id="memory budget", marks=slow),
    # The seed checkpoint has the state of a loader without workers.
    pytest.param(
        1, 4, ("--training.dataloader.num_workers=2", "--checkpoint.exclude_from_loading=dataloader"), id="workers",
        marks=slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("world", "batch", "extra"), OPTIONS)
def test_an_option_trains_as_one_plain_process(seed, one_process, tmp_path, world, batch, extra):
    [found] = train(world, tmp_path / "out", run_from(seed, tmp_path, world, *extra, SHORT_RUN, batch=batch))
    assert_same(found, one_process, last_step=3)
    assert found.tokens == one_process.tokens[:3]
