"""Parameters and training FLOPs per token in closed form, for MFU."""

from gdn2_titan.ops.gdn2.flops import forward_flops

from .args import GDN2ModelArgs
from .checks import value_head_dim

__all__ = ["flops_per_token", "mixing_flops", "parameter_counts"]


def parameter_counts(model):
    """(all parameters, parameters of the token embedding), counted on the unsharded model."""
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.tok_embeddings.parameters())


def _visible_tokens(length, window):
    """Mean number of tokens that a query sees."""
    window = min(window, length)
    return window - window * (window - 1) / (2 * length)


def mixing_flops(args: GDN2ModelArgs, layer, seq_len):
    """Forward FLOPs per token of what a layer's mixer multiplies by itself: the op, or attention."""
    kind = args.mixer(layer)
    if kind == "gdn2":
        v_heads = args.num_v_heads or args.num_heads
        value_dim = v_heads // args.num_heads * value_head_dim(args.head_dim, args.expand_v)
        return forward_flops(1, args.num_heads, args.head_dim, value_dim)
    return 4 * args.hidden_size * _visible_tokens(seq_len, args.window if kind == "swa" else seq_len)


def flops_per_token(args: GDN2ModelArgs, nparams, nparams_embedding, seq_len):
    """Forward and backward, six per parameter that multiplies, plus three times the mixers' own products.

    What activation checkpointing and the op's backward compute again is not counted, as MFU has it.
    """
    mixing = sum(mixing_flops(args, layer, seq_len) for layer in range(args.n_layers))
    return int(6 * (nparams - nparams_embedding) + 3 * mixing)
