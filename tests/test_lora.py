"""PEFT's adapters on the transformers model: they find the projections by their names."""

import copy

import peft
import pytest
import torch
from torch import nn

from tests.hf_cases import HYBRID, RECURRENT, pair, tokens

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OF_THE_MEMORY = ("erase_proj", "write_proj", "decay_proj")
LOW = ("decay_low_proj", "gate_low_proj")

patterns = pytest.mark.parametrize("pattern", [RECURRENT, HYBRID], ids="+".join)


def adapted(targets, structure=None, pattern=HYBRID, **options):
    """A model with an adapter that says something, and the model without it."""
    theirs, _ = pair(layer_pattern=pattern, **(structure or {}))
    plain = copy.deepcopy(theirs)
    targets = targets if isinstance(targets, str) else list(targets)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model, plain


def reached(model):
    """Names of the linear layers that have an adapter, without "base_model.model."."""
    return {n.split(".", 2)[2] for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


def step(model):
    """One step of training; {name: how far the parameter went}."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = tokens(2, 12)
    model.train()
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    return {name: (p - before[name]).abs().max() for name, p in model.named_parameters()}, gradients


@patterns
@pytest.mark.parametrize(
    "structure", [{}, {"tied_gates": True}, {"decay": "scalar", "erase_gate": "scalar", "write_gate": "scalar"}]
)
@pytest.mark.parametrize("targets", [USUAL, USUAL + OF_THE_MEMORY, "all-linear"], ids=["usual", "memory", "all-linear"])
def test_every_projection_that_is_named_gets_an_adapter_and_only_adapters_learn(targets, structure, pattern):
    model, plain = adapted(targets, structure, pattern)
    wanted = USUAL + OF_THE_MEMORY + LOW if targets == "all-linear" else targets
    there = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    assert reached(model) == {name for name in there if name.split(".")[-1] in wanted}
    moved, gradients = step(model)
    for name, far in moved.items():
        assert (far > 0) == ("lora_" in name), name
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients.values())


@patterns
@torch.no_grad()
def test_merged_weights_give_the_logits_of_the_adapted_model_and_the_adapter_comes_back_from_disk(pattern, tmp_path):
    model, plain = adapted(USUAL + OF_THE_MEMORY, pattern=pattern)
    model.eval()
    ids = tokens(2, 20)
    expected = model(ids).logits
    assert (expected - plain(ids).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=0)
    merged = model.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in plain.named_parameters()}
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None),
                       again.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0,
                                      eos_token_id=None))  # fmt: skip


def test_checkpointed_blocks_give_the_adapters_the_same_gradients():
    model, _ = adapted(USUAL + OF_THE_MEMORY)
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable()
    _, expected = step(model)
    _, actual = step(checkpointed)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=list(USUAL), use_dora=True),
        peft.IA3Config(target_modules=[*USUAL], feedforward_modules=["down_proj"]),
    ],
    ids=["DoRA", "IA3"],
)
def test_other_adapters_that_go_by_these_names_learn_alone(config):
    theirs, _ = pair()
    moved, gradients = step(peft.get_peft_model(theirs, config))
    assert all((far == 0) or ("lora_" in name or "ia3_" in name) for name, far in moved.items())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
