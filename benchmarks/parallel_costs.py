"""Bytes that a rank holds and sends in a parallel layout, as formulas; ``parallel_measured`` is what they must equal.

TorchTitan's defaults: parameters, gradients and Adam's two states are fp32; under FSDP blocks compute and
are gathered in bf16, and gradients are reduced in fp32; without FSDP all is fp32.
T tokens of a sequence, D hidden size.
"""

import dataclasses
import functools
import itertools
import math

import torch

from gdn2_titan.models import GDN2Model, GDN2ModelArgs

__all__ = ["CHECKPOINTING", "Costs", "Layout"]

CHECKPOINTING = ("none", "selective", "full")

# What tensor parallelism cuts, by name: these stay whole, these are cut by input channels, all others by rows.
WHOLE = ("norm", "decay_low_proj.", "gate_low_proj.")
BY_INPUTS = ("o_proj.", "down_proj.")
BIASED = "mixer.gate_proj"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees, and what a data-parallel rank does in a step: ``microbatches`` times ``sequences``, one after another
    (gradient accumulation, or the microbatches of the pipeline)."""

    replicate: int = 1
    shard: int = 1
    tp: int = 1
    pp: int = 1
    sequences: int = 1
    microbatches: int = 1
    checkpointing: str = "none"

    @property
    def width(self):
        """Bytes of a number in a hidden state."""
        return 2 if self.shard > 1 else 4


def part(n, ranks, rank=0):
    """Rows of n that a rank gets: torch.chunk, where the last ranks may get fewer or none. Rank 0 has the most."""
    rows = math.ceil(n / ranks)
    return max(0, min(rows, n - rank * rows))


def _cut(name, shape, tp, rank=0):
    """A parameter's shape on a rank of tensor parallelism."""
    if tp == 1 or any(x in name for x in WHOLE):
        return shape
    dim = 1 if any(x in name for x in BY_INPUTS) else 0
    return tuple(part(n, tp, rank) if i == dim else n for i, n in enumerate(shape))


class Costs:
    """Of one model shape at one sequence length.

    A unit is what FSDP gathers at once: "tok_embeddings", each block ("0", "1", ...), "head" (norm and lm_head). The
    decay parameters of all blocks of a stage are one more unit, in fp32.
    """

    def __init__(self, args: GDN2ModelArgs, seq_len: int):
        self.args, self.T, self.D = args, seq_len, args.hidden_size
        with torch.device("meta"):
            model = GDN2Model(args)
        self.n_params = sum(p.numel() for p in model.parameters())
        self.names = ["tok_embeddings", *(str(i) for i in range(args.n_layers)), "head"]
        self.shapes = {name: {} for name in self.names}
        for name, param in model.named_parameters():
            path = name.split(".")
            unit = path[1] if path[0] == "layers" else "tok_embeddings" if path[0] == "tok_embeddings" else "head"
            self.shapes[unit][name] = tuple(param.shape)
        # Blocks with the same mixer cost the same: the first of its kind stands for all.
        kinds = [args.mixer(i) for i in range(args.n_layers)]
        self._like = {name: str(kinds.index(kinds[int(name)])) if name.isdigit() else name for name in self.names}
        self._numel = functools.cache(self._numel)
        self._saved = functools.cache(self._saved)
        self.products = functools.cache(self.products)

    def stages(self, pp):
        """The units of each pipeline stage, in TorchTitan's default cut: even, where the ends count as a layer each."""
        size, extra = divmod(len(self.names), pp)
        bounds = [i * size + min(i, extra) for i in range(pp + 1)]
        return [self.names[a:b] for a, b in itertools.pairwise(bounds)]

    def _numel(self, unit, tp, tp_rank, shard, shard_rank):
        """(of the decay parameters, of all others) of a unit on one rank; shard_rank None: of all ranks that share it,
        with the padding that makes their parts equal."""
        total = [0, 0]
        for name, shape in self.shapes[unit].items():
            rows, *rest = _cut(name, shape, tp, tp_rank)
            rows = shard * part(rows, shard) if shard_rank is None else part(rows, shard, shard_rank)
            total[".decay." not in name] += rows * math.prod(rest)
        return total

    def held(self, layout, units, shard_rank=0, tp_rank=0):
        """Parameters that a rank keeps: each is cut by tensor parallelism, then FSDP cuts what is left by rows."""
        return sum(sum(self._numel(self._like[u], layout.tp, tp_rank, layout.shard, shard_rank)) for u in units)

    def _padded(self, layout, units):
        """(decay parameters, all others) that a group of FSDP gathers, with the padding."""
        numbers = [self._numel(self._like[u], layout.tp, 0, layout.shard, None) for u in units]
        return [sum(x) for x in zip(*numbers, strict=True)]

    # Communication: {(mesh dimension, collective): bytes of the whole tensor that a group gathers, adds up or sends}.

    def sharded(self, layout, units):
        """FSDP, in one step."""
        decays, others = self._padded(layout, units)
        # Until backward only the decays and the head stay gathered. Under pipeline parallelism everything does, and
        # gradients are added up whole, over all microbatches of a step.
        again = [u for u in units if u != "head"] if layout.pp == 1 else []
        _, regathered = self._padded(layout, again) if again else (0, 0)
        times = layout.microbatches if layout.pp == 1 else 1
        reduced = times * 4 * (decays + others)
        return {
            ("shard", "all-gather"): times * (4 * decays + 2 * others + 2 * regathered),
            ("shard", "reduce-scatter"): reduced,
            ("replicate", "all-reduce"): reduced // layout.shard,
        }

    def tensor(self, layout, units):
        """Tensor parallelism, in one step. Into and out of every block's mixer and MLP go the hidden states of whole
        sequences, [sequences, T, D]."""
        hidden = layout.sequences * self.T * self.D * layout.width
        blocks = sum(u.isdigit() for u in units)
        ends = len(units) - blocks
        # Forward: gathered before the mixer and the MLP, and before the head; scattered after each, and after the
        # embedding. Backward is the mirror image.
        moved = layout.microbatches * hidden * (4 * blocks + ends)
        # The loss over a vocabulary in parts: maximum, sum of exponentials and the target's logit of each token.
        loss = layout.microbatches * 3 * 4 * layout.sequences * self.T if "head" in units else 0
        # The gradients of whole parameters: each rank has what its part of the sequence, or its heads, gave. FSDP adds
        # them up before it reduces, under pipeline parallelism at the end; without it the optimizer does.
        whole = sum(math.prod(s) for u in units for n, s in self.shapes[u].items() if any(x in n for x in WHOLE))
        each_time = layout.shard > 1 and layout.pp == 1
        summed = layout.microbatches * 2 * whole if each_time else 4 * whole
        return {
            ("tp", "all-gather"): moved,
            ("tp", "reduce-scatter"): moved,
            ("tp", "all-reduce"): loss + summed,
        }

    def sends(self, layout, units):
        """Pipeline parallelism, in one step: hidden states to the next stage, their gradient to the one before."""
        hidden = layout.sequences * self.T // layout.tp * self.D * layout.width
        neighbours = ("head" not in units) + ("tok_embeddings" not in units)
        return {("pp", "send"): layout.microbatches * neighbours * hidden}

    def sent(self, layout, units):
        """All of it, in one step."""
        total = self.sharded(layout, units) | self.tensor(layout, units) | self.sends(layout, units)
        return {key: n for key, n in total.items() if n and getattr(layout, key[0]) > 1}

    def sent_by_a_rank(self, layout, units):
        """Of what its groups gather, add up or send, in one step: bytes."""

        def part_of(dimension, kind, n):
            ranks = getattr(layout, dimension)
            return n if kind == "send" else n * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)

        return sum(part_of(*key, n) for key, n in self.sent(layout, units).items())

    # Memory.

    def products(self, unit, tp=1):
        """{name: outputs} of a block's linear layers on a rank, in the order of the forward pass."""
        return {
            name.split(".", 2)[2].removesuffix(".weight"): _cut(name, shape, tp)[0]
            for order in ("q_proj", "k_proj", "v_proj", "decay_low_proj", "decay_proj", "erase_proj", "write_proj",
                          "gate_low_proj", "mixer.gate_proj", "mixer.o_proj", "mlp.gate_proj", "up_proj", "down_proj")
            for name, shape in self.shapes[unit].items()
            if order in name and name.endswith("weight")
        }  # fmt: skip

    @staticmethod
    def kept(products):
        """What selective checkpointing keeps of them: TorchTitan's every second matrix product, and gate_proj, whose
        bias makes it another operator."""
        return [name for name in products if name != BIASED][::2] + [BIASED] * (BIASED in products)

    def saved(self, unit, layout, fused_norm=True):
        """Bytes that a block keeps from forward for backward, for one microbatch in bf16. fused_norm: the RMS norm of a
        GPU keeps its input, PyTorch's on a CPU two fp32 copies."""
        return self._saved(self._like[unit], layout, fused_norm)

    def _saved(self, unit, layout, fused_norm):
        tp, args = layout.tp, self.args
        tokens = layout.sequences * self.T
        between = 2 * tokens * self.D // tp  # hidden states between blocks and halves of blocks
        if layout.checkpointing == "full":
            return between
        gdn2 = args.mixer(int(unit)) == "gdn2"
        products = dict(self.products(unit, tp))
        queries, values, hidden = (products[x] for x in ("mixer.q_proj", "mixer.v_proj", "mlp.gate_proj"))
        mixed = values if gdn2 else queries  # channels that come out of the mixer's op
        value_dim = int(args.head_dim * args.expand_v)
        if layout.checkpointing == "selective":
            total = between + 2 * tokens * (sum(products[name] for name in self.kept(products)) + mixed)
            total += 2 * between * (tp > 1)  # what was scattered along the sequence
            # The final state [sequences, HV, K, V], or the logarithms of attention's sums, in fp32.
            return total + 4 * (layout.sequences * args.head_dim * values if gdn2 else tokens * args.attn_heads // tp)
        del products["mixer.o_proj"], products["mlp.down_proj"]  # these go into the residual sum
        channels = sum(products.values()) + 2 * hidden  # silu(gate), silu(gate) * up
        if gdn2:
            channels += 2 * queries + values + 2 * values  # convolved q, k, v; silu(gate), and times the output
        else:
            channels += mixed
        # Two norms over D, on parts of the sequence, whose results tensor parallelism gathers; o_norm over V.
        norms = [(tokens * self.D // tp, tokens // tp)] * 2 + [(tokens * values, tokens * values // value_dim)] * gdn2
        total = 2 * tokens * channels + sum((2 if fused_norm else 8) * n + 4 * rows for n, rows in norms)
        total += 2 * tokens * (2 * self.D + values * gdn2)
        return total + (0 if gdn2 else 4 * tokens * args.attn_heads // tp)

    def memory(self, layout, stage):
        """{what: bytes} of rank 0 of a stage, under FSDP. "gathered" and "logits" are estimates."""
        units = self.stages(layout.pp)[stage]
        held = self.held(layout, units)
        blocks = [u for u in units if u.isdigit()]
        if layout.pp == 1:  # a unit and the next one in bf16; of one unit, gradients in bf16 and in fp32
            unit = max(sum(self._padded(layout, [u])) for u in units)
            gathered = 2 * 2 * unit + (2 + 4) * unit
        else:  # a stage in bf16, its gradients in fp32
            gathered = (2 + 4) * sum(self._padded(layout, units))
        in_flight = min(layout.pp - stage, layout.microbatches)
        activations = in_flight * sum(self.saved(u, layout) for u in blocks)
        if layout.checkpointing != "none":  # what a block computes again
            whole = dataclasses.replace(layout, checkpointing="none")
            activations += max((self.saved(u, whole) for u in blocks), default=0)
        logits = 0
        if "head" in units:  # in bf16; in fp32 with log-probabilities; the gradients of all three but one
            logits = (2 + 4 + 4 + 4) * layout.sequences * self.T * self.args.vocab_size // layout.tp
        return {
            "parameters": 4 * held,
            "gradients": 4 * held,
            "optimizer": 8 * held,
            "gathered": gathered,
            "activations": activations,
            "logits": logits,
        }
