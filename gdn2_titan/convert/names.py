"""Names in a Hugging Face folder: of its files of tensors, and of the decoder's tensors, where nothing but the name
differs."""

__all__ = ["INDEX", "QKV_ORDERS", "SINGLE", "from_hf_name", "to_hf_name"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
QKV_ORDERS = ("grouped", "concatenated")  # of the rows of the authors' attn.attn

_EMBEDDINGS, _HF_EMBEDDINGS = "tok_embeddings.", "model.embed_tokens."
_HEAD, _HF_PREFIX = "lm_head.", "model."


def to_hf_name(name):
    """The name in a Hugging Face folder of the decoder's tensor ``name``."""
    if name.startswith(_EMBEDDINGS):
        return _HF_EMBEDDINGS + name.removeprefix(_EMBEDDINGS)
    return name if name.startswith(_HEAD) else _HF_PREFIX + name


def from_hf_name(name):
    """The decoder's name of a Hugging Face folder's tensor ``name``; the inverse of :func:`to_hf_name`.

    Raises:
        ValueError: the name is not one that :func:`to_hf_name` gives.
    """
    if name.startswith(_HF_EMBEDDINGS):
        return _EMBEDDINGS + name.removeprefix(_HF_EMBEDDINGS)
    if name.startswith(_HEAD):
        return name
    if name.startswith(_HF_PREFIX):
        return name.removeprefix(_HF_PREFIX)
    raise ValueError(f"tensor name is {name!r}; it must begin with {_HF_PREFIX!r} or {_HEAD!r}")
