"""What a model keeps of a sequence that it has read, in bytes."""

from .args import GDN2ModelArgs
from .checks import value_head_dim

__all__ = ["state_bytes"]


def state_bytes(args: GDN2ModelArgs, tokens, itemsize=4):
    """Bytes that all layers keep of one sequence of ``tokens`` tokens to read on from there.

    GDN-2: the memory [HV, K, V] in fp32 and the last tokens under the short convolutions; softmax: keys and values, in
    a window those that the next token can see. itemsize: bytes of an activation.
    """
    return sum(_layer_bytes(args, args.mixer(layer), tokens, itemsize) for layer in range(args.n_layers))


def _layer_bytes(args, kind, tokens, itemsize):
    if kind != "gdn2":
        kept = tokens if kind == "attention" else min(tokens, args.window - 1)
        return 2 * (args.attn_kv_heads or args.attn_heads) * (args.hidden_size // args.attn_heads) * kept * itemsize
    value_heads, value_dim = args.num_v_heads or args.num_heads, value_head_dim(args.head_dim, args.expand_v)
    channels = 2 * args.num_heads * args.head_dim + value_heads * value_dim
    return 4 * value_heads * args.head_dim * value_dim + (args.conv_size - 1) * channels * itemsize
