"""How long a GDN-2 or softmax layer takes on 2 to 1,024 ranks that share a sequence: simulated, from measured costs.

    python benchmarks/context_parallel_simulation.py              # tables in Markdown
    python benchmarks/context_parallel_simulation.py --measure    # first time the operators on this machine
    python benchmarks/context_parallel_simulation.py --write      # and put the tables into docs/context_parallel.md
    python benchmarks/context_parallel_simulation.py --link 20e-6 5e-6 100e9    # tables for other links

A time is that of forward and backward of the sequence mixer alone (no projections) on the slowest rank, batch 1, and
nothing of the exchange is hidden. Computation is measured time per token and head, in COSTS; links are assumptions.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import context_parallel_bytes
from context_parallel_measured import measure

from gdn2_titan.ops import exchange_cost

COSTS = Path(__file__).with_name("context_parallel_costs.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "context_parallel.md"

H, K, V = 16, 128, 128  # heads of every layer; their sizes
WINDOW = 2048
MAP = 4 * H * K * K, 4 * H * K * V  # bytes of a segment's transition and state
RANKS, SHOWN = [2**i for i in range(1, 11)], (2, 8, 64, 256, 1024)
TOKENS = (2**17, 2**20, 2**24)
# An accelerator, assumed: it moves what tests/test_traffic.py allows the kernels, 17,600 bytes a token and head, at
# 70 % of 3.35 TB/s. What is measured is divided by one number, so that forward and backward take this long.
ACCELERATOR = 17_600 / (0.7 * 3.35e12)  # seconds
ATTENTION = 0.45 * 989e12  # FLOP/s of its softmax attention, as in parallel_plan.py


class Link(NamedTuple):  # a collective takes message + hop for each other rank that it deals with + bytes / bandwidth
    message: float  # seconds
    hop: float
    bandwidth: float  # bytes/s that a rank receives


LINKS = {
    "NVLink-class": Link(15e-6, 1e-6, 450e9),  # 900 GB/s both ways; all ranks in one domain
    "network-class": Link(20e-6, 5e-6, 50e9),  # 400 Gbit/s for each rank
    "10 Gbit/s": Link(50e-6, 50e-6, 1.25e9),
}


class Device(NamedTuple):
    name: str
    seconds: dict  # of a token and head; "product": of a head
    attention: float  # FLOP/s
    element: int  # bytes of an activation
    launch: float  # seconds

    @classmethod
    def measured(cls, costs):
        return cls("The measured device", costs["seconds"], costs["attention"], 4, 0.0)

    @classmethod
    def assumed(cls, costs):
        seconds = costs["seconds"]
        speed = (seconds["forward"] + seconds["backward"]) / ACCELERATOR
        seconds = {name: x / speed for name, x in seconds.items()}
        return cls(
            f"A device {speed:,.0f} times as fast as the measured one", seconds, ATTENTION, 2, exchange_cost.LAUNCH
        )


class Time(NamedTuple):
    exchange: float  # messages, and what puts maps together
    total: float


def handoff(device, link, tokens, ranks, form, per_rank=1):
    """GDN-2 as ``context_parallel_gdn2`` does it. form: "gather", "scan" or, by the model, "auto"."""
    if form == "auto":
        form = choice(ranks, per_rank)
    cost = device.seconds
    compute = tokens * H / ranks * (cost["segment"] + cost["read"] + cost["read_transposed"] + cost["backward"])
    steps = ranks.bit_length() - 1
    messages, peers = (2, ranks - 1) if form == "gather" else (2 * steps, 1)
    exchange = messages * (link.message + peers * link.hop)
    exchange += sum(exchange_cost.received(form, ranks, per_rank, *MAP)) / link.bandwidth
    half = H * cost["product"] / 2  # of the kernels that put maps together are products
    exchange += exchange_cost.launches(form, ranks, per_rank) * (device.launch + half)
    return Time(exchange, compute + exchange)


def choice(ranks, per_rank=1):
    return min(("gather", "scan"), key=lambda form: exchange_cost.seconds(form, ranks, per_rank, *MAP))


def flash_linear_attention(device, link, tokens, ranks):
    """Its pass for the map of a segment, 4 K (V + K) FLOPs a token, is charged what K more columns cost us: as many
    FLOPs for K = V. Forward once and backward once; both exchanges carry whole maps."""
    cost = device.seconds
    compute = tokens * H / ranks * (2 * cost["segment"] - cost["forward"] + cost["backward"])
    bytes_ = context_parallel_bytes.flash_linear_attention(ranks, 1, H, K, V)
    exchange = 2 * (link.message + (ranks - 1) * link.hop) + bytes_ / link.bandwidth
    exchange += 2 * (device.launch + (ranks - 1) * H * cost["product"])  # one kernel folds all maps
    return Time(exchange, compute + exchange)


def all_to_all_bytes(element, tokens, ranks):
    """That a rank receives in a direction: q, k, b, g (fp32), v, w and o, or their gradients."""
    return (element * (3 * K + 3 * V) + 4 * K) * H * tokens / ranks * (ranks - 1) / ranks


def all_to_all(device, link, tokens, ranks):
    """From sequence to heads and back, as Megatron does it; None where ranks do not divide the heads."""
    if H % ranks:
        return None
    compute = tokens * H / ranks * (device.seconds["forward"] + device.seconds["backward"])
    bytes_ = 2 * all_to_all_bytes(device.element, tokens, ranks)
    exchange = 4 * (link.message + (ranks - 1) * link.hop) + bytes_ / link.bandwidth
    return Time(exchange, compute + exchange)


def _attention(device, pairs):
    return 14 * K * H * pairs / device.attention  # 4 FLOPs for each pair and channel forward, 10 backward


def softmax(device, link, tokens, ranks, balanced=False):
    """Keys and values gathered, their gradients scattered; causal. balanced: head-tail shards."""
    local = tokens / ranks
    pairs = local * tokens / 2 if balanced else local * (tokens - local / 2)
    bytes_ = 2 * device.element * 2 * K * H * (tokens - local)
    exchange = 2 * (link.message + (ranks - 1) * link.hop) + bytes_ / link.bandwidth
    return Time(exchange, _attention(device, pairs) + exchange)


def window(device, link, tokens, ranks):
    """Keys and values of the WINDOW tokens before a shard, from the neighbour; from all ranks if shards are shorter."""
    local = tokens / ranks
    others, peers = (WINDOW, 1) if local >= WINDOW else (tokens - local, ranks - 1)
    exchange = 2 * (link.message + peers * link.hop) + 2 * device.element * 2 * K * H * others / link.bandwidth
    return Time(exchange, _attention(device, local * min(WINDOW, tokens)) + exchange)


SCHEMES = {
    "GDN-2, gather": lambda *a: handoff(*a, "gather"),
    "scan": lambda *a: handoff(*a, "scan"),
    "scan, head-tail": lambda *a: handoff(*a, "scan", 2),
    "as fla": flash_linear_attention,
    "all-to-all": all_to_all,
    "softmax": softmax,
    "softmax, head-tail": lambda *a: softmax(*a, balanced=True),
    f"window {WINDOW:,}": window,
}


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _tokens(n):
    return f"{n / 2**20:,.3g}M" if n >= 2**20 else f"{n / 2**10:,.3g}k" if n >= 2**10 else str(n)


def _seconds(time):
    if time is None:
        return "-"
    ms = 1e3 * time.total
    return f"{ms:,.{0 if ms >= 100 else 2}f}, {time.exchange / time.total:.0%}"


def times(device, link):
    rows = [
        [_tokens(n), r, choice(r), *(_seconds(scheme(device, link, n, r)) for scheme in SCHEMES.values())]
        for n, r in itertools.product(TOKENS, SHOWN)
    ]
    return _table(["tokens", "ranks", "model takes", *SCHEMES], rows)


def break_even(wins, ranks):
    """The shortest sequence, up to 2^26 tokens and within 2 %, from which on ``wins(tokens)``; None: never."""
    lengths = [ranks * 1.02**i for i in range(int(math.log(2**26 / ranks, 1.02)))]
    losing = max((i for i, tokens in enumerate(lengths) if not wins(tokens)), default=-1)
    return None if losing == len(lengths) - 1 else round(lengths[losing + 1])


def break_evens(device, link):
    def cell(other, ranks, i):
        def wins(tokens):
            return handoff(device, link, tokens, ranks, "auto")[i] < other(device, link, tokens, ranks)[i]

        if other(device, link, ranks, ranks) is None:
            return "-"
        at = break_even(wins, ranks)
        return "never" if at is None else "always" if at == ranks else _tokens(at)

    others = (all_to_all, SCHEMES["softmax, head-tail"])
    rows = [[r, choice(r), *(cell(other, r, i) for other in others for i in range(len(Time._fields)))] for r in RANKS]
    head = ["ranks", "model takes", "all-to-all: exchange", "whole", "gathering K and V: exchange", "whole"]
    return _table(head, rows)


def tables(costs):
    """{name of a table: Markdown}, those of the document."""
    measured, assumed = Device.measured(costs), Device.assumed(costs)
    seconds = costs["seconds"].items()
    return {
        "costs": _table(["operator", "nanoseconds"], [[name, f"{1e9 * x:,.0f}"] for name, x in seconds]),
        "times": f"**{assumed.name}, network-class links**\n\n{times(assumed, LINKS['network-class'])}",
    } | {
        f"break-even, {link}": f"**{device.name}, {link} links**\n\n{break_evens(device, LINKS[link])}"
        for device, link in ((assumed, "network-class"), (assumed, "NVLink-class"), (measured, "10 Gbit/s"))
    }


def write(tables):
    text = DOCUMENT.read_text()
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        assert mark and end, name
        text = f"{before}{mark}\n\n{table}\n\n{end}{after}"
    DOCUMENT.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help=f"time the operators here first, into {COSTS.name}")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/context_parallel.md")
    parser.add_argument("--link", nargs=3, type=float, metavar=("MESSAGE", "HOP", "BANDWIDTH"), help="seconds, bytes/s")
    chosen = parser.parse_args()
    if chosen.measure:
        COSTS.write_text(json.dumps(measure(H, K, V), indent=2) + "\n")
    costs = json.loads(COSTS.read_text())
    if chosen.write:
        write(tables(costs) | {"bytes": context_parallel_bytes.table(context_parallel_bytes.rows())})
    found = tables(costs).values()
    if chosen.link:
        devices = Device.measured(costs), Device.assumed(costs)
        found = [f"**{d.name}**\n\n{f(d, Link(*chosen.link))}" for d in devices for f in (times, break_evens)]
    print("\n\n".join(found))


if __name__ == "__main__":
    main()
