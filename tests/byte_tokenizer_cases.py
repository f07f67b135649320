"""How the files of the byte-level tokenizer are made; ``python -m tests.byte_tokenizer_cases`` writes them anew."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR

__all__ = ["build"]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in the ``ByteLevel`` format, by byte value.

    Bytes that are printable in Latin-1 stand for themselves; the others get the characters from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def build() -> tuple[str, str]:
    """Generate the tokenizer.

    Returns:
        The contents of ``tokenizer.json`` and of ``tokenizer_config.json``. Token ids 0 to 255 are byte values;
        256, 257 and 258 are bos, eos and pad.
    """
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
    # Without a regex the whole text is one piece: nothing depends on how words are split.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": False, "add_eos_token": False},
        # Otherwise transformers takes the space before a full stop or a comma out of decoded text.
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer.to_str(pretty=True) + "\n", json.dumps(config, indent=2) + "\n"


if __name__ == "__main__":
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), build()):
        (BYTE_TOKENIZER_DIR / name).write_text(content, encoding="utf-8")
