"""Mamba-2 (arXiv 2405.21060) as a sequence mixer: gated linear attention with one decay a head, on GDN-2's operator.

Per head, with state S [N, P], dt = softplus(its projection + bias) and A = -exp(A_log),

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = S_t^T C_t + D x_t

which is the operator with k = B, q = C, v = x, g = dt A on all channels, w = dt, nothing erased, scale 1.

Shapes: B batch, T tokens, D hidden size, H heads of size P, N the size of their keys B and C, which all heads share.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2_titan.ops import causal_conv1d, chunk_gdn2, recurrent_gdn2
from gdn2_titan.ops.context_parallel.api import begin_gdn2
from gdn2_titan.ops.context_parallel.tokens import halos
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.segmented import check_num_segments

from .checks import check_count, check_mamba
from .decay import DecayParameters
from .init import fill_
from .mamba_parts import GatedNorm, Skip
from .rows import Rows
from .this_rank import of_heads, of_this_rank

__all__ = ["Mamba2", "Mamba2State"]

WIDTH = 4  # of the convolutions


class Mamba2State(NamedTuple):
    """What a layer carries from one segment of a sequence to the next."""

    x_conv: Tensor  # [B, H * P, WIDTH - 1]
    bc_conv: Tensor  # [B, 2 * N, WIDTH - 1]
    memory: Tensor  # [B, H, N, P] fp32


class BiasedConvolution(nn.Module):
    """The parameters of a depthwise causal convolution with a bias. Read, never called."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, WIDTH))
        self.bias = nn.Parameter(torch.empty(channels))

    def init_weights(self) -> None:
        bound = WIDTH**-0.5  # as nn.Conv1d: fan-in is the width
        for parameter in (self.weight, self.bias):
            fill_(parameter, lambda x: nn.init.uniform_(x, -bound, bound))


class Mamba2(nn.Module):
    """Mamba-2 as a sequence mixer: x [B, T, D] -> [B, T, D].

    The projections are linear layers whose names end in ``_proj``: z (the gate) and x [H * P], bc (keys and queries of
    all heads) [2 * N], dt [H] and o. x, B and C pass a convolution of width 4 with bias, and SiLU. What the heads give
    passes RMSNorm(y * silu(z)), over all heads together, and the output projection.

    Args:
        hidden_size, num_heads, head_dim, state_size: D, H, P and N. The paper has H * P = 2 D, P = N = 64.
        norm_eps: of the RMS norm.
        backend: of the operator and convolutions, see :class:`gdn2_titan.models.GatedDeltaNet2`.
        num_segments: of :func:`gdn2_titan.ops.chunk_gdn2`.

    A_log and dt_bias stay in fp32 at least, see ``decay.DecayParameters``.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    OF_ALL_HEADS = ("bc_proj", "bc_conv1d")

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int = 64, state_size: int = 64, norm_eps: float = 1e-5,
        backend: str = "auto", num_segments: int | str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        check_count("hidden_size", hidden_size)
        check_mamba({"num_heads": num_heads, "head_dim": head_dim, "state_size": state_size}, norm_eps, backend)
        check_num_segments(num_segments)
        self.backend, self.num_segments = backend, num_segments
        self.conv_backend = "torch" if backend == "reference" else backend
        self.head_dim, self.state_size = head_dim, state_size
        inner = num_heads * head_dim
        linear = functools.partial(nn.Linear, bias=False)
        self.z_proj = linear(hidden_size, inner)
        self.x_proj = linear(hidden_size, inner)
        self.bc_proj = linear(hidden_size, 2 * state_size)
        self.dt_proj = linear(hidden_size, num_heads)
        self.x_conv1d = BiasedConvolution(inner)
        self.bc_conv1d = BiasedConvolution(2 * state_size)
        self.decay = DecayParameters(num_heads, 1)
        self.skip = Skip(num_heads)
        self.o_norm = GatedNorm(inner, norm_eps)
        self.o_proj = linear(inner, hidden_size)
        # A SequenceShards where ranks share a sequence (context parallelism); T is then what this rank has of it.
        self.shards = None
        self.init_weights()

    def forward(
        self, x: Tensor, resets: Tensor | None = None, *, state: Mamba2State | None = None,
        return_state: bool = False, rows: Rows | None = None, record: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Mamba2State]:  # fmt: skip
        """x [B, T, D], resets bool [B, T] or None -> [B, T, D], or ([B, T, D], Mamba2State) with ``return_state``.

        state, rows, record: as of :class:`gdn2_titan.models.GatedDeltaNet2`.

        Raises:
            ValueError: a state or rows are given, or a state is asked for, where ranks share the sequence.
        """
        if record is not None:
            record.append(x)
        z, values, bc, dt = self.z_proj(x), self.x_proj(x), of_heads(self.bc_proj(x)), self.dt_proj(x)
        cu_seqlens = None if rows is None else rows.cu_seqlens
        if rows is not None and state is not None:
            state = Mamba2State(*map(rows.of_documents, state))
        memory = None if state is None else state.memory
        if self.shards is None:
            before = (None, None) if state is None else state[:2]
            values, bc, tails = self._convolve(values, bc, resets, before, return_state, cu_seqlens)
        else:
            self.shards.refuse_states(state, return_state)
            self.shards.refuse_rows(rows)
            # Over this rank's segments as rows of the batch, with one exchange for both.
            past = halos([values, bc], self.shards, WIDTH, resets)
            segments = [self.shards.rows(t) for t in (values, bc)]
            convolved = self._convolve(*segments, self.shards.rows(resets), past)[:2]
            values, bc = (t.view(whole.shape) for t, whole in zip(convolved, (values, bc), strict=True))
        inputs, A_log, dt_bias = self._operands(values.unflatten(-1, (-1, self.head_dim)), bc, dt)
        if self.shards is None:
            step = x.shape[1] == 1 and state is not None
            op = recurrent_gdn2 if step else functools.partial(chunk_gdn2, num_segments=self.num_segments)
            o, memory = op(
                *inputs, scale=1.0, initial_state=memory, output_final_state=return_state, use_gate_in_kernel=True,
                A_log=A_log, dt_bias=dt_bias, cu_seqlens=cu_seqlens, resets=resets, backend=self.backend,
            )  # fmt: skip
        else:
            options = GDN2Options(1.0, gate=True, backend=self.backend)
            o, _ = begin_gdn2(GDN2Inputs(*inputs, A_log, dt_bias, resets=resets), options, self.shards)()
        o = self.skip(o, inputs[2])
        y = self.o_proj(self.o_norm(o.flatten(-2), z))
        if not return_state:
            return y
        state = Mamba2State(*tails, memory)
        return y, state if rows is None else Mamba2State(*map(rows.of_rows, state))

    def state_after(
        self, record: list[Tensor], resets: Tensor | None, *, state: Mamba2State | None, rows: Rows | None
    ) -> Mamba2State:
        """As :meth:`GatedDeltaNet2.state_after`."""
        return self(*record, resets, state=state, return_state=True, rows=rows)[1]

    def _operands(self, values, bc, dt):
        """q, k, v, g, b, w of the operator, A_log and dt_bias. values [B, T, H, P], bc [B, T, 2 N], dt [B, T, H]."""
        heads, N = values.shape[2], self.state_size
        A_log, dt_bias = of_this_rank(self.decay.A_log), of_this_rank(self.decay.dt_bias)  # [H], [H, 1]
        # Heads are counted from the tensors: under tensor parallelism a rank holds some of them.
        k, q = (t.unsqueeze(2).expand(-1, -1, heads, -1) for t in bc.split(N, -1))
        write = F.softplus(dt.to(dt_bias.dtype) + dt_bias[:, 0])
        inputs = q, k, values, dt.unsqueeze(-1).expand(q.shape), None, write.unsqueeze(-1).expand(values.shape)
        return inputs, A_log, dt_bias.expand(heads, N)

    def _convolve(self, values, bc, resets, before, return_state=False, cu_seqlens=None):
        """Both convolutions and SiLU: values, bc, and with return_state their final states."""
        found = [
            causal_conv1d(
                t, weight, bias, "silu", past, output_final_state=return_state, cu_seqlens=cu_seqlens, resets=resets,
                backend=self.conv_backend,
            )
            for t, past, weight, bias in (
                (values, before[0], of_this_rank(self.x_conv1d.weight), of_this_rank(self.x_conv1d.bias)),
                (bc, before[1], of_heads(self.bc_conv1d.weight), of_heads(self.bc_conv1d.bias)),
            )
        ]  # fmt: skip
        (values, x_tail), (bc, bc_tail) = found
        return values, bc, (x_tail, bc_tail)

    def init_weights(
        self, output_scale: float = 1.0, gain: float = 2**-2.5, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        """As ``GatedDeltaNet2.init_weights``: Xavier-uniform with ``gain`` for every projection, the output projection
        scaled by depth on top; A ~ U(1, 16), dt log-uniform in [dt_min, dt_max], D = 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                scaled = gain * (output_scale if module is self.o_proj else 1.0)
                fill_(module.weight, functools.partial(nn.init.xavier_uniform_, gain=scaled))
            elif isinstance(module, (BiasedConvolution, Skip, GatedNorm)):
                module.init_weights()
        self.decay.init_weights(dt_min, dt_max)
