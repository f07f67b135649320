"""What a model costs, in closed form: parameters, training FLOPs per token, and bytes of state."""

from torch import nn

from gdn2_titan.ops.gdn2.flops import CHUNK, forward_flops

from .args import SOFTMAX, GDN2ModelArgs
from .checks import value_head_dim
from .content import RANK
from .mamba2 import WIDTH

__all__ = ["flops_per_token", "mixing_flops", "parameter_counts", "state_bytes"]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all parameters, parameters of the token embedding), counted on the unsharded model."""
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.tok_embeddings.parameters())


def mixing_flops(args: GDN2ModelArgs, layer: int, seq_len: int) -> float:
    """Forward FLOPs per token of what a layer's mixer multiplies by itself: the op, or attention."""
    kind = args.mixer(layer)
    if kind == "gdn2":
        value_heads = (args.num_v_heads or args.num_heads) // args.num_heads  # of a key head
        value_dim = value_heads * value_head_dim(args.head_dim, args.expand_v)
        return forward_flops(1, args.num_heads, args.head_dim, value_dim)
    if kind == "mamba2":
        return forward_flops(1, args.mamba_heads, args.mamba_state, args.mamba_head_dim, erases=False)
    if kind == "mamba3":
        sizes, rank = (args.mamba_heads, args.mamba_state, args.mamba_head_dim), args.mamba_rank
        within = 2 * args.mamba_heads * rank * rank * (args.mamba_state + args.mamba_head_dim)  # of a token
        return forward_flops(rank, *sizes, erases=False) + within
    window = min(args.window, seq_len) if kind == "swa" else seq_len
    seen = window - window * (window - 1) / (2 * seq_len)  # tokens that a query sees, on average
    return 4 * args.hidden_size * seen


def _content_parameters(args):
    """Of a layer's content gate."""
    value_heads, value_dim = args.num_v_heads or args.num_heads, value_head_dim(args.head_dim, args.expand_v)
    channels = args.num_heads * (1 if args.erase_gate == "scalar" else args.head_dim)
    return RANK * (value_heads * value_dim + channels)


def flops_per_token(args: GDN2ModelArgs, nparams: int, nparams_embedding: int, seq_len: int) -> int:
    """Forward and backward, six per parameter that multiplies, plus three times the mixers' own products. A content
    gate multiplies once a chunk.

    What activation checkpointing and the op's backward compute again is not counted, as MFU has it.
    """
    mixing = sum(mixing_flops(args, layer, seq_len) for layer in range(args.n_layers))
    multiplied = nparams - nparams_embedding
    if args.content_gate:
        layers = sum(args.mixer(layer) == "gdn2" for layer in range(args.n_layers))
        multiplied -= layers * _content_parameters(args) * (1 - 1 / CHUNK)
    return int(6 * multiplied + 3 * mixing)


def state_bytes(args: GDN2ModelArgs, tokens: int, itemsize: int = 4) -> int:
    """Bytes that all layers keep of one sequence of ``tokens`` tokens to read on from there.

    GDN-2 and Mamba-2: the memory [HV, K, V] in fp32 and the last tokens under the short convolutions, with a content
    gate also two sums of outputs [HV, V] in fp32 and a count of 8 bytes; Mamba-3: the memory, and keys, values and
    angles of the last token; softmax: keys and values, in a window those that the next token can see. itemsize: bytes
    of an activation.
    """
    return sum(_layer_bytes(args, args.mixer(layer), tokens, itemsize) for layer in range(args.n_layers))


def _layer_bytes(args: GDN2ModelArgs, kind: str, tokens: int, itemsize: int) -> int:
    if kind == "mamba2":
        inner, state = args.mamba_heads * args.mamba_head_dim, args.mamba_state
        return 4 * inner * state + (WIDTH - 1) * (inner + 2 * state) * itemsize
    if kind == "mamba3":
        heads, P, N = args.mamba_heads, args.mamba_head_dim, args.mamba_state
        return heads * (4 * N * P + args.mamba_rank * (N + P) * itemsize + N)  # an angle of 4 bytes for 4 channels
    if kind in SOFTMAX:
        kept = tokens if kind == "attention" else min(tokens, args.window - 1)
        return 2 * (args.attn_kv_heads or args.attn_heads) * (args.hidden_size // args.attn_heads) * kept * itemsize
    value_heads, value_dim = args.num_v_heads or args.num_heads, value_head_dim(args.head_dim, args.expand_v)
    channels = 2 * args.num_heads * args.head_dim + value_heads * value_dim
    read = 8 * value_heads * value_dim + 8 if args.content_gate else 0
    return 4 * value_heads * args.head_dim * value_dim + (args.conv_size - 1) * channels * itemsize + read
