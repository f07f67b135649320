"""Small models, and what they are compared with: the layer, attention and masks written out from their weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs
from gdn2_titan.ops import naive_recurrent_gdn2

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = dict(
    vocab_size=50, hidden_size=32, n_layers=2, mlp_size=48, num_heads=2, head_dim=8, attn_heads=4, window=4
)  # fmt: skip
GATES = {
    "per channel": dict(),
    "tied": dict(tied_gates=True),
    "scalar erase": dict(erase_gate="scalar"),
    "scalar write": dict(write_gate="scalar"),
    "scalar decay": dict(decay="scalar"),
    "Gated DeltaNet": dict(tied_gates=True, decay="scalar"),
    "DeltaNet": dict(tied_gates=True, decay="none"),
    "grouped, wide values": dict(num_v_heads=4, expand_v=2.0),
    "tied, grouped": dict(num_v_heads=4, tied_gates=True),
    "negative eigenvalues": dict(allow_neg_eigval=True),
    "sigmoid output gate": dict(output_gate="sigmoid"),
    "conv of 2": dict(conv_size=2),
    "mean erase, ranks of 3 and 5": dict(erase_gate="mean", allow_neg_eigval=True, decay_rank=3, gate_rank=5),
    "mean write, full ranks": dict(write_gate="mean", num_v_heads=4, decay_rank=None, gate_rank="full"),
    "bounded decay": dict(lower_bound=-5.0),
    "bounded scalar decay": dict(lower_bound=-0.5, decay="scalar"),
}
gate_structures = pytest.mark.parametrize("structure", GATES)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    built = GDN2Model(GDN2ModelArgs(**SMALL | changes))
    built.init_weights()
    return built


def sharpened(built, seed=1):
    """Weights far larger than at initialisation, so that every influence on a logit is well above rounding."""
    torch.manual_seed(seed)
    for name, p in built.named_parameters():
        if "norm" not in name and "decay." not in name:
            torch.nn.init.normal_(p, std=0.5 if p.ndim == 2 and "conv" in name else max(p.shape[-1], 1) ** -0.5)
    return built


def layer(seed=0, dtype=torch.float64, **options):
    """A layer in fp64 (its decay parameters pass through fp32, so their values are fp32 ones)."""
    torch.manual_seed(seed)
    built = GatedDeltaNet2(32, 2, 8, **options)
    built.init_weights()
    for p in built.parameters():
        if p.ndim == 2 and p is not getattr(built.decay, "dt_bias", None):
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    torch.nn.init.normal_(built.gate_proj.bias)
    torch.nn.init.uniform_(built.o_norm.weight, 0.5, 1.5)
    return built.to(dtype)


def by_hand(built, x, resets=None, options=None):
    """The layer from its weights: F.conv1d within each document, the definition of the op on gates computed here."""
    options = options or {}
    B, T, _ = x.shape
    H, K, V = 2, 8, int(8 * options.get("expand_v", 1))
    HV = options.get("num_v_heads") or H

    def convolved(projection, convolution):
        y, weight = x @ projection.weight.T, convolution.weight
        width = weight.shape[1]
        rows = []
        for row in range(B):
            starts = [0] if resets is None else sorted({0, *resets[row].nonzero().flatten().tolist()})
            parts = []
            for start, end in zip(starts, [*starts[1:], T], strict=True):
                document = F.pad(y[row, start:end].T[None], (width - 1, 0))
                parts.append(F.conv1d(document, weight[:, None], groups=weight.shape[0])[0].T)
            rows.append(torch.cat(parts))
        y = torch.stack(rows)
        return y * torch.sigmoid(y)

    q = convolved(built.q_proj, built.q_conv1d).reshape(B, T, H, K)
    k = convolved(built.k_proj, built.k_conv1d).reshape(B, T, H, K)
    v = convolved(built.v_proj, built.v_conv1d).reshape(B, T, HV, V)
    q = q / torch.sqrt(q.square().sum(-1, keepdim=True) + 1e-6)
    k = k / torch.sqrt(k.square().sum(-1, keepdim=True) + 1e-6)

    def through(name, rank):
        low = x
        if rank is None:
            assert getattr(built, f"{name}_low_proj") is None
        else:
            low = x @ getattr(built, f"{name}_low_proj").weight.T
            assert low.shape[-1] == rank
        return low @ getattr(built, f"{name}_proj").weight.T

    def decays():
        scalar = options.get("decay") == "scalar"
        raw = through("decay", None if scalar else options.get("decay_rank", V)).reshape(B, T, H, 1 if scalar else K)
        # The layer computes with A_log and dt_bias in fp32 whatever its own dtype.
        A_log, dt_bias = built.decay.A_log.float().to(x.dtype), built.decay.dt_bias.float().to(x.dtype)
        if options.get("lower_bound") is None:
            return -(A_log.exp()[:, None] * torch.log1p(torch.exp(raw + dt_bias))).expand(B, T, H, K)
        return (options["lower_bound"] / (1 + torch.exp(-A_log.exp()[:, None] * (raw + dt_bias)))).expand(B, T, H, K)

    g = torch.zeros_like(k) if options.get("decay") == "none" else decays()

    erase = torch.sigmoid(x @ built.erase_proj.weight.T)
    if options.get("tied_gates"):
        write = erase.reshape(B, T, H, 1, 1).expand(B, T, H, HV // H, V).reshape(B, T, HV, V)
    else:
        write = torch.sigmoid(x @ built.write_proj.weight.T).reshape(B, T, HV, -1)
        if options.get("write_gate") == "mean":
            write = write.sum(-1, keepdim=True) / V
        write = write.expand(B, T, HV, V)
    erase = erase.reshape(B, T, H, -1)
    if options.get("erase_gate") == "mean":
        erase = erase.sum(-1, keepdim=True) / K
    erase = (2 if options.get("allow_neg_eigval") else 1) * erase.expand(B, T, H, K)

    o, _ = naive_recurrent_gdn2(q, k, v, g, erase, write, scale=K**-0.5, resets=resets)
    eps = options.get("norm_eps", 1e-5)
    o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + eps) * built.o_norm.weight
    gate_rank = options.get("gate_rank", V)
    gate = through("gate", None if gate_rank == "full" else gate_rank) + built.gate_proj.bias
    gate = gate.reshape(B, T, HV, V)
    gate = torch.sigmoid(gate) * (1 if options.get("output_gate") == "sigmoid" else gate)
    return (o * gate).reshape(B, T, HV * V) @ built.o_proj.weight.T


def some_resets(B, T):
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, [0, 3, 40]] = True
    resets[-1, [10, 11, T - 1]] = True
    return resets


def softmax_attention(built, x, num_heads, num_kv_heads, window=None, resets=None, theta=10_000.0, stride=1):
    """Softmax attention from its weights, one query at a time. stride: from one position to the next."""
    B, T, D = x.shape
    size = D // num_heads
    q, k, v = (x @ p.weight.T for p in (built.q_proj, built.k_proj, built.v_proj))
    q, k, v = q.view(B, T, num_heads, size), k.view(B, T, num_kv_heads, size), v.view(B, T, num_kv_heads, size)

    def rotated(vector, t):
        turned = torch.empty_like(vector)
        for i in range(size // 2):
            angle = t * theta ** (-2 * i / size)
            a, b = vector[..., i], vector[..., i + size // 2]
            turned[..., i] = a * math.cos(angle) - b * math.sin(angle)
            turned[..., i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    q = torch.stack([rotated(q[:, t], stride * t) for t in range(T)], 1)
    k = torch.stack([rotated(k[:, t], stride * t) for t in range(T)], 1)
    o = torch.zeros(B, T, num_heads, size, dtype=x.dtype)
    for row in range(B):
        for t in range(T):
            first = 0 if window is None else max(0, t - window + 1)
            if resets is not None:
                first = max([first, *(s for s in range(t + 1) if resets[row, s])])
            for head in range(num_heads):
                group = head // (num_heads // num_kv_heads)
                scores = k[row, first : t + 1, group] @ q[row, t, head] / math.sqrt(size)
                weights = scores.exp() / scores.exp().sum()
                o[row, t, head] = weights @ v[row, first : t + 1, group]
    return o.flatten(2) @ built.o_proj.weight.T


def visible_by_hand(B, T, window, resets):
    mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for row in range(B):
        for query in range(T):
            for key in range(query + 1):
                near = window is None or query - key < window
                same = resets is None or not resets[row, key + 1 : query + 1].any()
                mask[row, 0, query, key] = near and same
    return mask


def decays(module):
    found = {name: p.detach().clone() for name, p in module.named_parameters() if "decay." in name}
    assert found
    return found


def assert_exact(module, expected, dtype=FP32):
    """Of this dtype, equal to values that 16 bits do not have, and marked."""
    assert all(not torch.equal(p, p.to(BF16).to(p.dtype)) for p in expected.values())
    for name, p in decays(module).items():
        assert p.dtype == dtype, f"{name} is {p.dtype}"
        assert torch.equal(p, expected[name].to(dtype)), f"{name} is rounded"
    assert all(p._no_weight_decay for name, p in module.named_parameters() if "decay." in name)
