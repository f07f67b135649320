"""What a rank receives for one GDN-2 layer under context parallelism, counted, and against flash-linear-attention's.

    python benchmarks/context_parallel_bytes.py           # a table in Markdown; exit code 1 if count and formula differ
    python benchmarks/context_parallel_bytes.py --json    # the same as a list of rows
    python benchmarks/context_parallel_bytes.py --write   # put the table into docs/context_parallel.md

Processes over gloo run ``context_parallel_gdn2`` forward and backward at two lengths. Every collective that PyTorch is
asked for is counted by its arguments: all that arrives from other ranks, one's own part of an all-gather does not.
"""

import argparse
import itertools
import json

import torch
import torch.distributed as dist
from processes import Collectives, run
from tables import DOCS, fill, table

from gdn2_titan.ops import context_parallel_gdn2
from gdn2_titan.ops.context_parallel.exchange import received
from gdn2_titan.ops.context_parallel.layout import LAYOUTS

__all__ = ["flash_linear_attention", "markdown", "rows"]

RANKS = (2, 4, 8)
EXCHANGES = ("gather", "scan")
LENGTHS = (32, 192)  # tokens of a rank
B, H, K, V = 1, 2, 16, 16
CASES = [*itertools.product(RANKS, LAYOUTS, EXCHANGES, (False, True))]  # the last: with the final state?


# Bytes that arrive at a rank; of all-reduces, which only the final state's gradient needs, apart.
COLLECTIVES = {
    "_c10d_functional.all_gather_into_tensor_coalesced": lambda xs, size, _: (
        "exchanged", sum(x.nbytes for x in xs) * (size - 1)
    ),
    "_c10d_functional.all_to_all_single": lambda x, sizes, *_: (
        "exchanged", (sum(sizes) - sizes[dist.get_rank()]) * x.shape[1:].numel() * x.itemsize
    ),
    "_c10d_functional.all_reduce": lambda x, *_: ("reduced", x.nbytes),
}  # fmt: skip


def flash_linear_attention(size, per_rank, heads, key_dim, value_dim):
    """What its ranks receive (fla-core 0.6.0), forward and backward: the maps, in fp32, in both directions."""
    return 2 * (size - 1) * per_rank * heads * key_dim * (key_dim + value_dim) * 4


def _call(group, layout, exchange, final, length):
    """Bytes of this rank: exchanged forward, exchanged backward, reduced."""
    inputs = [torch.randn(B, length, H, size, requires_grad=True) for size in (K, K, V, K, K, V)]
    with Collectives(COLLECTIVES) as forward:
        o, state = context_parallel_gdn2(
            *inputs, group=group, layout=layout, exchange=exchange, output_final_state=final, A_log=torch.zeros(H),
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_sigmoid_in_kernel=True,
        )  # fmt: skip
    loss = o.sum() + (state.sum() if final else 0)
    with Collectives(COLLECTIVES) as backward:
        loss.backward()
    reduced = forward.bytes["reduced"] + backward.bytes["reduced"]
    return forward.bytes["exchanged"], backward.bytes["exchanged"], reduced


def _count():
    """Bytes of this rank for each of CASES and LENGTHS; nothing where it is no rank of the case."""
    groups = {size: dist.new_group(range(size)) for size in RANKS}
    return [
        [_call(groups[size], layout, exchange, final, length) for length in LENGTHS] if dist.get_rank() < size else None
        for size, layout, exchange, final in CASES
    ]


def rows():
    """A dict for each of CASES. "counted": (forward, backward) of the rank that receives most, for each of LENGTHS."""
    result = []
    for (size, layout, exchange, final), ranks in zip(CASES, zip(*run(_count, max(RANKS)), strict=True), strict=True):
        counted = [[max(n) for n in zip(*one, strict=True)][:2] for one in zip(*ranks[:size], strict=True)]
        (reduced,) = {n for lengths in ranks[:size] for _, _, n in lengths}  # alike everywhere
        per_rank = LAYOUTS.index(layout) + 1
        transition, state = B * H * K * K * 4, B * H * K * V * 4
        formula = [*received(exchange, size, per_rank, transition, state, final)]
        ratio = sum(counted[0]) / flash_linear_attention(size, per_rank, B * H, K, V)
        found = {"counted": counted, "formula": formula, "reduced": reduced, "state": state, "ratio": ratio}
        result.append({"ranks": size, "layout": layout, "exchange": exchange, "final": final} | found)
    return result


def markdown(result):
    """For calls without the final state, in Markdown."""
    lengths = " and ".join(f"{length:,}" for length in LENGTHS)
    heading = f"received forward, backward at {lengths} tokens a rank"
    lines = []
    for row in result:
        if not row["final"]:
            both = [f"{forward:,} + {backward:,}" for forward, backward in (*row["counted"], row["formula"])]
            counted, formula = "; ".join(both[:-1]), both[-1]
            lines.append([row["ranks"], row["layout"], row["exchange"], counted, formula, f"{row['ratio']:.2f}"])
    return table(["ranks", "layout", "exchange", heading, "formula", "of FLA's"], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/context_parallel.md")
    chosen = parser.parse_args()
    result = rows()
    if chosen.write:
        fill(DOCS / "context_parallel.md", {"bytes": markdown(result)})
    else:
        print(json.dumps(result) if chosen.json else markdown(result))
    raise SystemExit(any(counted != row["formula"] for row in result for counted in row["counted"]))


if __name__ == "__main__":
    main()
