"""The Gated DeltaNet-2 layer (arXiv 2605.22791): projections, short convolutions, gates, the op, the gated norm.

Shapes: B batch, T tokens, D hidden size, H key heads of size K, HV value heads of size V.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gdn2_titan.ops import causal_conv1d, chunk_gdn2, recurrent_gdn2
from gdn2_titan.ops.context_parallel.api import begin_gdn2
from gdn2_titan.ops.context_parallel.tokens import halos
from gdn2_titan.ops.dispatch import BACKENDS
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.gates import log_decay
from gdn2_titan.ops.gdn2.segmented import check_num_segments

from .checks import check_choice, check_count, check_gdn2, check_width, value_head_dim
from .decay import DecayParameters
from .init import fill_
from .old_names import rename_old
from .rows import Rows

__all__ = ["GDN2State", "GatedDeltaNet2", "STATISTICS"]

STATISTICS = (
    "erase_gate_mean", "erase_gate_std", "write_gate_mean", "write_gate_std",
    "half_life_mean", "half_life_std", "state_norm",
)  # fmt: skip
# Slower decays than this (ln 2 / 1e-6 = 693,147 tokens of half-life) are reported as this.
SLOWEST_DECAY = 1e-6


class GDN2State(NamedTuple):
    """What a layer carries from one segment of a sequence to the next."""

    q_conv: Tensor  # [B, H * K, conv_size - 1]
    k_conv: Tensor  # [B, H * K, conv_size - 1]
    v_conv: Tensor  # [B, HV * V, conv_size - 1]
    memory: Tensor  # [B, HV, K, V] fp32


def _of_this_rank(param: Tensor) -> Tensor:
    """What this rank holds of a parameter: under tensor parallelism, the part of its heads."""
    return param.to_local() if isinstance(param, DTensor) else param


class ShortConvolution(nn.Module):
    """Depthwise causal convolution and SiLU over [B, T, channels]. width: 2, 3 or 4; backend: of ``causal_conv1d``."""

    def __init__(self, channels: int, width: int, backend: str = "auto") -> None:
        super().__init__()
        check_count("channels", channels)
        check_width("width", width)
        check_choice("backend", backend, BACKENDS)
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, width))

    def forward(
        self, x: Tensor, resets: Tensor | None = None, state: Tensor | None = None,
        return_state: bool = False, cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return causal_conv1d(
            x, _of_this_rank(self.weight), activation="silu", initial_state=state, output_final_state=return_state,
            resets=resets, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip

    def init_weights(self) -> None:
        bound = self.weight.shape[1] ** -0.5  # as nn.Conv1d: fan-in is the width
        fill_(self.weight, lambda x: nn.init.uniform_(x, -bound, bound))


class GatedDeltaNet2(nn.Module):
    """Gated DeltaNet-2 as a sequence mixer: x [B, T, D] -> [B, T, D].

    Every submodule whose name ends in ``_proj`` is an nn.Linear: q, k, v, erase, write, o, and for decay and output
    gate two low-rank factors, ``decay_low_proj`` (D to V) and ``decay_proj``, ``gate_low_proj`` (D to V) and
    ``gate_proj``. Tied gates have no ``write_proj``, a scalar decay no ``decay_low_proj`` (they are None).

    Args:
        hidden_size, num_heads, head_dim: D, H and K.
        num_v_heads: HV, a multiple of num_heads; None means num_heads.
        expand_v: V / K.
        conv_size: width of the short convolutions, 2 to 4.
        erase_gate, write_gate: "channel" or "scalar" (one per head).
        tied_gates: one scalar per key head is both gates (Kimi Delta Attention).
        decay: "channel" or "scalar" (with tied_gates: Gated DeltaNet).
        allow_neg_eigval: the erase gate spans [0, 2] instead of [0, 1].
        output_gate, norm_eps: "silu" or "sigmoid", times the RMS norm of each value head.
        backend: of the ops and convolutions: "triton", "torch", or "auto", which takes Triton's kernels on a GPU that
            they can serve; or "reference", the op token by token and PyTorch's convolutions.
        num_segments: of :func:`gdn2_titan.ops.chunk_gdn2`, also an attribute: "auto", or into how many segments every
            sequence is cut, on a CPU too. Where ranks share a sequence they have its segments, and it has no effect.

    Whatever dtype the layer is cast to, or built in, A_log and dt_bias stay in fp32 at least (see
    ``decay.DecayParameters``); x has the dtype of the projections. FSDP2 wants one dtype in a unit: a layer that was
    cast to 16 bits is sharded after ``parallel.shard_decays``.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, num_v_heads: int | None = None, expand_v: float = 1.0,
        conv_size: int = 4, erase_gate: str = "channel", write_gate: str = "channel", tied_gates: bool = False,
        decay: str = "channel", allow_neg_eigval: bool = False, output_gate: str = "silu", norm_eps: float = 1e-5,
        backend: str = "auto", num_segments: int | str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        check_count("hidden_size", hidden_size)
        check_gdn2(
            num_heads, head_dim, num_v_heads, expand_v, conv_size, erase_gate, write_gate, tied_gates, decay,
            allow_neg_eigval, output_gate, norm_eps, backend,
        )  # fmt: skip
        check_num_segments(num_segments)
        self.backend, self.num_segments = backend, num_segments
        self.head_dim, self.head_v_dim = head_dim, value_head_dim(head_dim, expand_v)
        self.erase_scale = 2.0 if allow_neg_eigval else 1.0
        self.tied_gates = tied_gates
        self.norm_eps = norm_eps
        self.output_gate = {"silu": F.silu, "sigmoid": torch.sigmoid}[output_gate]
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        key_size, value_size = num_heads * head_dim, num_v_heads * self.head_v_dim

        linear = functools.partial(nn.Linear, bias=False)
        self.q_proj = linear(hidden_size, key_size)
        self.k_proj = linear(hidden_size, key_size)
        self.v_proj = linear(hidden_size, value_size)
        conv_backend = "torch" if backend == "reference" else backend
        self.q_conv1d = ShortConvolution(key_size, conv_size, conv_backend)
        self.k_conv1d = ShortConvolution(key_size, conv_size, conv_backend)
        self.v_conv1d = ShortConvolution(value_size, conv_size, conv_backend)
        if decay == "channel":
            self.decay_low_proj = linear(hidden_size, self.head_v_dim)
            self.decay_proj = linear(self.head_v_dim, key_size)
        else:
            self.decay_low_proj, self.decay_proj = None, linear(hidden_size, num_heads)
        self.decay = DecayParameters(num_heads, head_dim if decay == "channel" else 1)
        if tied_gates:
            self.erase_proj, self.write_proj = linear(hidden_size, num_heads), None
        else:
            self.erase_proj = linear(hidden_size, key_size if erase_gate == "channel" else num_heads)
            self.write_proj = linear(hidden_size, value_size if write_gate == "channel" else num_v_heads)
        self.gate_low_proj = linear(hidden_size, self.head_v_dim)
        self.gate_proj = linear(self.head_v_dim, value_size, bias=True)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=norm_eps)
        self.o_proj = linear(value_size, hidden_size)
        # A SequenceShards where ranks share a sequence (context parallelism); T is then what this rank has of it.
        self.shards = None
        # Telemetry: filled in forward while ``record_statistics`` is set, in the order of STATISTICS.
        self.record_statistics = False
        self.register_buffer("statistics", torch.zeros(len(STATISTICS)), persistent=False)
        self.register_load_state_dict_pre_hook(rename_old)
        self.init_weights()  # so that the layer alone, in anybody's model, starts as it should

    def forward(
        self, x: Tensor, resets: Tensor | None = None, *, state: GDN2State | None = None,
        return_state: bool = False, rows: Rows | None = None,
    ) -> Tensor | tuple[Tensor, GDN2State]:  # fmt: skip
        """x [B, T, D], resets bool [B, T] or None -> [B, T, D], or ([B, T, D], GDN2State) with ``return_state``.

        state: the GDN2State of the segment before. One token with a state takes the recurrent op, all else the chunked.
        rows: a Rows where x is [1, N, D], rows of unequal lengths end to end; it tells where documents begin.

        Raises:
            ValueError: a state or rows are given, or a state is asked for, where ranks share the sequence.
        """
        K, V = self.head_dim, self.head_v_dim
        cu_seqlens = None if rows is None else rows.cu_seqlens
        if rows is not None and state is not None:
            state = GDN2State(*map(rows.of_documents, state))
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.shards is None:
            q_conv, k_conv, v_conv, memory = state if state is not None else (None,) * 4
            q, q_conv = self.q_conv1d(q, resets, q_conv, return_state, cu_seqlens)
            k, k_conv = self.k_conv1d(k, resets, k_conv, return_state, cu_seqlens)
            v, v_conv = self.v_conv1d(v, resets, v_conv, return_state, cu_seqlens)
        else:
            self.shards.refuse_states(state, return_state)
            self.shards.refuse_rows(rows)
            # Over this rank's segments as rows of the batch, with one exchange for all three.
            past = halos([q, k, v], self.shards, self.q_conv1d.weight.shape[1], resets)
            convolutions = self.q_conv1d, self.k_conv1d, self.v_conv1d
            q, k, v = (
                conv1d(self.shards.rows(t), self.shards.rows(resets), before)[0].view(t.shape)
                for conv1d, t, before in zip(convolutions, (q, k, v), past, strict=True)
            )
        # Heads are counted from the tensors: under tensor parallelism a rank holds some of them.
        q, k, v = (t.unflatten(-1, (-1, size)) for t, size in ((q, K), (k, K), (v, V)))
        low = x if self.decay_low_proj is None else self.decay_low_proj(x)
        g = self.decay_proj(low).unflatten(-1, (q.shape[2], -1))
        A_log, dt_bias = _of_this_rank(self.decay.A_log), _of_this_rank(self.decay.dt_bias)
        erase = self.erase_proj(x).unflatten(-1, (q.shape[2], -1))
        if self.tied_gates:
            write = erase.repeat_interleave(v.shape[2] // q.shape[2], dim=2)
        else:
            write = self.write_proj(x).unflatten(-1, (v.shape[2], -1))
        inputs = q, k, v, g.expand(q.shape), erase.expand(q.shape), write.expand(v.shape)
        biases = dt_bias.expand(q.shape[2:])
        keep_memory = return_state or self.record_statistics
        if self.shards is None:
            step = x.shape[1] == 1 and state is not None
            op = recurrent_gdn2 if step else functools.partial(chunk_gdn2, num_segments=self.num_segments)
            o, memory = op(
                *inputs, initial_state=memory, output_final_state=keep_memory, use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True, A_log=A_log, dt_bias=biases, use_sigmoid_in_kernel=True,
                erase_scale=self.erase_scale, resets=resets, cu_seqlens=cu_seqlens, backend=self.backend,
            )  # fmt: skip
            gate = self.gate_proj(self.gate_low_proj(x))
        else:
            options = GDN2Options(None, True, True, True, self.erase_scale, self.backend)
            inputs = GDN2Inputs(*inputs, A_log, biases, resets=resets)
            finish = begin_gdn2(inputs, options, self.shards, keep_memory)
            gate = self.gate_proj(self.gate_low_proj(x))  # while what the ranks know of their segments is under way
            o, memory = finish()
        if self.record_statistics:
            self._record(g, erase, write, A_log, dt_bias, memory)
        o = self.o_norm(o) * self.output_gate(gate.unflatten(-1, (-1, V)))
        y = self.o_proj(o.flatten(2))
        if not return_state:
            return y
        state = GDN2State(q_conv, k_conv, v_conv, memory)
        return y, state if rows is None else GDN2State(*map(rows.of_rows, state))

    @torch.no_grad()
    def _record(self, g, erase, write, A_log, dt_bias, memory):
        erase = self.erase_scale * erase.float().sigmoid()
        write = write.float().sigmoid()
        rate = -log_decay(g.float(), A_log, dt_bias).mean((0, 1))  # [H, K or 1] nats per token
        half_life = math.log(2) / rate.clamp_min(SLOWEST_DECAY)
        state_norm = memory.square().sum((2, 3)).sqrt().mean()  # Frobenius, mean over sequences and heads
        pairs = [erase.mean(), erase.std(), write.mean(), write.std(), half_life.mean(), half_life.std(correction=0)]
        self.statistics.copy_(torch.stack([*pairs, state_norm.float()]))

    def init_weights(
        self, output_scale: float = 1.0, gain: float = 2**-2.5, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        """Xavier-uniform with ``gain`` for every projection, the output projection scaled by depth on top."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                scaled = gain * (output_scale if module is self.o_proj else 1.0)
                fill_(module.weight, functools.partial(nn.init.xavier_uniform_, gain=scaled))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ShortConvolution):
                module.init_weights()
            elif isinstance(module, DecayParameters):
                module.init_weights(dt_min, dt_max)
        nn.init.ones_(self.o_norm.weight)
        self.statistics.zero_()
