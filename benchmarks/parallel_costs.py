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
from gdn2_titan.ops.gdn2.flops import CHUNK

__all__ = ["CHECKPOINTING", "Costs", "Layout"]

CHECKPOINTING = ("none", "selective", "full")

# What tensor parallelism cuts, by name: these stay whole, these are cut by input channels, all others by rows.
WHOLE = ("norm", "decay_low_proj.", "gate_low_proj.")
BY_INPUTS = ("o_proj.", "down_proj.")
# What selective checkpointing keeps of a block: TorchTitan's every second matrix product, and the output gate, whose
# bias makes it another operator.
KEPT = {
    "gdn2": ("mixer.q_proj", "mixer.v_proj", "mixer.decay_proj", "mixer.write_proj", "mixer.gate_proj", "mixer.o_proj",
             "mlp.up_proj"),
    "attention": ("mixer.q_proj", "mixer.v_proj", "mlp.gate_proj", "mlp.down_proj"),
}  # fmt: skip


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


def _part(n, ranks, rank):
    """Rows of n that a rank gets: torch.chunk, where the last ranks may get fewer or none. Rank 0 has the most."""
    rows = math.ceil(n / ranks)
    return max(0, min(rows, n - rank * rows))


def _cut(name, shape, tp, rank=0):
    """A parameter's shape on a rank of tensor parallelism."""
    if tp == 1 or any(x in name for x in WHOLE):
        return shape
    dim = 1 if any(x in name for x in BY_INPUTS) else 0
    return tuple(_part(n, tp, rank) if i == dim else n for i, n in enumerate(shape))


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
        self.names = ["tok_embeddings", *model.layers, "head"]
        self.shapes = {name: {} for name in self.names}
        for name, param in model.named_parameters():
            module, part = name.split(".")[:2]
            unit = part if module == "layers" else module if module in self.shapes else "head"
            self.shapes[unit][name.removeprefix(f"layers.{unit}.")] = tuple(param.shape)
        # Blocks with the same mixer cost the same: the first of its kind stands for all.
        kinds = [args.mixer(i) for i in range(args.n_layers)]
        self._like = {name: str(kinds.index(kinds[int(name)])) if name.isdigit() else name for name in self.names}
        self._numel = functools.cache(self._numel)
        self.saved = functools.cache(self.saved)

    def stages(self, pp):
        """The units of each pipeline stage, in TorchTitan's default cut: even, where the ends count as a layer each."""
        size, extra = divmod(len(self.names), pp)
        bounds = [i * size + min(i, extra) for i in range(pp + 1)]
        return [self.names[a:b] for a, b in itertools.pairwise(bounds)]

    def _numel(self, unit, shard, tp, shard_rank, tp_rank):
        total = [0, 0]
        for name, shape in self.shapes[unit].items():
            rows, *rest = _cut(name, shape, tp, tp_rank)
            total[".decay." not in name] += _part(rows, shard, shard_rank) * math.prod(rest)
        return total

    def held(self, layout, units, shard_rank=0, tp_rank=0):
        """(decay parameters, all others) that a rank keeps: each is cut by tensor parallelism, then FSDP cuts what is
        left by rows. Rank 0 holds the most; FSDP pads the parts of the others to the same size."""
        numbers = [self._numel(self._like[u], layout.shard, layout.tp, shard_rank, tp_rank) for u in units]
        return [sum(n) for n in zip(*numbers, strict=True)]

    # Communication: {(mesh dimension, collective): bytes of the whole tensor that a group gathers, adds up or sends}.

    def sent(self, layout, units):
        """All that the ranks of a stage send in one step."""
        total = self._sharded(layout, units) | self._tensor(layout, units)
        # Pipeline parallelism: hidden states to the next stage, their gradient to the one before.
        neighbours = ("head" not in units) + ("tok_embeddings" not in units)
        total["pp", "send"] = layout.microbatches * neighbours * (self._hidden(layout) // layout.tp)
        return {key: n for key, n in total.items() if n and getattr(layout, key[0]) > 1}

    def _hidden(self, layout):
        """Bytes of the hidden states of whole sequences, [sequences, T, D]."""
        return layout.sequences * self.T * self.D * (2 if layout.shard > 1 else 4)

    def _sharded(self, layout, units):
        decays, others = (layout.shard * n for n in self.held(layout, units))
        # Until backward only the decays and the head stay gathered. Under pipeline parallelism everything does, and
        # gradients are added up whole, over all microbatches of a step.
        times, again = 1, 0
        if layout.pp == 1:
            times = layout.microbatches
            again = others - layout.shard * self.held(layout, ["head"])[1]
        reduced = times * 4 * (decays + others)
        return {
            ("shard", "all-gather"): times * (4 * decays + 2 * others + 2 * again),
            ("shard", "reduce-scatter"): reduced,
            ("replicate", "all-reduce"): reduced // layout.shard,
        }

    def _tensor(self, layout, units):
        blocks = sum(u.isdigit() for u in units)
        ends = len(units) - blocks
        # Forward: gathered before the mixer and the MLP, and before the head; scattered after each, and after the
        # embedding. Backward is the mirror image.
        moved = layout.microbatches * self._hidden(layout) * (4 * blocks + ends)
        # The loss over a vocabulary in parts: maximum, sum of exponentials and the target's logit of each token.
        loss = layout.microbatches * 3 * 4 * layout.sequences * self.T if "head" in units else 0
        # The gradients of whole parameters: each rank has what its part of the sequence, or its heads, gave. FSDP adds
        # them up before it reduces, under pipeline parallelism at the end; without it the optimizer does.
        whole = sum(math.prod(s) for u in units for n, s in self.shapes[u].items() if any(x in n for x in WHOLE))
        each_time = layout.shard > 1 and layout.pp == 1
        summed = layout.microbatches * 2 * whole if each_time else 4 * whole
        return {("tp", "all-gather"): moved, ("tp", "reduce-scatter"): moved, ("tp", "all-reduce"): loss + summed}

    def sent_by_a_rank(self, layout, units):
        """Of what its groups gather, add up or send, in one step: bytes."""
        total = 0
        for (dimension, kind), n in self.sent(layout, units).items():
            ranks = getattr(layout, dimension)
            total += n if kind == "send" else n * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)
        return total

    # Memory.

    def saved(self, unit, layout, on_gpu=True):
        """Bytes that a block keeps from forward for backward, for one microbatch in bf16. on_gpu: the RMS norm there
        keeps its input, PyTorch's on a CPU two fp32 copies; and Triton's kernels keep A and A_qk of each chunk."""
        tp, args = layout.tp, self.args
        tokens = layout.sequences * self.T
        between = 2 * tokens * self.D // tp  # hidden states between blocks and halves of blocks
        if layout.checkpointing == "full":
            return between
        gdn2 = args.mixer(int(unit)) == "gdn2"
        # Linear layer: its outputs on a rank.
        products = {
            name.removesuffix(".weight"): _cut(name, shape, tp)[0]
            for name, shape in self.shapes[unit].items() if name.endswith("_proj.weight")
        }  # fmt: skip
        queries, values, hidden = (products[x] for x in ("mixer.q_proj", "mixer.v_proj", "mlp.gate_proj"))
        mixed = values if gdn2 else queries  # channels that come out of the mixer's op
        sums = 0 if gdn2 else 4 * tokens * args.attn_heads // tp  # logarithms of attention's sums, in fp32
        squares = 2 * 2 * CHUNK * tokens * args.num_heads // tp * (gdn2 and on_gpu)
        if layout.checkpointing == "selective":
            total = between + 2 * tokens * (sum(products[x] for x in KEPT["gdn2" if gdn2 else "attention"]) + mixed)
            total += 2 * between * (tp > 1)  # what was scattered along the sequence
            # The final state [sequences, HV, K, V] is fp32.
            return total + sums + squares + 4 * layout.sequences * args.head_dim * values * gdn2
        del products["mixer.o_proj"], products["mlp.down_proj"]  # these go into the residual sum
        channels = sum(products.values()) + mixed + 2 * hidden  # silu(gate), silu(gate) * up
        if gdn2:
            channels += 2 * queries + values + values  # convolved q, k, v; silu(gate), which multiplies the output
        # Two norms over D, on parts of the sequence, whose results tensor parallelism gathers; o_norm over V.
        value_dim = int(args.head_dim * args.expand_v)
        norms = [(tokens * self.D // tp, tokens // tp)] * 2 + [(tokens * values, tokens * values // value_dim)] * gdn2
        total = 2 * tokens * channels + sum((2 if on_gpu else 8) * n + 4 * rows for n, rows in norms)
        return total + 2 * tokens * (2 * self.D + values * gdn2) + sums + squares

    def memory(self, layout, stage):
        """{what: bytes} of rank 0 of a stage, under FSDP. "gathered" and "logits" are estimates."""
        units = self.stages(layout.pp)[stage]
        held = sum(self.held(layout, units))
        if layout.pp == 1:  # a unit and the next one in bf16; of one unit, gradients in bf16 and in fp32
            gathered = (2 * 2 + 2 + 4) * layout.shard * max(sum(self.held(layout, [u])) for u in units)
        else:  # a stage in bf16, its gradients in fp32
            gathered = (2 + 4) * layout.shard * held
        blocks = [self._like[u] for u in units if u.isdigit()]
        in_flight = min(layout.pp - stage, layout.microbatches)
        activations = in_flight * sum(self.saved(u, layout) for u in blocks)
        if layout.checkpointing != "none":  # what a block computes again
            whole = dataclasses.replace(layout, checkpointing="none")
            activations += max((self.saved(u, whole) for u in blocks), default=0)
        # In bf16; in fp32 with log-probabilities; the gradients of all three but one.
        logits = (2 + 4 + 4 + 4) * layout.sequences * self.T * self.args.vocab_size // layout.tp
        return {
            "parameters": 4 * held, "gradients": 4 * held, "optimizer": 8 * held, "gathered": gathered,
            "activations": activations, "logits": logits if "head" in units else 0,
        }  # fmt: skip
