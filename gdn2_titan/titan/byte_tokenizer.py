"""Where the byte-level tokenizer lies that ships with the package: a token is a byte, text needs no download."""

from gdn2_titan.convert.checkpoint_info import BYTE_TOKENIZER as BYTE_TOKENIZER_DIR

__all__ = ["BYTE_TOKENIZER_DIR"]
