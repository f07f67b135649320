"""Write docs/kernels.md: what every kernel takes on every target at its default configuration, without any of them.

python benchmarks/aot_report.py
"""

import argparse
import pathlib

import triton
from aot import CASES, TARGETS, faults, reports
from calls import KINDS

PLACE = pathlib.Path(__file__).parents[1] / "docs" / "kernels.md"
HEAD = """# The kernels' machine code

By `python benchmarks/aot_report.py --kind {kinds}` with triton {version}, which compiles for
targets that are not there; the inputs are those of `benchmarks/aot.py`. Every kernel at its default configuration, for
each kind and size of input; registers
of a thread, bytes it spills, shared memory of a program in KB (of what the target has), instructions that multiply
matrices. "bf16" has the decay in fp32, "bf16 raw" is what a layer gives; "documents" are `resets` with an initial and
a final state, "packed" is `cu_seqlens` with both.
"""
COLUMNS = ("kernel", "inputs", "configuration", "registers", "spilled", "shared", "matrix instructions")


def _row(report):
    inputs = f"{report['kind']}, {report['size']}" + (f", {report['options']}" if report["options"] != "plain" else "")
    config = ", ".join(f"{name} {value}" for name, value in report["config"].items())
    if "error" in report:
        return (report["kernel"], inputs, config, "**does not compile**", "", "", "")
    shared = f"{report['shared'] / 1024:.0f} of {report['shared_limit'] // 1024}"
    matrix = ", ".join(f"{count} {name}" for name, count in report["matrix"].items())
    row = (report["kernel"], inputs, config, str(report["registers"]), str(report["spilled"]), shared, matrix)
    return tuple(f"**{cell}**" if cell else cell for cell in row) if faults(report) else row


def _table(rows):
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in dict.fromkeys(rows))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=PLACE)
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS), help="fp32 takes long to compile")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    found = {target: [] for target in chosen.target}
    for report in reports(chosen.target, [case for case in CASES if case[1] in chosen.kind], workers=chosen.workers):
        found[report["target"]].append(report)
        for fault in faults(report):
            print("{target} {op} {kind} {size} {options}, {kernel}:".format(**report), fault, flush=True)
    lines = [HEAD.format(version=triton.__version__, kinds=" ".join(repr(kind) for kind in chosen.kind))]
    wrong = sum(bool(faults(report)) for group in found.values() for report in group)
    lines += [f"{wrong} of {sum(map(len, found.values()))} break a promise; they are in bold.", ""]
    for target, group in found.items():
        lines += [f"## {target}", "", *_table(map(_row, group)), ""]
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
