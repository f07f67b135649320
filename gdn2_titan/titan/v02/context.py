"""Resets dealt out to the ranks of context parallelism as tokens are."""

import functools

import torch
from torchtitan.distributed import context_parallel

__all__ = ["deal_out_resets"]


def deal_out_resets():
    """Let TorchTitan deal out masks that are tensors [B, T], which is how our resets travel, as it does tokens: it
    fails on anything but masks of flex attention. Once per process; again is harmless."""
    stock = context_parallel.cp_shard
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def cp_shard(cp_mesh, inputs, attention_masks, load_balancer_type="headtail", input_seq_dim=1):
        balancer = None if load_balancer_type == "none" else load_balancer_type
        if not isinstance(attention_masks, torch.Tensor):
            return stock(cp_mesh, inputs, attention_masks, balancer, input_seq_dim)
        (*inputs, masks), _ = stock(cp_mesh, (*inputs, attention_masks), None, balancer, input_seq_dim)
        return tuple(inputs), masks

    context_parallel.cp_shard = cp_shard
