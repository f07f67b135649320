"""What ``op_gpu.py`` measured, on paper: JSON, CSV, Markdown and a plot."""

import csv
import json

__all__ = ["OURS", "write"]

OURS = "gdn2_titan"


def write(folder, device, rows):
    """device: facts by name. rows: dicts with benchmark, mode, size, implementation, and either ms, copy_fraction and
    peak_mb, or error."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "op_gpu.json").write_text(json.dumps({"device": device, "rows": rows}, indent=1))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "op_gpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(device, rows)
    (folder / "op_gpu.md").write_text(text)
    _plot(folder / "op_gpu.png", device, rows)
    return text


def _groups(rows):
    """(benchmark, mode) -> {size: {implementation: row}}."""
    groups = {}
    for row in rows:
        group = groups.setdefault((row["benchmark"], row["mode"]), {})
        group.setdefault(row["size"], {})[row["implementation"]] = row
    return groups


def markdown(device, rows):
    lines = [", ".join(f"{name} {value}" for name, value in device.items()), ""]
    for (benchmark, mode), sizes in _groups(rows).items():
        names = list(dict.fromkeys(name for group in sizes.values() for name in group))
        others = [name for name in names if name != OURS]
        head = ["size", *(f"{name}, ms" for name in names), *(f"{name} / ours" for name in others)]
        head += ["ours, of copy bandwidth", *(f"{name}, MB" for name in names)]
        lines += [f"### {benchmark}, {mode}", "", f"| {' | '.join(head)} |", "| ---: " * len(head) + "|"]
        for size, group in sizes.items():
            cells = [f"{size:,}", *(_cell(group, name, "ms", "{:.3f}") for name in names)]
            cells += [_ratio(group, name) for name in others]
            cells += [_cell(group, OURS, "copy_fraction", "{:.0%}")]
            cells += [_cell(group, name, "peak_mb", "{:,.0f}") for name in names]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    failures = [row for row in rows if "error" in row]
    if failures:
        lines += ["Did not run:", ""]
        lines += ["- {benchmark}, {mode}, {size:,}, {implementation}: {error}".format(**row) for row in failures]
        lines.append("")
    return "\n".join(lines)


def _cell(group, name, field, form):
    row = group.get(name, {})
    return form.format(row[field]) if field in row else "-"


def _ratio(group, name):
    times = [group.get(x, {}).get("ms") for x in (name, OURS)]
    return "-" if None in times else f"{times[0] / times[1]:.2f}"


def _plot(path, device, rows):
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'gdn2_titan[bench]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(rows)
    figure, axes = pyplot.subplots(1, len(groups), figsize=(5 * len(groups), 4), squeeze=False)
    for axis, ((benchmark, mode), sizes) in zip(axes[0], groups.items(), strict=True):
        for name in dict.fromkeys(name for group in sizes.values() for name in group):
            points = [(size, group[name]["ms"]) for size, group in sizes.items() if "ms" in group.get(name, {})]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", title=f"{benchmark}, {mode}", ylabel="ms")
        axis.set_xscale("log", base=2)
        axis.legend()
    figure.suptitle("{device}, torch {torch}, triton {triton}, {date}".format(**device))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
