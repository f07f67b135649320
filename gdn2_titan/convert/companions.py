"""What lies beside the weights in a Hugging Face folder: config, tokenizer, model card. Plain JSON and text, written
without transformers."""

import json
import math
import shutil
from pathlib import Path

from .errors import ConvertError, reading
from .layout import tensors_of
from .local_paths import without_folders
from .record import Record, args_to_fields

__all__ = ["MODEL_TYPE", "copy_tokenizer", "write_companions"]

MODEL_TYPE = "gdn2"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# Fields of a tokenizer_config.json that say where the tokenizer came from.
_ORIGIN = ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file")


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
    """Copies a tokenizer's files, and leaves out where they lay before; None: there is none."""
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    _forget_origin(folder)


def _forget_origin(folder):
    """Takes out of a copied tokenizer_config.json what names files of the machine where it was written, and code, which
    is not copied and for which transformers would ask: all of the tokenizer is in tokenizer.json."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        dropped = {*_ORIGIN, *(("auto_map",) if (folder / "tokenizer.json").is_file() else ())}
        kept = {name: value for name, value in config.items() if name not in dropped}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _snippet(tokenizer, with_code):
    """Lines that load the folder: exactly what it has, and without a question."""
    names = ["AutoModelForCausalLM"] + ["AutoTokenizer"] * tokenizer
    trust = ", trust_remote_code=True" if with_code else ""
    lines = [] if with_code else ["import gdn2_titan.convert.hf  # registers the model"]
    lines += [f"from transformers import {', '.join(names)}", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("this folder"{trust})']
    # The tokenizer has no code, but transformers asks for the config's, which stands beside it.
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})'] * tokenizer
    return ["```python", *lines, "```"]


def _card(record, step, dtype, tokenizer, with_code):
    args = record.model_args
    count = sum(math.prod(tensor.shape) for tensor in tensors_of(args).values())
    mixers = [args.mixer(layer) for layer in range(args.n_layers)]
    kinds = ", ".join(f"{mixers.count(kind)} {kind}" for kind in dict.fromkeys(mixers))
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gdn2", "---", "",
        "# Gated DeltaNet-2", "",
        f"{count:,} parameters in {dtype}; {args.n_layers} layers ({kinds}), hidden size {args.hidden_size}, "
        f"vocabulary {args.vocab_size:,}.", "",
        *_snippet(tokenizer, with_code), "",
        "## Training", "",
        f"- Step: {step if step is not None else 'not known'}",
    ]  # fmt: skip
    if record.job_config is None:
        lines += ["- Config: not known", ""]
    else:
        lines += ["- Config:", "", "```json", json.dumps(without_folders(record.job_config), indent=2), "```", ""]
    return "\n".join(lines)


def write_companions(folder, record: Record, tokenizer, dtype, step=None, with_code=False):
    """Writes config.json, generation_config.json, README.md and copies of the tokenizer's files into a folder.

    Args:
        tokenizer: a folder, or None where there is no tokenizer.
        dtype: of the weights, as torch names it without "torch.".
        step: the training step, if known.
        with_code: whether the model's code will lie beside it.

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
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    (folder / "README.md").write_text(_card(record, step, dtype, has_tokenizer, with_code), encoding="utf-8")
