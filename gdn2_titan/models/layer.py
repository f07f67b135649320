"""The Gated DeltaNet-2 layer (arXiv 2605.22791): projections, short convolutions, gates, the op, the gated norm.

Shapes: B batch, T tokens, D hidden size, H key heads of size K, HV value heads of size V.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn2_titan.ops import (
    causal_conv1d,
    causal_conv1d_qkv,
    causal_conv1d_qkv_,
    chunk_gdn2,
    recurrent_gdn2,
    recurrent_gdn2_,
)
from gdn2_titan.ops.context_parallel.api import begin_gdn2
from gdn2_titan.ops.context_parallel.tokens import halos
from gdn2_titan.ops.dispatch import BACKENDS
from gdn2_titan.ops.elementwise import BATCH_INVARIANT
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.gates import log_decay
from gdn2_titan.ops.gdn2.segmented import check_num_segments

from .batch_invariant import linear_of, sigmoid_of, silu_of
from .checks import check_choice, check_count, check_gdn2, check_width, rank_of, value_head_dim
from .content import ContentGate, Reading, mix_documents, mix_windows
from .decay import DecayParameters
from .init import fill_
from .old_names import rename_old
from .rows import Rows
from .this_rank import of_this_rank

__all__ = ["GDN2ContentState", "GDN2State", "GatedDeltaNet2", "STATISTICS"]

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


class GDN2ContentState(NamedTuple):
    """The same of a layer with a content gate; the last four are a ``content.Reading``."""

    q_conv: Tensor  # [B, H * K, conv_size - 1]
    k_conv: Tensor  # [B, H * K, conv_size - 1]
    v_conv: Tensor  # [B, HV * V, conv_size - 1]
    memory: Tensor  # [B, HV, K, V] fp32
    total: Tensor  # [B, HV, V] fp32
    mean: Tensor  # [B, HV, V] fp32
    count: Tensor  # int64 [B]


def _through(low: nn.Module | None, last: nn.Module, x: Tensor) -> Tensor:
    """x by two factors, or one."""
    return last(x if low is None else low(x))


class ShortConvolution(nn.Module):
    """Depthwise causal convolution and SiLU over [B, T, channels]. width: 2, 3 or 4; backend: of ``causal_conv1d``."""

    def __init__(self, channels: int, width: int, backend: str = "auto") -> None:
        super().__init__()
        check_count("channels", channels)
        check_width("width", width)
        check_choice("backend", backend, (*BACKENDS, BATCH_INVARIANT))
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, width))

    def forward(self, x: Tensor) -> Tensor:
        """One of the three by itself, over whole sequences; the layer has all three in one operator."""
        return causal_conv1d(x, of_this_rank(self.weight), activation="silu", backend=self.backend)[0]

    def init_weights(self) -> None:
        bound = self.weight.shape[1] ** -0.5  # as nn.Conv1d: fan-in is the width
        fill_(self.weight, lambda x: nn.init.uniform_(x, -bound, bound))


class GatedDeltaNet2(nn.Module):
    """Gated DeltaNet-2 as a sequence mixer: x [B, T, D] -> [B, T, D].

    Every submodule whose name ends in ``_proj`` is an nn.Linear: q, k, v, erase, write, o, and for decay and output
    gate two factors, ``decay_low_proj`` (D to decay_rank) and ``decay_proj``, ``gate_low_proj`` (D to gate_rank) and
    ``gate_proj``. Tied gates have no ``write_proj``, full rank and a scalar decay no ``_low_proj``, and without a decay
    there is no ``decay`` either (they are None).

    Args:
        hidden_size, num_heads, head_dim: D, H and K.
        num_v_heads: HV, a multiple of num_heads; None means num_heads.
        expand_v: V / K.
        conv_size: width of the short convolutions, 2 to 4.
        erase_gate, write_gate: "channel", "scalar" (one per head), or "mean": as "channel", the gates then averaged
            over the channels of a head (the ablation of arXiv 2605.22791).
        tied_gates: one scalar per key head is both gates (Kimi Delta Attention).
        decay: "channel", "scalar" (with tied_gates: Gated DeltaNet) or "none" (with tied_gates: DeltaNet).
        allow_neg_eigval: the erase gate spans [0, 2] instead of [0, 1].
        output_gate, norm_eps: "silu" or "sigmoid", times the RMS norm of each value head.
        backend: of the ops and convolutions: "triton", "torch", or "auto", which takes Triton's kernels on a GPU that
            they can serve; "reference", the op token by token and PyTorch's convolutions; or "batch_invariant", on the
            CPU: a row's outputs are the same bit for bit whatever else is in the batch, in one call or token by token.
        num_segments: of :func:`gdn2_titan.ops.chunk_gdn2`, also an attribute: "auto", or into how many segments every
            sequence is cut, on a CPU too. Where ranks share a sequence they have its segments, and it has no effect.
        lower_bound: None, or a number less than 0 that bounds the decay, see :func:`gdn2_titan.ops.chunk_gdn2`.
        decay_rank, gate_rank: inner size of the projections to the decay and to the output gate; "head", the value
            size of a head; or None (also "full"), one matrix. The bias is that of ``gate_proj`` in any case.
        content_gate: the erase gate also knows what the layer read in the chunk before, see ``content``: one part more,
            ``content``. Not with tied or averaged gates, backend "batch_invariant", segments, or a shared sequence.

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
        backend: str = "auto", num_segments: int | str = "auto", lower_bound: float | None = None,
        decay_rank: int | str | None = "head", gate_rank: int | str | None = "head", content_gate: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_count("hidden_size", hidden_size)
        check_gdn2(
            num_heads, head_dim, num_v_heads, expand_v, conv_size, erase_gate, write_gate, tied_gates, decay,
            allow_neg_eigval, output_gate, norm_eps, backend, lower_bound, decay_rank, gate_rank, content_gate,
        )  # fmt: skip
        check_num_segments(num_segments)
        self.backend, self.num_segments = backend, num_segments
        self.head_dim, self.head_v_dim = head_dim, value_head_dim(head_dim, expand_v)
        self.erase_scale = 2.0 if allow_neg_eigval else 1.0
        self.tied_gates, self.lower_bound = tied_gates, lower_bound
        self.mean_gates = erase_gate == "mean", write_gate == "mean"
        self.norm_eps = norm_eps
        self.output_gate = {"silu": silu_of, "sigmoid": sigmoid_of}[output_gate](backend)
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        key_size, value_size = num_heads * head_dim, num_v_heads * self.head_v_dim

        linear = functools.partial(linear_of(backend), bias=False)
        self.q_proj = linear(hidden_size, key_size)
        self.k_proj = linear(hidden_size, key_size)
        self.v_proj = linear(hidden_size, value_size)
        conv_backend = "torch" if backend == "reference" else backend
        self.q_conv1d = ShortConvolution(key_size, conv_size, conv_backend)
        self.k_conv1d = ShortConvolution(key_size, conv_size, conv_backend)
        self.v_conv1d = ShortConvolution(value_size, conv_size, conv_backend)
        self.decay_low_proj = self.decay_proj = self.decay = None
        if decay != "none":
            rank = rank_of("decay_rank", decay_rank, self.head_v_dim) if decay == "channel" else None
            self.decay_low_proj = None if rank is None else linear(hidden_size, rank)
            self.decay_proj = linear(rank or hidden_size, key_size if decay == "channel" else num_heads)
            self.decay = DecayParameters(num_heads, head_dim if decay == "channel" else 1, lower_bound is not None)
        if tied_gates:
            self.erase_proj, self.write_proj = linear(hidden_size, num_heads), None
        else:
            self.erase_proj = linear(hidden_size, num_heads if erase_gate == "scalar" else key_size)
            self.write_proj = linear(hidden_size, num_v_heads if write_gate == "scalar" else value_size)
        self.content = None
        if content_gate:
            channels = 1 if erase_gate == "scalar" else head_dim
            self.content = ContentGate(num_heads, channels, num_v_heads // num_heads * self.head_v_dim)
            self._check_one_piece()
        rank = rank_of("gate_rank", gate_rank, self.head_v_dim)
        self.gate_low_proj = None if rank is None else linear(hidden_size, rank)
        self.gate_proj = linear(rank or hidden_size, value_size, bias=True)
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
        self, x: Tensor, resets: Tensor | None = None, *, state: GDN2State | GDN2ContentState | None = None,
        return_state: bool = False, rows: Rows | None = None, in_place: bool = False,
        record: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, GDN2State | GDN2ContentState]:  # fmt: skip
        """x [B, T, D], resets bool [B, T] or None -> [B, T, D], or ([B, T, D], GDN2State) with ``return_state``; with a
        content gate it is a GDN2ContentState.

        state: that of the segment before. One token with a state takes the recurrent op, all else the chunked.
        rows: a Rows where x is [1, N, D], rows of unequal lengths end to end; it tells where documents begin.
        in_place: one token without rows overwrites the state that it is given, and returns it; without gradients. With
            a content gate it returns a new one.
        record: a list that gets what ``state_after`` takes.

        Raises:
            ValueError: where ranks share the sequence a state or rows are given, a state is asked for, or there is a
                content gate; with a content gate ``num_segments`` says more than one.
        """
        K, V = self.head_dim, self.head_v_dim
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        # Heads are counted from the tensors: under tensor parallelism a rank holds some of them.
        heads, v_heads = q.shape[-1] // K, v.shape[-1] // V
        if self.shards is None:
            g, erase, write = self.gate_inputs(x, heads, v_heads)
            inputs = q, k, v, g, erase, write
            if record is not None:
                record.extend(inputs)
            keep = return_state or self.record_statistics
            o, state, erase = self._mix(inputs, resets, state, rows, keep, in_place)
            gate = _through(self.gate_low_proj, self.gate_proj, x)
        else:
            self.shards.refuse_states(state, return_state)
            self.shards.refuse_rows(rows)
            if self.content is not None:
                raise ValueError("content_gate is True; where ranks share the sequence it must be False")
            # Over this rank's segments as rows of the batch, with one exchange for all three.
            past = halos([q, k, v], self.shards, self.q_conv1d.weight.shape[1], resets)
            segments = [self.shards.rows(t) for t in (q, k, v)]
            convolved = self._convolve(*segments, self.shards.rows(resets), past)[:3]
            q, k, v = (t.view(whole.shape) for t, whole in zip(convolved, (q, k, v), strict=True))
            g, erase, write = self.gate_inputs(x, heads, v_heads)
            inputs, options = self._operands(q, k, v, g, erase, write)
            raw, erase_scale = options["use_sigmoid_in_kernel"], options["erase_scale"]
            inputs = GDN2Inputs(*inputs, options["A_log"], options["dt_bias"], resets=resets)
            options = GDN2Options(
                None, True, options["use_gate_in_kernel"], raw, erase_scale, self.backend, self.lower_bound
            )
            finish = begin_gdn2(inputs, options, self.shards, self.record_statistics)
            # While what the ranks know of their segments is under way.
            gate = _through(self.gate_low_proj, self.gate_proj, x)
            o, memory = finish()
        if self.record_statistics:
            self._record(g, erase, write, memory if state is None else state.memory)
        y = self.output(o, gate)
        if not return_state:
            return y
        return y, state if rows is None else type(state)(*map(rows.of_rows, state))

    def state_after(
        self, record: list[Tensor], resets: Tensor | None, *, state: GDN2State | GDN2ContentState | None,
        rows: Rows | None,
    ) -> GDN2State | GDN2ContentState:  # fmt: skip
        """The state that ``forward`` returns after tokens, of which it recorded this; all else as it was told there.

        Of the first tokens of a record, the state that stands after these.
        """
        state = self._mix(record, resets, state, rows, keep=True)[1]
        return state if rows is None else type(state)(*map(rows.of_rows, state))

    def gate_inputs(self, x: Tensor, heads: int, v_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> decay [..., H, K or 1], erase gate [..., H, K or 1] and write gate [..., HV, V or 1], as the
        operator takes them with :meth:`op_options`; the last axis is 1 where the channels of a head share them."""
        # In this order: selective checkpointing keeps every second matrix product.
        g = None
        if self.decay is not None:
            g = _through(self.decay_low_proj, self.decay_proj, x).unflatten(-1, (heads, -1))
        erase = self.erase_proj(x).unflatten(-1, (heads, -1))
        if g is None:
            g = torch.zeros_like(erase[..., :1])
        if self.tied_gates:
            write = erase.repeat_interleave(v_heads // heads, dim=-2)
        else:
            write = self.write_proj(x).unflatten(-1, (v_heads, -1))
        if any(self.mean_gates):
            erase, write = self._gates(erase, write)
        return g, erase, write

    def op_options(self, heads: int) -> dict[str, Any]:
        """Keyword arguments of the operator, for q, k and v of ``heads`` key heads and :meth:`gate_inputs`."""
        raw = not any(self.mean_gates)
        A_log = dt_bias = None
        if self.decay is not None:
            A_log = of_this_rank(self.decay.A_log)
            dt_bias = of_this_rank(self.decay.dt_bias).expand(heads, self.head_dim)
        return {
            "A_log": A_log, "dt_bias": dt_bias, "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": self.decay is not None, "use_sigmoid_in_kernel": raw,
            "erase_scale": self.erase_scale if raw else 1.0, "lower_bound": self.lower_bound, "backend": self.backend,
        }  # fmt: skip

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """What the operator gives [..., HV, V] and the output gate's projection of x [..., HV * V] -> [..., D]."""
        o = self.o_norm(o) * self.output_gate(gate.unflatten(-1, (-1, self.head_v_dim)))
        return self.o_proj(o.flatten(-2))

    def _mix(self, inputs, resets, state, rows, keep, in_place=False):
        """Convolutions and operator: o [B, T, HV, V] of q, k, v, g, erase, write of x, the state after it or None, and
        the erase gate as the operator had it; with rows, states of their documents."""
        *qkv, g, erase, write = inputs
        step = g.shape[1] == 1 and state is not None
        if in_place and step and rows is None and self.content is None:
            q, k, v = causal_conv1d_qkv_(
                *qkv, *self._conv_weights(), *state[:3], "silu", resets=resets, backend=self.q_conv1d.backend
            )
            operands, options = self._operands(q, k, v, g, erase, write)
            return recurrent_gdn2_(*operands, state.memory, resets=resets, **options), state, erase
        cu_seqlens = None if rows is None else rows.cu_seqlens
        if rows is not None and state is not None:
            state = type(state)(*map(rows.of_documents, state))
        before = (None,) * 3 if state is None else state[:3]
        q, k, v, tails = self._convolve(*qkv, resets, before, keep, cu_seqlens)
        operands, options = self._operands(q, k, v, g, erase, write)
        op = recurrent_gdn2 if step else functools.partial(chunk_gdn2, num_segments=self.num_segments)
        op = functools.partial(op, **options)
        if self.content is None:
            memory = None if state is None else state.memory
            o, memory = op(
                *operands, initial_state=memory, output_final_state=keep, resets=resets, cu_seqlens=cu_seqlens
            )
            return o, GDN2State(*tails, memory) if keep else None, erase
        self._check_one_piece()
        reading = None if state is None else Reading(*state[3:])
        if rows is None:
            o, reading, erase = mix_windows(self.content, op, operands, resets, reading, keep)
        else:
            o, reading, erase = mix_documents(self.content, op, operands, cu_seqlens, reading)
        return o, GDN2ContentState(*tails, *reading) if keep else None, erase

    def _check_one_piece(self):
        """Also whenever it is used: num_segments can be set."""
        if self.num_segments not in (1, "auto"):
            raise ValueError(f"num_segments is {self.num_segments}; with content_gate it must be 1 or 'auto'")

    def _operands(self, q, k, v, g, erase, write):
        """What the operator takes: tensors with an axis of heads, and keyword arguments."""
        q, k, v = (
            t.unflatten(-1, (-1, size)) for t, size in ((q, self.head_dim), (k, self.head_dim), (v, self.head_v_dim))
        )
        inputs = q, k, v, g.expand(q.shape), erase.expand(q.shape), write.expand(v.shape)
        return inputs, self.op_options(q.shape[2])

    def _conv_weights(self):
        return [of_this_rank(conv1d.weight) for conv1d in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]

    def _convolve(self, q, k, v, resets, before, return_state=False, cu_seqlens=None):
        """The three short convolutions and SiLU as one operator: q, k, v and, with return_state, their final states."""
        return causal_conv1d_qkv(
            q, k, v, *self._conv_weights(), "silu", *before, output_final_state=return_state, cu_seqlens=cu_seqlens,
            resets=resets, backend=self.q_conv1d.backend,
        )  # fmt: skip

    def _gates(self, erase, write):
        """From logits [B, T, heads, channels or 1], in fp32 at least; with one channel those that are averaged."""
        sigmoid = sigmoid_of(self.backend)
        erase, write = (sigmoid(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (erase, write))
        pairs = zip((self.erase_scale * erase, write), self.mean_gates, strict=True)
        return [x.mean(-1, keepdim=True) if mean else x for x, mean in pairs]

    @torch.no_grad()
    def _record(self, g, erase, write, memory):
        if not any(self.mean_gates):
            erase, write = self._gates(erase, write)
        if self.decay is None:
            log_decays = g
        else:
            A_log, dt_bias = of_this_rank(self.decay.A_log), of_this_rank(self.decay.dt_bias)
            log_decays = log_decay(g.float(), A_log, dt_bias, self.lower_bound)
        rate = -log_decays.mean((0, 1))  # [H, K or 1] nats per token
        half_life = math.log(2) / rate.clamp_min(SLOWEST_DECAY)
        state_norm = memory.square().sum((2, 3)).sqrt().mean()  # Frobenius, mean over sequences and heads
        pairs = [erase.mean(), erase.std(), write.mean(), write.std(), half_life.mean(), half_life.std(correction=0)]
        self.statistics.copy_(torch.stack([*pairs, state_norm.float()]))

    def init_weights(
        self, output_scale: float = 1.0, gain: float = 2**-2.5, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        """Xavier-uniform with ``gain`` for every projection, times ``output_scale`` for the output projection; biases
        of linear layers 0; softplus(dt_bias) log-uniform from ``dt_min`` to ``dt_max``."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                scaled = gain * (output_scale if module is self.o_proj else 1.0)
                fill_(module.weight, functools.partial(nn.init.xavier_uniform_, gain=scaled))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ShortConvolution):
                module.init_weights()
            elif isinstance(module, ContentGate):
                module.init_weights(gain)
            elif isinstance(module, DecayParameters):
                module.init_weights(dt_min, dt_max)
        nn.init.ones_(self.o_norm.weight)
        self.statistics.zero_()
