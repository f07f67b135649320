"""Text from a model, as it comes: ``python -m gdn2_titan.generate --model FOLDER --prompt TEXT``.

The folder is a TorchTitan checkpoint (a step, or a run's folder: the latest) or a Hugging Face folder of ours.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn2_titan.convert.errors import ConvertError, exit_status, reading
from gdn2_titan.convert.run_folders import checkpoint_folder
from gdn2_titan.convert.tokenizer import document_ids, encode
from gdn2_titan.model_options import add_model_options, dtype_of, number, open_model, open_without_tokenizer
from gdn2_titan.text_stream import TextStream

if TYPE_CHECKING:
    from torch import Tensor

# A longer prompt is read in pieces of so many tokens, so that the masks of softmax layers stay small.
PIECE = 2048


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m gdn2_titan.generate", description=__doc__.splitlines()[0])
    add_model_options(parser)
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what the text begins with; may be empty; - reads stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same, from a file")
    count = number(int, "a whole number of at least 1", lambda x: x >= 1)
    add("--max-tokens", type=count, default=256, metavar="N", help="to generate (default: 256)")
    add("--greedy", action="store_true", help="always the likeliest token")
    above = number(float, "a number greater than 0", lambda x: 0 < x < float("inf"))
    add("--temperature", type=above, metavar="X", help="of sampling (default: 1)")
    add("--top-k", type=count, metavar="N", help="sample from the N likeliest tokens (default: all)")
    share = number(float, "a number greater than 0 and at most 1", lambda x: 0 < x <= 1)
    add("--top-p", type=share, metavar="P", help="sample from the likeliest tokens that make up P (default: 1)")
    seed = number(int, "a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
    some = number(str, "at least one character", bool)
    add("--stop", type=some, action="append", default=[], metavar="TEXT", help="ends before this text; may be repeated")
    add("--num-samples", type=count, default=1, metavar="N", help="texts to generate (default: 1)")
    add("--seed", type=seed, metavar="N", help="the same text again (default: another every time)")
    return parser


class _Clock:
    """Remembers when the prompt and each token came."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._first = None
        self.tokens = self._rest = 0
        self._seconds = 0.0  # of all tokens but the first

    def token(self) -> None:
        now = time.perf_counter()
        self.tokens += 1
        if self._first is None:
            self._first = now - self._start
        else:
            self._rest, self._seconds = self._rest + 1, self._seconds + now - self._last
        self._last = now

    def report(self, prompt: int) -> str:
        """One line: how many tokens in how long, apart from the prompt's ``prompt`` tokens."""
        rate = self._rest / self._seconds if self._rest else 1 / self._first
        return (
            f"{self.tokens} tokens in {self._last - self._start:.2f} s, {rate:.1f} tokens/s after the first; "
            f"prompt of {prompt} tokens in {self._first:.2f} s"
        )


def _prompt(options: argparse.Namespace) -> str:
    source, name = options.prompt, "--prompt -"
    if options.prompt_file is None and source != "-":
        return source
    try:
        if options.prompt_file is None:
            return sys.stdin.buffer.read().decode()
        name = f"--prompt-file {options.prompt_file}"
        return Path(options.prompt_file).read_bytes().decode()
    except OSError as error:
        raise ConvertError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConvertError(f"{name} is not UTF-8 at byte {error.start}; it must be text in UTF-8") from error


def _choice(options: argparse.Namespace) -> "Callable[[Tensor], Tensor]":
    """From logits [1, vocabulary] to the id [1, 1] of the next token."""
    import torch

    if options.greedy:
        return lambda logits: logits.argmax(-1, keepdim=True)
    random = torch.Generator(options.device)
    random.seed() if options.seed is None else random.manual_seed(options.seed)

    def sample(logits):
        logits = logits.float() / (options.temperature or 1.0)
        if options.top_k is not None and options.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], -torch.inf)
        likely, order = logits.softmax(-1).sort(descending=True)
        if options.top_p is not None:
            # Kept is what comes before the sum is reached; the first always is.
            likely = likely.masked_fill(likely.cumsum(-1) - likely >= options.top_p, 0.0)
        return order.gather(-1, likely.multinomial(1, generator=random))

    return sample


def generate(options: argparse.Namespace) -> None:
    """Print the texts to stdout and the rate to stderr.

    Raises:
        ConvertError: one sentence about what is wrong with the options or the checkpoint.
    """
    for name in ("temperature", "top_k", "top_p", "seed"):
        if options.greedy and getattr(options, name) is not None:
            raise ConvertError(f"--greedy and --{name.replace('_', '-')} are both given; it must be one of them")
    if options.greedy and options.num_samples > 1:
        raise ConvertError(f"--num-samples is {options.num_samples}; with --greedy, which says the same every time, it "
                           "must be 1")  # fmt: skip
    checkpoint_folder(options.model)  # a path that is not there is answered before torch is imported
    prompt = _prompt(options)
    try:
        from gdn2_titan.convert.load_decoder import load_decoder
        from gdn2_titan.convert.plain_tokenizer import PlainTokenizer
        from gdn2_titan.models.decoding import Decoding

        checkpoint = open_without_tokenizer(options)
        if (checkpoint.tokenizer / "tokenizer.json").is_file():
            with reading(checkpoint.tokenizer):
                tokenizer = PlainTokenizer(checkpoint.tokenizer)
        else:
            _, tokenizer = open_model(options)
    except ImportError as error:
        raise ConvertError(f"{error}; generating needs the extra 'hf': pip install 'gdn2_titan[hf]'") from error
    ids = encode(tokenizer, prompt)["input_ids"]
    ids = document_ids(tokenizer, ids, checkpoint.info.model_args.vocab_size)
    if not ids.shape[1]:
        raise ConvertError("--prompt is empty; with a tokenizer that has no bos token it must not be")
    model = load_decoder(checkpoint, dtype_of(options), options.device)
    choose, decoding, clock = _choice(options), Decoding(model), _Clock()
    for piece in ids.to(options.device).split(PIECE, 1):
        logits = decoding(piece)
    for sample in range(options.num_samples):
        if options.num_samples > 1:
            print(f"--- {sample + 1} of {options.num_samples} ---")
        stream = TextStream(tokenizer, options.stop, lambda text: print(text, end="", flush=True))
        _continue(decoding.again(), logits, choose, stream, clock, options.max_tokens, tokenizer.eos_token_id)
        print(flush=True)
    print(clock.report(ids.shape[1]), file=sys.stderr)


def _continue(
    decoding: Any, logits: "Tensor", choose: "Callable[[Tensor], Tensor]", stream: TextStream, clock: _Clock,
    most: int, eos: int | None,
) -> None:  # fmt: skip
    """One text, from the logits after the prompt on."""
    for left in range(most, 0, -1):
        token = choose(logits)
        chosen = token.item()
        clock.token()
        if chosen == eos or stream.put(chosen):
            break
        if left > 1:
            logits = decoding(token)
    stream.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one sentence on stderr."""
    return exit_status(generate, _parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
