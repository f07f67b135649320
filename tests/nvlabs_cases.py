"""Checkpoints in the layout of the authors' release, made from its names and shapes alone, and what they compute."""

import math

import torch
import torch.nn.functional as F


def release_shapes(D, mlp, layers, per_layer=1, heads=16, K=128, n_head=1, groups=None, vocab=32_000):
    """{name: shape}: layer i is GDN-2 with ``heads`` heads of K where per_layer divides i, else softmax attention of
    ``n_head`` query heads and ``groups`` key/value heads."""
    C, size = heads * K, D // n_head
    gdn2 = {
        **{f"{x}_proj.weight": (C, D) for x in "qkvbw"}, "o_proj.weight": (D, C),
        **{f"{x}_conv1d.weight": (C, 1, 4) for x in "qkv"},
        "f_proj.0.weight": (K, D), "f_proj.1.weight": (C, K),
        "g_proj.0.weight": (K, D), "g_proj.1.weight": (C, K), "g_proj.1.bias": (C,),
        "A_log": (heads,), "dt_bias": (C,), "o_norm.weight": (K,),
    }  # fmt: skip
    softmax = {"attn.weight": ((n_head + 2 * (groups or n_head)) * size, D), "proj.weight": (D, D)}
    shapes = {"transformer.wte.weight": (vocab, D), "transformer.ln_f.weight": (D,), "lm_head.weight": (vocab, D)}
    for layer in range(layers):
        block = {
            "norm_1.weight": (D,), "norm_2.weight": (D,), "mlp.swiglu.w1.weight": (mlp, D),
            "mlp.swiglu.w2.weight": (mlp, D), "mlp.swiglu.w3.weight": (D, mlp),
        }  # fmt: skip
        block |= {f"attn.{name}": shape for name, shape in (softmax if layer % per_layer else gdn2).items()}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def release_checkpoint(shapes, dtype=torch.float32, seed=0):
    """{name: random tensor}: norms around 1, matrices that keep the size of what goes through them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        std = 0.5 / math.sqrt(shape[-1]) if len(shape) == 2 and "wte" not in name else 0.5
        tensor = torch.randn(shape, generator=generator) * std
        made[name] = (tensor + 1 if "norm" in name or "ln_f" in name else tensor).to(dtype)
    return made


def _norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _gdn2(t, x):
    """x [T, D] through a GDN-2 layer, token by token."""
    T, heads, K = len(x), len(t["A_log"]), len(t["o_norm.weight"])

    def convolved(name):
        past = torch.cat((torch.zeros(3, heads * K, dtype=x.dtype), x @ t[f"{name}_proj.weight"].T))
        taps = t[f"{name}_conv1d.weight"]  # [C, 1, 4], the last of them for the token itself
        return F.silu(sum(past[i : i + T] * taps[:, 0, i] for i in range(4))).view(T, heads, K)

    q, k, v = convolved("q"), convolved("k"), convolved("v")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    erase, write = (torch.sigmoid(x @ t[f"{name}_proj.weight"].T).view(T, heads, K) for name in "bw")
    raw = x @ t["f_proj.0.weight"].T @ t["f_proj.1.weight"].T + t["dt_bias"]
    decay = torch.exp(-t["A_log"].exp()[:, None] * F.softplus(raw).view(T, heads, K))
    gate = x @ t["g_proj.0.weight"].T @ t["g_proj.1.weight"].T + t["g_proj.1.bias"]
    S, out = torch.zeros(heads, K, K, dtype=x.dtype), []
    for i in range(T):
        S = decay[i][:, :, None] * S
        S = S - k[i][:, :, None] * ((erase[i] * k[i])[:, :, None] * S).sum(1, keepdim=True)
        S = S + k[i][:, :, None] * (write[i] * v[i])[:, None]
        out.append((S * q[i][:, :, None]).sum(1) / math.sqrt(K))
    o = _norm(torch.stack(out), t["o_norm.weight"]) * F.silu(gate.view(T, heads, K))
    return o.flatten(1) @ t["o_proj.weight"].T


def _softmax(t, x, n_head, groups, window):
    """x [T, D] through sliding-window attention; the window counts the token itself."""
    T, size = len(x), x.shape[1] // n_head
    per_group = n_head // groups
    rows = (x @ t["attn.weight"].T).view(T, groups, per_group + 2, size)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * 10_000 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)

    def turned(y):
        a, b = y[..., : size // 2], y[..., size // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    age = torch.arange(T)[:, None] - torch.arange(T)
    seen, out = (age >= 0) & (age < window), []
    for head in range(n_head):
        group, index = divmod(head, per_group)
        q, k, v = turned(rows[:, group, index]), turned(rows[:, group, -2]), rows[:, group, -1]
        out.append(torch.softmax((q @ k.T / math.sqrt(size)).masked_fill(~seen, -math.inf), -1) @ v)
    return torch.cat(out, -1) @ t["proj.weight"].T


def release_forward(tensors, tokens, n_head=1, groups=1, window=2048):
    """Ids [T] -> logits [T, vocabulary] in fp64, read off the names and the equations."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x, layer = tensors["transformer.wte.weight"][tokens], 0
    while f"transformer.h.{layer}.norm_1.weight" in tensors:
        block = f"transformer.h.{layer}."
        t = {name.removeprefix(block): tensor for name, tensor in tensors.items() if name.startswith(block)}
        mixer = {name.removeprefix("attn."): tensor for name, tensor in t.items() if name.startswith("attn.")}
        h = _norm(x, t["norm_1.weight"])
        x = x + (_gdn2(mixer, h) if "A_log" in mixer else _softmax(mixer, h, n_head, groups, window))
        h = _norm(x, t["norm_2.weight"])
        gate, up = h @ t["mlp.swiglu.w1.weight"].T, h @ t["mlp.swiglu.w2.weight"].T
        x, layer = x + (F.silu(gate) * up) @ t["mlp.swiglu.w3.weight"].T, layer + 1
    return _norm(x, tensors["transformer.ln_f.weight"]) @ tensors["lm_head.weight"].T
