"""Models of every other mixer train in every kind of layout as in one process: losses and gradient norms, in fp32."""

import pytest

from gdn2_titan.titan.torchtitan_version import IS_V02

from .runs import SHORT_RUN, WHOLE_RUN, arguments, assert_same, train, write_documents

LAYOUTS = {  # processes, data parallel degree, overrides
    "fsdp2-tp2": (4, 2, ("--parallelism.tensor_parallel_degree=2",)),
    "cp2": (2, 1, ("--parallelism.context_parallel_degree=2",)),
    "tp2-compiled": (2, 1, ("--parallelism.tensor_parallel_degree=2", "--compile.enable")),
    "cp2-compiled": (2, 1, ("--parallelism.context_parallel_degree=2", "--compile.enable")),
    "cp2-pp2": (4, 1, ("--parallelism.context_parallel_degree=2", "--parallelism.pipeline_parallel_degree=2")),
    "fsdp2-tp2-muon": (4, 2, ("--parallelism.tensor_parallel_degree=2", "--optimizer.name=Muon")),
}
SIZES = ("--gdn2.mamba_heads=4", "--gdn2.mamba_head_dim=8", "--gdn2.mamba_state=16")
PATTERNS = {
    "mamba2": (*SIZES, "--gdn2.layer_pattern=mamba2,swa"),
    "mamba3": (*SIZES, "--gdn2.layer_pattern=mamba3,swa"),
    "mamba3 MIMO": (*SIZES, "--gdn2.layer_pattern=mamba3,attention", "--gdn2.mamba_rank=2"),
    "DeltaNet": ("--gdn2.layer_pattern=gdn2,swa", "--gdn2.tied_gates=True", "--gdn2.decay=none"),
    "content gate": ("--gdn2.layer_pattern=gdn2,swa", "--gdn2.write_gate=scalar", "--gdn2.content_gate=True"),
}
# Every mixer in every kind of parallelism that it goes with; what reads no mixer's name, with one of them. The plans
# are the same objects under a second generation of TorchTitan, which has no pipelines here.
EVERY, ONE, ALONE = ("fsdp2-tp2", "cp2"), "mamba3 MIMO", "content gate"
CASES = [(ONE, name) for name in ([name for name in LAYOUTS if name != "cp2"] if IS_V02 else EVERY)]
CASES += [(pattern, name) for pattern in PATTERNS for name in EVERY if IS_V02 and pattern not in (ONE, ALONE)]
CASES += [(ALONE, "fsdp2-tp2")] if IS_V02 else []


def run_of(seed, folder, data_parallel, *extra):
    return [
        *arguments("debug_hybrid", folder / "run", seed / "documents.jsonl", batch=4 // data_parallel), *extra,
        f"--checkpoint.initial_load_path={seed / 'checkpoint' / 'step-0'}", "--checkpoint.no-initial_load_model_only",
        "--lr_scheduler.total_steps=10", "--validation.freq=3", "--gdn2.statistics_freq=3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mixer(request, tmp_path_factory):
    """The overrides of a model, the folder of its seed checkpoint, and the curves of one process by optimizer."""
    folder, changes = tmp_path_factory.mktemp("seed"), PATTERNS[request.param]
    write_documents(folder / "documents.jsonl")
    create = *changes, "--checkpoint.create_seed_checkpoint"
    train(1, folder / "out", arguments("debug_hybrid", folder, folder / "documents.jsonl", *create))
    return changes, folder, {}


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "name"), CASES, indirect=["mixer"])
def test_a_layout_trains_as_one_process(mixer, tmp_path, name):
    changes, seed, known = mixer
    world, data_parallel, overrides = LAYOUTS[name]
    optimizer = tuple(x for x in overrides if x.startswith("--optimizer"))
    if optimizer:  # a seed checkpoint has the state of another optimizer
        optimizer = *optimizer, "--checkpoint.exclude_from_loading=optimizer"
    if optimizer not in known:
        one = run_of(seed, tmp_path / "one", 1, *changes, *optimizer, WHOLE_RUN)
        [known[optimizer]] = train(1, tmp_path / "one", one)
    run = run_of(seed, tmp_path, data_parallel, *changes, *overrides, *optimizer[1:], SHORT_RUN)
    [found] = train(world, tmp_path / "out", run)
    assert_same(found, known[optimizer], last_step=3)
