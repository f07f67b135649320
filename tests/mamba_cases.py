"""Small models with Mamba layers, in fp64, with weights that all matter; a batch, its loss and its gradients."""

import torch

from gdn2_titan.models import GDN2Model, GDN2ModelArgs

FP64 = torch.float64
SIZES = dict(
    vocab_size=50, hidden_size=32, n_layers=2, mlp_size=48, mamba_heads=4, mamba_head_dim=6, mamba_state=8,
    attn_heads=4, window=8,
)  # fmt: skip
MODELS = {
    "mamba2": GDN2ModelArgs(**SIZES, layer_pattern=("mamba2", "swa")),
    "mamba3": GDN2ModelArgs(**SIZES, layer_pattern=("mamba3", "swa")),
    "mamba3 MIMO": GDN2ModelArgs(**SIZES, layer_pattern=("mamba3", "mamba2"), mamba_rank=3),
}


def some_resets(B, T):
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, 31] = resets[-1, 66] = resets[-1, 68] = True
    return resets


def model(kind, dtype=FP64):
    torch.manual_seed(0)
    built = GDN2Model(MODELS[kind])
    built.init_weights()
    for name, p in built.named_parameters():
        if "norm" not in name and "decay." not in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3)
    return built.to(dtype)


def batch(B=2, T=48):
    tokens = torch.randint(50, (B, T + 1), generator=torch.Generator().manual_seed(1))
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, 5] = resets[0, 24] = resets[-1, 25] = True
    return tokens, resets


def loss(built, tokens, targets, resets):
    logits = built(tokens, resets).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")


def gradients(built):
    return {name: p.grad for name, p in built.named_parameters()}
