"""One model, one set of TOML files, two generations of TorchTitan. Run it in an environment of each."""

import dataclasses
import importlib
import json
import os
import tarfile

import pytest
import torch

pytest.importorskip("torchtitan")

from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.v03.fields import COUNTERPARTS, WITHOUT
from tests.concerns import concerns_titan
from tests.generations import only_functions, only_toml
from tests.recorded_checkpoint import AFTER, CURVES, archive, continued, curves
from tests.training import LOSS, ROOT, scalars

CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))


@pytest.mark.parametrize("version", ["0.2.2", "0.3.0"])
def test_a_checkpoint_of_either_generation_continues_with_the_curve_of_the_one_that_wrote_it(version, tmp_path):
    with tarfile.open(archive(version)) as file:
        file.extractall(tmp_path, filter="data")
    assert f"Training starts at step {AFTER[0]}" in continued(tmp_path)
    assert set(scalars(tmp_path, LOSS)) == set(AFTER)
    found = curves(tmp_path)
    for name, expected in json.loads((tmp_path / CURVES).read_text()).items():
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=0)  # another CPU adds up in another order


def _leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value) and path not in COUNTERPARTS:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


@only_toml
def test_every_field_of_a_toml_file_has_a_counterpart_or_is_named_as_having_none():
    from gdn2_titan.titan.job_config import JobConfig
    from gdn2_titan.titan.v02.sections import JobConfig as Ours

    assert JobConfig is Ours
    chosen = {"job.config_file", "job.description", "job.custom_config_module", "model.name", "model.flavor"}
    for path, default in _leaves(Ours()):
        if path in WITHOUT:
            assert WITHOUT[path] == default, path
        else:
            assert path in COUNTERPARTS or path in chosen or path.startswith("activation_checkpoint."), path


@only_functions
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_toml_file_becomes_a_config_that_says_the_same(path):
    from gdn2_titan.titan.job_config import parse, validate
    from gdn2_titan.titan.v03.config import trainer_config
    from gdn2_titan.titan.v03.trainer import settings_of

    job_config = parse([f"--job.config_file={path}", f"--model.hf_assets_path={BYTE_TOKENIZER_DIR}"])
    validate(job_config)
    back = settings_of(trainer_config(job_config)).to_dict()
    said = job_config.to_dict()
    assert said["job"].pop("custom_config_module") and back["job"].pop("custom_config_module") == ""
    for name in ("config_file", "description"):
        said["job"].pop(name), back["job"].pop(name)
    if said["activation_checkpoint"]["mode"] == "none":
        said["activation_checkpoint"] = back["activation_checkpoint"]
    assert back == said


@only_functions
@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[optimizer]\nearly_step_in_backward = true", "optimizer.early_step_in_backward"),
        ("[parallelism]\ncontext_parallel_rotate_method = 'alltoall'", "parallelism.context_parallel_rotate_method"),
        ("[fault_tolerance]\nenable = true", "fault_tolerance.enable"),
        ("[training]\nstepz = 3", "training.stepz = 3: no such field"),
        ("[training]\nsteps = 'three'", "training.steps is 'three'"),
    ],
)
def test_a_field_without_counterpart_ends_the_start_with_its_name(toml, sentence, tmp_path):
    from gdn2_titan.titan.job_config import parse

    path = tmp_path / "x.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError, match=sentence):
        parse([f"--job.config_file={path}"])


@only_functions
def test_what_is_left_at_its_default_needs_no_counterpart(tmp_path):
    from gdn2_titan.titan.job_config import parse

    path = tmp_path / "x.toml"
    path.write_text("[optimizer]\nearly_step_in_backward = false\n[fault_tolerance]\nenable = false\n")
    assert parse([f"--job.config_file={path}"]).optimizer.lr == 8e-4


@only_functions
@pytest.mark.parametrize(
    "name",
    [
        "gdn2_debug",
        "gdn2_debug_hybrid",
        "gdn2_recall",
        "gdn2_150M",
        "gdn2_370M",
        "gdn2_370M_hybrid",
        "gdn2_400M",
        "gdn2_1_3B",
        "gdn2_1_3B_hybrid",
    ],
)
def test_there_is_a_config_function_for_every_flavor(name):
    from gdn2_titan.models import flavors

    registry = importlib.import_module("gdn2_titan.titan.config_registry")
    flavor = getattr(registry, name)().model_spec.flavor
    assert flavor in flavors and flavor.replace(".", "_") == name.removeprefix("gdn2_")


@only_functions
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gdn2_debug", "debug"),
        ("gdn2_debug_hybrid", "debug_hybrid"),
        ("gdn2_recall", "recall/mqar"),
        ("gdn2_150M", "150M"),
        ("gdn2_1_3B", "1.3B"),
        ("gdn2_1_3B_hybrid", "1.3B_hybrid"),
        ("gdn2_paper_370M", "paper/370M"),
        ("gdn2_paper_1_3B", "paper/1.3B"),
        ("gdn2_paper_1_3B_hybrid", "paper/1.3B_hybrid"),
    ],
)
def test_a_config_function_says_what_the_toml_file_does(name, file, monkeypatch):
    from gdn2_titan.titan.v03.trainer import settings_of

    registry = importlib.import_module("gdn2_titan.titan.config_registry")
    monkeypatch.setenv("GDN2_TOML", str(ROOT / "train_configs" / f"{file}.toml"))
    said, wanted = (settings_of(function()).to_dict() for function in (getattr(registry, name), registry.from_toml))
    assert said == wanted


@only_functions
@pytest.mark.parametrize(
    ("section", "field", "value", "sentence"),
    [
        ("training", "disable_cuda_graphs", False, "training.disable_cuda_graphs is False"),
        ("parallelism", "spmd_backend", "full_dtensor", "it must be 'spmd_types' or 'partial_dtensor'"),
        ("parallelism", "enable_sequence_parallel", False, "parallelism.enable_sequence_parallel is False"),
        ("training", "local_batch_size", 0, "training.local_batch_size is 0"),
    ],
)
def test_a_config_that_cannot_train_is_refused_before_anything_is_built(section, field, value, sentence):
    from gdn2_titan.titan.config_registry import gdn2_debug

    config = gdn2_debug()
    setattr(getattr(config, section), field, value)
    with pytest.raises(SystemExit, match=sentence):
        config.build()


@only_functions
@pytest.mark.parametrize(
    ("replicate", "shard", "context", "tensor"),
    [(1, 1, 1, 1), (1, 4, 1, 1), (2, 2, 1, 1), (1, 1, 4, 1), (1, 2, 2, 2), (2, 1, 2, 1), (2, 2, 2, 2)],
)
def test_both_backends_shard_the_parameters_over_the_same_ranks(replicate, shard, context, tensor):
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torchtitan.distributed import ParallelDims

    from gdn2_titan.titan.parallelize import mesh_of_shards
    from gdn2_titan.titan.v03.fields import BACKENDS

    world, found = replicate * shard * context * tensor * 2, {}
    degrees = {"dp_replicate": replicate, "dp_shard": shard, "cp": context, "tp": tensor, "pp": 2, "ep": 1}
    for backend in BACKENDS:
        torch.distributed.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
        try:
            dims = ParallelDims(**degrees, world_size=world, spmd_backend=backend)
            found[backend], of_second_stage = (mesh_of_shards(dims).mesh.tolist() for _ in range(2))
        finally:
            torch.distributed.destroy_process_group()
        assert found[backend] == of_second_stage
    assert found["spmd_types"] == found["partial_dtensor"]  # TorchTitan's own mesh "fsdp"


@only_functions
def test_from_toml_reads_the_file_that_the_environment_names(monkeypatch):
    from gdn2_titan.titan.config_registry import from_toml

    monkeypatch.setitem(os.environ, "GDN2_TOML", str(ROOT / "train_configs" / "debug_hybrid.toml"))
    config = from_toml()
    assert (config.model_spec.flavor, config.validator.freq, config.dump_folder) == (
        "debug_hybrid", 100, "./outputs/debug_hybrid"
    )  # fmt: skip


def test_the_files_that_run_in_both_environments_are_those_that_import_torchtitan_or_the_plug():
    tests = ROOT / "tests"
    for file in ("test_titan_generations", "test_study_recall", "test_accuracy", "distributed/test_layouts"):
        assert concerns_titan(tests / f"{file}.py"), file
    for file in ("test_gdn2_op", "test_gdn2_library", "test_fsdp", "test_convert"):
        assert not concerns_titan(tests / f"{file}.py"), file
