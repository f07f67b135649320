"""The tokenizer that ships with the package: bytes in, bytes out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchtitan")

from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from tests.byte_tokenizer_cases import build
from tests.generations import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_committed_files_are_what_the_generator_writes():
    written = [
        (BYTE_TOKENIZER_DIR / name).read_text(encoding="utf-8") for name in ("tokenizer.json", "tokenizer_config.json")
    ]
    assert [json.loads(text) for text in written] == [json.loads(text) for text in build()]


# Special tokens written out in a text are special tokens to a tokenizer: the round trip is promised for text without.
plain_text = st.text().filter(lambda text: "<|" not in text)


@given(plain_text)
@settings(max_examples=300, deadline=None)
def test_ids_are_the_utf8_bytes_between_bos_and_eos_and_decode_to_the_same_text(text):
    ids = TOKENIZER.encode(text, add_bos=True, add_eos=True)
    assert ids == [256, *text.encode("utf-8"), 257]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids[1:-1], skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", [" leading", "a b ,c", "\r\n\t \x00\x7f", "e\u0301 \u00e9 \ufb01", "漢字 \U0001f600\u200d"]
)
def test_no_prefix_space_no_normalisation_no_clean_up(text):
    assert TOKENIZER.encode(text) == list(text.encode("utf-8"))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_vocabulary_is_256_bytes_then_bos_eos_pad():
    assert TOKENIZER.get_vocab_size() == 259
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.token_to_id("<|pad|>")) == (256, 257, 258)
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(259))


def test_long_document_without_a_break_is_encoded_whole():
    text = "xé" * 50_000
    assert TOKENIZER.encode(text) == list(text.encode("utf-8"))


def test_transformers_reads_the_folder():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(BYTE_TOKENIZER_DIR))
    text = "a , b ."
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
