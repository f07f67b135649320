"""What a Hugging Face folder has beside the weights: config, tokenizer, model card. Plain JSON and text, written
without transformers."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from .checkpoint_info import CheckpointInfo, args_to_fields
from .errors import ConvertError
from .mapping import tensors_of
from .tokenizer import copy_tokenizer, special_ids

__all__ = ["MODEL_TYPE", "without_folders", "write_model_files"]

MODEL_TYPE = "gdn2"
# How a value begins that is a path as a whole, with whatever spaces in it.
_IS_PATH = re.compile(r"[/~]|\.{1,2}([\\/]|$)|[A-Za-z]:[\\/]|\\\\|file:")
# Folders of a path inside of a sentence. What follows a letter, a dot or a colon is of a URL or an "and/or".
_FOLDERS = re.compile(r"(?<![\w:/.])~?/(?:[\w.@+-]+/)+|(?<!\w)[A-Za-z]:\\(?:[^\\\s]+\\)*")
# Fields of a job config that hold a path, relative ones too.
_PATH_FIELD = re.compile(r"(^|_)(folder|dir|file|csv|assets_path|load_path|tokenizer_path)$")
_FILE = re.compile(r"^\S*[*?]|\.(txt|text|jsonl?|parquet|csv|md|py|gz|zst)$", re.IGNORECASE)


def without_folders(value: Any, field: str = "") -> Any:
    """A JSON value for what is published: of every local path only the last name is left. Names of datasets and URLs
    stay.

    field: the name that ``value`` has. Values that JSON has no word for become strings.
    """
    if isinstance(value, dict):
        return {key: without_folders(one, str(key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(one, field) for one in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.loads(json.dumps(value, default=str))
    if not isinstance(text, str):
        return without_folders(text, field)
    local = _IS_PATH.match(text) or _PATH_FIELD.search(field) or ("://" not in text and _FILE.search(text))
    if local:
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _FOLDERS.sub("", text)


def _snippet(tokenizer: bool, with_code: bool) -> list[str]:
    """Lines that load the folder: exactly what it has, and without a question."""
    names = ["AutoModelForCausalLM"] + ["AutoTokenizer"] * tokenizer
    trust = ", trust_remote_code=True" if with_code else ""
    lines = [] if with_code else ["import gdn2_titan.convert.hf  # registers the model"]
    lines += [f"from transformers import {', '.join(names)}", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("this folder"{trust})']
    # The tokenizer has no code, but transformers asks for the config's, which stands beside it.
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})'] * tokenizer
    return ["```python", *lines, "```"]


def _card(info: CheckpointInfo, step: int | None, dtype: str, tokenizer: bool, with_code: bool) -> str:
    args = info.model_args
    count = sum(math.prod(tensor.shape) for tensor in tensors_of(args).values())
    mixers = [args.mixer(layer) for layer in range(args.n_layers)]
    counts = ", ".join(f"{mixers.count(mixer)} {mixer}" for mixer in dict.fromkeys(mixers))
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gdn2", "---", "",
        "# Gated DeltaNet-2", "",
        f"{count:,} parameters in {dtype}; {args.n_layers} layers ({counts}), hidden size {args.hidden_size}, "
        f"vocabulary {args.vocab_size:,}.", "",
        *_snippet(tokenizer, with_code), "",
        "## Training", "",
        f"- Step: {step if step is not None else 'not known'}",
    ]  # fmt: skip
    if info.job_config is None:
        lines += ["- Config: not known", ""]
    else:
        lines += ["- Config:", "", "```json", json.dumps(without_folders(info.job_config), indent=2), "```", ""]
    return "\n".join(lines)


def write_model_files(
    folder: str | os.PathLike[str], info: CheckpointInfo, tokenizer: str | os.PathLike[str] | None, dtype: str,
    step: int | None = None, with_code: bool = False,
) -> None:  # fmt: skip
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
    ids = special_ids(tokenizer)
    for name, number in ids.items():
        if number is not None and number >= info.model_args.vocab_size:
            raise ConvertError(f"{tokenizer} has {name} {number}; vocab_size is {info.model_args.vocab_size}")
    config = {
        "model_type": MODEL_TYPE, "architectures": ["GDN2ForCausalLM"], "dtype": dtype,
        **args_to_fields(info.model_args), **ids, "tie_word_embeddings": False, "use_cache": True,
    }  # fmt: skip
    generation = {"_from_model_config": True} | {name: number for name, number in ids.items() if number is not None}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer, folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    (folder / "README.md").write_text(_card(info, step, dtype, has_tokenizer, with_code), encoding="utf-8")
