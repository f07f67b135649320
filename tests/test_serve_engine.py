"""vLLM's engine with the plug-in against the transformers model of the same folder. Needs vLLM: see setup_env.sh."""

import logging
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from gdn2_titan.models.old_names import OLD_NAMES
from gdn2_titan.serve import register
from tests import serve_cases
from tests.convert_cases import load_safetensors
from tests.serve_cases import GROUPED, VARIANTS, WINDOWED, Engine, Oracle, folder, prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ModelRegistry = pytest.importorskip("vllm").ModelRegistry

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OF_THE_MEMORY = ("erase_proj", "write_proj", "decay_proj", "decay_low_proj", "gate_low_proj")
# At the widths of convolutions and at the ends of pieces, and any.
LENGTHS = [1, 2, 3, 4, 5, 31, 32, 33, 64, 75, 700, *random.Random(0).choices(range(1, 701), k=53)]


@pytest.fixture
def two_cores(monkeypatch):
    """One for each of two processes of an engine."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("hybrid"), **VARIANTS["windowed"])


# Those of two processes, below, are asked the same.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("GDN", "windowed")])
def test_64_prompts_in_pieces_of_32_tokens_are_answered_as_the_transformers_model_does(tmp_path, variant):
    path = folder(tmp_path, **VARIANTS[variant])
    texts = prompts(LENGTHS)
    with Engine(path, max_num_seqs=16) as engine:
        Oracle(path).assert_said(texts, engine.answers(texts))


@pytest.mark.parametrize("variant", ["recurrent", "windowed", "full"])
def test_what_goes_on_from_a_cached_prefix_is_what_reads_all_of_it(tmp_path, variant):
    path = folder(tmp_path, **VARIANTS[variant])
    with Engine(path, enable_prefix_caching=True, max_num_batched_tokens=512) as engine:
        block = engine.llm.llm_engine.vllm_config.cache_config.mamba_block_size
        first = prompts([2 * block + 5, 3 * block])
        oracle = Oracle(path)
        oracle.assert_said(first, engine.answers(first))
        again = [first[0], [*first[1][: 2 * block], 7, 8, 9], first[1][:block], first[1], [*first[0], *first[1]]]
        cached = []
        oracle.assert_said(again, engine.answers(again, cached=cached))
        assert cached[0] == 2 * block and cached[3] >= 2 * block and cached[4] >= 2 * block, cached


@pytest.mark.parametrize("caching", [False, True], ids=["", "prefix-caching"])
def test_a_state_of_an_earlier_request_never_shows(tmp_path, caching):
    """Blocks are few and used again and again; requests of one token come as pieces of prompts do; some are aborted in
    the middle, others put off, as memory is short."""
    draw = random.Random(1)
    texts = prompts([draw.choice([1, 1, 2, 3, draw.randint(1, 90)]) for _ in range(200)])
    path = folder(tmp_path, layer_pattern=("gdn2", "swa", "attention"), **GROUPED)
    tight = {"num_gpu_blocks_override": 24, "block_size": 32, "max_num_seqs": 8, "max_model_len": 160}
    with Engine(path, enable_prefix_caching=caching, **tight) as engine:
        answers, put_off = serve_cases.arriving(engine, texts, draw)
    assert 120 < len(answers) < 180 and put_off
    kept = sorted(answers)
    Oracle(path).assert_said([texts[i] for i in kept], [answers[i] for i in kept])


def test_bf16_differs_from_fp32_by_no_more_than_the_transformers_model_in_bf16(hybrid):
    texts = prompts([5, 40, 75])
    oracle = Oracle(hybrid)
    with Engine(hybrid, dtype="bfloat16") as engine:
        answers = engine.answers(texts)
        layer = engine.model().model.layers[0].mixer
        assert {layer.decay.A_log.dtype, layer.decay.dt_bias.dtype, layer.kv_cache[0].dtype} == {torch.float32}
        assert layer.q_conv1d.weight.dtype == layer.kv_cache[1].dtype == torch.bfloat16
    expected, rounded = oracle.logprobs(texts, answers), oracle.bfloat16().logprobs(texts, answers)
    ours = torch.tensor([logprobs for _, logprobs in answers])
    assert (ours - expected).abs().max() < 3 * (rounded - expected).abs().max()


def test_a_block_that_held_a_state_serves_keys_and_values_of_a_window(tmp_path):
    """In bf16 the bytes of a state are NaN here and there, and vLLM's attention on CPUs reads blocks to their ends."""
    path = folder(tmp_path, layer_pattern=WINDOWED, head_dim=64)
    texts = prompts([1, 5, 40, 75, 3, 20, 9, 33] * 3)
    with Engine(path, dtype="bfloat16", num_gpu_blocks_override=16, max_model_len=96) as engine:
        first = engine.answers(texts)
        again = engine.answers(texts[::-1])[::-1]
    logprobs = torch.tensor([[said for _, said in answers] for answers in (first, again)])
    assert logprobs.isfinite().all()
    torch.testing.assert_close(logprobs[0, :, 0], logprobs[1, :, 0], rtol=0, atol=0.1)


@pytest.mark.parametrize("split, variant", [("tensor_parallel_size", "GDN"), ("pipeline_parallel_size", "windowed")])
def test_two_processes_say_what_one_model_does(tmp_path, two_cores, split, variant):
    path = folder(tmp_path, **VARIANTS[variant])
    texts = prompts(LENGTHS)
    # Asked to be eager, vLLM 0.32 makes no room on CPUs for what stages hand over.
    with Engine(path, enforce_eager=split == "tensor_parallel_size", **{split: 2}) as engine:
        Oracle(path).assert_said(texts, engine.answers(texts))


@pytest.mark.parametrize("processes, variant", [(1, "KDA"), (2, "windowed")])
def test_a_request_with_an_adapter_says_what_the_merged_model_does_and_one_without_what_the_plain_one_does(
    tmp_path, two_cores, processes, variant
):
    from vllm.lora.request import LoRARequest

    path = folder(tmp_path, **VARIANTS[variant])
    of_the_memory = [name for name in OF_THE_MEMORY if name != "write_proj" or variant != "KDA"]
    folders, requests = [path], [None]
    for number, targets in enumerate((USUAL, of_the_memory), 1):
        lora, merged = serve_cases.adapter(tmp_path / str(number), path, targets)
        folders.append(merged)
        requests.append(LoRARequest(str(number), number, str(lora)))
    texts = prompts([3, 40, 75, 1, 33, 20])  # with all three in one step
    # A place more than adapters: on CPUs vLLM gives the last one's to requests without any that run beside others.
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 3, "tensor_parallel_size": processes}
    with Engine(path, **options) as engine:
        answers = engine.answers(texts, lora_request=requests * 2)
    for number, merged in enumerate(folders):
        Oracle(merged).assert_said(texts[number::3], answers[number::3])


def test_projections_in_8_bits_are_served(tmp_path, hybrid):
    int8, wide = serve_cases.in_int8(tmp_path, hybrid)
    texts = prompts([3, 40, 75])
    with Engine(int8, dtype="bfloat16") as engine:  # vLLM's kernel for cores with AMX has no fp32
        layer = engine.model().model.layers[0].mixer
        assert type(layer.erase_proj.quant_method).__name__ == "CompressedTensorsLinearMethod"
        answers = engine.answers(texts)
    said = torch.tensor([logprobs for _, logprobs in answers])
    # Inputs are rounded too, and weights are such that a rounding shows.
    assert (said - Oracle(wide).bfloat16().logprobs(texts, answers)).abs().mean() < 0.15


@pytest.mark.parametrize(
    "options, fields, sentence",
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}, {},
         "speculative_config has method 'ngram'; it must be left out, the states of GDN-2 layers cannot be taken back"),
        ({}, {"layer_pattern": ("swa", "attention")}, "layer_pattern is ['swa', 'attention']; to be served it must"),
        ({}, {"backend": "batch_invariant"}, "backend is 'batch_invariant'; to be served it must be another one"),
        ({}, {"layer_pattern": ("gdn2", "mamba2", "swa")},
         "layer_pattern is ['gdn2', 'mamba2', 'swa']; to be served it must be without 'mamba2', whose states vLLM"),
        ({}, {"content_gate": True}, "content_gate is True; to be served it must be false, vLLM is not given"),
        ({"tensor_parallel_size": 4}, {}, "tensor_parallel_size is 4; it must divide num_heads = 2"),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, {}, "mamba_ssm_cache_dtype is 'bfloat16'; it must be 'float32'"),
        ({"mamba_cache_dtype": "float16"}, {}, "mamba_cache_dtype is 'float16'; it must be left out"),
    ],
    ids=["speculative", "no-gdn2", "backend", "mamba", "content-gate", "heads", "memory-dtype", "tails-dtype"],
)  # fmt: skip
def test_what_is_not_served_is_refused_before_the_model_is_built(tmp_path, options, fields, sentence):
    path = folder(tmp_path, **fields)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Engine(path, **options)


@pytest.mark.parametrize("version", ["0.19.1", "0.30.2.post1", "0.34.0rc1", "1.0"])
def test_another_vllm_is_told_one_sentence_and_nothing_else(monkeypatch, version):
    said = []
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr(ModelRegistry, "register_model", lambda *_: pytest.fail("it was told of the model"))
    monkeypatch.setattr(logging.getLogger("vllm"), "warning", lambda sentence, *args: said.append(sentence % args))
    register()
    assert said == [f"vllm is {version}; to serve GDN-2 it must be at least 0.31 and less than 0.34"]


def test_a_tensor_that_has_no_place_is_named_and_so_is_one_that_is_missing(tmp_path):
    path = folder(tmp_path)
    tensors = load_safetensors(path)
    gate = tensors.pop("model.layers.1.mixer.gate_proj.bias")
    save_file(tensors | {"model.layers.1.mixer.other.bias": gate}, path / "model.safetensors")
    with pytest.raises(ValueError, match="the folder has tensor 'model.layers.1.mixer.other.bias', which"):
        Engine(path)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match="model.layers.1.mixer.gate_proj.bias"):
        Engine(path)


def test_a_folder_of_old_names_is_served(tmp_path, hybrid):
    old = tmp_path / "old"
    shutil.copytree(hybrid, old)
    names = {today: before for before, today in OLD_NAMES.items()}
    pattern = re.compile(r"(?<=mixer\.)(?:" + "|".join(map(re.escape, names)) + ")")
    tensors = load_safetensors(hybrid)
    renamed = {pattern.sub(lambda found: names[found.group()], name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, old / "model.safetensors")
    texts = prompts([3, 40])
    with Engine(old) as engine:
        Oracle(hybrid).assert_said(texts, engine.answers(texts))
