"""The recall study's rows as Markdown."""

from .results import capacity, spread

__all__ = ["accuracy_table", "capacity_table", "separation_table"]


def _table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cell(rows):
    """Mean and range over seeds, in percent."""
    mean, low, high = spread(rows)
    return f"{mean:.1%} ({low:.0%} to {high:.0%})"


def _mixers(rows):
    return list(dict.fromkeys(row.mixer for row in rows))


def accuracy_table(rows, axis):
    """Of one task, one line a mixer: accuracy at each value of ``axis`` ("pairs" or "length")."""
    values = sorted({getattr(row, axis) for row in rows})
    lines = [
        [mixer, *(_cell([r for r in rows if r.mixer == mixer and getattr(r, axis) == value]) for value in values)]
        for mixer in _mixers(rows)
    ]
    return _table(["mixer", *(f"{value} {'pairs' if axis == 'pairs' else 'tokens'}" for value in values)], lines)


def capacity_table(rows):
    """Of one task at one length: parameters, state and the pairs held at 90% accuracy, in all and per KB of state."""
    lines = []
    for mixer in _mixers(rows):
        mine = [row for row in rows if row.mixer == mixer]
        held, more = zip(
            *(capacity({r.pairs: r.accuracy for r in mine if r.seed == seed}) for seed in {r.seed for r in mine}),
            strict=True,
        )
        kilobytes = mine[0].state_bytes / 1000
        mean, least = sum(held) / len(held), "at least " if any(more) else ""
        lines.append(
            [
                mixer,
                f"{mine[0].parameters:,}",
                f"{kilobytes:.2f}",
                f"{least}{mean:.1f} ({min(held):.1f} to {max(held):.1f})",
                f"{least}{mean / kilobytes:.2f}",
            ]
        )
    return _table(["mixer", "parameters", "state, KB", "pairs held at 90%", "pairs per KB"], lines)


def separation_table(rows):
    """Of one task: under how many of its conditions every seed of a line's mixer is above every seed of a column's."""
    names, conditions = _mixers(rows), {(row.pairs, row.length) for row in rows}
    ranges = {
        (mixer, at): spread([row for row in rows if row.mixer == mixer and (row.pairs, row.length) == at])[1:]
        for mixer in names
        for at in conditions
    }

    def above(mixer, other):
        return sum(ranges[mixer, at][0] > ranges[other, at][1] for at in conditions)

    lines = [[mixer, *("" if mixer == x else str(above(mixer, x)) for x in names)] for mixer in names]
    return _table([f"of {len(conditions)}, above", *names], lines)
