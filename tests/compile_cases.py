"""A small decoder, its batches, and one step of training it: what compiled or checkpointed models are compared by."""

import torch

from gdn2_titan.models import GDN2Model, GDN2ModelArgs

KINDS = ("gdn2", "swa", "attention")
VOCABULARY, WINDOW = 50, 8


def build(*pattern, repeats=1):
    torch.manual_seed(0)
    args = GDN2ModelArgs(
        vocab_size=VOCABULARY, hidden_size=32, n_layers=repeats * len(pattern), mlp_size=48, num_heads=2, head_dim=8,
        attn_heads=2, window=WINDOW, layer_pattern=pattern,
    )  # fmt: skip
    model = GDN2Model(args)
    model.init_weights()
    return model


def batch(B, T, documents=True):
    generator = torch.Generator().manual_seed(B * T)
    tokens = torch.randint(VOCABULARY, (B, T), generator=generator)
    return tokens, (torch.rand(B, T, generator=generator) < 0.1) if documents else None


def loss(model, tokens, resets):
    logits = model(tokens, resets)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model):
    """By the names in the state dict: torch's checkpoint_wrapper puts a name of its own before those of parameters."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}


def step(model, *inputs):
    model.zero_grad()
    value = loss(model, *inputs)
    value.backward()
    return {"loss": value.detach()} | gradients(model)


def assert_same(found, expected, tolerance=2e-5):
    assert set(found) == set(expected)
    for name, want in expected.items():
        error = (found[name] - want).abs().max() / want.abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e}"
