"""Text from a model, as it comes: ``python -m gdn2_titan.generate --model FOLDER --prompt TEXT``.

The folder is a TorchTitan checkpoint (a step, or a run's folder: the latest) or a Hugging Face folder of ours.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from gdn2_titan.convert.errors import ConvertError, exit_status
from gdn2_titan.convert.run_folders import checkpoint_folder
from gdn2_titan.convert.tokenizer import document_ids, encode
from gdn2_titan.model_options import add_model_options, dtype_of, number, open_model

# A longer prompt is read in pieces of so many tokens, so that the masks of softmax layers stay small.
PIECE = 2048


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m gdn2_titan.generate", description=__doc__.splitlines()[0])
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what the text begins with; may be empty")
    count = number(int, "a whole number of at least 1", lambda x: x >= 1)
    add("--max-tokens", type=count, default=256, metavar="N", help="to generate (default: 256)")
    add("--greedy", action="store_true", help="always the likeliest token")
    above = number(float, "a number greater than 0", lambda x: 0 < x < float("inf"))
    add("--temperature", type=above, metavar="X", help="of sampling (default: 1)")
    add("--top-k", type=count, metavar="N", help="sample from the N likeliest tokens (default: all)")
    share = number(float, "a number greater than 0 and at most 1", lambda x: 0 < x <= 1)
    add("--top-p", type=share, metavar="P", help="sample from the likeliest tokens that make up P (default: 1)")
    seed = number(int, "a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
    add("--seed", type=seed, metavar="N", help="the same text again (default: another every time)")
    return parser


class _Clock:
    """A streamer that also remembers when the prompt and each token came."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.times = streamer, []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()

    def report(self, prompt: int) -> str:
        """One line: how many tokens in how long, apart from the prompt's ``prompt`` tokens."""
        start, *tokens = self.times
        count, first = len(tokens), tokens[0] - start
        rate = (count - 1) / (tokens[-1] - tokens[0]) if count > 1 else 1 / first
        return (
            f"{count} tokens in {tokens[-1] - start:.2f} s, {rate:.1f} tokens/s after the first; "
            f"prompt of {prompt} tokens in {first:.2f} s"
        )


def generate(options: argparse.Namespace) -> None:
    """Print the text to stdout and the rate to stderr.

    Raises:
        ConvertError: one sentence about what is wrong with the options or the checkpoint.
    """
    for name in ("temperature", "top_k", "top_p", "seed"):
        if options.greedy and getattr(options, name) is not None:
            raise ConvertError(f"--greedy and --{name.replace('_', '-')} are both given; it must be one of them")
    checkpoint_folder(options.model)  # a path that is not there is answered before torch is imported
    try:
        import torch
        from transformers import GenerationConfig, TextStreamer

        from gdn2_titan.convert.hf import load_checkpoint
    except ImportError as error:
        raise ConvertError(f"{error}; generating needs the extra 'hf': pip install 'gdn2_titan[hf]'") from error
    checkpoint, tokenizer = open_model(options)
    ids = encode(tokenizer, options.prompt)["input_ids"]
    ids = document_ids(tokenizer, ids, checkpoint.info.model_args.vocab_size)
    if not ids.shape[1]:
        raise ConvertError("--prompt is empty; with a tokenizer that has no bos token it must not be")
    model = load_checkpoint(checkpoint, dtype_of(options), options.device)
    sampling = dict(temperature=options.temperature or 1.0, top_k=options.top_k or 0, top_p=options.top_p or 1.0)
    config = GenerationConfig(
        **{} if options.greedy else sampling, do_sample=not options.greedy, max_new_tokens=options.max_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        prefill_chunk_size=PIECE if ids.shape[1] > PIECE else None,
    )  # fmt: skip
    if options.seed is not None:
        torch.manual_seed(options.seed)
    clock = _Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    ids = ids.to(options.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
    print(clock.report(ids.shape[1]), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one sentence on stderr."""
    return exit_status(generate, _parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
