"""Which parallel layouts of a 7B or 70B hybrid fit on 8 to 1,024 GPUs, and what a rank then holds, sends and repeats.

    python benchmarks/parallel_plan.py            # the plans
    python benchmarks/parallel_plan.py --check    # the formulas against small runs in processes
    python benchmarks/parallel_plan.py --write    # both, into docs/parallelism.md

A plan lists the layouts that fit and that no other one beats in both bytes sent and work, by ``parallel_costs``. It
predicts no times.
"""

import argparse
import itertools
import math
from pathlib import Path

from marked_tables import write
from parallel_costs import CHECKPOINTING, Costs, Layout
from parallel_measured import measure_saved, measure_step

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.flops import flops_per_token
from gdn2_titan.parallel import check_tensor_parallel

DOCUMENT = Path(__file__).parents[1] / "docs" / "parallelism.md"

# A GPU and its node.
GPUS_OF_A_NODE = 8
MEMORY = 80e9
USABLE = 0.9  # the rest: CUDA, NCCL, fragmentation
MOST_STAGES = 16
SHOWN = 6  # layouts of a plan, those of least work

_hybrid = {"vocab_size": 128_000, "layer_pattern": ("gdn2", "swa"), "attn_kv_heads": 8}
# name: shape, tokens of a sequence, sequences of a batch
MODELS = {
    "7B": (
        GDN2ModelArgs(**_hybrid, hidden_size=4096, n_layers=32, mlp_size=11008, num_heads=32, attn_heads=32),
        4096, 1024,
    ),
    "70B": (
        GDN2ModelArgs(**_hybrid, hidden_size=8192, n_layers=80, mlp_size=23040, num_heads=64, attn_heads=64),
        4096, 2048,
    ),
}  # fmt: skip
GPUS = (8, 64, 256, 1024)
SEQUENCES = (1, 2, 4, 8)  # of a microbatch

# Small models and layouts for the check. The heads can be shared by two ranks; sides are no powers of two, so that
# FSDP has to pad.
SMALL = GDN2ModelArgs(
    vocab_size=50, hidden_size=36, n_layers=4, mlp_size=90, num_heads=2, num_v_heads=4, head_dim=10, expand_v=2.0,
    attn_heads=6, attn_kv_heads=2, layer_pattern=("gdn2", "attention"),
)  # fmt: skip
SMALL_LENGTH = 64
CHECKED = {
    "FSDP 2": Layout(shard=2),
    "FSDP 2, 2 accumulated": Layout(shard=2, microbatches=2),
    "HSDP 2 x 2": Layout(replicate=2, shard=2),
    "TP 2": Layout(tp=2, sequences=2),
    "FSDP 2 x TP 2": Layout(shard=2, tp=2),
    "PP 2": Layout(pp=2, sequences=2, microbatches=3),
    "FSDP 2 x PP 2": Layout(shard=2, pp=2, microbatches=3),
    "FSDP 2 x TP 2 x PP 2": Layout(shard=2, tp=2, pp=2, microbatches=3),
}


BLOCKS = {"a block": 1, "a block, TP 2": 2}


def check(name):
    """Rows (layout, rank, quantity, formula, measured) of the small model."""
    costs = Costs(SMALL, SMALL_LENGTH)
    return _saved(costs, name, BLOCKS[name]) if name in BLOCKS else _step(costs, name, CHECKED[name])


def _step(costs, name, layout):
    rows = []
    for rank, found in enumerate(measure_step(costs, layout)):
        at = found["at"]
        units = costs.stages(layout.pp)[at["pp"]]
        held = costs.held(layout, units, at["shard"], at["tp"])
        rows.append((name, rank, "parameters", held, found["parameters"]))
        rows.append((name, rank, "optimizer bytes", 8 * held, found["optimizer"]))
        formula = costs.sent(layout, units)
        for key in sorted(formula.keys() | found["sent"].keys()):
            rows.append((name, rank, " ".join(key), formula.get(key, 0), found["sent"].get(key, 0)))
    return rows


def _saved(costs, name, tp):
    rows = []
    for checkpointing in CHECKPOINTING:
        layout = Layout(tp=tp, sequences=2, checkpointing=checkpointing)
        measured = measure_saved(costs, layout)
        for unit in ("0", "1"):
            what = f"saved by {SMALL.mixer(int(unit))}, checkpointing {checkpointing}"
            rows.append((name, 0, what, costs.saved(unit, layout, fused_norm=False), measured[unit]))
    return rows


def estimate(costs, layout):
    """{"memory": {what: bytes} of the fullest rank, "sent": bytes of the busiest rank in a step, "work": its FLOPs,
    repeated ones and the idle steps of the pipeline included, over an even share of the useful ones}."""
    args, pp, m = costs.args, layout.pp, layout.microbatches
    stages = costs.stages(pp)
    memory = max((costs.memory(layout, i) for i in range(pp)), key=lambda x: sum(x.values()))
    sizes = {u: sum(math.prod(s) for s in costs.shapes[u].values()) for u in costs.names}
    total = costs.n_params - sizes["tok_embeddings"]
    flops = flops_per_token(args, costs.n_params, sizes["tok_embeddings"], costs.T)

    def computed(units):
        useful = flops * sum(sizes[u] for u in units if u != "tok_embeddings") / total
        return useful + 2 * sum(costs.repeated(u, layout.checkpointing) for u in units)

    work = max(map(computed, stages)) * pp / flops * (m + pp - 1) / m
    sent = max(sum(_sent_by_a_rank(layout, *x) for x in costs.sent(layout, units).items()) for units in stages)
    return {"memory": memory, "sent": sent, "work": work}


def _sent_by_a_rank(layout, key, n):
    """Of n bytes that its group gathers, adds up or sends."""
    dimension, collective = key
    ranks = getattr(layout, dimension)
    return n if collective == "send" else n * (ranks - 1) / ranks * (2 if collective == "all-reduce" else 1)


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


def plan(costs, gpus, batch):
    """[(layout, its estimate)] of those that fit and that no other one beats in work and bytes, least work first."""
    fitting = []
    for layout in layouts(costs, gpus, batch):
        found = estimate(costs, layout)
        if sum(found["memory"].values()) <= USABLE * MEMORY:
            fitting.append((layout, found))
    fitting.sort(key=lambda x: (round(x[1]["work"], 2), x[1]["sent"], sum(x[1]["memory"].values())))
    best, least = [], math.inf
    for layout, found in fitting:
        if found["sent"] < least:
            best.append((layout, found))
            least = found["sent"]
    return best[:SHOWN]


def _table(head, rows):
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def check_table(rows):
    """A line for each layout and quantity: the numbers of rank 0, and on how many ranks the two agree."""
    ranks = {}
    for layout, _, quantity, formula, measured in rows:
        ranks.setdefault((layout, quantity), []).append((formula, measured))
    return _table(
        ["layout", "quantity", "formula", "measured", "equal on"],
        [
            (*key, *(f"{x:,}" for x in pairs[0]), f"{sum(a == b for a, b in pairs)} of {len(pairs)} ranks")
            for key, pairs in ranks.items()
        ],
    )


def _description(name, costs, batch):
    args = costs.args
    flops = flops_per_token(args, costs.n_params, args.vocab_size * args.hidden_size, costs.T)
    saved = {
        args.mixer(int(unit)): "/".join(
            f"{costs.saved(unit, Layout(checkpointing=c)) / 1e6:,.0f}" for c in CHECKPOINTING
        )
        for unit in ("0", "1")
    }
    return (
        f"**{name}**: {costs.n_params:,} parameters; D = {args.hidden_size:,}, {args.n_layers} layers, MLP "
        f"{args.mlp_size:,}, {args.num_heads} GDN-2 heads of {args.head_dim}, {args.attn_heads} attention heads over "
        f"{args.attn_kv_heads} key/value heads, window {args.window:,}, vocabulary {args.vocab_size:,}. A step is "
        f"{batch:,} sequences of {costs.T:,} tokens, {flops / 1e9:.1f} GFLOP a token. For each sequence a GDN-2 block "
        f"saves {saved['gdn2']} MB, an attention block {saved['swa']} ({'/'.join(CHECKPOINTING)} checkpointing)."
    )


def _plans_of(name):
    args, length, batch = MODELS[name]
    costs = Costs(args, length)
    degrees = ["replicate", "shard", "tensor", "pipeline", "sequences", "microbatches", "checkpointing"]
    rows, memory = [], ()
    for gpus in GPUS:
        for layout, found in plan(costs, gpus, batch):
            memory = found["memory"]
            numbers = (layout.replicate, layout.shard, layout.tp, layout.pp, layout.sequences, layout.microbatches)
            held = [f"{x / 1e9:.1f}" for x in (*memory.values(), sum(memory.values()))]
            work, sent = f"{found['work']:.2f}", f"{found['sent'] / 1e9:,.1f}"
            rows.append([gpus, *numbers, layout.checkpointing, work, sent, *held])
        if not rows or rows[-1][0] != gpus:
            least = min(sum(estimate(costs, layout)["memory"].values()) for layout in layouts(costs, gpus, batch))
            rows.append([gpus, f"none fits: the least is {least / 1e9:.0f} GB a GPU", *[""] * 15])
    return [_description(name, costs, batch), _table(["GPUs", *degrees, "work", "GB sent", *memory, "GB held"], rows)]


def plan_tables():
    return "\n\n".join(part for name in MODELS for part in _plans_of(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*BLOCKS, *CHECKED]
    parser.add_argument(
        "--check",
        nargs="*",
        choices=names,
        help="formulas against small runs (default: all); exit code 1 if they differ",
    )
    parser.add_argument("--write", action="store_true", help="check all, and put all tables into docs/parallelism.md")
    chosen = parser.parse_args()
    checked = names if chosen.write or chosen.check == [] else chosen.check or []
    rows = [row for name in checked for row in check(name)]
    tables = {"check": check_table(rows)} if rows else {}
    if chosen.write or not rows:
        tables["plans"] = plan_tables()
    if chosen.write:
        write(DOCUMENT, tables)
    else:
        print("\n\n".join(tables.values()))
    raise SystemExit(any(formula != measured for *_, formula, measured in rows))


if __name__ == "__main__":
    main()
