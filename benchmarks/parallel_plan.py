"""Which parallel layouts of a 7B or 70B hybrid fit on 8 to 1,024 GPUs, and what a rank then holds and sends.

    python benchmarks/parallel_plan.py            # the plans
    python benchmarks/parallel_plan.py --check    # the formulas against small runs in processes
    python benchmarks/parallel_plan.py --write    # both, into docs/parallelism.md

``parallel_costs`` has the formulas, ``parallel_measured`` the runs. A plan predicts no times.
"""

import argparse
import dataclasses
import itertools

from parallel_costs import CHECKPOINTING, Costs, Layout
from parallel_measured import LAYOUTS, check
from tables import DOCS, fill, table

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.parallel import check_tensor_parallel

# A GPU and its node.
GPUS_OF_A_NODE = 8
MEMORY = 80e9
USABLE = 0.9  # the rest: CUDA, NCCL, fragmentation
MOST_STAGES = 16
SHOWN = 5  # layouts of a plan, those that send least

_hybrid = {"vocab_size": 128_000, "layer_pattern": ("gdn2", "swa"), "attn_kv_heads": 8}
_7B = GDN2ModelArgs(**_hybrid, hidden_size=4096, n_layers=32, mlp_size=11008, num_heads=32, attn_heads=32)
_70B = GDN2ModelArgs(**_hybrid, hidden_size=8192, n_layers=80, mlp_size=23040, num_heads=64, attn_heads=64)
MODELS = {"7B": (_7B, 1024), "70B": (_70B, 2048)}  # shape, sequences of a batch
LENGTH = 4096
GPUS = (8, 64, 256, 1024)
SEQUENCES = (1, 2, 4, 8)  # of a microbatch


def check_table(rows):
    """A line for each layout and quantity: the numbers of rank 0, and on how many ranks the two agree."""
    ranks = {}
    for layout, quantity, *pair in rows:
        ranks.setdefault((layout, quantity), []).append(pair)
    lines = [
        [*key, *(f"{x:,}" for x in pairs[0]), f"{sum(a == b for a, b in pairs)} of {len(pairs)} ranks"]
        for key, pairs in ranks.items()
    ]
    return table(["layout", "quantity", "formula", "measured", "equal on"], lines)


def layouts(costs, gpus, batch):
    """All that TorchTitan and this model allow, in powers of two. FSDP takes part in each: without it TorchTitan trains
    in fp32."""
    powers = [1 << i for i in range(gpus.bit_length())]
    for tp, pp, shard in itertools.product(powers, repeat=3):
        if tp > GPUS_OF_A_NODE or pp > MOST_STAGES or shard == 1 or gpus % (tp * pp * shard):
            continue
        try:
            check_tensor_parallel(costs.args, tp)
        except ValueError:
            continue
        replicate = gpus // (tp * pp * shard)
        for sequences, checkpointing in itertools.product(SEQUENCES, CHECKPOINTING):
            microbatches, rest = divmod(batch, replicate * shard * sequences)
            if not rest and microbatches >= (pp if pp > 1 else 1):
                yield Layout(replicate, shard, tp, pp, sequences, microbatches, checkpointing)


def fullest(costs, layout):
    """{what: bytes} that the rank holds which holds most."""
    return max((costs.memory(layout, i) for i in range(layout.pp)), key=lambda x: sum(x.values()))


def plan(costs, gpus, batch):
    """[(layout, its bytes sent, its memory)] of those that fit: for each tensor and pipeline degree, with the least
    checkpointing that fits, the one that sends least."""
    best = {}
    for layout in layouts(costs, gpus, batch):
        memory = fullest(costs, layout)
        held = sum(memory.values())
        if held > USABLE * MEMORY:
            continue
        sent = max(costs.sent_by_a_rank(layout, units) for units in costs.stages(layout.pp))
        rank = CHECKPOINTING.index(layout.checkpointing), sent, held
        degrees = layout.tp, layout.pp
        if degrees not in best or rank < best[degrees][0]:
            best[degrees] = rank, layout, memory
    return [(layout, sent, memory) for (_, sent, _), layout, memory in sorted(best.values(), key=lambda x: x[0][1])]


def _plans_of(name):
    args, batch = MODELS[name]
    costs = Costs(args, LENGTH)
    degrees = ["replicate", "shard", "tensor", "pipeline", "sequences", "microbatches", "checkpointing"]
    rows, parts = [], [*costs.memory(Layout(), 0)]
    for gpus in GPUS:
        found = plan(costs, gpus, batch)[:SHOWN]
        for layout, sent, memory in found:
            held = [f"{x / 1e9:.1f}" for x in (*memory.values(), sum(memory.values()))]
            rows.append([gpus, *dataclasses.astuple(layout), f"{sent / 1e9:,.1f}", *held])
        if not found:
            least = min(sum(fullest(costs, layout).values()) for layout in layouts(costs, gpus, batch))
            rows.append([gpus, f"none fits: the least is {least / 1e9:.0f} GB a GPU", *[""] * (len(parts) + 8)])
    description = (
        f"**{name}**: {costs.n_params:,} parameters; D = {args.hidden_size:,}, {args.n_layers} layers, MLP "
        f"{args.mlp_size:,}, {args.num_heads} GDN-2 heads of {args.head_dim}, {args.attn_heads} attention heads over "
        f"{args.attn_kv_heads} key/value heads, window {args.window:,}, vocabulary {args.vocab_size:,}. A step is "
        f"{batch:,} sequences of {LENGTH:,} tokens."
    )
    return f"{description}\n\n{table(['GPUs', *degrees, 'GB sent', *parts, 'GB held'], rows)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="*", choices=list(LAYOUTS),
                        help="formulas against small runs (default: all); exit code 1 if they differ")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="check all, and put all tables into docs/parallelism.md")
    chosen = parser.parse_args()
    checked = LAYOUTS if chosen.write or chosen.check == [] else chosen.check or []
    rows = [row for name in checked for row in check(name)]
    tables = {"check": check_table(rows)} if rows else {}
    if chosen.write or not rows:
        tables["plans"] = "\n\n".join(map(_plans_of, MODELS))
    if chosen.write:
        fill(DOCS / "parallelism.md", tables)
    else:
        print("\n\n".join(tables.values()))
    raise SystemExit(any(formula != measured for *_, formula, measured in rows))


if __name__ == "__main__":
    main()
