"""``python -m gdn2_titan.titan.tokenize FILES --out DIR``: tokenizes local files before a training that names DIR.

Run again, it continues where it was killed, and does nothing where all is done.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

__all__ = ["main"]

# Settings of a training, as this command calls them.
_NAMES = {"tokenize.dataset_path": "FILES", "data.text_column": "--text_column", "model.hf_assets_path": "--tokenizer"}


def main() -> int:
    from .byte_tokenizer import BYTE_TOKENIZER_DIR
    from .errors import ConfigError

    parser = argparse.ArgumentParser(prog="python -m gdn2_titan.titan.tokenize", description=__doc__)
    parser.add_argument(
        "files", nargs="+", metavar="FILES", help="files, folders or globs, as of training.dataset_path"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the tokens")
    parser.add_argument("--tokenizer", default=str(BYTE_TOKENIZER_DIR), metavar="DIR",
                        help="folder of the tokenizer, as model.hf_assets_path; bytes if unset")  # fmt: skip
    parser.add_argument("--text_column", default="text", help="column of JSON lines or Parquet that holds the text")
    arguments = parser.parse_args()
    try:
        _tokenize(arguments)
    except ConfigError as error:
        sentence = str(error)
        for setting, option in _NAMES.items():
            sentence = sentence.replace(setting, option)
        print(f"Error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return 130
    return 0


def _tokenize(arguments: argparse.Namespace) -> None:
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    from .byte_tokenizer import BYTE_TOKENIZER_DIR
    from .errors import ConfigError
    from .local_files import check_begins, find_files, reason
    from .token_files import plan_of, write_tokens
    from .tokens import DocumentTokens, check_tokenizer, check_tokenizer_json

    check_tokenizer_json(arguments.tokenizer)
    check_tokenizer(arguments.tokenizer)
    found = [find_files("tokenize", path) for path in arguments.files]
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1 or "tokens" in kinds:
        raise ConfigError(f"FILES are of these kinds: {', '.join(sorted(kinds))}; allowed: one of text, json, parquet.")
    files = sorted({file for _, some in found for file in some})
    [kind] = kinds
    check_begins(kind, files, arguments.text_column)
    encode = DocumentTokens(HuggingFaceTokenizer(tokenizer_path=arguments.tokenizer))
    _, plan = plan_of(kind, files, arguments.text_column, encode)
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def began(size: int) -> None:
            bar.reset(size)

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        def waits() -> None:
            bar.write("Waiting for the process that tokenizes into the same folder", file=sys.stderr)

        try:
            tokens = write_tokens(arguments.out, plan, encode, began=began, progress=progress, waits=waits)
        except OSError as error:
            raise ConfigError(f"--out {str(arguments.out)!r} cannot be written: {reason(error)}.") from error
    print(f"{len(tokens)} documents, {tokens.tokens} tokens in {arguments.out}")
    settings = f'training.dataset = "files", training.dataset_path = "{arguments.out.absolute()}"'
    if arguments.tokenizer != str(BYTE_TOKENIZER_DIR):
        settings += f', model.hf_assets_path = "{os.path.abspath(arguments.tokenizer)}"'
        settings += f", gdn2.vocab_size = {len(encode.vocabulary)} or more"
    print(f"Train on them with {settings}")


if __name__ == "__main__":
    sys.exit(main())
