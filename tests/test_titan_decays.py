"""Decays are exact in what TorchTitan trains in bf16, and in what it exports in 16 bits."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

pytest.importorskip("torchtitan")

from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.titan.checkpoint import GDN2StateDictAdapter, exact_decays
from gdn2_titan.titan.torchtitan_version import IS_V02
from tests.convert_cases import load_safetensors
from tests.training import SHORT, train

if IS_V02:
    from torchtitan.components.checkpoint import MODEL
    from torchtitan.components.checkpoint import CheckpointManager as Manager

    from gdn2_titan.titan import register

    register()
else:
    from torchtitan.components.checkpointer.base import MODEL

    from gdn2_titan.titan.v03.trainer import Checkpoints as Manager

EXPORT = ("--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf")


def decays(weights):
    return {name.removeprefix("model."): value for name, value in weights.items() if ".decay." in name}


def read(folder):
    """{name: tensor} of the model in a distributed checkpoint, in the dtypes that they have there."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(m.size, dtype=m.properties.dtype)
        for name, m in metadata.items()
        if name.startswith(("layers.", "lm_head."))
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


@pytest.mark.slow
def test_twenty_steps_of_a_model_in_bf16_move_every_decay_and_an_export_has_them_unrounded(tmp_path):
    train(1, tmp_path, *SHORT, "--training.dtype=bfloat16", "--training.steps=20", *EXPORT,
          "--checkpoint.enable", "--checkpoint.export_dtype=bfloat16", "--checkpoint.keep_latest_k=0",
          "--checkpoint.enable_first_step_checkpoint", "--checkpoint.interval=100")  # fmt: skip
    before = decays(read(tmp_path / "checkpoint" / "step-1"))
    exported = load_safetensors(tmp_path / "checkpoint" / "step-20")
    after = decays(exported)
    assert exported["lm_head.weight"].dtype == torch.bfloat16
    assert before.keys() == after.keys() != set()
    for name, value in after.items():
        assert before[name].dtype == value.dtype == torch.float32
        # A decay that forgets everything may have no gradient that fp32 can tell from zero.
        assert (value != before[name]).double().mean() > 0.95, name
        assert not torch.equal(value, value.bfloat16().float()), f"{name} is rounded"


@pytest.mark.parametrize("in_hf", [False, True], ids=["distributed", "hugging-face"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_export_in_16_bits_has_the_decays_of_the_model(dtype, in_hf, tmp_path):
    torch.manual_seed(0)
    model = GDN2Model(flavors["recall"])
    model.init_weights()
    manager = object.__new__(Manager)
    manager.__dict__.update(
        enable=False, last_save_model_only=True, last_save_in_hf=in_hf, export_dtype=dtype, folder=str(tmp_path),
        states={MODEL: SimpleNamespace(state_dict=model.state_dict)},
        sd_adapter=GDN2StateDictAdapter(flavors["recall"], None),
    )  # fmt: skip
    manager._save_last_step(3)
    found = load_safetensors(tmp_path / "step-3") if in_hf else read(tmp_path / "step-3")
    assert found["lm_head.weight"].dtype == dtype
    expected = decays(model.state_dict())
    assert decays(found).keys() == expected.keys() != set()
    for name, value in decays(found).items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name
        assert not torch.equal(value, value.to(dtype).float())


def test_nothing_else_in_a_state_dict_changes():
    class Model:
        def state_dict(self):
            return {"layers.0.mixer.decay.A_log": torch.ones(2)}

    others = {"optimizer": object(), "x.decay.A_log": torch.ones(2), "lm_head.weight": torch.ones(2).half()}
    assert exact_decays(others, None) is others
    rounded = others | {"layers.0.mixer.decay.A_log": torch.zeros(2).half()}
    found = exact_decays(rounded, Model())
    assert found.keys() == rounded.keys() and all(found[name] is value for name, value in others.items())
    assert torch.equal(found["layers.0.mixer.decay.A_log"], torch.ones(2))
