"""Layers and models with content gates whose terms matter, and the layer written out token by token in fp64."""

import torch

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs

FP64 = torch.float64
CHUNK = 64
SHAPES = {  # of 2 key heads of 5
    "channel erase": dict(),
    "CARVE": dict(write_gate="scalar"),
    "scalar erase, grouped, wide, negative": dict(
        erase_gate="scalar", num_v_heads=4, expand_v=1.2, allow_neg_eigval=True
    ),
    "no decay": dict(decay="none"),
}
ARGS = GDN2ModelArgs(
    vocab_size=50, hidden_size=32, n_layers=2, mlp_size=48, num_heads=2, num_v_heads=4, head_dim=8, attn_heads=4,
    window=8, layer_pattern=("gdn2", "swa"), write_gate="scalar", content_gate=True,
)  # fmt: skip


def sharpened(built):
    """Every weight matters, and half-lives are of tens of tokens."""
    torch.manual_seed(1)
    for name, p in built.named_parameters():
        if "content" in name:
            torch.nn.init.normal_(p, std=4 * p.shape[-1] ** -0.5)
        elif "norm" not in name and "decay." not in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.5)
        elif name.endswith("A_log"):
            torch.nn.init.uniform_(p, -1, 1)
    return built


def layer(dtype=FP64, **options):
    torch.manual_seed(0)
    return sharpened(GatedDeltaNet2(20, 2, 5, content_gate=True, **options)).to(dtype)


def model(dtype=FP64, **changes):
    torch.manual_seed(0)
    built = GDN2Model(GDN2ModelArgs(**vars(ARGS) | changes))
    built.init_weights()
    return sharpened(built).to(dtype)


def documents(B, T):
    """Resets such that chunks end within windows, before a reset there, on their edges, and never."""
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, [30, 110]] = True
    resets[-1, [0, 1, 64]] = True
    return resets


def written_out(built, x, resets=None, scalar_erase=False, erase_scale=1.0):
    """The layer one row and one token at a time. The chunk before is a list of what was read."""
    K, V, weights = built.head_dim, built.head_v_dim, {n: p.to(FP64) for n, p in built.named_parameters()}
    H, HV = len(weights["q_proj.weight"]) // K, len(weights["v_proj.weight"]) // V

    def sigmoid(y):
        return 1 / (1 + torch.exp(-y))

    def unit(y):
        return y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6)

    def of_values(y):
        """[H, ...] -> [HV, ...]"""
        return torch.stack([y[j // (HV // H)] for j in range(HV)])

    def convolved(name, projected, t, start, size):
        weight, y = weights[f"{name}_conv1d.weight"], 0
        for tap in range(max(0, 3 - (t - start)), 4):
            y = y + weight[:, tap] * projected[t - 3 + tap]
        return (y * sigmoid(y)).view(-1, size)

    rows = []
    for row in range(len(x)):
        q, k, v, erase, write = (
            x[row] @ weights[f"{name}_proj.weight"].T for name in ("q", "k", "v", "erase", "write")
        )
        gate = x[row] @ weights["gate_low_proj.weight"].T @ weights["gate_proj.weight"].T + weights["gate_proj.bias"]
        kept = torch.ones(len(q), H, K, dtype=FP64)
        if built.decay is not None:
            raw = (x[row] @ weights["decay_low_proj.weight"].T @ weights["decay_proj.weight"].T).unflatten(-1, (H, K))
            A = torch.exp(weights["decay.A_log"])[:, None]
            kept = torch.exp(-A * torch.log1p(torch.exp(raw + weights["decay.dt_bias"])))
        outputs = []
        for t in range(x.shape[1]):
            if t == 0 or (resets is not None and resets[row, t]):
                start, before, now, state = t, None, [], torch.zeros(HV, K, V, dtype=FP64)
            if len(now) == CHUNK:
                before, now = now, []
            q_t, k_t, v_t = (
                convolved(name, p, t, start, size) for name, p, size in (("q", q, K), ("k", k, K), ("v", v, V))
            )
            q_t, k_t = of_values(unit(q_t)), of_values(unit(k_t))
            logit = erase[t][:, None].expand(H, K) if scalar_erase else erase[t].view(H, K)
            if before is not None:
                mean = (sum(before) / CHUNK).view(H, -1)
                low = (weights["content.down"] * mean[:, None]).sum(-1)
                logit = logit + (weights["content.up"] * low[:, None]).sum(-1)
            b_t = of_values(erase_scale * sigmoid(logit))
            w_t = sigmoid(write[t].view(HV, -1))
            decayed = of_values(kept[t])[:, :, None] * state
            erased = (decayed * (b_t * k_t)[:, :, None]).sum(1)
            state = decayed + k_t[:, :, None] * (w_t * v_t - erased)[:, None]
            o = K**-0.5 * (state * q_t[:, :, None]).sum(1)
            now = [*now, o]
            z = gate[t].view(HV, V)
            y = o / torch.sqrt((o * o).mean(-1, keepdim=True) + built.norm_eps) * weights["o_norm.weight"]
            outputs.append(weights["o_proj.weight"] @ (y * z * sigmoid(z)).flatten())
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def expected(built, x, resets=None, options=None):
    options = options or {}
    scale = 2.0 if options.get("allow_neg_eigval") else 1.0
    return written_out(built, x, resets, options.get("erase_gate") == "scalar", scale)
