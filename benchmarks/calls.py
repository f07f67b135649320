"""The calls that the other benchmarks compile, count and time: inputs as training sees them, by kind."""

import torch

from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.segments import segment_gdn2

__all__ = ["KINDS", "conv_inputs", "gdn2_inputs", "segment"]

# What the projections in front of the op produce. "bf16": bf16 with the decay in fp32, gates already activated.
# "bf16 raw": bf16 projections as they come; the op activates them.
KINDS = {
    "bf16": {"dtype": torch.bfloat16, "decay_dtype": torch.float32, "raw": False},
    "bf16 raw": {"dtype": torch.bfloat16, "decay_dtype": torch.bfloat16, "raw": True},
    "fp32": {"dtype": torch.float32, "decay_dtype": torch.float32, "raw": False},
}


def _generator(device):
    return torch.Generator(device).manual_seed(0)


def _documents(generator, B, T, resets, packed):
    device = generator.device
    options = {}
    if resets:
        options["resets"] = torch.rand(B, T, generator=generator, device=device) < 1e-3
    if packed:
        options["cu_seqlens"] = torch.tensor([0, T // 3, T // 2, T], device=device)
    return options


def gdn2_inputs(
    kind, B, T, H, K, V, groups=1, state=False, resets=False, packed=False, device="cpu", requires_grad=False
):  # fmt: skip
    """Keyword arguments of chunk_gdn2 and recurrent_gdn2: keys of unit length, memory of hundreds of tokens.

    groups: value heads for each key head. state: start from one and ask for the final one. resets: a document ends
    every 1,000 tokens or so. packed: three sequences in ``cu_seqlens``.
    """
    dtype, decay_dtype, raw = (KINDS[kind][name] for name in ("dtype", "decay_dtype", "raw"))
    generator = _generator(device)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    q, k, g, b = (randn(B, T, H, K) for _ in range(4))
    v, w = (randn(B, T, H * groups, V) for _ in range(2))
    tensors = {"q": q, "k": k, "v": v, "g": g - 4, "b": b, "w": w}
    options = {}
    if raw:
        tensors |= {"A_log": torch.zeros(H, device=device), "dt_bias": torch.zeros(H, K, device=device)}
        options = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_sigmoid_in_kernel=True)
    else:
        tensors |= {name: torch.nn.functional.normalize(tensors[name], dim=-1) for name in ("q", "k")}
        tensors |= {"g": -0.02 * g.sigmoid(), "b": b.sigmoid(), "w": w.sigmoid()}
    tensors |= {name: tensors[name].to(dtype) for name in ("q", "k", "v", "b", "w")}
    tensors["g"] = tensors["g"].to(decay_dtype)
    if state:
        tensors["initial_state"] = randn(3 if packed else B, H * groups, K, V)
        options["output_final_state"] = True
    tensors = {name: x.requires_grad_(requires_grad) for name, x in tensors.items()}
    return tensors | options | _documents(generator, B, T, resets, packed)


def conv_inputs(
    kind, B, T, D, W=4, state=False, resets=False, packed=False, device="cpu", requires_grad=False
):  # fmt: skip
    """Keyword arguments of causal_conv1d with SiLU, as the layer calls it."""
    dtype = KINDS[kind]["dtype"]
    generator = _generator(device)
    tensors = {"x": torch.randn(B, T, D, generator=generator, device=device).to(dtype)}
    tensors["weight"] = torch.randn(D, W, generator=generator, device=device).to(dtype)
    options = {"activation": "silu"}
    if state:
        N = 3 if packed else B
        tensors["initial_state"] = torch.randn(N, D, W - 1, generator=generator, device=device).to(dtype)
        options["output_final_state"] = True
    tensors = {name: x.requires_grad_(requires_grad) for name, x in tensors.items()}
    return tensors | options | _documents(generator, B, T, resets, packed)


def segment(initial_state=None, output_final_state=False, **inputs):
    """What a rank that holds a segment of a sequence runs before it knows the entering state. inputs: gdn2_inputs."""
    tensors = GDN2Inputs(**{name: inputs.get(name) for name in GDN2Inputs._fields})
    raw = inputs.get("use_gate_in_kernel", False)
    return segment_gdn2(tensors, GDN2Options(inputs["q"].shape[-1] ** -0.5, raw, raw, raw, 1.0, "triton"))
