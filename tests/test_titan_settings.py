"""Every setting that TorchTitan reads: what it may be, and the one sentence that refuses anything else."""

import dataclasses
import functools
import math
import os
import sys
import typing

import pytest

pytest.importorskip("torchtitan")

from gdn2_titan.titan.check import main as check_command
from gdn2_titan.titan.checks.command_line import check_arguments, check_table
from gdn2_titan.titan.checks.ranges import ANY, ELSEWHERE, IGNORED, RANGES
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.job_config import JobConfig, parse, validate
from gdn2_titan.titan.torchtitan_version import IS_V02
from tests.config_cases import check, write_toml
from tests.generations import only_functions, only_toml
from tests.training import DEBUG_HYBRID, ROOT, SHORT, launch

NAN, INF = math.nan, math.inf
NO_COUNT, NO_SIZE, NO_SHARE = [0, -1], [-1], [-0.1, 1.5, NAN, INF]
NO_MOMENT, NO_AMOUNT = [-0.1, 1.0, 2.0, NAN], [-1e-3, NAN, INF, -INF]
SHAPES = ["Linear", "exponential", ""]
DTYPES = ["float64", "bf16", ""]
MESH, ENABLED, COMPILED = {"WORLD_SIZE": "8"}, {"checkpoint.enable": True}, {"compile.enable": True}
PIPELINE = {"parallelism.pipeline_parallel_degree": 2}
# The last of four layers is left out.
STAGES = [["tok_embeddings", "layers.0", "layers.1"], ["layers.2", "norm", "output"]]
ADAMW, MUON = {"optimizer.name": "AdamW"}, {"optimizer.name": "Muon"}
FLOAT8 = {"model.converters": ["quantize.linear.float8"], "quantize.linear.float8.emulate": True}
MX = {"model.converters": ["quantize.linear.mx"], "quantize.linear.mx.emulate": True}

# Field: values that it may not have; some with the settings beside which, or the environment in which, they are wrong.
WRONG = {
    "job.dump_folder": [__file__, f"{__file__}/outputs"],
    "job.save_config_file": ["", "configs/"],
    "job.custom_config_module": ["no.such.module", "gdn2_titan.titan.job_confg"],
    "experimental.custom_import": ["no.such.module", "examples.no_such"],
    "profiling.profile_freq": NO_COUNT,
    "profiling.profiler_active": NO_COUNT,
    "profiling.profiler_warmup": NO_SIZE,
    "metrics.log_freq": NO_COUNT,
    "model.name": ["gdn3", "GDN2", ""],
    "model.flavor": ["debgu", ""],
    "model.hf_assets_path": ["/no/tokenizer", ""],
    "model.tokenizer_path": ["/no/tokenizer"],
    "model.converters": [["float8"], ["quantize.linear.float8", "quantize.linear.mx"], ["quantize.grouped_mm.mx"]],
    "optimizer.name": ["SGD", "adamw", ""],
    "optimizer.lr": NO_AMOUNT,
    "optimizer.beta1": NO_MOMENT,
    "optimizer.beta2": NO_MOMENT,
    "optimizer.eps": [0.0, *NO_AMOUNT],
    "optimizer.weight_decay": NO_AMOUNT,
    "optimizer.implementation": ["fast", "Fused"],
    "optimizer.early_step_in_backward": [True],
    "optimizer.weight_decay_on": ["everything", "Matrices", ""],
    "optimizer.muon_lr": [*NO_AMOUNT, (0.01, ADAMW)],
    "optimizer.muon_momentum": [*NO_MOMENT, (0.9, ADAMW)],
    "optimizer.muon_nesterov": [(False, ADAMW)],
    "optimizer.muon_ns_steps": [0, -1, 100, (4, ADAMW)],
    "optimizer.muon_adjust_lr_fn": ["adamw", "", ("original", ADAMW), ("original", MUON)],
    "lr_scheduler.warmup_steps": NO_SIZE,
    "lr_scheduler.total_steps": NO_COUNT,
    "lr_scheduler.decay_ratio": NO_SHARE,
    "lr_scheduler.decay_type": SHAPES,
    "lr_scheduler.min_lr_factor": NO_SHARE,
    "training.dataset": ["c4_test", ""],
    "training.dataset_path": ["/no/such.txt"],
    "training.local_batch_size": NO_COUNT,
    "training.global_batch_size": [0, -2, (12, {})],
    "training.seq_len": NO_COUNT,
    "training.max_norm": [0, -1, -0.5, NAN, -INF],
    "training.steps": NO_COUNT,
    "training.dtype": DTYPES,
    "training.gc_debug": [(True, {})],
    "training.mixed_precision_param": DTYPES,
    "training.mixed_precision_reduce": ["bfloat16", *DTYPES],
    "training.gc_freq": NO_COUNT,
    "training.dataloader.num_workers": NO_SIZE,
    "training.dataloader.prefetch_factor": [0, -1, (2, {})],
    "training.dataloader.persistent_workers": [True],
    "validation.dataloader.num_workers": NO_SIZE,
    "validation.dataloader.prefetch_factor": [0, -1, (2, {})],
    "validation.dataloader.persistent_workers": [True],
    "parallelism.data_parallel_replicate_degree": [0, -1, 2],
    "parallelism.data_parallel_shard_degree": [0, -2, 3],
    "parallelism.fsdp_reshard_after_forward": ["sometimes", True],
    "parallelism.tensor_parallel_degree": [0, -1, 2],
    "parallelism.context_parallel_degree": [0, -1, 2],
    "parallelism.pipeline_parallel_degree": [0, -1, 2],
    "parallelism.expert_parallel_degree": [0, 2],
    "parallelism.expert_tensor_parallel_degree": [0, 2],
    "parallelism.expert_parallel_comm_backend": ["deepep"],
    "parallelism.enable_async_tensor_parallel": [True],
    "parallelism.module_fqns_per_model_part": [
        (STAGES, PIPELINE, MESH),
        ([[*STAGES[0], "layers.3"], STAGES[1]], PIPELINE, MESH),
        ([STAGES[0], ["layers.2", "layer.3", "norm", "output"]], PIPELINE, MESH),
    ],
    "parallelism.pipeline_parallel_first_stage_less_layers": NO_SIZE,
    "parallelism.pipeline_parallel_last_stage_less_layers": NO_SIZE,
    "parallelism.pipeline_parallel_layers_per_stage": NO_COUNT,
    "parallelism.pipeline_parallel_schedule": ["1B1F", ""],
    "parallelism.pipeline_parallel_schedule_csv": [("/no.csv", PIPELINE, MESH)],
    "parallelism.pipeline_parallel_microbatch_size": [*NO_COUNT, (3, PIPELINE, MESH)],
    "parallelism.pipeline_parallel_expert_parallel_overlap": [False],
    "parallelism.context_parallel_load_balancer": ["ptrr", ""],
    "parallelism.context_parallel_rotate_method": ["alltoall"],
    "checkpoint.enable_ft_dataloader_checkpoints": [False],
    "checkpoint.folder": ["", " "],
    "checkpoint.interval": NO_COUNT,
    "checkpoint.initial_load_path": ["/no/step-1", ("/no/step-1", ENABLED), (str(ROOT), ENABLED)],
    "checkpoint.initial_load_in_hf": [True, (True, {**ENABLED, "checkpoint.initial_load_model_only": False})],
    "checkpoint.initial_load_in_hf_quantized": [(True, ENABLED)],
    "checkpoint.last_save_in_hf": [(True, ENABLED)],
    "checkpoint.export_dtype": [*DTYPES, ("bfloat16", ENABLED)],
    "checkpoint.async_mode": ["asynchronous", ("async_with_pinned_mem", ENABLED)],
    "checkpoint.keep_latest_k": [1, -1],
    "checkpoint.load_step": [-2, (77, {}), (77, ENABLED)],
    "checkpoint.exclude_from_loading": [["optimiser"], ["model"], ["optimizer", "optimizer"]],
    "checkpoint.enable_first_step_checkpoint": [(True, {**ENABLED, "checkpoint.load_only": True})],
    "checkpoint.create_seed_checkpoint": [
        True, (True, ENABLED, MESH), (True, {**ENABLED, "checkpoint.load_only": True})
    ],
    "activation_checkpoint.mode": ["ful", ("memory_budget", {})],
    "activation_checkpoint.selective_ac_option": ["ops", "0", "-1", "1.5", ""],
    "activation_checkpoint.memory_budget": NO_SHARE,
    "activation_checkpoint.determinism_check": ["strict"],
    "compile.components": [["modle"], ["model", "optimizer"], ["loss", "loss"], ([], COMPILED)],
    "compile.backend": [("indcutor", COMPILED)],
    "quantize.linear.float8.enable_fsdp_float8_all_gather": [
        (True, FLOAT8 | {"quantize.linear.float8.recipe_name": "rowwise"})
    ],
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": [(True, FLOAT8)],
    "quantize.linear.float8.recipe_name": ["rowwize"],
    "quantize.linear.float8.filter_fqns": [(["auto_filter_small_kn"], FLOAT8)],
    "quantize.linear.float8.smallest_side": NO_SIZE,
    "quantize.linear.float8.emulate": [(False, FLOAT8)],
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": [("cuda", MX)],
    "quantize.linear.mx.recipe_name": ["mxfp9"],
    "quantize.linear.mx.filter_fqns": [(["auto_filter_small_kn"], MX)],
    "quantize.linear.mx.smallest_side": NO_SIZE,
    "quantize.linear.mx.emulate": [(False, MX)],
    "quantize.grouped_mm.float8.fqns": [["experts"]],
    "quantize.grouped_mm.mx.recipe_name": ["mxfp9"],
    "quantize.grouped_mm.mx.fqns": [["experts"]],
    "comm.init_timeout_seconds": [*NO_COUNT, 10**15],
    "comm.train_timeout_seconds": [*NO_COUNT, 10**15],
    "comm.trace_buf_size": NO_SIZE,
    "comm.mode": ["fake_backend", "local_tensor", "gloo"],
    "memory_estimation.enable": [True],
    "memory_estimation.disable_fake_mode": [True],
    "fault_tolerance.enable": [True],
    "fault_tolerance.process_group": ["nccl"],
    "fault_tolerance.process_group_timeout_ms": [1],
    "fault_tolerance.replica_id": [1],
    "fault_tolerance.group_size": [2],
    "fault_tolerance.min_replica_size": [2],
    "fault_tolerance.semi_sync_method": ["diloco"],
    "experimental.custom_args_module": ["gdn2_titan.titan.job_config"],
    "validation.dataset": [("c4_validation", {"validation.enable": True})],
    "validation.dataset_path": [("/no/such.txt", {"validation.enable": True, "validation.dataset": "files"})],
    "validation.local_batch_size": NO_COUNT,
    "validation.seq_len": NO_COUNT,
    "validation.freq": NO_COUNT,
    "validation.steps": [0, -2],
    "debug.seed": [-1, 2**63],
    "debug.deterministic_warn_only": [True],
    "debug.moe_force_load_balance": [True],
}  # fmt: skip

# Switches whose own tests are elsewhere, and those that are wrong only with what other fields say.
SWITCHES = {
    "profiling.enable_profiling", "profiling.enable_memory_snapshot", "training.enable_cpu_offload",
    "metrics.enable_wandb", "validation.enable", "compile.enable", "checkpoint.load_only", "job.config_file",
}  # fmt: skip

RIGHT = {
    "optimizer.lr": [0.0, 1],
    "optimizer.beta1": [0.0, 0],
    "optimizer.weight_decay": [0.0],
    "lr_scheduler.warmup_steps": [0, 10**6],
    "lr_scheduler.total_steps": [1, 10**6],
    "lr_scheduler.decay_ratio": [0.0, 1.0, 1],
    "lr_scheduler.min_lr_factor": [0.0, 1.0],
    "training.max_norm": [1, 0.5, INF],
    "training.global_batch_size": [-1, 8, 16],
    "checkpoint.keep_latest_k": [0, 2],
    "checkpoint.exclude_from_loading": [[], ["dataloader"], ["optimizer", "lr_scheduler", "dataloader", "train_state"]],
    "activation_checkpoint.selective_ac_option": ["op", "1", "3"],
    "activation_checkpoint.memory_budget": [0.0, 1.0],
    "compile.components": [[], ["loss"], ["loss", "model"]],
    "comm.trace_buf_size": [0],
    "validation.steps": [-1, 1],
    "debug.seed": [0, 2**63 - 1],
    "parallelism.data_parallel_shard_degree": [-1, 1],
    "job.save_config_file": ["config.json", "configs/config.json"],
    "experimental.custom_import": ["examples.fork.registered"],
}


def leaves(cls, prefix=""):
    """(name, type) of all fields of a config class."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.type


@functools.cache
def config_class():
    """What a TOML file is checked against."""
    if not IS_V02:
        return JobConfig
    from torchtitan.config import ConfigManager
    from torchtitan.config import JobConfig as StockJobConfig

    return ConfigManager._merge_configs(StockJobConfig, JobConfig)


LEAVES = dict(leaves(config_class()))
# Of this package's own sections, whose checks have tests of their own.
OURS = ("gdn2.", "data.", "task.")
CASES = [
    (field, *(case if isinstance(case, tuple) else (case,)))
    for field, cases in WRONG.items() if field in LEAVES for case in cases
]  # fmt: skip


def test_every_field_of_every_section_has_its_values_checked_or_a_reason_why_any_is_right():
    free = [field for fields in ANY.values() for field in fields]
    tables = [*RANGES, *IGNORED, *ELSEWHERE, *free]
    assert len(tables) == len(set(tables))
    for field in LEAVES:
        assert field in tables or field.startswith(OURS), f"{field} is in no table of setting_ranges.py"
        if field not in free and not field.startswith(OURS):
            assert field in WRONG or field in SWITCHES, f"{field} has no case here that shows how it is refused"
    assert not IS_V02 or set(tables) == {field for field in LEAVES if not field.startswith(OURS)}


def test_what_is_ignored_is_ignored_at_its_default():
    for field, (only, why) in IGNORED.items():
        if field in LEAVES:
            assert functools.reduce(getattr, field.split("."), config_class()()) == only and why


def _of_another_type(annotation):
    parts = typing.get_args(annotation) if typing.get_origin(annotation) is not list else ()
    kinds = {annotation, *parts} - {type(None)}
    wrong = [{"a": 1}]
    wrong += [value for kind, value in ((str, "text"), (int, 3), (float, 2.5), (bool, True)) if kind not in kinds
              and not (value == 3 and float in kinds) and not any(isinstance(part, str) for part in kinds)]  # fmt: skip
    return wrong


def test_a_value_of_another_type_is_refused_by_name():
    for field, value in [(field, value) for field, kind in LEAVES.items() for value in _of_another_type(kind)]:
        table = _table(field, value)
        with pytest.raises(ConfigError) as refusal:
            check_table(table, config_class())
        assert str(refusal.value).startswith(f"{field} is {value!r}; it must be "), field


def _sentence(call):
    with pytest.raises(ConfigError) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("NGPU", raising=False)
    monkeypatch.chdir(tmp_path)


def _ids(case):
    return f"{case[0]}={case[1]!r}" + ("" if len(case) == 2 else f" {len(case)}")


def _table(field, value):
    return functools.reduce(lambda inner, name: {name: inner}, reversed(field.split(".")), value)


def _says(sentence, field, value):
    assert field in sentence
    for one in value if isinstance(value, list) else [value]:
        assert repr(one).strip("[]").lower() in sentence.lower()


ALONE = [case for case in CASES if len(case) == 2 and case[0] in (*RANGES, *IGNORED)]


def test_a_value_that_is_never_right_is_refused_in_one_sentence_as_soon_as_a_file_or_a_command_line_says_it():
    for field, value in ALONE:
        in_file = _sentence(lambda: check_table(_table(field, value), config_class()))
        _says(in_file, field, value)
        if isinstance(value, (list, bool)):
            continue
        for options in ([f"--{field}={value}"], [f"--{field.replace('_', '-')}", str(value)]):
            said = _sentence(lambda: check_arguments(options, config_class()))
            # A whole number for a number is a number there.
            assert said.replace(".0;", ";") == in_file.replace(".0;", ";")


@pytest.mark.parametrize("case", [case for case in CASES if case not in ALONE], ids=_ids)
def test_a_value_that_is_wrong_here_is_refused_in_one_sentence_with_the_field(case, one_process, tmp_path, monkeypatch):
    field, value, beside, process = case if len(case) == 4 else [*case, {}, {}][:4]
    for name, said in process.items():
        monkeypatch.setenv(name, said)
    path = write_toml(tmp_path / "x.toml", beside | {field: value})
    _says(_sentence(lambda: check(path)), field, value)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        (["--training.stepz=3"], ["training.stepz = '3': no such field", "did you mean 'steps'"]),
        (["--trainning.steps", "3"], ["[trainning] is no section", "did you mean 'training'"]),
        (["--training.steps", "three"], ["training.steps is 'three'", "a whole number"]),
        (["--training.steps=1e3"], ["training.steps is '1e3'", "a whole number"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr is 'fast'", "a number"]),
        (["--lr_scheduler.total_steps=all"], ["lr_scheduler.total_steps is 'all'", "a whole number"]),
        (["--activation_checkpoint.mode=ful"], ["activation_checkpoint.mode is 'ful'", "'full'"]),
        (["--compile.components=model,los"], ["compile.components is ['model', 'los']", "'loss'"]),
        (["--checkpoint.enable=yes"], ["checkpoint.enable is 'yes'", "--checkpoint.no-enable"]),
        (["--checkpoint.enable", "true", "false"], ["checkpoint.enable is 'true false'", "true or false"]),
        (["--checkpoint.no-enable", "true"], ["checkpoint.enable is 'true'", "--checkpoint.no-enable"]),
        (["--task.pairs", "4", "many"], ["task.pairs is '4 many'", "a list of a whole number"]),
    ],
    ids=lambda value: value[0],
)
def test_what_a_command_line_cannot_mean_is_refused_in_one_sentence(option, parts, one_process, tmp_path):
    sentence = _sentence(lambda: parse([f"--job.config_file={write_toml(tmp_path / 'x.toml', {})}", *option]))
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize("which", range(3))
def test_the_ends_of_each_range_are_right(which, one_process, tmp_path):
    said = {field: values[min(which, len(values) - 1)] for field, values in RIGHT.items() if field in LEAVES}
    check(write_toml(tmp_path / "x.toml", said))
    options = [f"--{field}={value}" for field, value in said.items() if not isinstance(value, list)]
    check(write_toml(tmp_path / "x.toml", {}), *options)


def test_truth_values_with_and_without_a_word_and_lists_by_spaces_or_commas_mean_the_same(one_process, tmp_path):
    path = write_toml(tmp_path / "x.toml", {})

    def said(*options):
        parsed = parse([f"--job.config_file={path}", *options])
        lists = parsed.compile.components, parsed.task.pairs, parsed.quantize.linear.float8.filter_fqns
        return parsed.checkpoint.enable, parsed.compile.enable, parsed.metrics.enable_tensorboard, *lists

    wanted = True, False, False, ["model", "loss"], [4, 8], ["a.b"]
    words = "--task.pairs", "--compile.components", "--quantize.linear.float8.filter_fqns"
    for true in (["--checkpoint.enable"], ["--checkpoint.enable", "true"], ["--checkpoint.enable=True"]):
        assert said(*true, "--compile.enable=false", "--metrics.enable-tensorboard", "False", words[0], "4", "8",
                    words[1], "model", "loss", words[2], "a.b") == wanted  # fmt: skip
    for pairs, names in ((["4,8"], ["model,loss"]), (["4,", "8"], ["model,", "loss"]), (["4, 8"], ["model, loss"])):
        assert said("--checkpoint.enable", "--compile.no-enable", "--metrics.no-enable_tensorboard", words[0], *pairs,
                    words[1], *names, f"{words[2]}=a.b") == wanted  # fmt: skip


def test_profiling_and_logging_want_room_and_what_is_installed(one_process, tmp_path, monkeypatch):
    monkeypatch.setattr("gdn2_titan.titan.checks.settings.accelerator", lambda: "cuda")
    changes = {"profiling.enable_profiling": True, "profiling.profiler_warmup": 10}
    sentence = _sentence(lambda: check(write_toml(tmp_path / "x.toml", changes)))
    assert sentence.startswith("profiling.profile_freq is 10; it must be at least 11")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ConfigError, ValueError), match="metrics.enable_wandb is true; it must be false"):
        check(write_toml(tmp_path / "x.toml", {"metrics.enable_wandb": True}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_dump_folder_that_cannot_be_written_in_is_refused(one_process, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    path = write_toml(tmp_path / "x.toml", {"job.dump_folder": str(tmp_path / "closed" / "outputs")})
    assert "job.dump_folder" in _sentence(lambda: check(path))


@pytest.mark.parametrize("said", ["0", "-2", "two", ""])
def test_a_number_of_processes_that_is_none_is_refused(said, one_process, tmp_path, monkeypatch):
    monkeypatch.setenv("NGPU", said)
    path = write_toml(tmp_path / "x.toml", {})
    assert _sentence(lambda: check(path)) == f"NGPU is {said!r}; it must be a whole number of at least 1"


@pytest.mark.parametrize("option", ["--model.flavor=2B", "--training.max_norm=-1", "--training.stepz=3"])
def test_the_check_command_ends_with_2_and_the_sentence(option, one_process, tmp_path, monkeypatch, capsys):
    path = write_toml(tmp_path / "x.toml", {})
    monkeypatch.setattr(sys, "argv", ["check", f"--job.config_file={path}", option])
    assert check_command() == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"Config error: {option[2:].split('=')[0]} ")
    assert said.err.count("\n") == 1 and not said.out


# --- checkpoints


def checkpoints(folder, *steps, file=".metadata"):
    """A folder with the marks of checkpoints."""
    for step in steps:
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}" / file).touch()
    return folder


def begin(tmp_path, **changes):
    changes = {f"checkpoint.{name}": value for name, value in changes.items()}
    said = {"job.dump_folder": str(tmp_path / "out"), "checkpoint.enable": True} | changes
    return check(write_toml(tmp_path / "x.toml", said))


@pytest.mark.parametrize(("there", "named"), [([], "there is none"), ([5, 10, 100], "5, 10, 100")])
def test_a_step_to_load_that_is_not_there_is_refused_with_those_that_are(there, named, one_process, tmp_path):
    checkpoints(tmp_path / "out" / "checkpoint", *there)
    (tmp_path / "out" / "checkpoint" / "step-77").mkdir(parents=True)  # of a save that was cut short
    sentence = _sentence(lambda: begin(tmp_path, load_step=77))
    assert sentence.startswith("checkpoint.load_step is 77; it must be -1 (the latest) or the step of a checkpoint in")
    assert sentence.endswith(f": {named}")


def test_a_step_to_load_that_is_there_is_right_and_so_is_the_latest(one_process, tmp_path):
    begin(tmp_path)
    checkpoints(tmp_path / "out" / "checkpoint", 0, 5, 10)
    begin(tmp_path)
    for step in (-1, 0, 5, 10):
        begin(tmp_path, load_step=step)


def test_a_latest_checkpoint_in_hugging_faces_format_is_refused_unless_another_is_named(one_process, tmp_path):
    folder = tmp_path / "out" / "checkpoint"
    checkpoints(folder, 5), checkpoints(folder, 10, file="model.safetensors.index.json")
    sentence = _sentence(lambda: begin(tmp_path))
    assert "checkpoint.load_step is -1" in sentence and "step 10" in sentence and "one of 5" in sentence
    begin(tmp_path, load_step=5)


@pytest.mark.parametrize(
    ("files", "path", "settings", "found"),
    [
        ([], "away", {}, "it is no folder"),
        (["away/notes.txt"], "away/notes.txt", {}, "it is no folder"),
        (["away/notes.txt"], "away", {}, "it has no checkpoint"),
        (["away/step-5/.metadata", "away/step-10/.metadata"], "away", {}, "it has step-5, step-10"),
        (["away/model.safetensors"], "away", {}, "checkpoint.initial_load_in_hf = true"),
        (["away/.metadata"], "away", {"initial_load_in_hf": True}, "it has no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_to_begin_with_is_refused(files, path, settings, found, one_process, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    path = str(tmp_path / path)
    sentence = _sentence(lambda: begin(tmp_path, initial_load_path=path, **settings))
    assert sentence.startswith(f"checkpoint.initial_load_path is {path!r}; it must be ") and sentence.endswith(found)


@pytest.mark.parametrize("in_hf", [False, True])
def test_a_checkpoint_to_begin_with_may_be_relative_and_gone_where_a_run_goes_on(in_hf, one_process, tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / ("model.safetensors" if in_hf else ".metadata")).touch()
    for path in ("away", str(tmp_path / "away")):
        begin(tmp_path, initial_load_path=path, initial_load_in_hf=in_hf)
    checkpoints(tmp_path / "out" / "checkpoint", 5)
    begin(tmp_path, initial_load_path="gone", initial_load_in_hf=in_hf)


def test_hugging_face_weights_beside_the_tokenizer_must_be_there(one_process, tmp_path):
    sentence = _sentence(lambda: begin(tmp_path, initial_load_in_hf=True))
    assert sentence.startswith("model.hf_assets_path is ") and "safetensors" in sentence


@only_toml
def test_a_folder_for_checkpoints_that_is_empty_hides_none_to_begin_with(one_process, tmp_path):
    """TorchTitan 0.2.2 would start from nothing."""
    checkpoints(tmp_path / "away", 5)
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    sentence = _sentence(lambda: begin(tmp_path, initial_load_path=str(tmp_path / "away" / "step-5")))
    assert "checkpoint.initial_load_path" in sentence and "must be removed" in sentence


# --- launches


def _refusal(module, folder, *arguments):
    """What a launch says that is refused before TorchTitan builds anything."""
    code, printed = launch(1, module, folder, *arguments)
    said = [line for line in printed.splitlines() if line.startswith("Config error: ")]
    assert code and len(said) == 1, printed[-2000:]
    assert "Traceback" not in printed and "step:" not in printed
    return said[0].removeprefix("Config error: ")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--validation.steps=0", "validation.steps is 0; it must be -1 (all of the data) or at least 1"),
        ("--training.dataset_path=a.txt", "training.dataset_path = 'a.txt' would be ignored"),
    ],
)
def test_a_launch_ends_with_the_sentence_before_torchtitan_builds_anything(option, sentence, tmp_path):
    module = "torchtitan.train" if IS_V02 else "gdn2_titan.titan.train"
    start = f"--job.config_file={DEBUG_HYBRID}", f"--job.dump_folder={tmp_path}"
    assert _refusal(module, tmp_path, *start, *SHORT, option).startswith(sentence)


@only_functions
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--validator.steps=0"], "validator.steps is 0; it must be -1 (all of the data) or at least 1"),
        (["--compile.enable-async-tensor-parallel"], "compile.enable_async_tensor_parallel is true; then"),
    ],
)
def test_a_launch_of_a_config_function_is_refused_in_the_names_of_its_config(option, sentence, tmp_path):
    start = "--module", "gdn2_titan.titan", "--config", "gdn2_debug", f"--dump_folder={tmp_path}"
    assert _refusal("torchtitan.train", tmp_path, *start, *option).startswith(sentence)


@only_functions
def test_every_field_of_torchtitan_03s_config_has_a_counterpart_or_a_check_of_its_own():
    from gdn2_titan.titan.config_registry import gdn2_debug
    from gdn2_titan.titan.v03 import fields as own_fields
    from gdn2_titan.titan.v03.fields import COUNTERPARTS
    from gdn2_titan.titan.v03.trainer import check as check_config

    known = {*COUNTERPARTS.values(), *own_fields.ONLY, *own_fields.OWN_RANGES, *own_fields.ANY}

    def fields_of(config, prefix=""):
        for field in dataclasses.fields(config):
            value, name = getattr(config, field.name), prefix + field.name
            if dataclasses.is_dataclass(value) and name not in known:
                yield from fields_of(value, f"{name}.")
            elif field.name != "_settings":
                yield name

    assert set(fields_of(gdn2_debug())) == known
    for name in (*own_fields.ONLY, *own_fields.OWN_RANGES):
        config = gdn2_debug()
        section, field = name.split(".")
        value = -1 if name in own_fields.OWN_RANGES else not getattr(getattr(config, section), field)
        setattr(getattr(config, section), field, value)
        assert _sentence(lambda: check_config(config)).startswith(f"{name} is {value!r}; ")


def test_the_sentences_of_a_config_made_in_python_are_the_same():
    config = JobConfig()
    config.training.dataset = "stdlib"
    validate(config)
    for field, value, words in (
        ("training.steps", "three", "a whole number"),
        ("optimizer.lr", NAN, "a finite number of at least 0"),
        ("compile.components", ["modle"], "a list of some of 'model', 'loss', each at most once"),
        ("activation_checkpoint.mode", "ful", "one of 'selective', 'full', 'memory_budget', 'none'"),
    ):
        section, name = field.split(".")
        before = getattr(getattr(config, section), name)
        setattr(getattr(config, section), name, value)
        assert _sentence(lambda: validate(config)) == f"{field} is {value!r}; it must be {words}"
        setattr(getattr(config, section), name, before)
