"""Folders that vLLM serves, its engine in this process, and what the transformers model says of what it answers."""

import gc
import json
import os
import shutil

import torch
from safetensors.torch import save_file

from gdn2_titan.convert.commands import to_hf
from gdn2_titan.convert.hf import GDN2ForCausalLM
from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from tests.convert_cases import TOKENIZER, load_safetensors, save_step
from tests.model_cases import sharpened

# Before vLLM is imported: its engine in this process, with little memory.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

# vLLM's attention for CPUs has heads of 32 and larger.
SERVED = dict(
    vocab_size=264, hidden_size=128, n_layers=4, mlp_size=96, num_heads=2, head_dim=16, attn_heads=4, attn_kv_heads=2,
    window=24,
)  # fmt: skip
WINDOWED, FULL = ("gdn2", "swa"), ("gdn2", "attention")
GROUPED = {"num_v_heads": 4, "expand_v": 1.5}  # and K != V
VARIANTS = {
    "recurrent": GROUPED,
    "windowed": {"layer_pattern": WINDOWED} | GROUPED,
    "full": {"layer_pattern": FULL, "attn_kv_heads": None, "conv_size": 3} | GROUPED,
    "KDA": {"tied_gates": True, "num_v_heads": 4, "allow_neg_eigval": True},
    "GDN": {"tied_gates": True, "decay": "scalar", "layer_pattern": ("gdn2", "swa", "attention")},
    "scalar-gates": {"erase_gate": "scalar", "write_gate": "scalar", "output_gate": "sigmoid", "conv_size": 2},
    "mean-gates-ranks-bounded": {
        "erase_gate": "mean", "write_gate": "mean", "decay_rank": "full", "gate_rank": 3, "lower_bound": -5.0,
    },
}  # fmt: skip


def folder(path, dtype=None, **fields):
    """A Hugging Face folder of ``convert to-hf`` in ``path``, of a model with weights that matter."""
    args = GDN2ModelArgs(**SERVED | fields)
    torch.manual_seed(0)
    weights = sharpened(GDN2Model(args)).state_dict()
    to_hf(save_step(path / "checkpoint" / "step-1", weights, args), path / "hf", dtype, tokenizer=TOKENIZER)
    return path / "hf"


def adapter(path, hf, targets, rank=4):
    """A LoRA in PEFT's layout for the projections of these names, and the folder ``hf`` with it merged in: two paths.
    Written by hand, as vLLM's environment need not have PEFT."""
    tensors, merged = {}, load_safetensors(hf)
    generator = torch.Generator().manual_seed(3)
    for name, weight in merged.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[-2] in targets and parts[-1] == "weight":
            A = torch.randn((rank, weight.shape[1]), generator=generator) * weight.shape[1] ** -0.5
            B = torch.randn((weight.shape[0], rank), generator=generator) * 0.3
            module = "base_model.model." + name.removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
            merged[name] = weight + B @ A
    assert {name.split(".")[-3] for name in tensors} == set(targets)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets), "bias": "none"}
    _write(path / "lora", {"adapter_config.json": config}, "adapter_model.safetensors", tensors)
    _write(path / "merged", {"config.json": json.loads((hf / "config.json").read_text())}, "model.safetensors", merged)
    return path / "lora", path / "merged"


def in_int8(path, hf):
    """The folder ``hf`` with its projections in 8 bits, a scale for each row, in the layout of compressed-tensors; and
    the folder of the same values in fp32: two paths."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = json.loads((hf / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
                    "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip
    small, wide = {}, {}
    for name, tensor in load_safetensors(hf).items():
        small[name] = wide[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            small[name] = (tensor / scale).round().to(torch.int8)
            small[f"{name}_scale"] = scale
            wide[name] = small[name] * scale
    quantized = {"config.json": config | {"quantization_config": quantization}}
    _write(path / "int8", quantized, "model.safetensors", small)
    _write(path / "wide", {"config.json": config}, "model.safetensors", wide)
    return path / "int8", path / "wide"


def _write(folder, configs, name, tensors):
    shutil.copytree(TOKENIZER, folder)
    for file, content in configs.items():
        (folder / file).write_text(json.dumps(content))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)


def prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]


class Engine:
    """vLLM in this process, ``with Engine(folder) as engine``."""

    def __init__(self, path, **options):
        from vllm import LLM

        usual = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 32, "max_num_seqs": 4,
                 "enforce_eager": True, "enable_prefix_caching": False}  # fmt: skip
        self.llm = LLM(str(path), **usual | options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def model(self):
        return self.llm.apply_model(lambda model: model)[0]

    def answers(self, texts, tokens=8, cached=None, **options):
        """[(ids, their logprobs)] of greedy generation. cached: a list, to which go the numbers of tokens of each text
        that were found in the prefix cache."""
        outputs = self.llm.generate([_prompt(ids) for ids in texts], _greedy(tokens), use_tqdm=False, **options)
        if cached is not None:
            cached += [output.num_cached_tokens for output in outputs]
        return [_answer(output.outputs[0]) for output in outputs]


def _prompt(ids):
    return {"prompt_token_ids": ids}


def _greedy(tokens):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)


def _answer(output):
    ids = list(output.token_ids)
    return ids, [said[token].logprob for said, token in zip(output.logprobs, ids, strict=True)]


def arriving(engine, texts, draw):
    """({index: answer} of texts that arrive at random times, a fourth of which are aborted; how often one was put
    off)."""
    engine = engine.llm.llm_engine
    waiting, answers, running = list(range(len(texts))), {}, {}
    scheduler = engine.engine_core.engine_core.scheduler
    preempt, put_off = scheduler._preempt_request, []

    def counted(request, *args, **kwargs):
        put_off.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    while waiting or engine.has_unfinished_requests():
        while waiting and draw.random() < 0.6:
            index = waiting.pop(0)
            length = draw.randint(1, 40)
            engine.add_request(str(index), _prompt(texts[index]), _greedy(length))
            if draw.random() < 0.25:
                running[index] = draw.randint(1, 12)  # steps until it is aborted
        for output in engine.step():
            index = int(output.request_id)
            if output.finished:
                running.pop(index, None)
                answers[index] = _answer(output.outputs[0])
        for index in list(running):
            running[index] -= 1
            if running[index] < 0:
                engine.abort_request([str(index)])
                del running[index]
    return answers, len(put_off)


class Oracle:
    """The transformers model of a folder, which reads all of a text at once, in fp32."""

    def __init__(self, path):
        self.model = GDN2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def bfloat16(self):
        self.model.bfloat16()
        return self

    @torch.no_grad()
    def _logits(self, text, ids):
        """Before each of the ids that follow the text [tokens, vocabulary]."""
        return self.model(torch.tensor([[*text, *ids]])).logits[0, len(text) - 1 : -1].float()

    def logprobs(self, texts, answers):
        """Of the ids of each answer [answers, tokens]."""
        said = [self._logits(text, ids).log_softmax(-1) for text, (ids, _) in zip(texts, answers, strict=True)]
        picked = [logprobs[range(len(ids)), ids] for logprobs, (ids, _) in zip(said, answers, strict=True)]
        return torch.stack(picked)

    def assert_said(self, texts, answers, atol=1e-4):
        """Each answer is what greedy generation gives, token for token, with the same logprobs."""
        assert len(texts) == len(answers)
        for text, (ids, logprobs) in zip(texts, answers, strict=True):
            logits = self._logits(text, ids)
            assert ids == logits.argmax(-1).tolist(), f"of a prompt of {len(text)} tokens"
            expected = logits.log_softmax(-1)[range(len(ids)), ids]
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=atol)
