"""Inputs for the tests of the op, and what all of them measure by: outputs and every gradient, by name."""

import itertools

import torch

from gdn2_titan.ops import naive_recurrent_gdn2

LEAVES = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state")
RESULTS = ("o", "final_state")


def decays(kind, shape, generator):
    """Log-decays of a kind, fp64. shape [B, T, H, K]."""

    def choice(*values):
        index = torch.randint(len(values), shape, generator=generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    spike = torch.arange(shape[1])[None, :, None, None] % 23 == 7
    if kind == "weak":  # memory of hundreds of tokens: it crosses chunks
        return -0.02 * uniform
    if kind == "strong":  # nothing survives a token
        return -60 * (0.5 + 0.5 * uniform)
    if kind == "moderate":
        return -2 * uniform
    if kind == "mixed":  # channels of one head differ by 60 nats at one token
        return choice(0.0, 0.0, 0.0, -0.01, -20.0, -60.0)
    if kind == "spikes of -1e6":
        return torch.where(spike, -1e6, -0.02 * uniform)
    if kind == "spikes of -inf":
        return torch.where(spike, -torch.inf, -0.02 * uniform)
    if kind == "spikes in some channels":
        spike = spike & (torch.arange(shape[3]) % 2 == 0)
        return torch.where(spike, choice(-1e6, -torch.inf), -0.02 * uniform)
    if kind == "none":
        return torch.zeros(shape, dtype=torch.float64)
    raise ValueError(kind)


DECAYS = (
    "weak", "strong", "moderate", "mixed", "spikes of -1e6", "spikes of -inf", "spikes in some channels", "none",
)  # fmt: skip


def make(
    B=1, T=8, H=2, groups=1, K=4, V=3, decay="weak", l2norm=False, gate=False, dt_bias="[H, K]", sigmoid=False,
    erase_scale=1.0, state=True, resets=None, cu=None, scale=None, dtype=torch.float64, seed=0,
):  # fmt: skip
    """Keyword arguments of the op; the differentiable ones require gradients. cu: bounds as a list."""
    generator = torch.Generator().manual_seed(seed)
    HV = H * groups

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = randn(B, T, H, K), randn(B, T, H, K), randn(B, T, HV, V)
    b, w = randn(B, T, H, K), randn(B, T, HV, V)
    if not l2norm:
        q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    if not sigmoid:
        b, w = b.sigmoid(), w.sigmoid()
    inputs = {"q": q, "k": k, "v": v, "g": decays(decay, (B, T, H, K), generator), "b": b, "w": w}
    if gate:
        inputs |= {"g": 2 * randn(B, T, H, K) - 3, "A_log": randn(H)}
        if dt_bias is not None:
            inputs["dt_bias"] = randn(*((H, K) if dt_bias == "[H, K]" else (H * K,)))
    if state:
        inputs["initial_state"] = randn(B if cu is None else len(cu) - 1, HV, K, V)
    inputs = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    return inputs | {
        "scale": scale,
        "use_qk_l2norm_in_kernel": l2norm,
        "use_gate_in_kernel": gate,
        "use_sigmoid_in_kernel": sigmoid,
        "erase_scale": erase_scale,
        "resets": None if resets is None else torch.as_tensor(resets, dtype=torch.bool).reshape(B, T),
        "cu_seqlens": None if cu is None else torch.tensor(cu),
    }


def random_resets(B, T, seed=0, every=30):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, T, generator=generator) < 1 / every


def leaves(inputs):
    return {name: inputs[name] for name in LEAVES if inputs.get(name) is not None}


def cast(inputs, dtype, only=LEAVES):
    """New leaves in another dtype."""
    return inputs | {
        name: value.detach().to(dtype if name in only else value.dtype).requires_grad_()
        for name, value in leaves(inputs).items()
    }


def cotangents(inputs, seed=1):
    """Random fp64 gradients of o and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    q, v = inputs["q"], inputs["v"]
    N = q.shape[0] if inputs["cu_seqlens"] is None else len(inputs["cu_seqlens"]) - 1
    shapes = v.shape, (N, v.shape[2], q.shape[3], v.shape[3])
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(function, inputs, output_grads, through=("o", "final_state")):
    """{"o", "final_state", "dq", ...} of function(**inputs) with the loss <output_grads, outputs named in through>."""
    outputs = function(**inputs, output_final_state=True)
    return collect(inputs, outputs, output_grads, through)


def collect(inputs, outputs, output_grads, through=("o", "final_state")):
    used = [RESULTS.index(name) for name in through]
    grads = torch.autograd.grad(
        [outputs[i] for i in used],
        list(leaves(inputs).values()),
        [output_grads[i].to(outputs[i].dtype) for i in used],
        materialize_grads=True,
    )
    results = {name: output.detach() for name, output in zip(RESULTS, outputs, strict=True)}
    return results | {f"d{name}": grad for name, grad in zip(leaves(inputs), grads, strict=True)}


def golden(inputs, output_grads, through=("o", "final_state")):
    """The same numbers through the definition in fp64."""
    return run(naive_recurrent_gdn2, cast(inputs, torch.float64), output_grads, through)


def errors(got, want):
    """name -> (largest deviation, largest magnitude wanted)."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        assert torch.isfinite(exact).all(), f"the expected {name} is not finite"
        assert torch.isfinite(got[name]).all(), f"{name} is not finite"
    size = {name: exact.abs().max().item() for name, exact in want.items()}
    return {name: ((got[name].double() - exact).abs().max().item(), size[name]) for name, exact in want.items()}


def assert_close(got, want, relative, floor=0.0):
    """Max-norm per tensor. floor: for tensors that are sums which cancel, in units of the largest tensor of all."""
    found = errors(got, want)
    largest = max(size for _, size in found.values())
    for name, (error, size) in found.items():
        assert error <= relative * size + floor * largest, f"{name}: off by {error:.2e} where the largest is {size:.2e}"


def spans(inputs):
    """(row, first token, end) of every sequence."""
    if inputs["cu_seqlens"] is None:
        return [(row, 0, inputs["q"].shape[1]) for row in range(inputs["q"].shape[0])]
    return [(0, start, end) for start, end in itertools.pairwise(inputs["cu_seqlens"].tolist())]
