"""What backend "batch_invariant" costs on a CPU, beside "torch" in one run, and that its bits are what it promises.

    python benchmarks/batch_invariant.py                   # debug_hybrid and debug, 2 rows of 512 tokens
    python benchmarks/batch_invariant.py --flavor 150M --length 128 --rows 2

Each line is a ratio of medians, of runs that take turns: a forward pass, forward and backward, and a step of one token
after a text of the length.
"""

import argparse
import dataclasses
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.models.decoding import Decoding


def models(flavor):
    """{backend: GDN2Model}, of the same weights."""
    made = {}
    for backend in ("torch", "batch_invariant"):
        torch.manual_seed(0)
        made[backend] = GDN2Model(dataclasses.replace(flavors[flavor], backend=backend)).eval()
        made[backend].init_weights()
    return made


def check_bits(model, ids):
    """A row alone, and token by token, against the row in the batch."""
    with torch.no_grad():
        whole = model(ids)
        assert torch.equal(model(ids[1:2]), whole[1:2]), "a row alone has other bits"
        decoding = Decoding(model)
        steps = torch.cat([decoding(token) for token in ids[:1].split(1, 1)])
    assert torch.equal(steps, whole[0]), "a step has other bits"


def forward(model, ids):
    with torch.no_grad():
        model(ids)


def forward_backward(model, ids):
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def seconds(run, *args):
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def medians(runs, repeats):
    """{name: median seconds} of {name: function}, which take turns."""
    for run in runs.values():
        run()
    taken = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(times) for name, times in taken.items()}


def say(what, runs, repeats):
    found = medians(runs, repeats)
    plain, invariant = found["torch"], found["batch_invariant"]
    print(f"  {what:22} {plain * 1e3:9.1f} ms {invariant * 1e3:9.1f} ms   {invariant / plain:6.1f} times", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavor", nargs="+", default=["debug_hybrid", "debug"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, fp32")
    for flavor in options.flavor:
        made = models(flavor)
        ids = torch.randint(flavors[flavor].vocab_size, (options.rows, options.length))
        check_bits(made["batch_invariant"], ids)
        print(f"{flavor}, {options.rows} rows of {options.length} tokens: torch, batch_invariant")
        say("forward", {name: lambda m=model: forward(m, ids) for name, model in made.items()}, options.repeats)
        say(
            "forward and backward",
            {name: lambda m=model: forward_backward(m, ids) for name, model in made.items()},
            options.repeats,
        )
        read = {name: Decoding(model) for name, model in made.items()}
        for decoding in read.values():
            decoding(ids[:1])
        say(
            "a step of one token",
            {name: lambda d=d: d.again()(ids[:1, :1]) for name, d in read.items()},
            4 * options.repeats,
        )


if __name__ == "__main__":
    main()
