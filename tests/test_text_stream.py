"""Text of tokens as they come, against the text of all of them."""

import pytest

from gdn2_titan.convert.plain_tokenizer import PlainTokenizer
from gdn2_titan.text_stream import TextStream
from tests.convert_cases import TOKENIZER


def streamed(data, *stops):
    """What is written of bytes, token by token, and whether the text had ended."""
    written = []
    stream = TextStream(PlainTokenizer(TOKENIZER), stops, written.append)
    ended = any(stream.put(byte) for byte in data)
    stream.end()
    return written, ended


def test_characters_come_whole_and_damaged_bytes_as_they_would_in_one_piece():
    for data in ("aé家b".encode(), b"a\xc3b\xff\xfe c\xe5\xae", "é".encode() * 3, b""):
        written, ended = streamed(data)
        assert "".join(written) == data.decode(errors="replace") and not ended
    assert streamed("aé家b".encode())[0] == ["a", "é", "家", "b"]


@pytest.mark.parametrize(
    ("text", "stops", "said"),
    [
        ("abcabd!", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("xyz", ["yz", "xyz"], ""),
        ("x-END-y", ["END-y", "-EN"], "x"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("größe", ["ß"], "grö"),
    ],
)
def test_a_text_ends_before_a_stop_that_comes_in_pieces(text, stops, said):
    written, ended = streamed(text.encode(), *stops)
    assert "".join(written) == said and ended


def test_what_only_began_like_a_stop_is_written_as_soon_as_it_is_none():
    assert streamed(b"aEbEN", "END")[0] == ["a", "Eb", "EN"]
