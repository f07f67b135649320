"""``python -m gdn2_titan.study gates``: pictures and a page of what the gates of a model do over a text."""

import argparse
from pathlib import Path
from typing import Any

from gdn2_titan.convert.atomic import check_free, new_path
from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.convert.run_folders import checkpoint_folder
from gdn2_titan.convert.tokenizer import document_ids, encode
from gdn2_titan.model_options import add_model_options, dtype_of, number, open_model

from .gates_tokens import tokens_of

__all__ = ["add_parser", "run"]

# Pictures of more would be beyond what PNG readers take, and a page of more beyond what a person reads.
MOST_TOKENS = 4096


def add_parser(subparsers: Any) -> None:
    """Adds the command; its options are in its --help."""
    what = "pictures of what the gates do over a text: PNG files, and gates.html with all of it"
    parser = subparsers.add_parser("gates", help=what, description=what)
    add = parser.add_argument
    add("--text", required=True, metavar="FILE", help="UTF-8 text that the model reads")
    add("--out", default="gates", metavar="DIR", help="a new name (default: gates)")
    count = number(int, f"a whole number from 1 to {MOST_TOKENS}", lambda x: 1 <= x <= MOST_TOKENS)
    add("--tokens", type=count, default=256, metavar="N", help="of the text, after bos (default: 256)")
    index = number(int, "a whole number of at least 0", lambda x: x >= 0)
    add("--layer", type=index, metavar="N", help="whose channels are shown (default: the first GDN-2 layer)")
    add("--head", type=index, default=0, metavar="N", help="value head whose channels are shown (default: 0)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConvertError(f"--text is {path}; it must be a file that can be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConvertError(f"--text is {path}; it must be UTF-8, which it is not at byte {error.start}") from error
    if not text:
        raise ConvertError(f"--text is {path}, which is empty; it must have at least one character")
    return text


def _layer(args: Any, options: argparse.Namespace) -> tuple[int, int]:
    """The layer to show the channels of, after checking it and the head; and how many GDN-2 layers there are."""
    layers = [layer for layer in range(args.n_layers) if args.mixer(layer) == "gdn2"]
    if not layers:
        mixers = ", ".join(sorted(args.mixers()))
        raise ConvertError(f"{options.model} has no GDN-2 layer, its layers mix by {mixers}; it must have one")
    if args.content_gate:
        raise ConvertError(f"content_gate of {options.model} is true; it must be false for pictures of the gates")
    layer = layers[0] if options.layer is None else options.layer
    if layer not in layers:
        raise ConvertError(f"--layer is {layer}; it must be a GDN-2 layer of the model: {', '.join(map(str, layers))}")
    heads = args.num_v_heads or args.num_heads
    if options.head >= heads:
        raise ConvertError(f"--head is {options.head}; it must be a value head of the model, from 0 to {heads - 1}")
    return layer, len(layers)


def run(options: argparse.Namespace) -> None:
    """Write the folder ``options.out``, whole or not at all.

    Raises:
        ConvertError: one sentence about what is wrong with the options, the text or the checkpoint.
    """
    checkpoint_folder(options.model)  # a path that is not there is answered before torch is imported
    from tqdm import tqdm

    from gdn2_titan.convert.hf import load_checkpoint

    from .gates_figures import draw_figures
    from .gates_page import write_page
    from .gates_trace import trace_gates

    check_free(options.out)
    text = _read_text(options.text)
    checkpoint, tokenizer = open_model(options)
    args = checkpoint.info.model_args
    layer, count = _layer(args, options)
    encoding = encode(tokenizer, text, return_offsets_mapping=tokenizer.is_fast)
    if not encoding["input_ids"]:
        raise ConvertError(f"--text is {options.text}, which the tokenizer makes no token of; it must give one")
    ids = document_ids(tokenizer, encoding["input_ids"][: options.tokens], args.vocab_size)
    model = load_checkpoint(checkpoint, dtype_of(options), options.device)
    with tqdm(desc="reading the text", total=count, unit="layer", disable=None, leave=False) as bar:
        traces = trace_gates(model, ids.to(options.device), layer, options.head, bar.update)
    tokens = tokens_of(tokenizer, text, encoding, ids[0].tolist())
    step = "" if checkpoint.step is None else f", step {checkpoint.step}"
    about = f"{options.model}{step} reads {Path(options.text).name}: {len(tokens)} tokens"
    about = about.encode("utf-8", "replace").decode()  # names of files may be no text
    try:
        with new_path(options.out) as folder:
            with tqdm(desc="drawing", unit="picture", disable=None, leave=False) as bar:
                pictures = draw_figures(folder, about, tokens, traces, options.head, bar.update)
            write_page(folder, about, tokens, traces, options.head, pictures)
    except OSError as error:
        raise ConvertError(f"{options.out} was not written: {error.strerror or error}") from error
    print(f"Wrote {options.out}")
