"""TorchTitan loads checkpoints with the names of before the low-rank projections were two linear layers each."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

pytest.importorskip("torchtitan")

from gdn2_titan.convert.commands import to_hf
from gdn2_titan.convert.mapping import to_hf_name
from gdn2_titan.models import flavors
from gdn2_titan.titan.checkpoint import GDN2StateDictAdapter, reading_old_names
from tests.convert_cases import assert_equal, load_safetensors, save_step, weights
from tests.old_name_cases import old_names
from tests.training import SHORT, train

HYBRID = flavors["debug_hybrid"]
STATE, GROUP = "state.{}.exp_avg", "param_groups.{}.lr"


class Kept:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


class Manager:
    """What the load of TorchTitan's checkpoint manager uses of it."""

    def __init__(self):
        self.states = {"model": Kept({})}


def loaded(wanted, folder):
    """Whether TorchTitan's own code did it."""
    stock = []
    reading_old_names(lambda self, *given: stock.append(given))(Manager(), wanted, str(folder), False, False)
    return bool(stock)


def states(tensors):
    """As TorchTitan saves them: the model's tensors beside a flat optimizer's."""
    optimizer = {STATE.format(name): tensor + 1 for name, tensor in tensors.items()}
    return tensors | {"optimizer": optimizer | {GROUP.format(name): 0.5 for name in tensors}}


def blank(tensors):
    empty = states({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()})
    return empty | {"optimizer": Kept(empty["optimizer"] | {GROUP.format(name): 0.0 for name in tensors})}


@pytest.fixture
def tensors():
    return weights(flavors["debug"])


def test_model_and_optimizer_come_out_of_a_checkpoint_with_old_names(tensors, tmp_path):
    dcp.save(states(old_names(tensors)), checkpoint_id=tmp_path / "old", no_dist=True)
    wanted = blank(tensors)
    assert not loaded(wanted, tmp_path / "old")
    expected = states(tensors)
    optimizer, of_optimizer = wanted.pop("optimizer").state, expected.pop("optimizer")
    assert_equal(wanted, expected)
    assert {name: value for name, value in optimizer.items() if name.startswith("param_groups")} == {
        GROUP.format(name): 0.5 for name in tensors
    }
    for name in map(STATE.format, tensors):
        assert torch.equal(optimizer[name], of_optimizer[name]), name


def test_what_an_old_checkpoint_lacks_is_still_an_error(tensors, tmp_path):
    old = old_names(tensors)
    del old["layers.1.mixer.gate_proj.1.bias"]
    dcp.save(states(old), checkpoint_id=tmp_path / "old", no_dist=True)
    with pytest.raises((RuntimeError, CheckpointException), match="layers.1.mixer.gate_proj.bias"):
        loaded(blank(tensors), tmp_path / "old")


def test_other_checkpoints_and_other_models_are_left_to_torchtitan(tensors, tmp_path):
    dcp.save(states(tensors), checkpoint_id=tmp_path / "new", no_dist=True)
    dcp.save(states(old_names(tensors)), checkpoint_id=tmp_path / "old", no_dist=True)
    assert loaded(blank(tensors), tmp_path / "new")
    assert loaded(blank(old_names(tensors)), tmp_path / "old")
    assert loaded(blank(tensors), tmp_path / "missing")


def test_the_adapter_reads_an_old_hugging_face_folder(tensors, tmp_path):
    hf = {to_hf_name(name): tensor for name, tensor in tensors.items()}
    save_file(old_names(hf), tmp_path / "model-00001-of-00001.safetensors")
    files = dict.fromkeys(old_names(hf), "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    adapter = GDN2StateDictAdapter(flavors["debug"], str(tmp_path))
    assert adapter.fqn_to_index_mapping == dict.fromkeys(hf, 1)
    wanted = {name: torch.full_like(tensor, torch.nan) for name, tensor in hf.items()}
    dcp.load(wanted, storage_reader=adapter.get_hf_storage_reader(str(tmp_path)), no_dist=True)
    assert_equal(adapter.from_hf(wanted), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dcp", "hf"])
def test_a_training_of_two_ranks_starts_from_old_names_and_saves_todays(kind, tmp_path):
    tensors, old = weights(HYBRID), tmp_path / "old"
    if kind == "dcp":
        save_step(old / "step-7", old_names(tensors), HYBRID)
        load = [f"--checkpoint.initial_load_path={old / 'step-7'}"]
    else:
        old.mkdir()
        save_file(old_names({to_hf_name(name): t for name, t in tensors.items()}), old / "model.safetensors")
        load = ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={old}"]
    # One step without learning writes what was loaded.
    still = ["--checkpoint.enable", "--training.steps=1", "--optimizer.lr=0.0", "--checkpoint.async_mode=async"]
    train(2, tmp_path, *SHORT, *still, *load)
    to_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert_equal(load_safetensors(tmp_path / "again"), {to_hf_name(name): t for name, t in tensors.items()})
