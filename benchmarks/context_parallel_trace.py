"""That the exchange of maps is under way while a rank computes what does not depend on it, in a profiler's trace.

    python benchmarks/context_parallel_trace.py --out traces    # traces/gather.json and scan.json, for chrome://tracing

Two processes over gloo do what a layer does between the two halves of the operator: a projection of its input, forward,
and both of its products, backward. Printed are the operators that ran between the start of each exchange and the wait
for it.
"""

import argparse
import collections
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch.profiler import ProfilerActivity, profile, record_function

from gdn2_titan.ops.context_parallel.api import begin_gdn2
from gdn2_titan.ops.context_parallel.layout import SequenceShards
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options

__all__ = ["between"]

WORLD = 2
EXCHANGES = {"gather": "all_gather_into_tensor_coalesced", "scan": "all_to_all_single"}
B, T, H, K, D = 1, 256, 16, 128, 1024  # T: of a rank


def _step(inputs, x, weight, shards, exchange):
    options = GDN2Options(None, l2norm=True, gate=True, sigmoid=True)
    finish = begin_gdn2(GDN2Inputs(*inputs, torch.zeros(H)), options, shards, exchange=exchange)
    gate = F.linear(x, weight)
    o, _ = finish()
    return (o.flatten(2) * gate.sigmoid()).sum()


def _trace(folder):
    """[(exchange, phase, what ``between`` says)] of this rank; rank 0 writes its traces, if there is a folder."""
    shards = SequenceShards.of(dist.group.WORLD, "contiguous")
    inputs = [torch.randn(B, T, H, K, requires_grad=True) for _ in range(6)]
    x, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(H * K, D, requires_grad=True)
    found = []
    for exchange in EXCHANGES:
        _step(inputs, x, weight, shards, exchange).backward()  # what is set up once
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            with record_function("forward"):
                loss = _step(inputs, x, weight, shards, exchange)
            with record_function("backward"):
                loss.backward()
        if folder is not None and dist.get_rank() == 0:
            profiler.export_chrome_trace(str(folder / f"{exchange}.json"))
        found += [(exchange, phase, between(profiler.events(), exchange, phase)) for phase in ("forward", "backward")]
    return found


def between(events, exchange, phase):
    """Outermost ATen operators on the calling thread between the exchange and its wait, in order. phase: "forward" or
    "backward"."""
    (whole,) = (e for e in events if e.name == phase)
    first, last = whole.time_range.start, whole.time_range.end
    inside = [e for e in events if first <= e.time_range.start and e.time_range.end <= last]
    here = [(e.time_range.start, -e.time_range.end, e.name) for e in inside if e.thread == whole.thread]
    here.sort()  # what is called inside another comes after it
    start = next(-end for _, end, name in here if name == f"_c10d_functional::{EXCHANGES[exchange]}")
    wait = next(begin for begin, _, name in here if name == "_c10d_functional::wait_tensor" and begin >= start)
    names, busy_until = [], start
    for begin, end, name in here:
        if name.startswith("aten::") and busy_until <= begin and -end <= wait:
            names.append(name)
            busy_until = -end
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for the traces")
    folder = parser.parse_args().out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for exchange, phase, names in run(_trace, WORLD, folder)[0]:
        counts = ", ".join(f"{n} x {name}" for name, n in collections.Counter(names).items())
        print(f"{exchange}, {phase}: {counts}")


if __name__ == "__main__":
    main()
