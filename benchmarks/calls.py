"""The calls that the other benchmarks compile, count and time: inputs as training sees them, by kind."""

import torch

from gdn2_titan.ops import recurrent_gdn2_
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.segments import segment_gdn2

__all__ = ["KINDS", "conv_inputs", "decode_step", "gdn2_inputs", "qkv_inputs", "segment"]

# What the projections in front of the op produce: dtype, that of the decay, whether the op activates the gates.
KINDS = {
    "bf16": (torch.bfloat16, torch.float32, False),
    "bf16 raw": (torch.bfloat16, torch.bfloat16, True),
    "fp32": (torch.float32, torch.float32, False),
}


def _documents(generator, B, T, resets, packed):
    options = {}
    if resets:
        options["resets"] = torch.rand(B, T, generator=generator, device=generator.device) < 1e-3
    if packed:
        options["cu_seqlens"] = torch.tensor([0, T // 3, T // 2, T], device=generator.device)
    return options


def gdn2_inputs(
    kind, B, T, H, K, V, state=False, resets=False, packed=False, erases=True, device="cpu", requires_grad=False
):  # fmt: skip
    """Keyword arguments of chunk_gdn2 and recurrent_gdn2: keys of unit length, memory of hundreds of tokens.

    state: start from one and ask for the final one. resets: a document ends every 1,000 tokens or so. packed: three
    sequences in ``cu_seqlens``. erases: else b is None.
    """
    dtype, decay_dtype, raw = KINDS[kind]
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    q, k, g, b = (randn(B, T, H, K) for _ in range(4))
    v, w = (randn(B, T, H, V) for _ in range(2))
    options = {}
    if raw:
        g = g - 4
        options = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_sigmoid_in_kernel=True)
    else:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        g, b, w = -0.02 * g.sigmoid(), b.sigmoid(), w.sigmoid()
    tensors = {name: x.to(dtype) for name, x in zip("qkvgbw", (q, k, v, g, b, w), strict=True)}
    tensors["g"] = g.to(decay_dtype)
    if raw:
        tensors |= {"A_log": torch.zeros(H, device=device), "dt_bias": torch.zeros(H, K, device=device)}
    if state:
        tensors["initial_state"] = randn(3 if packed else B, H, K, V)
        options["output_final_state"] = True
    tensors = {name: x.requires_grad_(requires_grad) for name, x in tensors.items()}
    if not erases:
        tensors["b"] = None
    return tensors | options | _documents(generator, B, T, resets, packed)


def conv_inputs(kind, B, T, D, state=False, resets=False, packed=False, device="cpu", requires_grad=False):
    """Keyword arguments of causal_conv1d with 4 taps and SiLU, as the layer calls it."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (B, T, D), "weight": (D, 4)} | ({"initial_state": (3 if packed else B, D, 3)} if state else {})
    tensors = {name: torch.randn(x, generator=generator, device=device) for name, x in shapes.items()}
    tensors = {name: x.to(KINDS[kind][0]).requires_grad_(requires_grad) for name, x in tensors.items()}
    options = {"activation": "silu"} | ({"output_final_state": True} if state else {})
    return tensors | options | _documents(generator, B, T, resets, packed)


def qkv_inputs(kind, B, T, D, state=False, resets=False, packed=False, device="cpu", requires_grad=False):
    """Keyword arguments of causal_conv1d_qkv, as the layer calls it, D channels of each."""
    given = conv_inputs(kind, B, T, 3 * D, state, resets, packed, device)
    tensors = {}
    for name, x, weight in zip("qkv", given.pop("x").split(D, 2), given.pop("weight").split(D), strict=True):
        tensors |= {name: x.contiguous(), f"{name}_weight": weight.contiguous()}
    if state:
        states = given.pop("initial_state").split(D, 1)
        tensors |= {f"{name}_state": x.contiguous() for name, x in zip("qkv", states, strict=True)}
    return {name: x.requires_grad_(requires_grad) for name, x in tensors.items()} | given


def decode_step(initial_state, output_final_state=True, **tensors):
    """One token for each sequence, the state updated in place. The arguments are those of gdn2_inputs."""
    return recurrent_gdn2_(**tensors, state=initial_state, backend="triton")


def segment(initial_state=None, output_final_state=False, backend="triton", **inputs):
    """What a rank that holds a segment of a sequence runs before it knows the entering state. inputs: gdn2_inputs."""
    tensors = GDN2Inputs(**{name: inputs.get(name) for name in GDN2Inputs._fields})
    raw = inputs.get("use_gate_in_kernel", False)
    return segment_gdn2(tensors, GDN2Options(inputs["q"].shape[-1] ** -0.5, raw, raw, raw, 1.0, backend))
