"""Parameters and training FLOPs per token in closed form, for MFU."""

from gdn2_titan.ops.flops import forward_flops

from .args import GDN2ModelArgs

__all__ = ["flops_per_token", "parameter_counts"]


def parameter_counts(model):
    """(all parameters, parameters of the token embedding), counted on the unsharded model."""
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.tok_embeddings.parameters())


def _visible_tokens(length, window):
    """Mean number of tokens that a query sees."""
    window = min(window, length)
    return window - window * (window - 1) / (2 * length)


def flops_per_token(args: GDN2ModelArgs, nparams, nparams_embedding, seq_len):
    """Forward and backward, six per parameter that multiplies, plus three times the mixers' own products.

    What activation checkpointing and the op's backward compute again is not counted, as MFU has it.
    """
    v_heads = args.num_v_heads or args.num_heads
    value_dim = v_heads // args.num_heads * int(args.head_dim * args.expand_v)
    mixing = {
        "gdn2": forward_flops(1, args.num_heads, args.head_dim, value_dim),
        "swa": 4 * args.hidden_size * _visible_tokens(seq_len, args.window),
        "attention": 4 * args.hidden_size * _visible_tokens(seq_len, seq_len),
    }
    return int(
        6 * (nparams - nparams_embedding) + 3 * sum(mixing[args.mixer(i)] for i in range(args.n_layers))
    )  # fmt: skip
