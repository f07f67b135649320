"""Which parallel layout for a 7B or 70B hybrid on 8 to 1,024 GPUs, what each rank then holds and sends, and how long.

    python benchmarks/parallel_plan.py            # the plans
    python benchmarks/parallel_plan.py --check    # the formulas against small runs in processes
    python benchmarks/parallel_plan.py --write    # both, into docs/parallelism.md

A plan is the fastest of all layouts that fit, by ``parallel_costs`` and the assumptions below. Nothing here was timed.
"""

import argparse
import itertools
import math
import re
from pathlib import Path

from parallel_costs import CHECKPOINTING, Costs, Layout
from parallel_measured import measure_saved, measure_step

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.flops import flops_per_token
from gdn2_titan.parallel import check_tensor_parallel

DOCUMENT = Path(__file__).parents[1] / "docs" / "parallelism.md"

# Assumptions, of a cluster of H100s.
GPUS_OF_A_NODE = 8
MEMORY = 80e9
USABLE = 0.9  # the rest: CUDA, NCCL, fragmentation
PEAK = 989e12  # bf16 FLOP/s
EFFICIENCY = 0.45  # of PEAK, while a GPU computes
NVLINK = 450e9  # bytes/s that a GPU sends within its node (900 GB/s both ways)
NETWORK = 50e9  # bytes/s that a GPU sends to other nodes
HOP = 5e-6  # seconds of each step around a ring

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
KINDS = (
    ("shard", "all-gather"), ("shard", "reduce-scatter"), ("replicate", "all-reduce"),
    ("tp", "all-gather"), ("tp", "reduce-scatter"), ("tp", "all-reduce"), ("pp", "send"),
)  # fmt: skip
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


def seconds(sent, ranks, stride, ring=1):
    """Of collectives among ``ranks`` GPUs that lie ``stride`` apart, over tensors of ``sent`` bytes in all. The GPUs of
    the group that share a node send through their own network ports. ring: times around it, 2 in an all-reduce."""
    if ranks == 1 or not sent:
        return 0.0
    together = max(1, min(ranks, GPUS_OF_A_NODE // stride))
    nodes = ranks // together
    inside = sent * (together - 1) / together / NVLINK
    between = sent * (nodes - 1) / nodes / (together * NETWORK)
    return ring * max(inside, between)


def estimate(costs, layout):
    """{"memory": {what: bytes}} of the fullest rank and {"time": {what: seconds}} of a step."""
    args, tp, pp, m = costs.args, layout.tp, layout.pp, layout.microbatches
    stages = costs.stages(pp)
    memory = max((costs.memory(layout, i) for i in range(pp)), key=lambda x: sum(x.values()))
    sizes = {u: sum(math.prod(s) for s in costs.shapes[u].values()) for u in costs.names}
    total = costs.n_params - sizes["tok_embeddings"]
    flops = flops_per_token(args, costs.n_params, sizes["tok_embeddings"], costs.T)
    tokens = layout.sequences * costs.T

    def computing(units):
        """(useful, repeated) seconds of a microbatch on a stage, forward and backward."""
        useful = flops * sum(sizes[u] for u in units if u != "tok_embeddings") / total
        repeated = 2 * sum(costs.repeated(u, layout.checkpointing) for u in units)
        return [tokens * x / tp / (EFFICIENCY * PEAK) for x in (useful, repeated)]

    useful, repeated = max((computing(units) for units in stages), key=sum)
    # Tensor parallelism waits for each of its collectives.
    moved = [costs.tensor(layout, units) for units in stages]
    t_tp = max(
        seconds(x["tp", "all-gather"] + x["tp", "reduce-scatter"], tp, 1) + seconds(x["tp", "all-reduce"], tp, 1, 2)
        for x in moved
    ) / m  # fmt: skip
    calls = max(4 * 2 * sum(u.isdigit() for u in units) + 4 for units in stages)
    t_tp += calls * (tp - 1) * HOP
    # FSDP communicates while a GPU computes: gathers for forward behind forward, the rest behind backward, which takes
    # twice as long. Under pipeline parallelism there is one gather and one reduction, behind one microbatch.
    fsdp = [costs.sharded(layout, units) for units in stages]
    times = m if pp == 1 else 1
    units = max(len(units) for units in stages) + 1
    hops = (layout.shard - 1) * HOP * units * times
    replicas = 2 * (layout.replicate - 1) * HOP * units * times

    def shard_seconds(collective, phase):
        sent = max(x["shard", collective, phase] for x in fsdp)
        return seconds(sent, layout.shard, tp) + hops * (sent > 0)

    reduced = max(x["replicate", "all-reduce", "backward"] for x in fsdp)
    t_replicate = seconds(reduced, layout.replicate, tp * layout.shard, 2) + replicas
    forward = shard_seconds("all-gather", "forward")
    backward = shard_seconds("all-gather", "backward") + shard_seconds("reduce-scatter", "backward") + t_replicate
    microbatch = useful + repeated + t_tp
    # The first unit's gather and the last unit's reduction have nothing to hide behind.
    exposed = max(forward / units, forward - times * microbatch / 3)
    exposed += max(backward / units, backward - times * microbatch * 2 / 3)
    # Neighbouring stages are on different nodes: a send each way for every microbatch, not hidden.
    hidden = layout.sequences * costs.T // tp * costs.D * layout.width
    time = {
        "compute": m * useful,
        "recompute": m * repeated,
        "tensor": m * t_tp,
        "sharding, exposed": exposed,
        "bubble": (pp - 1) * microbatch,
        "sends": 2 * (m + pp - 1) * (hidden / NETWORK + HOP) * (pp > 1),
    }
    return {"memory": memory, "time": time, "sharding": forward + backward}


def layouts(costs, gpus, batch):
    """All that TorchTitan and this model allow, in powers of two. FSDP takes part in each: without it TorchTitan trains
    in fp32."""
    powers = [1 << i for i in range(gpus.bit_length())]
    for tp, pp, shard in itertools.product(powers, repeat=3):
        if tp > GPUS_OF_A_NODE or pp > 16 or shard == 1 or gpus % (tp * pp * shard):
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
    """(layout, its estimate) of the shortest step, or None if nothing fits."""
    best = None
    for layout in layouts(costs, gpus, batch):
        found = estimate(costs, layout)
        if sum(found["memory"].values()) > USABLE * MEMORY:
            continue
        if best is None or sum(found["time"].values()) < sum(best[1]["time"].values()):
            best = layout, found
    return best


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
    chosen, memories, traffic, times = [], [], [], []
    for gpus in GPUS:
        found = plan(costs, gpus, batch)
        if found is None:
            least = min(sum(estimate(costs, layout)["memory"].values()) for layout in layouts(costs, gpus, batch))
            chosen.append([gpus, f"none fits: the least is {least / 1e9:.0f} GB a GPU", *[""] * 6])
            continue
        layout, cost = found
        degrees = (layout.replicate, layout.shard, layout.tp, layout.pp)
        chosen.append([gpus, *degrees, layout.sequences, layout.microbatches, layout.checkpointing])
        memory, time = cost["memory"], cost["time"]
        memories.append([gpus, *(f"{x / 1e9:.1f}" for x in (*memory.values(), sum(memory.values())))])
        stages = [costs.sent(layout, units) for units in costs.stages(layout.pp)]
        most = {key: max(stage.get(key, 0) for stage in stages) / 1e9 for key in KINDS}
        traffic.append([gpus, *(f"{x:,.1f}" if x else "" for x in most.values())])
        step, share = sum(time.values()), time["compute"] / sum(time.values())
        numbers = [f"{1e3 * x:,.0f}" for x in (*time.values(), step, cost["sharding"])]
        times.append([gpus, *numbers, f"{share:.0%}", f"{share * EFFICIENCY:.0%}"])
    degrees = ("replicate", "shard", "tensor", "pipeline", "sequences", "microbatches", "checkpointing")
    return [
        _description(name, costs, batch),
        _table(["GPUs", *degrees], chosen),
        "GB of the fullest rank:",
        _table(["GPUs", *memory, "sum"], memories),
        "GB that the groups of a rank gather, add up or send in a step:",
        _table(["GPUs", *map(" ".join, KINDS)], traffic),
        "Milliseconds of a step, and of FSDP2's communication, hidden or not:",
        _table(["GPUs", *time, "step", "sharding in all", "share of compute", "MFU"], times),
    ]


def plan_tables():
    return "\n\n".join(part for name in MODELS for part in _plans_of(name))


def write(tables):
    """Put each table between its two marks in the document."""
    text = DOCUMENT.read_text()
    for name, table in tables.items():
        marks = [f"<!-- {name} -->", f"<!-- end of {name} -->"]
        text, n = re.subn(
            "(?s)" + ".*".join(map(re.escape, marks)), lambda _: f"{marks[0]}\n\n{table}\n\n{marks[1]}", text
        )
        assert n == 1, f"{DOCUMENT} must have {marks[0]} and {marks[1]} once"
    DOCUMENT.write_text(text)


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
        write(tables)
    else:
        print("\n\n".join(tables.values()))
    raise SystemExit(any(formula != measured for *_, formula, measured in rows))


if __name__ == "__main__":
    main()
