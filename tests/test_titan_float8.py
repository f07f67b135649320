"""Float8 and MXFP8 by TorchTitan: the converters' names, sections and refusals, and whole runs. Emulated on CPU."""

import re
import sys

import pytest
import torch
from torchao.float8.float8_linear import Float8Linear
from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear

from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.parallel import apply_float8
from gdn2_titan.parallel.float8 import FLOAT8_RECIPES
from gdn2_titan.titan import float8 as titan_float8
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.float8 import check_float8
from tests.config_cases import check, write_toml
from tests.generations import convert, dimensions, only_toml
from tests.training import LOSS, SHORT, scalars, train

FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"
EMULATED = {"model.converters": [FLOAT8], f"{FLOAT8}.emulate": True}
EMULATED_MX = {"model.converters": [MX], f"{MX}.emulate": True}

REFUSALS = [
    ({"model.converters": ["float8"]}, ["model.converters", "'float8'", FLOAT8]),
    ({"model.converters": ["quantize.grouped_mm.float8"]}, ["model.converters", "'quantize.grouped_mm.float8'", MX]),
    ({"model.converters": [FLOAT8, MX]}, ["model.converters", FLOAT8, MX, "only one"]),
    (EMULATED | {f"{FLOAT8}.recipe_name": "rowise"}, [f"{FLOAT8}.recipe_name", "'rowise'", "rowwise_with_gw_hp"]),
    (EMULATED_MX | {f"{MX}.recipe_name": "mxfp8_cublas"}, [f"{MX}.recipe_name", "'mxfp8_cublas'", "mxfp8_rceil"]),
    ({"model.converters": [FLOAT8]}, [f"{FLOAT8}.emulate is false", "sm_89", "must be true"]),
    ({"model.converters": [MX]}, [f"{MX}.emulate is false", "sm_100", "must be true"]),
    (EMULATED | {f"{FLOAT8}.filter_fqns": "lm_head"}, [f"{FLOAT8}.filter_fqns", "'lm_head'", "a list"]),
    (EMULATED | {f"{FLOAT8}.filter_fqns": ["auto_filter_small_kn"]}, ["auto_filter_small_kn", "smallest_side"]),
    (EMULATED | {f"{FLOAT8}.recipe_name": "rowwise", f"{FLOAT8}.enable_fsdp_float8_all_gather": True},
     [f"{FLOAT8}.enable_fsdp_float8_all_gather is true", "'rowwise'", "must be false"]),
    (EMULATED | {f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp": True},
     [f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp is true", "enable_fsdp_float8_all_gather"]),
    (EMULATED_MX | {f"{MX}.mxfp8_dim1_cast_kernel_choice": "cuda"},
     [f"{MX}.mxfp8_dim1_cast_kernel_choice", "'cuda'", "left out"]),
    (EMULATED_MX | {"training.seq_len": 10, "training.local_batch_size": 3}, ["training.seq_len is 10", "30", "32"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), REFUSALS, ids=[" ".join(changes) for changes, _ in REFUSALS])
def test_a_toml_that_cannot_be_converted_is_refused_in_one_sentence(tmp_path, monkeypatch, changes, parts):
    monkeypatch.setattr(titan_float8, "has_cuda_capability", lambda *_: False)
    with pytest.raises(ConfigError) as refusal:
        check(write_toml(tmp_path / "x.toml", changes))
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


def test_a_torchao_without_mxfp8_layers_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.prototype.moe_training.mxfp8_linear", None)
    with pytest.raises(ConfigError, match=f"model.converters has '{MX}'; it needs a torchao with MXFP8"):
        check(write_toml(tmp_path / "x.toml", EMULATED_MX))
    with pytest.raises(ImportError, match="recipe is 'mxfp8_rceil'; it needs a torchao with MXFP8"):
        apply_float8(on_meta("debug"), "mxfp8_rceil")


@pytest.mark.parametrize(("converter", "oldest"), [(FLOAT8, (8, 9)), (MX, (10, 0))])
def test_a_gpu_of_the_right_age_needs_no_emulation_but_batches_it_can_multiply(
    tmp_path, monkeypatch, converter, oldest
):
    changes = {"model.converters": [converter], "training.local_batch_size": 1}
    monkeypatch.setattr(titan_float8, "has_cuda_capability", lambda *wanted: oldest >= wanted)
    check(write_toml(tmp_path / "x.toml", changes | {"training.seq_len": 96}))
    odd = write_toml(tmp_path / "x.toml", changes | {"training.seq_len": 72})
    with pytest.raises(ConfigError, match="training.seq_len is 72, which gives microbatches of 72 tokens"):
        check(odd)
    exact = {FLOAT8: "rowwise_with_gw_hp", MX: "mxfp8_rceil_wgrad_with_hp"}[converter]
    check(odd, f"--{converter}.recipe_name={exact}")  # no product over tokens in float8
    monkeypatch.setattr(titan_float8, "has_cuda_capability", lambda *wanted: (8, 0) >= wanted)
    with pytest.raises(ConfigError, match=f"{converter}.emulate is false"):
        check(odd)


def on_meta(flavor):
    with torch.device("meta"):
        return GDN2Model(flavors[flavor])


def converted(config, world=1):
    """The linear layers of the config's flavor that TorchTitan's own machinery converts, by name."""
    model = on_meta(config.model.flavor)
    convert(model, config, dimensions(world))
    return {name: x for name, x in model.named_modules() if isinstance(x, (Float8Linear, MXFP8Linear))}


@pytest.mark.parametrize(("converter", "changes"), [(FLOAT8, EMULATED), (MX, EMULATED_MX)])
def test_what_is_converted_is_changed_in_toml_or_on_the_command_line(tmp_path, converter, changes):
    names = set(converted(check(write_toml(tmp_path / "x.toml", changes))))
    assert names == set(apply_float8(on_meta("debug_hybrid")))
    toml = write_toml(
        tmp_path / "x.toml", changes | {f"{converter}.filter_fqns": ["mixer"], f"{converter}.smallest_side": 300}
    )
    assert not converted(check(toml))
    names = set(converted(check(toml, f"--{converter}.smallest_side=32")))
    assert names == {f"layers.{i}.mlp.{name}_proj" for i in range(4) for name in ("gate", "up", "down")}
    names = set(converted(check(toml, f"--{converter}.filter_fqns=mlp,lm_head", f"--{converter}.smallest_side=64")))
    assert {"layers.1.mixer.k_proj", "layers.0.mixer.gate_proj", "layers.0.mixer.o_proj"} <= names
    assert not any("mlp" in name for name in names)


@pytest.mark.parametrize("recipe", FLOAT8_RECIPES)
def test_emulation_and_the_gather_hold_with_a_recipe_by_name_too(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("WORLD_SIZE", "2")
    gather = f"{FLOAT8}.enable_fsdp_float8_all_gather"
    changes = EMULATED | {f"{FLOAT8}.recipe_name": recipe, gather: recipe == "tensorwise", "compile.enable": True}
    config = check(write_toml(tmp_path / "x.toml", changes))
    with torch._inductor.config.patch(emulate_precision_casts=False):
        modules = converted(config, world=2)
        assert torch._inductor.config.emulate_precision_casts == (recipe == "rowwise")
    assert modules
    for module in modules.values():
        assert module.config.emulate
        assert module.config.enable_fsdp_float8_all_gather == (recipe == "tensorwise")


@only_toml
def test_other_models_keep_torchtitans_converter_and_a_forks_own_config_has_our_defaults(monkeypatch):
    from torchtitan.components.quantization.float8 import Float8LinearConverter
    from torchtitan.config import JobConfig as StockJobConfig
    from torchtitan.protocols.model_converter import build_model_converters

    from gdn2_titan.titan import register

    register()
    register()
    config = StockJobConfig()
    config.model.converters = [FLOAT8]
    config.quantize.linear.float8.emulate = True
    config.model.name = "llama3"
    assert type(build_model_converters(config, dimensions(1)).converters[0]) is Float8LinearConverter
    config.model.name, config.model.flavor = "gdn2", "debug_hybrid"
    check_float8(config)
    default = set(apply_float8(on_meta("debug_hybrid")))
    assert set(converted(config)) == default
    config.quantize.linear.float8.filter_fqns = ["mlp", "lm_head", "decay", "mixer.gate"]
    assert set(converted(config)) == {name for name in default if "mlp" not in name}
    monkeypatch.setattr(titan_float8, "has_cuda_capability", lambda *_: True)
    config.model.converters = [MX]
    check_float8(config)
    assert set(converted(config)) == default


LINE = r"Converted 28 of 41 linear layers \(tensorwise, emulated\): 85.9% of the FLOPs in linear layers, 7\d.\d% of all"


@pytest.mark.slow
def test_after_200_steps_the_debug_hybrids_loss_is_that_of_fp32_within_two_percent(tmp_path):
    arguments = [
        *SHORT, "--training.local_batch_size=4", "--training.steps=200",
        "--lr_scheduler.warmup_steps=20", "--validation.enable", "--validation.freq=200", "--validation.steps=20",
        "--validation.seq_len=64",
    ]  # fmt: skip
    losses = {}
    for kind, extra in (
        ("fp32", []),
        ("float8", [f"--model.converters={FLOAT8}", f"--{FLOAT8}.emulate"]),
    ):
        (tmp_path / kind).mkdir()
        printed = train(1, tmp_path / kind, *arguments, *extra)
        assert bool(re.search(LINE, printed)) == bool(extra)
        curve = scalars(tmp_path / kind, LOSS)
        assert set(curve) == set(range(1, 201))
        losses[kind] = scalars(tmp_path / kind, "validation_metrics/loss")[200]
    assert losses["fp32"] < 3, "the model has learnt something"
    assert losses["float8"] != losses["fp32"]
    assert losses["float8"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_run_whose_weights_were_gathered_in_float8_continues_in_fp32_without_torchao(tmp_path, optimizer):
    arguments = [*SHORT, "--checkpoint.enable", "--lr_scheduler.total_steps=6", f"--optimizer.name={optimizer}"]
    printed = train(
        2, tmp_path, *arguments, "--training.steps=4", f"--model.converters={FLOAT8}", f"--{FLOAT8}.emulate",
        f"--{FLOAT8}.enable_fsdp_float8_all_gather", f"--{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp",
        "--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op",
    )  # fmt: skip
    assert re.search(LINE + r".*; weights are gathered in float8", printed)
    assert "Training starts at step 5" in train(2, tmp_path, *arguments, "--training.steps=6")
    curve = scalars(tmp_path, LOSS)
    assert set(curve) == set(range(1, 7))
    assert all(curve[step] < curve[1] for step in (5, 6))
