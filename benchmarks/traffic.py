"""Count what the op moves: launches, and the bytes that each kernel loads and stores per token and key head.

    python benchmarks/traffic.py

The kernels run in Triton's interpreter on CPU tensors, in the default configuration of --arch, and every load and store
goes through a counter with its pointers and mask. Bytes are those that differ within one program: what a program reads
again it finds in its cache; "issued" is without that mercy, "distinct" counts an address once in a whole launch, as if
the cache between programs never missed. Memory traffic lies between "distinct" and "issued". PyTorch operators that the
op calls on the way count as launches too, each reading and writing its tensors once.
Each figure is the difference between two lengths, so that what a call costs once a sequence (its states) falls out.
One head stands for as many as fill the GPU. The floor: every input read once and every output written once. "segment"
is the forward of a rank of a context parallel group, which does not know the state that its tokens are entered with.
Each kind is counted with an erase gate, and without one ("no erase").
"""

import argparse
import collections
import contextlib
import json
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from calls import KINDS, gdn2_inputs, segment
from launches import recorded
from operators import Operators, bytes_of
from tables import table

from gdn2_titan.ops import chunk_gdn2

LENGTHS = (128, 256)
SIZE = 128  # K and V
# Of the launches of one kernel, bytes but for the first.
FIELDS = ("launches", "loaded", "stored", "issued", "distinct")


class Memory:
    """In the place of the interpreter's memory: notes the addresses of each program, and passes the access on."""

    def __init__(self, memory):
        self.memory = memory
        self.forget()

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def forget(self):
        self.touched = collections.defaultdict(list)  # (is it a store, program, bytes an element) -> addresses

    def _note(self, store, pointers, mask, size):
        program = interpreter.interpreter_builder.grid_idx
        self.touched[store, program, size].append(pointers[np.broadcast_to(mask, pointers.shape)].ravel())

    def load(self, pointers, mask, other, dtype):
        self._note(False, pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._note(True, pointers, mask, value.itemsize)
        return self.memory.store(pointers, value, mask)

    def add_to(self, row):
        """Add what was noted since the last ``forget`` as one launch."""
        everywhere = collections.defaultdict(list)
        for (store, _, size), accesses in self.touched.items():
            addresses = np.concatenate(accesses)
            row["issued"] += size * addresses.size
            addresses = np.unique(addresses)
            everywhere[store, size].append(addresses)
            row["stored" if store else "loaded"] += size * addresses.size
        distinct = sum(size * np.unique(np.concatenate(x)).size for (_, size), x in everywhere.items())
        row.update(launches=1, distinct=distinct)
        self.forget()


@contextlib.contextmanager
def _counting(architecture):
    """-> a function that begins a phase: {kernel or operator: Counter of FIELDS}, filled from then on."""
    memory = Memory(interpreter._interpreter)
    operators = Operators()

    def start(launch):
        operators.paused = True
        launch.kernel[launch.grid](**launch.args, **launch.constants, **launch.candidates[0])
        operators.paused = False
        memory.add_to(operators.rows[launch.name])

    with mock.patch.object(interpreter, "_interpreter", memory), recorded(architecture, start, processors=1), operators:
        yield operators.begin


def _count(kind, erases, T, architecture):
    """{phase: its kernels and operators}, {phase: the floor}, the bytes saved for backward."""
    inputs = gdn2_inputs(kind, 1, T, 1, SIZE, SIZE, erases=erases, requires_grad=True)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    do = torch.ones_like(inputs["v"])
    saved = {}

    def save(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    phases = {}
    with _counting(architecture) as begin:
        phases["forward"] = begin()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            o, _ = chunk_gdn2(**inputs, backend="triton")
        phases["backward"] = begin()
        grads = torch.autograd.grad(o, leaves, do)
        phases["segment"] = begin()
        with torch.no_grad():
            results = segment(**inputs)
    floors = {"forward": (leaves, o), "backward": (leaves, do, grads), "segment": (leaves, results)}
    return phases, {phase: bytes_of(x) for phase, x in floors.items()}, sum(saved.values())


def measure(kind, erases, architecture):
    """Per token and key head: {"forward": {"kernels": {name: {...}}, "total": {...}, "floor": bytes}, "backward": ...,
    "segment": ..., "saved": bytes}."""
    counts = (_count(kind, erases, T, architecture) for T in LENGTHS)
    (short, short_floors, short_saved), (long, long_floors, long_saved) = counts
    tokens = LENGTHS[1] - LENGTHS[0]
    result = {"saved": (long_saved - short_saved) / tokens}
    for phase, rows in long.items():
        kernels = {
            name: {x: (row[x] - short[phase][name][x]) / tokens for x in FIELDS} | {"launches": row["launches"]}
            for name, row in rows.items()
        }
        total = {x: sum(row[x] for row in kernels.values()) for x in FIELDS}
        floor = (long_floors[phase] - short_floors[phase]) / tokens
        result[phase] = {"kernels": kernels, "total": total, "floor": floor}
    return result


def _print(kind, found):
    print(f"{kind}; {found.pop('saved'):.0f} bytes saved for backward\n")
    rows = []
    for phase, of_phase in found.items():
        for name, row in (of_phase["kernels"] | {phase: of_phase["total"]}).items():
            numbers = (row["loaded"], row["stored"], row["loaded"] + row["stored"], row["issued"], row["distinct"])
            rows.append([name, row["launches"], *(f"{x:.0f}" for x in numbers)])
        rows.append([f"{phase}: inputs and outputs once", "", "", "", f"{of_phase['floor']:.0f}", "", ""])
    head = ["bytes per token and key head", "launches", "loaded", "stored", "both", "issued", "distinct"]
    print(f"{table(head, rows)}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="whose default configuration, e.g. 80 or 90")
    parser.add_argument("--kind", nargs="*", choices=list(KINDS), default=["bf16", "bf16 raw"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args()
    found = {kind: measure(kind, True, chosen.arch) for kind in chosen.kind}
    found |= {f"{kind}, no erase": measure(kind, False, chosen.arch) for kind in chosen.kind}
    if chosen.json:
        print(json.dumps(found))
        return
    for kind, of_kind in found.items():
        _print(kind, of_kind)


if __name__ == "__main__":
    main()
