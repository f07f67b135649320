"""How fast whole models train on one GPU: tokens a second, MFU and peak memory, beside what the paper reports.

    python benchmarks/train_gpu.py --out results

Flavors by batch shapes by eager, compiled and compiled float8. A step is what TorchTitan does on one device: autocast
to bf16 over fp32 parameters, cross entropy, clipped gradients, fused AdamW. Tokens are random, a sequence is one
document. Medians of CUDA-event times of whole steps. What fails, for memory or else, is a line in the results. To see
it run without a GPU: --device cpu --flavor debug --shape 64x2 --how eager --steps 2.
"""

import argparse
import gc
import itertools
import json
import pathlib
import statistics
import time

import torch
import torch.nn.functional as F
from tables import describe, one_line, table, write

from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.models.flops import flops_per_token, parameter_counts
from gdn2_titan.parallel import apply_compile, apply_float8

HOW = ("eager", "compiled", "float8")
SHAPES = ("2048x8", "4096x4", "8192x2", "16384x1")
# Tokens a second of the paper's 1.3B hybrid on one H100 (arXiv 2605.22791), by length.
PAPER = {("1.3B_hybrid", 2048): "38,000", ("1.3B_hybrid", 16384): "36,100"}
# Dense bf16 FLOP/s by a part of the device's name; the first that fits. Float8's MFU too is of these.
PEAKS = {
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12,
    "MI300X": 1307e12, "MI325X": 1307e12,
}  # fmt: skip


def loss_sum(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def _clock(device):
    """-> (mark(), milliseconds between two marks)."""
    if device.type == "cpu":
        return time.perf_counter, lambda start, end: 1e3 * (end - start)

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda start, end: start.elapsed_time(end)


def train(flavor, length, batch, how, device, warmup, steps):
    """{what: number} of one case."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = GDN2Model(flavors[flavor])
    n_params, n_embedding = parameter_counts(model)
    if how == "float8":
        apply_float8(model, "tensorwise")
    if how != "eager":
        apply_compile(model)
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()
    loss_of = loss_sum if how == "eager" else torch.compile(loss_sum)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(flavors[flavor].vocab_size, (batch, length + 1), device=device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model(inputs), labels) / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(warmup):
        step()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    mark, between = _clock(device)
    marks = [mark()]
    for _ in range(steps):
        loss = step()
        marks.append(mark())
    if cuda:
        torch.cuda.synchronize()
    ms = statistics.median(between(*pair) for pair in itertools.pairwise(marks))
    speed = batch * length / (1e-3 * ms)
    found = {"ms": ms, "tokens_per_second": speed, "loss": loss.item()}
    found["flops_per_second"] = speed * flops_per_token(flavors[flavor], n_params, n_embedding, length)
    if cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        peak = next((flops for name, flops in PEAKS.items() if name in torch.cuda.get_device_name()), None)
        if peak is not None:
            found["mfu"] = found["flops_per_second"] / peak
    return found


def measure(chosen):
    """A row for each case, printed as it is known."""
    device = torch.device(chosen.device)
    rows = []
    for flavor, (length, batch), how in itertools.product(chosen.flavor, chosen.shape, chosen.how):
        row = {"flavor": flavor, "length": length, "batch": batch, "how": how}
        try:
            row |= train(flavor, length, batch, how, device, chosen.warmup, chosen.steps)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:  # a case that breaks ends alone
            row["error"] = one_line(error)
        gc.collect()  # a model and its hooks refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def markdown(rows):
    lines = []
    for row in rows:
        numbers = [row.get("error", ""), "", ""]
        if "ms" in row:
            forms = {"tokens_per_second": "{:,.0f}", "mfu": "{:.0%}", "peak_gb": "{:.1f}"}
            numbers = [form.format(row[name]) if name in row else "-" for name, form in forms.items()]
        paper = PAPER.get((row["flavor"], row["length"]), "-")
        lines.append([row["how"], row["flavor"], f"{row['length']:,} x {row['batch']}", *numbers, paper])
    return [table(["how", "flavor", "length x batch", "tokens/s", "MFU", "peak GB", "paper, one H100"], lines)]


def _shape(text):
    length, _, batch = text.partition("x")
    return int(length), int(batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--flavor", nargs="+", choices=list(flavors), default=["400M", "1.3B_hybrid"])
    parser.add_argument("--shape", nargs="+", type=_shape, default=[_shape(x) for x in SHAPES], help="lengthxbatch")
    parser.add_argument("--how", nargs="+", choices=HOW, default=HOW)
    parser.add_argument("--warmup", type=int, default=5, help="steps")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device is 'cuda'; without a GPU it must be 'cpu'")
    facts = describe(chosen.device) | {"steps": chosen.steps, "warm-up": chosen.warmup}
    rows = measure(chosen)
    write(chosen.out, "train_gpu", facts, rows, markdown(rows))
    raise SystemExit(all("error" in row for row in rows))


if __name__ == "__main__":
    main()
