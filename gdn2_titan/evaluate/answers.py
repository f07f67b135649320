"""What a transformers model says to prompts, greedily."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

__all__ = ["greedy_answers"]

# A longer prompt is read in pieces of so many tokens: what a layer computes at a time stays small, and of the prompt a
# recurrent layer keeps a state of fixed size.
PIECE = 2048


def greedy_answers(
    model: Any, tokenizer: Any, batch_size: int, new_tokens: int
) -> Callable[[Sequence[list[int]]], list[str]]:
    """A function from prompts, ids without padding, to the text of up to ``new_tokens`` tokens after each."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def answers(prompts: Sequence[list[int]]) -> list[str]:
        texts = []
        for first in range(0, len(prompts), batch_size):
            texts += batch(prompts[first : first + batch_size])
        return texts

    @torch.no_grad()
    def batch(prompts):
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), padding, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        config = GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=padding,
            prefill_chunk_size=PIECE if longest > PIECE else None,
        )  # fmt: skip
        ids, mask = ids.to(model.device), mask.to(model.device)
        said = model.generate(ids, attention_mask=mask, generation_config=config)
        return tokenizer.batch_decode(said[:, longest:], skip_special_tokens=True)

    return answers
