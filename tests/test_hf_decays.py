"""transformers, accelerate and the Trainer leave the decays exact, and do not decay them."""

import pytest
import torch

pytest.importorskip("transformers")

import accelerate
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gdn2_titan.convert.hf import GDN2ForCausalLM
from tests.hf_cases import config, tokens
from tests.model_cases import BF16, FP16, FP32, FP64, assert_exact, decays


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a model in fp32, its decays)."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = GDN2ForCausalLM(config())
    model.save_pretrained(folder)
    return folder, decays(model)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_model_from_a_config_in_16_bits_has_decays_in_fp32(dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=dtype)
    assert_exact(model, decays(model))
    assert model.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("cast", [lambda m: m.to(BF16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_a_cast_leaves_them_in_fp32(saved, cast):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    assert_exact(cast(model), saved[1])


@pytest.mark.parametrize(("dtype", "expected"), [(BF16, FP32), (FP16, FP32), ("auto", FP32), (FP64, FP64)], ids=str)
def test_a_model_from_a_file_has_those_of_the_file(saved, dtype, expected):
    assert_exact(AutoModelForCausalLM.from_pretrained(saved[0], dtype=dtype), saved[1], expected)


def test_a_model_in_16_bits_is_saved_and_loaded_with_them(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved[0], dtype=BF16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    assert_exact(model, saved[1])
    assert model.lm_head.weight.dtype == BF16


@pytest.mark.parametrize("dtype", [None, BF16])
def test_accelerate_loads_them_in_fp32_into_an_empty_model(saved, dtype):
    with accelerate.init_empty_weights():
        model = GDN2ForCausalLM(config())
    model = accelerate.load_checkpoint_and_dispatch(model, saved[0], device_map={"": "cpu"}, dtype=dtype)
    assert model.lm_head.weight.dtype == (dtype or FP32)
    for name, p in decays(model).items():
        # It casts what it reads before it gives it to the model: the optimizer can move what is then rounded.
        assert p.dtype == FP32 and torch.equal(p, saved[1][name].to(dtype or FP32).float())


def trainer(model, folder, **options):
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
    options = {"weight_decay": 0.5, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"} | options
    arguments = TrainingArguments(folder, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **options)
    return Trainer(model=model, args=arguments, train_dataset=rows)


OTHERS = dict(layer_pattern=("mamba2", "mamba3"), mamba_heads=4, mamba_head_dim=6, mamba_state=8, mamba_rank=2)


@pytest.mark.parametrize(
    "dtype, changes", [(FP32, {"content_gate": True}), (BF16, {}), (FP32, OTHERS)], ids=["content", "BF16", "mamba"]
)
def test_the_trainer_decays_neither_decays_nor_norms_nor_biases_nor_scales_and_all_else(dtype, changes, tmp_path):
    model = GDN2ForCausalLM(config(**changes)).to(dtype)
    theirs = trainer(model, tmp_path)
    theirs.create_optimizer()
    decayed = {id(p): group["weight_decay"] for group in theirs.optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        spared = any(part in name for part in ("decay.", "norm", "bias", "skip.", "heads."))
        assert decayed[id(p)] == (0.0 if spared else 0.5), name


def test_the_trainer_moves_every_decay_of_a_model_in_bf16(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=BF16)
    before = decays(model)
    trainer(model, tmp_path, max_steps=20, learning_rate=1e-3).train()
    for name, p in decays(model).items():
        assert p.dtype == FP32 and (p != before[name]).all(), name


def test_a_model_describes_itself():
    assert "GDN2Decays()" in repr(GDN2ForCausalLM(config()))
