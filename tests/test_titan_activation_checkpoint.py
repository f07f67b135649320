"""TorchTitan's [activation_checkpoint] on this model."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

from gdn2_titan.titan.job_config import JobConfig
from tests.activation_checkpoint_cases import LAYERS, counted_calls, fresh_compiler  # noqa: F401 - fixtures
from tests.compile_cases import assert_same, batch, build, step
from tests.generations import dimensions, parallelized


@pytest.fixture
def one_rank():
    """A process group of this process alone: TorchTitan 0.3 shards parameters on one rank too."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "settings, mixer",
    [
        (dict(mode="full"), 2 * LAYERS),
        (dict(mode="selective", selective_ac_option="2"), 1.5 * LAYERS),
        (dict(mode="selective", selective_ac_option="op"), LAYERS),
        (dict(mode="memory_budget", memory_budget=0.5), LAYERS),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else None,
)
def test_torchtitans_settings_checkpoint_the_model_as_they_say(settings, mixer, calls, one_rank):
    job_config = JobConfig()
    for name, value in settings.items():
        setattr(job_config.activation_checkpoint, name, value)
    job_config.compile.enable = settings["mode"] == "memory_budget"  # which TorchTitan insists on
    job_config.compile.backend = "aot_eager"
    job_config.training.mixed_precision_param = "float32"
    model, inputs = build("gdn2", repeats=LAYERS), batch(2, 20)
    found = step(parallelized(copy.deepcopy(model), dimensions(1), job_config), *inputs)
    assert calls["mixer"] == mixer
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
    assert_same(whole, step(model, *inputs))
    assert torch._functorch.config.is_non_builtin_to_include == (settings["mode"] == "memory_budget")
