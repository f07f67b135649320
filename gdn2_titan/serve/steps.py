"""A GDN-2 layer's way through one step of an engine: sequences that go on by a token, and pieces of prompts.

n tokens of several sequences lie end to end: first one token each of D sequences that go on (decodes), then pieces of P
sequences (prefills), then padding. States lie in pools, a block for each sequence. Knows nothing of vLLM.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gdn2_titan.models import GatedDeltaNet2
from gdn2_titan.ops import causal_conv1d_qkv, causal_conv1d_qkv_, chunk_gdn2, recurrent_gdn2_

__all__ = ["Pools", "Step", "mix"]


class Pools(NamedTuple):
    """States of all sequences, block by block. Blocks are contiguous and may lie apart."""

    memory: Tensor  # [blocks, HV, K, V] fp32
    q_conv: Tensor  # [blocks, H * K, conv_size - 1]
    k_conv: Tensor  # [blocks, H * K, conv_size - 1]
    v_conv: Tensor  # [blocks, HV * V, conv_size - 1]


class Step(Protocol):
    """What a layer is told; the names are vLLM's."""

    num_decodes: int  # D, one token each
    num_prefills: int  # P
    num_prefill_tokens: int
    state_indices_tensor_d: Tensor | None  # int32 [D, 1], a decode's block, -1 for padding
    state_indices_tensor_p: Tensor | None  # int32 [P]
    has_initial_states_p: Tensor | None  # bool [P], False where a prompt begins, whatever its block holds
    query_start_loc_p: Tensor | None  # int32 [P + 1], bounds of the pieces, from 0


def mix(
    layer: GatedDeltaNet2, q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, write: Tensor,
    pools: Pools | None, step: Step | None, out: Tensor,
) -> None:  # fmt: skip
    """Short convolutions and operator over the tokens of a step; the states of its sequences move on.

    Args:
        layer: whose convolutions and options these are.
        q, k, v: projections of x [n, H * K], [n, H * K] and [n, HV * V].
        g, erase, write: ``layer.gate_inputs`` of x [n, D].
        pools, step: None to go through all tokens as one sequence without a state, as vLLM measures memory.
        out: [n, HV, V], overwritten with what the operator gives; what is padding is left as it is.
    """
    convolutions = [conv1d.weight for conv1d in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)]
    tensors = q, k, v, g, erase, write
    if step is None or pools is None:
        _prefill(layer, convolutions, tensors, None, None, None, None, out)
        return
    decodes, end = step.num_decodes, step.num_decodes + step.num_prefill_tokens
    if decodes:
        blocks = step.state_indices_tensor_d[:, 0]
        _decode(layer, convolutions, [x[:decodes] for x in tensors], pools, blocks, out[:decodes])
    if step.num_prefills:
        of_prompts = [x[decodes:end] for x in tensors]
        blocks, goes_on, bounds = step.state_indices_tensor_p, step.has_initial_states_p, step.query_start_loc_p
        _prefill(layer, convolutions, of_prompts, pools, blocks, goes_on, bounds, out[decodes:end])


def _decode(layer, convolutions, tensors, pools, blocks, out):
    """A token for each sequence, in place on the pools: nothing is gathered, and no value read on the host."""
    q, k, v, *gates = (x.unsqueeze(1) for x in tensors)  # [D, 1, ...]
    states = pools.q_conv, pools.k_conv, pools.v_conv
    backend = layer.q_conv1d.backend
    q, k, v = causal_conv1d_qkv_(q, k, v, *convolutions, *states, "silu", state_indices=blocks, backend=backend)
    inputs, options = _operands(layer, q, k, v, gates)
    out.copy_(recurrent_gdn2_(*inputs, pools.memory, state_indices=blocks, **options)[:, 0])


def _prefill(layer, convolutions, tensors, pools, blocks, goes_on, bounds, out):
    """All pieces in one call of each operator. A piece may be shorter than a convolution is wide."""
    q, k, v, *gates = (x.unsqueeze(0) for x in tensors)  # [1, tokens, ...]
    memory, *tails = (None,) * 4 if pools is None else (_entering(pool, blocks, goes_on) for pool in pools)
    q, k, v, tails = causal_conv1d_qkv(
        q, k, v, *convolutions, "silu", *tails, output_final_state=pools is not None, cu_seqlens=bounds,
        backend=layer.q_conv1d.backend,
    )  # fmt: skip
    inputs, options = _operands(layer, q, k, v, gates)
    o, memory = chunk_gdn2(
        *inputs, initial_state=memory, output_final_state=pools is not None, cu_seqlens=bounds, **options
    )
    out.copy_(o[0])
    if pools is not None:
        for pool, state in zip(pools, (memory, *tails), strict=True):
            pool.index_copy_(0, blocks.long(), state)


def _entering(pool, blocks, goes_on):
    """The states that pieces start from [P, ...]: zeros where a prompt begins. A block may hold anything then, the
    state of an earlier sequence or no number, so it is not multiplied by zero."""
    state = pool.index_select(0, blocks.long())
    return torch.where(goes_on.view(-1, *(1,) * (state.ndim - 1)), state, 0)


def _operands(layer, q, k, v, gates):
    q, k = (x.unflatten(-1, (-1, layer.head_dim)) for x in (q, k))
    v = v.unflatten(-1, (-1, layer.head_v_dim))
    g, erase, write = gates
    inputs = q, k, v, g.expand(q.shape), erase.expand(q.shape), write.expand(v.shape)
    return inputs, layer.op_options(q.shape[2])
