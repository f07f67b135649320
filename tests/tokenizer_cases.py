"""Small tokenizers of every make, trained here on a text: nothing is downloaded."""

import functools
import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR

__all__ = ["TEXT", "TOKENIZERS", "tokenizer"]

_CODE = '''def area(width, height):
    """The area of a rectangle."""
    if width < 0:\r
        raise ValueError("it's negative; can't be")\t# never

\treturn width * height

class Étagère:
    12345 + 67.8  //  9


x = {"日本語のテキスト": "naïve café", "\U0001f600": 'a  b   c'}
'''
TEXT = "".join(f"{_CODE}value_{i} = other words about {i * 7919} things\nand_so = on{i}\n" for i in range(120))

_BYTES = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bpe(pre_tokenizer, normalizer=None, train=None, **options):
    made = Tokenizer(
        models.BPE(**{name: options.pop(name) for name in ("byte_fallback", "unk_token") if name in options})
    )
    made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator([train or TEXT], trainers.BpeTrainer(vocab_size=600, show_progress=False, **options))
    return made


def _split_and_bytes(pattern):
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _bpe(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytewise]), **_BYTES)


def _sentencepiece(**changes):
    """A BPE of SentencePiece's: the whole text is one word, lines' ends are bytes."""
    words = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Metaspace()])
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = _bpe(words, byte_fallback=True, unk_token="<unk>", special_tokens=symbols)
    return Tokenizer.from_str(json.dumps(json.loads(made.to_str()) | changes))


def _legacy():
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    return _sentencepiece(pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": [prepend, blanks]})


def _metaspace():
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return _sentencepiece(pre_tokenizer=first)


def _unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"vocab_size": 300, "unk_token": "<unk>", "special_tokens": ["<unk>"], "show_progress": False}
    made.train_from_iterator([TEXT], trainers.UnigramTrainer(**options))
    return made


def _wordpiece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    options = {"vocab_size": 400, "special_tokens": ["[UNK]"], "show_progress": False}
    made.train_from_iterator([TEXT], trainers.WordPieceTrainer(**options))
    return made


def _without_words():
    """Merges go over words and lines."""
    return _bpe(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), train="a\n" * 2000 + "a " * 2000, **_BYTES
    )


TOKENIZERS = {
    "bytes": lambda: Tokenizer.from_file(str(BYTE_TOKENIZER_DIR / "tokenizer.json")),
    "GPT-2": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), **_BYTES),
    "GPT-2 with a blank before": lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), **_BYTES),
    "Llama 3": lambda: _split_and_bytes(_LLAMA3),
    "Llama 2": _legacy,
    "Llama 2, newer": _metaspace,
    "T5": _unigram,
    "BERT": _wordpiece,
    "without words": _without_words,
}


@functools.cache
def tokenizer(name):
    made = TOKENIZERS[name]()
    made.encode_special_tokens = True
    return made
