"""Which tests show what works with a version of TorchTitan.

``--versions FILE`` writes what they gave into a column of the table between two comments of a Markdown file.
"""

import importlib.metadata

__all__ = ["BEGIN", "END", "FEATURES", "installed", "read_table", "write_column"]

BEGIN = "<!-- versions: written by ./run_tests.sh --all --versions=docs/torchtitan.md -->"
END = "<!-- end of versions -->"

LAYOUTS, OPTIONS, RECORDED = (f"distributed/test_{name}.py" for name in ("layouts", "options", "recorded"))
RUNS, CONFIG, GENERATIONS = "test_training_runs.py", "test_titan_config.py", "test_titan_generations.py"
CONVERT, RECALL = "test_convert_titan.py", "distributed/test_recall.py"
TRAINS, AS_ONE = "test_a_layout_trains_as_one_process", "test_an_option_trains_as_one_plain_process"
# Layouts of TorchTitan 0.3 with the older of its two backends; the others have its default.
OLDER, DEFAULT = "partial_dtensor", "^(?!.*partial_dtensor)"
LAYOUT_KINDS = {
    "FSDP2": r"\bfsdp",
    "HSDP": "hsdp",
    "tensor and sequence parallelism": r"\btp\d",
    "context parallelism, head-tail": r"\bcp\d(?!-contiguous)",
    "context parallelism, one segment a rank": "contiguous",
    "pipeline parallelism (1F1B, interleaved)": r"\bpp\d",
}
TASKS = "^(alias|copying|locked|mqar|needle|overwrite|parity|permutations|rejected|selective_erase|stale|version)$"
# Feature: tests, by file, by how the name begins and by what its parameters say.
FEATURES = {
    **{kind: [(LAYOUTS, TRAINS, pattern, DEFAULT)] for kind, pattern in LAYOUT_KINDS.items()},
    "FSDP2": [(LAYOUTS, TRAINS, LAYOUT_KINDS["FSDP2"], DEFAULT), (OPTIONS, AS_ONE, "fsdp")],
    "context parallelism, head-tail": [
        (LAYOUTS, TRAINS, LAYOUT_KINDS["context parallelism, head-tail"], DEFAULT), ("test_titan_context.py", "test_"),
    ],
    **{f"{kind}; backend {OLDER}": [(LAYOUTS, TRAINS, pattern, OLDER)] for kind, pattern in LAYOUT_KINDS.items()},
    "a checkpoint of one backend continues with the other": [(LAYOUTS, "test_a_checkpoint_continues", "er-.*er$")],
    "torch.compile of each block": [
        (LAYOUTS, "test_a_layout_trains_as_one_process_when_blocks_are_compiled"),
        (OPTIONS, AS_ONE, "compiled|inductor"),
    ],
    "activation checkpointing": [
        ("test_titan_activation_checkpoint.py", "test_"), (OPTIONS, AS_ONE, "checkpointed|memory budget"),
    ],
    "float8 and MXFP8, emulated": [("test_titan_float8.py", "test_"), (RECORDED, "test_", "float8|mxfp8")],
    "losses and gradient norms of 0.2.2": [(RECORDED, "test_"), (RECALL, "test_its_accuracies")],
    "checkpoint and resume, after SIGKILL and under another layout": [
        (RUNS, "test_a_run_killed"), (RUNS, "test_a_finished_run"), (LAYOUTS, "test_a_checkpoint_continues"),
        (LAYOUTS, "test_a_rank_that_dies"),
    ],
    "checkpoints of the other generation": [(GENERATIONS, "test_a_checkpoint_of_either_generation")],
    "Hugging Face export and import": [(CONVERT, "test_"), ("test_perplexity.py", "test_")],
    "validation": [("test_accuracy.py", "test_"), (RUNS, "test_the_loss_falls"), ("test_perplexity.py", "test_")],
    "gate telemetry": [(RUNS, "test_the_loss_falls"), (LAYOUTS, TRAINS)],
    "recall tasks": [
        ("test_tasks.py", "test_"), (RECALL, "test_"), ("test_study_recall.py", "test_"),
        (RECORDED, "test_", TASKS),
    ],
    "every file in train_configs starts": [
        (CONFIG, "test_every_shipped_config"), (RUNS, "test_a_shipped_config"), (RECORDED, "test_", TASKS),
    ],
    "a wrong config ends with one sentence": [
        (CONFIG, "test_a_config_that_cannot_train"), (CONFIG, "test_a_layout_that_eight"),
        (CONFIG, "test_a_wrong_toml"), (GENERATIONS, "test_a_field_without_counterpart"),
        (GENERATIONS, "test_a_config_that_cannot_train"), ("test_titan_settings.py", "test_"),
    ],
    "the lines above that launch": [(RUNS, "test_a_line_of_the_readme")],
}  # fmt: skip


def installed():
    """The head of the column of this environment."""
    titan, torch = (importlib.metadata.version(name).partition("+")[0] for name in ("torchtitan", "torch"))
    return f"TorchTitan {titan}, torch {torch}"


def _cells(line):
    return [cell.strip() for cell in line[1:-1].split("|")]


def read_table(text):
    """(heads of the columns, {row: {head: cell}}) of the table between the comments."""
    lines = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].split("\n")[1:-1]
    if not lines:
        return [], {}
    _, *heads = _cells(lines[0])
    rows = (_cells(line) for line in lines[2:])
    return heads, {row: dict(zip(heads, cells, strict=True)) for row, *cells in rows}


def write_column(path, cells):
    """Puts what FEATURES gave, {feature: cell}, in the column of the installed versions; keeps the others."""
    text, mine = path.read_text(), installed()
    heads, rows = read_table(text)
    heads = sorted({*heads, mine})
    table = [["", *heads], ["---"] * (len(heads) + 1)]
    for feature, cell in cells.items():
        said = rows.get(feature, {}) | {mine: cell.replace("|", "/")}
        table.append([feature, *(said.get(head, "not run") for head in heads)])
    lines = ["| " + " | ".join(row).lstrip() + " |" for row in table]
    path.write_text(text[: text.index(BEGIN) + len(BEGIN)] + "\n" + "\n".join(lines) + "\n" + text[text.index(END) :])
