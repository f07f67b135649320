"""The tensors' names of the authors' trainer, as far as it is known here.

Blocks are ``transformer.h.N`` with ``norm_1``, ``attn``, ``norm_2`` and ``mlp.w1`` to ``w3``; a softmax layer has q, k
and v in one matrix, ``attn.attn``. Taken, not known: that the other keys of a GDN-2 layer are those of
flash-linear-attention's, that a softmax layer's output is ``attn.proj`` and the last norm ``transformer.ln_f``. A key
that is none of these, or is missing, ends the conversion with its name.
"""

from collections.abc import Callable, Mapping

import torch

from gdn2_titan.models import GDN2ModelArgs

from .errors import ConvertError
from .fla import from_fla_mapping
from .mapping import Part, Source, tensors_of

__all__ = ["from_nvlabs_mapping"]

QKV_ORDERS = ("grouped", "concatenated")  # of the rows of attn.attn

_OUTSIDE = {
    "tok_embeddings.weight": "transformer.wte.weight", "norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}  # fmt: skip
_BLOCK = {"mixer_norm.weight": "norm_1.weight", "mlp_norm.weight": "norm_2.weight"}


def _rows(args: GDN2ModelArgs, projection: str, order: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Picks one projection's rows out of q, k and v in one matrix.

    "grouped": for every key head its query heads, its key, its value. "concatenated": all q, all k, all v.
    """
    size = args.hidden_size // args.attn_heads
    groups = args.attn_kv_heads or args.attn_heads
    queries = args.attn_heads // groups

    def of(tensor):
        if tuple(tensor.shape) != ((args.attn_heads + 2 * groups) * size, args.hidden_size):
            raise RuntimeError("it is not q, k and v of this configuration")
        if order == "concatenated":
            return tensor.split([args.attn_heads * size, groups * size, groups * size])["qkv".index(projection)]
        heads = tensor.view(groups, queries + 2, size, args.hidden_size)
        picked = {"q": heads[:, :queries], "k": heads[:, queries], "v": heads[:, queries + 1]}[projection]
        return picked.reshape(-1, args.hidden_size)

    return of


def _mlp(args: GDN2ModelArgs, tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, str]:
    """Which of w1, w2, w3 is which. w1 is the gate in both known orders; the shape tells which one leads back."""
    if args.mlp_size == args.hidden_size:
        raise ConvertError("mlp_size equals hidden_size; which of mlp.w2 and mlp.w3 leads back cannot be told then")
    shapes = {
        w: tuple(tensors[f"{prefix}.{w}.weight"].shape) for w in ("w2", "w3") if f"{prefix}.{w}.weight" in tensors
    }
    down = "w2" if shapes.get("w2") == (args.hidden_size, args.mlp_size) else "w3"
    return {"gate_proj": "w1", "up_proj": "w3" if down == "w2" else "w2", "down_proj": down}


def from_nvlabs_mapping(args: GDN2ModelArgs, source: Source, qkv_order: str | None = None) -> dict[str, Part]:
    """{name here: Part of the authors' checkpoint}.

    Args:
        qkv_order: how the rows of ``attn.attn`` are ordered, one of QKV_ORDERS; needed where there are softmax layers.

    Raises:
        ConvertError: what a key means cannot be told.
    """
    if qkv_order is None and args.mixers() - {"gdn2"}:
        raise ConvertError(
            "attn.attn.weight holds q, k and v of a softmax layer in one matrix, and nothing in a checkpoint tells "
            f"their order; --qkv-order must be one of {', '.join(QKV_ORDERS)}"
        )
    fla, mapping = from_fla_mapping(args), {}
    for name in tensors_of(args):
        if name in _OUTSIDE:
            mapping[name] = Part(_OUTSIDE[name])
            continue
        _, layer, rest = name.split(".", 2)
        block, (module, inner) = f"transformer.h.{layer}", rest.split(".", 1)
        if rest in _BLOCK:
            mapping[name] = Part(f"{block}.{_BLOCK[rest]}")
        elif module == "mlp":
            projection = inner.removesuffix(".weight")
            mapping[name] = Part(f"{block}.mlp.{_mlp(args, source.tensors, block + '.mlp')[projection]}.weight")
        elif args.mixer(int(layer)) == "gdn2":
            part = fla[name]
            mapping[name] = Part(f"{block}.{part.name.split('.', 3)[3]}", part.of)
        elif inner == "o_proj.weight":
            mapping[name] = Part(f"{block}.attn.proj.weight")
        else:
            mapping[name] = Part(f"{block}.attn.attn.weight", _rows(args, inner[0], qkv_order))
    return mapping
