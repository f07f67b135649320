"""A model, a batch and a loss that ranks under FSDP2 share, and one process has whole."""

import torch

from gdn2_titan.models import GDN2Model, GDN2ModelArgs

__all__ = ["ARGS", "WORLD", "assert_near", "batch", "build", "loss"]

ARGS = GDN2ModelArgs(
    vocab_size=50, hidden_size=32, n_layers=2, mlp_size=64, num_heads=2, head_dim=16, attn_heads=2, window=8,
    layer_pattern=("gdn2", "swa"),
)  # fmt: skip
WORLD = 2


def build(device="meta"):
    with torch.device(device):
        return GDN2Model(ARGS)


def batch():
    tokens = torch.randint(0, 50, (WORLD, 41), generator=torch.Generator().manual_seed(1))
    resets = torch.zeros(WORLD, 40, dtype=torch.bool)
    resets[:, 17] = True
    return tokens, resets


def loss(model, tokens, resets):
    logits = model(tokens[:, :-1], resets)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def assert_near(name, found, expected):
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"{name} is off by {error:.1e}"
