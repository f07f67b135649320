"""What optimizer.name = "Muon" builds, under either generation of TorchTitan, and what it cannot be combined with."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("torchtitan")

from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.parallel import Muon, muon_matrices
from tests.config_cases import assert_refused, check, write_toml
from tests.generations import optimizers_of, schedule_of

MUON = {"optimizer.name": "Muon", "optimizer.lr": 2e-3, "optimizer.implementation": "for-loop"}


def built(tmp_path, **changes):
    """(model, AdamW, Muon, schedule)"""
    said = MUON | {f"optimizer.{name}": value for name, value in changes.items()} | {"lr_scheduler.warmup_steps": 4}
    config = check(write_toml(tmp_path / "x.toml", said))
    model = GDN2Model(flavors["debug_hybrid"])
    optimizers = optimizers_of(model, config)
    return model, *optimizers, schedule_of(optimizers, config)


@pytest.mark.parametrize("on", ["matrices", "all"])
def test_matrices_of_blocks_have_muon_and_everything_else_adamw(tmp_path, on):
    model, adamw, muon, _ = built(tmp_path, weight_decay=0.3, weight_decay_on=on)
    assert type(adamw) is torch.optim.AdamW and type(muon) is Muon
    names = {p: name for name, p in model.named_parameters()}
    of_muon = {names[p]: group["head_rows"] for group in muon.param_groups for p in group["params"]}
    assert of_muon == {names[p]: rows for p, rows in muon_matrices(model).items()}
    of_adamw = {names[p]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert of_muon.keys() | of_adamw.keys() == set(names.values()) and not of_muon.keys() & of_adamw.keys()
    assert {"tok_embeddings.weight", "lm_head.weight", "layers.0.mixer.q_conv1d.weight"} <= of_adamw.keys()
    assert {"layers.0.mixer.decay_low_proj.weight", "layers.0.mixer.gate_proj.weight"} <= of_adamw.keys()
    assert of_adamw["norm.weight"] == of_adamw["layers.0.mixer.decay.A_log"] == (0.3 if on == "all" else 0.0)
    assert {group["weight_decay"] for group in muon.param_groups} == {0.3}


def test_both_have_their_own_rates_and_one_schedule(tmp_path):
    _, adamw, muon, schedule = built(tmp_path, muon_lr=1e-2)
    for step in range(1, 5):
        for optimizer, rate in ((adamw, 2e-3), (muon, 1e-2)):
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
                [rate * step / 4] * len(optimizer.param_groups)
            )
            optimizer.step()
        schedule.step()


def test_a_rate_of_muon_that_is_not_said_is_that_of_adamw(tmp_path):
    _, _, muon, _ = built(tmp_path)
    assert {group["initial_lr"] for group in muon.param_groups} == {2e-3}


def test_what_is_said_of_muon_reaches_it(tmp_path):
    said = {"momentum": 0.8, "nesterov": False, "ns_steps": 7, "adjust_lr_fn": "original"}
    _, _, muon, _ = built(tmp_path, muon_lr=0.02, **{f"muon_{name}": value for name, value in said.items()})
    for group in muon.param_groups:
        assert {name: group[name] for name in said} == said


def test_a_model_part_without_blocks_has_adamw_alone(tmp_path):
    config = check(write_toml(tmp_path / "x.toml", MUON))
    (only,) = optimizers_of(torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(4)}), config)
    assert type(only) is torch.optim.AdamW


def test_parameters_on_the_cpu_of_a_machine_with_a_gpu_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gdn2_titan.titan.checks.settings.accelerator", lambda: "cuda")
    changes = MUON | {"training.enable_cpu_offload": True}
    assert_refused(write_toml(tmp_path / "x.toml", changes), ["training.enable_cpu_offload is true", "'Muon'", "false"])


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("saved", ["AdamW", "Muon"])
def test_a_checkpoint_of_another_optimizer_is_refused_unless_its_state_is_left_out(tmp_path, name, saved):
    state = {"optimizer.state.norm.weight.exp_avg": torch.zeros(2)}
    if saved == "Muon":
        state["optimizer.state.layers.0.mlp.up_proj.weight.momentum_buffer"] = torch.zeros(2)
    out = tmp_path / "out"
    changes = MUON | {"optimizer.name": name, "checkpoint.enable": True}
    for start, path in (
        ({}, out / "checkpoint" / "step-3"),
        ({"checkpoint.initial_load_path": str(tmp_path / "step-4"), "checkpoint.initial_load_model_only": False,
          "checkpoint.folder": "other"}, tmp_path / "step-4"),
    ):  # fmt: skip
        dcp.save(state, checkpoint_id=path, no_dist=True)
        toml = write_toml(tmp_path / "x.toml", changes | start | {"job.dump_folder": str(out)})
        if name == saved:
            check(toml)
        else:
            assert_refused(toml, [f"optimizer.name is '{name}'", str(path), "exclude_from_loading", "'optimizer'"])
        check(toml, "--checkpoint.exclude_from_loading=optimizer")
