"""Text from a model, as it comes: ``python -m gdn2_titan.generate --model FOLDER --prompt TEXT``.

The folder is a TorchTitan checkpoint (a step, or a run's folder of them: the latest) or a Hugging Face folder of ours.
"""

import argparse
import sys
import time

import torch

try:
    from transformers import AutoTokenizer, GenerationConfig, TextStreamer
except ImportError as error:
    raise SystemExit(f"Error: {error}; generating needs the extra 'hf': pip install 'gdn2_titan[hf]'") from error

from gdn2_titan.convert.checkpoints import open_checkpoint
from gdn2_titan.convert.errors import ConvertError, reading
from gdn2_titan.convert.hf.load import load_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A longer prompt is read in pieces of so many tokens, so that the masks of softmax layers stay small.
PIECE = 2048


class Clock(TextStreamer):
    """Prints the text, and remembers when the prompt and each token came."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())
        super().put(value)

    def report(self, prompt):
        """One line: how many tokens in how long, apart from the prompt's ``prompt`` tokens."""
        start, *tokens = self.times
        count, first = len(tokens), tokens[0] - start
        rate = (count - 1) / (tokens[-1] - tokens[0]) if count > 1 else 1 / first
        return (
            f"{count} tokens in {tokens[-1] - start:.2f} s, {rate:.1f} tokens/s after the first; "
            f"prompt of {prompt} tokens in {first:.2f} s"
        )


def _number(kind, what, allowed):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be {what}")
        return value

    return parse


def _parser():
    parser = argparse.ArgumentParser("python -m gdn2_titan.generate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="TorchTitan checkpoint or Hugging Face folder")
    add("--prompt", required=True, metavar="TEXT", help="what the text begins with; may be empty")
    count = _number(int, "a whole number of at least 1", lambda x: x >= 1)
    add("--max-tokens", type=count, default=256, metavar="N", help="to generate (default: 256)")
    add("--greedy", action="store_true", help="always the likeliest token")
    above = _number(float, "a number greater than 0", lambda x: 0 < x < float("inf"))
    add("--temperature", type=above, metavar="X", help="of sampling (default: 1)")
    add("--top-k", type=count, metavar="N", help="sample from the N likeliest tokens (default: all)")
    share = _number(float, "a number greater than 0 and at most 1", lambda x: 0 < x <= 1)
    add("--top-p", type=share, metavar="P", help="sample from the likeliest tokens that make up P (default: 1)")
    seed = _number(int, "a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
    add("--seed", type=seed, metavar="N", help="the same text again (default: another every time)")
    add("--dtype", choices=DTYPES, help="to compute in (default: the checkpoint's)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"to compute on (default: {device})")
    add("--config", metavar="TOML", help="TorchTitan config of the model, where the checkpoint does not say it")
    add("--flavor", help="name of the model's shape, where the checkpoint does not say it")
    add("--tokenizer", metavar="FOLDER", help="instead of the one that the model was trained with")
    return parser


def _prompt_ids(tokenizer, text, vocab_size):
    """The ids [1, T] of a document's beginning, as in training: after bos, with no special tokens in the text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ConvertError("--prompt is empty; with a tokenizer that has no bos token it must not be")
    if max(ids) >= vocab_size:
        raise ConvertError(f"the tokenizer gives id {max(ids)}; it must be below the model's vocab_size, {vocab_size}")
    return torch.tensor([ids])


def generate(options):
    """Print the text to stdout and the rate to stderr.

    Raises:
        ConvertError: one sentence about what is wrong with the options or the checkpoint.
    """
    for name in ("temperature", "top_k", "top_p", "seed"):
        if options.greedy and getattr(options, name) is not None:
            raise ConvertError(f"--greedy and --{name.replace('_', '-')} are both given; it must be one of them")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConvertError(f"--device is {options.device!r}; it must be a device that torch has here") from error
    checkpoint = open_checkpoint(options.model, options.config, options.flavor, options.tokenizer)
    if checkpoint.tokenizer is None:
        raise ConvertError(f"{options.model} does not say which tokenizer it was trained with; name it by --tokenizer")
    with reading(checkpoint.tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer, local_files_only=True)
    ids = _prompt_ids(tokenizer, options.prompt, checkpoint.record.model_args.vocab_size)
    model = load_checkpoint(checkpoint, DTYPES.get(options.dtype), options.device)
    sampling = dict(temperature=options.temperature or 1.0, top_k=options.top_k or 0, top_p=options.top_p or 1.0)
    config = GenerationConfig(
        **{} if options.greedy else sampling,
        do_sample=not options.greedy,
        max_new_tokens=options.max_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        prefill_chunk_size=PIECE if ids.shape[1] > PIECE else None,
    )
    if options.seed is not None:
        torch.manual_seed(options.seed)
    clock, ids = Clock(tokenizer), ids.to(options.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
    print(clock.report(ids.shape[1]), file=sys.stderr)


def main(arguments=None):
    """Returns the exit status: 0, or 1 after one sentence on stderr."""
    try:
        generate(_parser().parse_args(arguments))
    except ConvertError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
