"""Prints a text as it comes and keeps the time. Apart from the command, which parses options without transformers."""

import time

from transformers import TextStreamer

__all__ = ["Clock"]


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
