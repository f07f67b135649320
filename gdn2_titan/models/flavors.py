"""Named model shapes. 1.3B and 1.3B_hybrid are the paper's (arXiv 2605.22791): 1,302,638,112 and 1,300,314,384
parameters in the blocks."""

from .args import GDN2ModelArgs

__all__ = ["flavors"]

# The byte-level tokenizer that ships with the plug has 259 symbols; the rest of 264 keeps sides multiples of 8.
_BYTES = 264

_debug = {
    "vocab_size": _BYTES, "hidden_size": 128, "n_layers": 4, "mlp_size": 352,
    "num_heads": 2, "head_dim": 64, "attn_heads": 4, "attn_kv_heads": 2, "window": 128,
}  # fmt: skip

flavors: dict[str, GDN2ModelArgs] = {
    "debug": GDN2ModelArgs(**_debug),
    "debug_hybrid": GDN2ModelArgs(**_debug, layer_pattern=("gdn2", "swa")),
    "recall": GDN2ModelArgs(
        vocab_size=_BYTES, hidden_size=64, n_layers=2, mlp_size=128,
        num_heads=2, head_dim=16, attn_heads=4, attn_kv_heads=1, window=16,
        init_std=0.1, mixer_gain=0.7, dt_min=1e-4, dt_max=1e-2,
    ),
    "150M": GDN2ModelArgs(
        hidden_size=768, n_layers=12, mlp_size=2048, num_heads=6, attn_heads=12,
    ),
    "400M": GDN2ModelArgs(
        hidden_size=1024, n_layers=24, mlp_size=2816, num_heads=8, attn_heads=16,
    ),
    "1.3B": GDN2ModelArgs(),
    "1.3B_hybrid": GDN2ModelArgs(mlp_size=6784, layer_pattern=("gdn2", "swa")),
}  # fmt: skip
