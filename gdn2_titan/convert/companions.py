"""What lies beside the weights in a Hugging Face folder: config, tokenizer, model card. Plain JSON and text, written
without transformers."""

import json
import math
import shutil
from pathlib import Path

from .errors import ConvertError, reading
from .layout import tensors_of
from .record import Record, args_to_fields

__all__ = ["MODEL_TYPE", "copy_tokenizer", "write_companions"]

MODEL_TYPE = "gdn2"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def _special_ids(tokenizer):
    """{"bos_token_id": ...} as the tokenizer's files have them; None where a token is not there."""
    found = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is None or not all((tokenizer / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
        return found
    with reading(tokenizer / "tokenizer.json"):
        content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    with reading(tokenizer / "tokenizer_config.json"):
        config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in found:
        token = config.get(name.removesuffix("_id"))
        found[name] = ids.get(token["content"] if isinstance(token, dict) else token)
    return found


def copy_tokenizer(tokenizer, folder):
    """Copies a tokenizer's files; None: there is none."""
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def _card(record, step, dtype):
    args = record.model_args
    count = sum(math.prod(tensor.shape) for tensor in tensors_of(args).values())
    mixers = [args.mixer(layer) for layer in range(args.n_layers)]
    kinds = ", ".join(f"{mixers.count(kind)} {kind}" for kind in dict.fromkeys(mixers))
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gdn2", "---", "",
        "# Gated DeltaNet-2", "",
        f"{count:,} parameters in {dtype}; {args.n_layers} layers ({kinds}), hidden size {args.hidden_size}, "
        f"vocabulary {args.vocab_size:,}.", "",
        "```python", "import gdn2_titan.convert.hf  # registers the model",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")', "```", "",
        "## Training", "",
        f"- Step: {step if step is not None else 'not known'}",
    ]  # fmt: skip
    if record.job_config is None:
        lines += ["- Config: not known", ""]
    else:
        lines += ["- Config:", "", "```json", json.dumps(record.job_config, indent=2, default=str), "```", ""]
    return "\n".join(lines)


def write_companions(folder, record: Record, tokenizer, dtype, step=None):
    """Writes config.json, generation_config.json, README.md and copies of the tokenizer's files into a folder.

    Args:
        tokenizer: a folder, or None where there is no tokenizer.
        dtype: of the weights, as torch names it without "torch.".
        step: the training step, if known.

    Raises:
        ConvertError: the tokenizer cannot be read, or has symbols that the model has no room for.
    """
    folder, tokenizer = Path(folder), None if tokenizer is None else Path(tokenizer)
    ids = _special_ids(tokenizer)
    for name, number in ids.items():
        if number is not None and number >= record.model_args.vocab_size:
            raise ConvertError(f"{tokenizer} has {name} {number}; vocab_size is {record.model_args.vocab_size}")
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["GDN2ForCausalLM"],
        "dtype": dtype,
        **args_to_fields(record.model_args),
        **ids,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    generation = {"_from_model_config": True} | {name: number for name, number in ids.items() if number is not None}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(_card(record, step, dtype), encoding="utf-8")
