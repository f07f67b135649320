"""Job configs: what is refused, with which sentence, and what the accepted ones build."""

import dataclasses
import math
import subprocess
import sys

import datasets
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.convert.commands import to_hf
from gdn2_titan.models import GDN2Model, flavors
from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.parallelize import layout_of
from tests.config_cases import assert_refused, check, write_toml
from tests.convert_cases import save_step, weights
from tests.generations import StockParallelism, loader_of, model_config, only_toml, optimizers_of
from tests.training import ROOT, SHORT, environment, train

REFUSALS = [
    ({"model.flavor": "2B"}, ["model.flavor", "'2B'", "debug_hybrid", "1.3B_hybrid"]),
    ({"gdn2.windw": 12}, ["gdn2.windw", "12", "did you mean 'window'"]),
    ({"training.stepz": 3}, ["training.stepz", "3", "steps"]),
    ({"trainning.steps": 3}, ["[trainning]", "did you mean 'training'"]),
    ({"training.steps": "three"}, ["training.steps", "'three'", "whole number"]),
    ({"training.steps": 2.5}, ["training.steps", "2.5", "whole number"]),
    ({"training.steps": True}, ["training.steps", "True", "whole number"]),
    ({"training.steps": 0}, ["training.steps", "0", "at least 1"]),
    ({"gdn2.window": 0}, ["gdn2.window", "0", "at least 1"]),
    ({"gdn2.window": -4}, ["gdn2.window", "-4", "at least 1"]),
    ({"gdn2.n_layers": 0}, ["gdn2.n_layers", "0", "at least 1"]),
    ({"gdn2.n_layers": 2.0}, ["gdn2.n_layers", "2.0", "whole number"]),
    ({"gdn2.hidden_size": 0}, ["gdn2.hidden_size", "0", "at least 1"]),
    ({"gdn2.hidden_size": 130}, ["gdn2.attn_heads", "4", "hidden_size = 130"]),
    ({"gdn2.hidden_size": 36}, ["gdn2.attn_heads", "4", "hidden_size = 36", "even size"]),
    ({"gdn2.attn_heads": 7}, ["gdn2.attn_heads", "7", "128"]),
    ({"gdn2.attn_kv_heads": 3}, ["gdn2.attn_kv_heads", "3", "attn_heads = 4"]),
    ({"gdn2.num_v_heads": 3}, ["gdn2.num_v_heads", "3", "num_heads = 2"]),
    ({"gdn2.layer_pattern": ["gdn2", "mamba"]}, ["gdn2.layer_pattern", "mamba", "swa"]),
    ({"gdn2.layer_pattern": "gdn2"}, ["gdn2.layer_pattern", "'gdn2'", "a list"]),
    ({"gdn2.erase_gate": "vector"}, ["gdn2.erase_gate", "'vector'", "'channel', 'scalar' or 'mean'"]),
    ({"gdn2.erase_gate": "mean", "gdn2.tied_gates": True}, ["gdn2.erase_gate", "'mean'", "tied_gates"]),
    ({"gdn2.tied_gates": True, "gdn2.content_gate": True}, ["gdn2.tied_gates", "True", "content_gate", "false"]),
    ({"gdn2.lower_bound": 5.0}, ["gdn2.lower_bound", "5.0", "less than 0"]),
    ({"gdn2.lower_bound": "none"}, ["gdn2.lower_bound", "'none'", "a number"]),
    ({"gdn2.decay_rank": 0}, ["gdn2.decay_rank", "0", "at least 1, 'head' or 'full'"]),
    ({"gdn2.gate_rank": "half"}, ["gdn2.gate_rank", "'half'", "at least 1, 'head' or 'full'"]),
    ({"gdn2.decay": "scalar", "gdn2.decay_rank": 8}, ["gdn2.decay_rank", "8", "decay = 'scalar'"]),
    ({"gdn2.conv_size": 5}, ["gdn2.conv_size", "5", "2, 3 or 4"]),
    ({"gdn2.statistics_freq": -1}, ["gdn2.statistics_freq", "-1", "0"]),
    ({"gdn2.tied_gates": "yes"}, ["gdn2.tied_gates", "'yes'", "true or false"]),
    ({"training.dataset": "c5"}, ["training.dataset", "'c5'", "stdlib"]),
    ({"training.dataset": "files", "training.dataset_path": "/no/such.txt"},
     ["training.dataset_path", "/no/such.txt", ".jsonl"]),
    ({"validation.enable": True, "validation.dataset": "files", "validation.dataset_path": "/no/such.txt"},
     ["validation.dataset_path", "/no/such.txt", ".jsonl"]),
    ({"model.hf_assets_path": "/no/tokenizer"}, ["model.hf_assets_path", "/no/tokenizer", "tokenizer.json"]),
    ({"data.shuffle_seed": -1}, ["data.shuffle_seed", "-1", "0 or more"]),
    ({"data.cache_dir": ""}, ["data.cache_dir", "''", "name a folder"]),
    ({"parallelism.tensor_parallel_degree": 2}, ["parallelism.tensor_parallel_degree", "2", "the 1 processes"]),
    ({"parallelism.context_parallel_degree": 2}, ["parallelism.context_parallel_degree", "2", "the 1 processes"]),
    ({"parallelism.context_parallel_load_balancer": "ptrr"},
     ["parallelism.context_parallel_load_balancer", "'ptrr'", "'headtail'", "'none'"]),
    ({"parallelism.expert_parallel_degree": 2}, ["parallelism.expert_parallel_degree", "2", "must be 1"]),
    ({"parallelism.pipeline_parallel_degree": 2}, ["parallelism.pipeline_parallel_degree", "2", "the 1 processes"]),
    ({"parallelism.data_parallel_shard_degree": 3}, ["parallelism.data_parallel_shard_degree", "3", "-1"]),
    ({"training.local_batch_size": 8, "training.global_batch_size": 12},
     ["training.global_batch_size", "12", "multiple of", "8"]),
    ({"optimizer.early_step_in_backward": True}, ["optimizer.early_step_in_backward", "rue", "alse"]),
    ({"training.enable_cpu_offload": True}, ["training.enable_cpu_offload", "true", "false"]),
    ({"activation_checkpoint.mode": "memory_budget"},
     ["activation_checkpoint.mode", "'memory_budget'", "compile.enable", "'model'"]),
    ({"optimizer.name": 3}, ["optimizer.name", "3", "must be"]),
    ({"checkpoint.enable": True, "checkpoint.keep_latest_k": 1}, ["checkpoint.keep_latest_k", "1", "at least 2"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), REFUSALS, ids=[" ".join(changes) for changes, _ in REFUSALS])
def test_a_config_that_cannot_train_is_refused_in_one_sentence(tmp_path, monkeypatch, changes, parts):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("NGPU", raising=False)
    assert_refused(write_toml(tmp_path / "x.toml", changes), parts)


def test_a_missing_or_broken_toml_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="job.config_file is '/no/such.toml'"):
        check("/no/such.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="must be valid TOML"):
        check(str(tmp_path / "broken.toml"))


def test_pure_replication_is_refused_and_hsdp_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = write_toml(tmp_path / "x.toml", {"parallelism.data_parallel_replicate_degree": 2})
    with pytest.raises(ConfigError, match="data_parallel_replicate_degree is 2"):
        check(path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check(path)


TP, PP = "parallelism.tensor_parallel_degree", "parallelism.pipeline_parallel_degree"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
CP, BALANCER = "parallelism.context_parallel_degree", "parallelism.context_parallel_load_balancer"
LAYOUT_REFUSALS = [
    ({TP: 2, "gdn2.backend": "batch_invariant"}, [TP, "2", "backend is 'batch_invariant'"]),
    ({CP: 2, "gdn2.backend": "batch_invariant"}, ["gdn2.backend is 'batch_invariant'; with context parallelism"]),
    ({"compile.enable": True, "gdn2.backend": "batch_invariant"}, ["gdn2.backend", "with compile.enable"]),
    ({"model.converters": ["quantize.linear.float8"], "gdn2.backend": "batch_invariant"},
     ["gdn2.backend is 'batch_invariant'; with model.converters"]),
    ({TP: 4}, [TP, "4", "num_heads is 2"]),
    ({TP: 4, "gdn2.num_heads": 4}, [TP, "4", "attn_kv_heads is 2"]),
    ({TP: 3}, [TP, "3", "the 8 processes"]),
    ({TP: 4, PP: 4}, [TP, "4", "the 2 of 8 processes that other degrees leave"]),
    ({TP: 2, "training.seq_len": 127}, [TP, "2", "training.seq_len is 127"]),
    ({CP: 3}, [CP, "3", "the 8 processes"]),
    ({CP: 4, TP: 4}, [TP, "4", "the 2 of 8 processes that other degrees leave"]),
    ({CP: 4, "training.seq_len": 100}, [f"{CP} = 4", "two segments", "training.seq_len is 100", "a multiple of 8"]),
    ({CP: 4, BALANCER: "none", "training.seq_len": 102}, [f"{CP} = 4", "training.seq_len is 102", "a multiple of 4"]),
    ({CP: 4, TP: 2, BALANCER: "none", "training.seq_len": 100},
     [f"{CP} = 4", f"{TP} = 2", "training.seq_len is 100", "a multiple of 8"]),
    ({CP: 4, "validation.enable": True, "validation.dataset": "stdlib", "validation.seq_len": 100},
     [f"{CP} = 4", "validation.seq_len is 100", "a multiple of 8"]),
    ({CP: 4, "training.local_batch_size": 8, "training.global_batch_size": 24},
     ["training.global_batch_size", "24", "the 2 data-parallel processes = 16"]),
    ({CP: 2, "parallelism.data_parallel_shard_degree": 8}, ["data_parallel_shard_degree", "8", "-1, or 4"]),
    ({TP: 2, "parallelism.enable_async_tensor_parallel": True}, ["enable_async_tensor_parallel", "compile.enable"]),
    ({TP: 2, "parallelism.enable_async_tensor_parallel": True, "compile.enable": True},
     ["enable_async_tensor_parallel", "true", "without an accelerator"]),
    ({TP: 2, PP: 2, "parallelism.data_parallel_replicate_degree": 2}, ["data_parallel_replicate_degree", "2"]),
    ({PP: 2, "parallelism.data_parallel_shard_degree": 2}, ["data_parallel_shard_degree", "2", "-1, or 4"]),
    ({PP: 2, SCHEDULE: "1B1F"}, [SCHEDULE, "'1B1F'", "Interleaved1F1B"]),
    ({PP: 2, "parallelism.pipeline_parallel_microbatch_size": 3}, ["pipeline_parallel_microbatch_size", "3", "8"]),
    ({PP: 2, "training.local_batch_size": 1}, ["training.local_batch_size is 1", "each of 2 stages"]),
    ({PP: 8}, [PP, "8", "4 layers"]),
    ({PP: 2, SCHEDULE: "Interleaved1F1B", "training.local_batch_size": 5}, ["local_batch_size is 5", PP, "multiple"]),
    ({PP: 2, "parallelism.pipeline_parallel_layers_per_stage": 2}, ["layers_per_stage", "3 stages", "2, one for each"]),
    ({CP: 2, "gdn2.content_gate": True}, ["gdn2.content_gate", "true", "context parallelism", "false"]),
    ({PP: 2, "parallelism.pipeline_parallel_schedule_csv": "/no.csv"}, ["pipeline_parallel_schedule_csv", "/no.csv"]),
    ({PP: 2, SCHEDULE: "InterleavedZeroBubble", "compile.enable": True}, ["compile.enable", "Interleaved", "false"]),
    ({PP: 2, SCHEDULE: "InterleavedZeroBubble", "activation_checkpoint.selective_ac_option": "op"},
     ["selective_ac_option", "'op'", "a number of layers"]),
    ({PP: 2, SCHEDULE: "interleavedzerobubble", "compile.enable": True}, ["compile.enable", "interleaved", "false"]),
    ({PP: 2, SCHEDULE: "1f1b", "training.local_batch_size": 1}, ["training.local_batch_size is 1", "each of 2 stages"]),
    ({PP: 2, SCHEDULE: "ZBVZeroBubble", "validation.enable": True, "validation.dataset": "stdlib"},
     ["validation.enable", "'ZBVZeroBubble'", "false"]),
    ({PP: 2, "validation.enable": True, "validation.dataset": "stdlib", "validation.local_batch_size": 4},
     ["validation.local_batch_size", "4", "training.local_batch_size = 8"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "parts"), LAYOUT_REFUSALS, ids=[" ".join(changes) for changes, _ in LAYOUT_REFUSALS]
)
def test_a_layout_that_eight_processes_cannot_have_is_refused_in_one_sentence(tmp_path, monkeypatch, changes, parts):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert_refused(write_toml(tmp_path / "x.toml", changes), parts)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="only torch 2.13 fails there")
@pytest.mark.parametrize("mode", [{"mode": "full"}, {"mode": "selective", "selective_ac_option": "2"}])
def test_checkpointing_whole_compiled_blocks_under_tensor_parallelism_is_refused(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WORLD_SIZE", "8")
    changes = {TP: 2, "compile.enable": True} | {f"activation_checkpoint.{name}": value for name, value in mode.items()}
    with pytest.raises(ConfigError, match="activation_checkpoint.mode is .* it must be 'none', or 'selective'"):
        check(write_toml(tmp_path / "x.toml", changes))


@pytest.mark.parametrize(
    "changes",
    [{CP: 2, TP: 2, PP: 2}, {CP: 4, "training.seq_len": 104}, {CP: 4, BALANCER: "none", "training.seq_len": 100},
     {CP: 4, TP: 2, "training.seq_len": 104}, {CP: 4, "parallelism.data_parallel_replicate_degree": 2},
     {TP: 2, PP: 2}, {TP: 2, "parallelism.data_parallel_replicate_degree": 2}, {PP: 2, SCHEDULE: "Interleaved1F1B"},
     {PP: 2, "parallelism.data_parallel_replicate_degree": 2, "training.global_batch_size": 64}],
)  # fmt: skip
def test_layouts_of_several_kinds_are_not_refused(tmp_path, monkeypatch, changes):
    monkeypatch.setenv("WORLD_SIZE", "8")
    check(write_toml(tmp_path / "x.toml", changes))


def test_the_load_balancer_can_be_none_in_toml_and_on_the_command_line(tmp_path):
    path = write_toml(tmp_path / "x.toml", {BALANCER: "none"})
    assert layout_of(check(path).parallelism) == "contiguous"
    assert layout_of(check(path, f"--{BALANCER}=headtail").parallelism) == "head_tail"
    path = write_toml(tmp_path / "x.toml", {})
    assert layout_of(check(path).parallelism) == "head_tail"
    assert layout_of(check(path, f"--{BALANCER}=none").parallelism) == "contiguous"


def test_in_a_forks_own_config_the_load_balancer_is_torchtitans():
    parallelism = StockParallelism()
    assert layout_of(parallelism) == "head_tail"
    parallelism.context_parallel_load_balancer = None
    assert layout_of(parallelism) == "contiguous"
    parallelism.context_parallel_load_balancer = "ptrr"
    with pytest.raises(ConfigError, match="context_parallel_load_balancer is 'ptrr'; it must be 'headtail' or 'none'"):
        layout_of(parallelism)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    config = check(write_toml(tmp_path / "x.toml", {}), "--gdn2.vocab_size=258")
    with pytest.raises(SystemExit, match="model.hf_assets_path.*259 symbols.*at most 258, gdn2.vocab_size makes it"):
        loader_of(config)


def test_a_missing_text_column_ends_the_process_with_the_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    changes = {"training.dataset": "files", "training.dataset_path": str(tmp_path / "a.jsonl")}
    with pytest.raises(SystemExit, match="^Config error: data.text_column = 'text'.*allowed: body"):
        loader_of(check(write_toml(tmp_path / "x.toml", changes)))


@pytest.mark.parametrize("config", sorted((ROOT / "train_configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_fits(config, monkeypatch, tmp_path):
    # The large ones name a tokenizer that the user brings.
    folder = tmp_path / "assets" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    check(str(config))


def test_a_wrong_toml_ends_a_launch_with_the_sentence_before_any_step(tmp_path):
    path = write_toml(tmp_path / "x.toml", {"gdn2.windw": 12})
    with pytest.raises(AssertionError) as launched:
        train(1, tmp_path, *SHORT, config=path)
    printed = str(launched.value)
    sentence = "Config error: gdn2.windw = 12: no such field; did you mean 'window'? allowed are: "
    assert any(line.startswith(sentence) for line in printed.splitlines())
    assert "Traceback" not in printed and "step:" not in printed


@pytest.mark.slow
def test_the_check_command_ends_with_the_sentence(tmp_path):
    path = write_toml(tmp_path / "x.toml", {"model.flavor": "2B"})
    run = subprocess.run(
        [sys.executable, "-m", "gdn2_titan.titan.check", f"--job.config_file={path}"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2
    # TorchTitan 0.3 imports torchao, which may say before that it cannot load its GPU libraries.
    assert "Traceback" not in run.stderr
    sentence = f"Config error: model.flavor is '2B'; it must be one of {', '.join(flavors)}"
    assert run.stderr.splitlines()[-1] == sentence and not run.stdout


def test_the_section_overrides_the_flavor_and_leaves_the_rest(tmp_path):
    changes = {
        "gdn2.window": 9,
        "gdn2.layer_pattern": ["swa", "gdn2"],
        "gdn2.tied_gates": True,
        "model.flavor": "debug",
    }
    config = check(write_toml(tmp_path / "x.toml", changes), "--gdn2.decay=scalar")
    args, _ = model_config(config)
    assert (args.window, args.layer_pattern, args.tied_gates, args.decay) == (9, ("swa", "gdn2"), True, "scalar")
    assert args.num_heads == flavors["debug"].num_heads


@pytest.mark.parametrize("flavor", ["debug", "debug_hybrid"])
def test_depth_and_width_of_the_section_make_the_model_that_is_trained_and_counted(tmp_path, flavor):
    changes = {"model.flavor": flavor, "gdn2.n_layers": 3, "gdn2.hidden_size": 96, "gdn2.mlp_size": 80}
    changes["gdn2.vocab_size"] = 300
    args, counts = model_config(check(write_toml(tmp_path / "x.toml", changes)))
    expected = dataclasses.replace(flavors[flavor], n_layers=3, hidden_size=96, mlp_size=80, vocab_size=300)
    assert {f.name: getattr(args, f.name) for f in dataclasses.fields(expected)} == dataclasses.asdict(expected)
    with torch.device("meta"):
        model = GDN2Model(expected)
    assert counts.get_nparams_and_flops(model, 64)[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("begin", ["resumes", "initial_load_path", "initial_load_in_hf"])
def test_a_checkpoint_of_another_depth_or_width_is_refused_before_training(tmp_path, begin):
    step = save_step(tmp_path / "run" / "checkpoint" / "step-7", weights(flavors["recall"]), flavors["recall"])
    folder = tmp_path / ("run" if begin == "resumes" else "new")
    toml = {"model.flavor": "recall", "checkpoint.enable": True, "job.dump_folder": str(folder)}
    refused = {"gdn2.n_layers": (1, ["of a model of 2 layers", "make it 1"])}
    if begin == "initial_load_path":
        toml |= {"checkpoint.initial_load_path": str(step)}
        refused = {"gdn2.mlp_size": (64, ["mlp.gate_proj.weight", "[128, 64]", "make it [64, 64]"])}
    elif begin == "initial_load_in_hf":
        to_hf(step, tmp_path / "hf")
        toml |= {"checkpoint.initial_load_path": str(tmp_path / "hf"), "checkpoint.initial_load_in_hf": True}
        refused |= {"gdn2.hidden_size": (32, ["[264, 64]", "make it [264, 32]"])}
    check(write_toml(tmp_path / "x.toml", toml))
    for field, (value, parts) in refused.items():
        assert_refused(write_toml(tmp_path / "x.toml", toml | {field: value}), parts)


def test_bounds_ranks_and_mean_gates_come_from_the_file_and_the_command_line(tmp_path):
    changes = {"gdn2.lower_bound": -5, "gdn2.decay_rank": "full", "gdn2.erase_gate": "mean", "gdn2.gate_rank": "head"}
    path = write_toml(tmp_path / "x.toml", changes)
    args, _ = model_config(check(path))
    assert (args.lower_bound, args.decay_rank, args.erase_gate, args.gate_rank) == (-5.0, "full", "mean", "head")
    args, _ = model_config(check(path, "--gdn2.lower_bound=-2.5", "--gdn2.gate_rank=24", "--gdn2.decay_rank=3"))
    assert (args.lower_bound, args.decay_rank, args.gate_rank) == (-2.5, 3, 24)
    args, _ = model_config(check(path, "--gdn2.gate_rank=full"))
    assert args.gate_rank == "full"


@only_toml
def test_registering_is_two_lines_and_harmless_twice():
    from torchtitan.protocols.train_spec import get_train_spec

    from gdn2_titan.titan import register

    register()
    register()
    assert issubclass(get_train_spec("gdn2").model_cls, GDN2Model)


@only_toml
def test_a_forks_own_job_config_without_our_sections_trains_with_their_defaults():
    from torchtitan.config import JobConfig as StockJobConfig
    from torchtitan.protocols.train_spec import get_train_spec

    config = StockJobConfig()
    config.model.name, config.model.flavor, config.model.hf_assets_path = "gdn2", "debug", str(BYTE_TOKENIZER_DIR)
    config.training.dataset, config.training.local_batch_size, config.training.seq_len = "stdlib", 2, 32
    spec = get_train_spec("gdn2")
    tokenizer = spec.build_tokenizer_fn(config)
    loader = spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)
    inputs, labels = next(iter(loader))
    args = spec.model_args["debug"]
    args.update_from_config(config)
    assert set(inputs) == {"input", "resets"}
    model = spec.model_cls(args)
    tokens = inputs.pop("input")
    masks = model.get_attention_masks(input_batch=tokens, tokenizer=tokenizer, extra_inputs=inputs)
    assert model(tokens, **inputs, attention_masks=masks).shape == (2, 32, 264)


@pytest.mark.parametrize("on", ["matrices", "all"])
def test_weight_decay_leaves_out_decays_norms_and_biases_unless_it_is_on_all(tmp_path, on):
    changes = {"optimizer.weight_decay": 0.3} | ({"optimizer.weight_decay_on": "all"} if on == "all" else {})
    config = check(write_toml(tmp_path / "x.toml", changes))
    model = GDN2Model(flavors["debug_hybrid"])
    names = {id(p): name for name, p in model.named_parameters()}
    (optimizer,) = optimizers_of(model, config)
    groups = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == set(names.values())
    for name, weight_decay in groups.items():
        leaf = name.rsplit(".", 1)[1]
        exempt = on == "matrices" and (leaf in ("A_log", "dt_bias", "bias") or "norm" in name)
        assert weight_decay == (0.0 if exempt else 0.3), name


def test_flops_per_token_are_three_times_the_counted_forward(tmp_path):
    args, counts = model_config(check(write_toml(tmp_path / "x.toml", {"model.flavor": "debug"})))
    with torch.device("meta"):
        model = GDN2Model(args)
        tokens = torch.zeros(2, 512, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    nparams, flops = counts.get_nparams_and_flops(model, 512)
    assert nparams == sum(p.numel() for p in model.parameters())
    # Norms and biases count as six a token each although they multiply no matrix.
    assert math.isclose(flops, 3 * counter.get_total_flops() / tokens.numel(), rel_tol=0.01)
