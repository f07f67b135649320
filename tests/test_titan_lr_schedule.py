"""The learning rate of every step, under either generation of TorchTitan, against a formula of its own."""

import itertools
import math
import re

import pytest
import torch

pytest.importorskip("torchtitan")

from gdn2_titan.titan.job_config import JobConfig
from tests.generations import optimizers_of, schedule_of
from tests.training import LOSS, SHORT, scalars, train

LR = 0.5
SHAPES = {
    "linear": lambda share: share,
    "sqrt": lambda share: 1 - math.sqrt(1 - share),
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


def rate(n, steps, warmup, ratio, shape, floor):
    """Of the n-th step: up to 1 with the last step of the warm-up, and from 1 down to what only a step after the last
    would reach, the floor. ``share`` is what is left of the way down."""
    warmup = min(warmup, steps)
    down = steps - warmup if ratio is None else min(round(steps * ratio), steps - warmup)
    if n <= warmup:
        return n / warmup
    share = min(1, max(0, steps + 1 - n) / down) if down else 1
    return floor + (1 - floor) * SHAPES[shape](share)


def schedule(steps, warmup, ratio=None, shape="linear", floor=0.0, total=None):
    job_config = JobConfig()
    job_config.training.steps, job_config.optimizer.lr = steps, LR
    job_config.optimizer.implementation = "for-loop"
    settings = job_config.lr_scheduler
    settings.warmup_steps, settings.total_steps = warmup, total
    settings.decay_ratio, settings.decay_type, settings.min_lr_factor = ratio, shape, floor
    optimizers = optimizers_of(torch.nn.Linear(2, 2), job_config)
    return optimizers, schedule_of(optimizers, job_config)


def rates(optimizers, schedulers, count):
    """Of so many steps from here on, as the optimizer has them, over that of the config."""
    found = []
    for _ in range(count):
        (optimizer,) = optimizers
        (lr,) = {group["lr"] for group in optimizer.param_groups}
        found.append(lr / LR)
        optimizer.step()
        schedulers.step()
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 6, 7, 8, 20])
def test_each_step_has_the_rate_of_the_formula_below_at_and_above_the_warm_up(warmup, shape):
    for steps, ratio, floor in itertools.product((1, 2, 6, 7, 9), (None, 0.0, 0.3, 1.0), (0.0, 0.1, 1.0)):
        found = rates(*schedule(steps, warmup, ratio, shape, floor), steps + 1)
        expected = [rate(n, steps, warmup, ratio, shape, floor) for n in range(1, steps + 2)]
        assert found == pytest.approx(expected, abs=1e-12), (steps, ratio, floor)
        assert all(one > 0 for one in found[:-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("warmup", "ratio"), [(2, None), (2, 0.5), (2, 0.0), (9, None)])
def test_after_its_schedule_a_training_keeps_the_rate_of_its_end(shape, warmup, ratio):
    """No AssertionError, no negative rate, none that rises again."""
    found = rates(*schedule(12, warmup, ratio, shape, 0.1, total=6), 12)
    assert found == pytest.approx([rate(n, 6, warmup, ratio, shape, 0.1) for n in range(1, 13)], abs=1e-12)
    assert found[6:] == pytest.approx([found[-1]] * 6)


def test_a_schedule_longer_than_the_training_is_followed_as_far_as_it_goes():
    expected = [rate(n, 40, 2, None, "linear", 0) for n in range(1, 5)]
    assert rates(*schedule(4, 2, total=40), 4) == pytest.approx(expected)


@pytest.mark.parametrize("saved", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("steps", [4, 6, 9])
def test_a_loaded_schedule_goes_on_with_the_rates_of_one_that_ran_that_far(saved, steps):
    optimizers, schedulers = schedule(6, 2)
    rates(optimizers, schedulers, saved)
    whole = schedule(steps, 2)
    expected = rates(*whole, saved + 4)[saved:]
    continued = schedule(steps, 2)
    continued[1].load_state_dict(schedulers.state_dict())
    (one,) = continued[1].schedulers
    assert one.get_last_lr()[0] / LR == pytest.approx(expected[0])
    # The optimizer's own rate comes with its state.
    assert rates(*continued, 4)[1:] == pytest.approx(expected[1:])


@pytest.mark.slow
def test_six_steps_finish_under_a_longer_warm_up_and_a_shorter_training_starts_from_there(tmp_path):
    arguments = [*SHORT, "--checkpoint.enable", "--lr_scheduler.warmup_steps=20"]
    assert "Training completed" in train(1, tmp_path, *arguments, "--training.steps=6")
    assert set(scalars(tmp_path, LOSS)) == set(range(1, 7))
    log = train(1, tmp_path, *arguments, "--training.steps=4")
    assert re.search("Training starts at step 7.*Training completed", log, re.DOTALL)
