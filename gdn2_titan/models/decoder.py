"""The decoder: embeddings, pre-norm blocks of mixer and SwiGLU MLP, norm, output head. Read top to bottom."""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from gdn2_titan.ops.context_parallel.tokens import gather_sequence

from .args import SOFTMAX, GDN2ModelArgs
from .attention import Attention, AttentionState, rotary_angles
from .batch_invariant import linear_of, silu_of
from .checks import check_count
from .init import linear_, normal_
from .layer import GatedDeltaNet2, GDN2ContentState, GDN2State
from .mamba2 import Mamba2, Mamba2State
from .mamba3 import Mamba3, Mamba3State
from .masks import attention_mask, context_mask
from .rows import Rows

__all__ = ["Block", "GDN2Model", "State"]

State = GDN2State | GDN2ContentState | Mamba2State | Mamba3State | AttentionState


class SwiGLU(nn.Module):
    """x [..., D] -> [..., D] through a hidden size of ``size``. backend: as in Attention."""

    def __init__(self, hidden_size: int, size: int, backend: str = "auto") -> None:
        super().__init__()
        check_count("hidden_size", hidden_size)
        check_count("size", size)
        linear = functools.partial(linear_of(backend), bias=False)
        self.silu = silu_of(backend)
        self.gate_proj = linear(hidden_size, size)
        self.up_proj = linear(hidden_size, size)
        self.down_proj = linear(size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.silu(self.gate_proj(x)) * self.up_proj(x))

    def init_weights(self, output_scale: float, std: float | None) -> None:
        """std: of ``init.linear_``."""
        for projection in (self.gate_proj, self.up_proj):
            linear_(projection.weight, std)
        linear_(self.down_proj.weight, std, output_scale)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, args: GDN2ModelArgs, layer: int) -> None:
        super().__init__()
        self.kind = args.mixer(layer)
        # Two branches a layer add to the residual stream.
        self.output_scale, self.linear_std = 1 / math.sqrt(2 * args.n_layers), args.linear_std
        self.mixer_init = (self.output_scale, self.linear_std)
        if self.kind not in SOFTMAX:
            scale = 1.0 if args.init == "release" else self.output_scale
            self.mixer_init = (scale, args.mixer_gain, args.dt_min, args.dt_max)
        self.mixer_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        if self.kind == "gdn2":
            self.mixer = GatedDeltaNet2(args.hidden_size, **args.gdn2_options())
        elif self.kind in ("mamba2", "mamba3"):
            of_kind = {"mamba2": Mamba2, "mamba3": Mamba3}[self.kind]
            self.mixer = of_kind(args.hidden_size, **args.mamba_options(self.kind))
        else:
            window = args.window if self.kind == "swa" else None
            self.mixer = Attention(args.hidden_size, args.attn_heads, args.attn_kv_heads, window, args.backend)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.mlp = SwiGLU(args.hidden_size, args.mlp_size, args.backend)

    def forward(
        self, x: Tensor, resets: Tensor | None = None, angles: Tensor | None = None,
        mask: Tensor | BlockMask | None = None, *, state: State | None = None, return_state: bool = False,
        rows: Rows | None = None, in_place: bool = False, record: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, State]:  # fmt: skip
        """x [B, T, D]; resets bool [B, T] or None; angles and mask for softmax layers -> [B, T, D].

        With ``return_state`` ([B, T, D], the mixer's state), which starts from ``state``, that of the segment before.
        rows: a Rows where x is [1, N, D], rows of unequal lengths end to end. in_place: of a GDN-2 layer. record: a
        list that gets what the mixer's ``state_after`` takes.
        """
        inputs = (angles, mask) if self.kind in SOFTMAX else (resets,)
        options = dict(state=state, return_state=return_state, rows=rows, record=record)
        if self.kind == "gdn2":
            options["in_place"] = in_place
        h = self.mixer(self.mixer_norm(x), *inputs, **options)
        if return_state:
            h, state = h
        x = x + h
        x = x + self.mlp(self.mlp_norm(x))
        return (x, state) if return_state else x

    def init_weights(self) -> None:
        nn.init.ones_(self.mixer_norm.weight)
        nn.init.ones_(self.mlp_norm.weight)
        self.mixer.init_weights(*self.mixer_init)
        self.mlp.init_weights(self.output_scale, self.linear_std)


class GDN2Model(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocab_size].

    ``tok_embeddings``, any of ``layers``, ``norm`` and ``lm_head`` may be absent (None) in a pipeline stage: what comes
    in is then hidden states, and what goes out too. Build it on the meta device if you like; ``init_weights`` fills it.
    Where ranks share sequences (``shards``, see ``parallel.context``), T is what this rank has of them.

    Raises:
        ValueError: naming the field of ``args`` that no model can be built from.
    """

    def __init__(self, args: GDN2ModelArgs) -> None:
        super().__init__()
        args.validate()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(args, i) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.lm_head = linear_of(args.backend)(args.hidden_size, args.vocab_size, bias=False)
        # Ranks that share a sequence between blocks (sequence parallelism); hidden states hold 1 / this of its tokens.
        self.sequence_shards = 1
        # A SequenceShards where ranks share a sequence also inside the mixers (context parallelism).
        self.shards = None

    def forward(self, tokens: Tensor, resets: Tensor | None = None) -> Tensor:
        """tokens: ids [B, T] (or hidden states [B, T, D]); resets: bool [B, T], True where a document begins."""
        if self.tok_embeddings is not None:
            (B, T), h = tokens.shape, self.tok_embeddings(tokens)
        else:
            (B, T, _), h = tokens.shape, tokens
            T = T * self.sequence_shards
        kinds = [self.args.mixer(int(name)) for name in self.layers]  # by name: a stage holds some of the layers
        angles, masks = self._angles_and_masks({*kinds} & {*SOFTMAX}, B, T, resets, tokens.device)
        for kind, block in zip(kinds, self.layers.values(), strict=True):
            h = block(h, resets, angles, masks.get(kind))
        h = self.norm(h) if self.norm is not None else h
        return self.lm_head(h) if self.lm_head is not None else h

    def _angles_and_masks(self, kinds, B, T, resets, device):
        """What the softmax layers of these kinds take, computed once for all of them: angles, and {kind: mask}."""
        if not kinds:
            return None, {}
        args, shards, backend = self.args, self.shards, self.args.backend
        windows = {kind: args.window if kind == "swa" else None for kind in kinds}
        if shards is None:
            positions = torch.arange(T, device=device)
            masks = {kind: attention_mask(B, T, W, resets, device, backend) for kind, W in windows.items()}
        else:
            positions, documents = shards.positions(T, device), None
            if resets is not None:
                # As bytes: not every backend of torch.distributed moves bool.
                documents = gather_sequence(resets.to(torch.uint8), shards).long().cumsum(1)
            masks = {kind: context_mask(B, T, W, documents, shards, device, backend) for kind, W in windows.items()}
        return rotary_angles(positions, args.hidden_size // args.attn_heads, args.rope_theta), masks

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fill every parameter and buffer, from whatever device the model was built on to where it now lies.

        The random stream is the same for every sharding (see ``init``). buffer_device: where buffers shall lie
        if not beside the parameters (TorchTitan's CPU offload).
        """
        if self.tok_embeddings is not None:
            normal_(self.tok_embeddings.weight, self.args.init_std)
        for block in self.layers.values():
            block.init_weights()
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)
        if self.lm_head is not None:
            linear_(self.lm_head.weight, self.args.linear_std)
        if buffer_device is not None:
            for module in self.modules():
                if isinstance(module, GatedDeltaNet2):
                    module.statistics = module.statistics.to(buffer_device)
