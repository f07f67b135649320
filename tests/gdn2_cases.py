"""Inputs for the tests of the op, and what all of them measure by: outputs and every gradient, by name."""

import functools
import itertools

import pytest
import torch
from hypothesis import strategies as st

from gdn2_titan.ops import naive_recurrent_gdn2

LEAVES = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state")
RESULTS = ("o", "final_state")
RAW = dict(l2norm=True, gate=True, sigmoid=True, erase_scale=2.0)
# Where the Triton kernels run: interpreted, see conftest, where there is no GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def slowly(*cases):
    """Of a parametrization: what only the whole suite runs."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def examples(few, many):
    """How many cases Hypothesis tries: few in the quick suite, many in the whole one."""
    return pytest.mark.parametrize("count", [few, *slowly(many)])


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
    erase_scale=1.0, state=True, resets=None, cu=None, scale=None, lower_bound=None, dtype=torch.float64,
    seed=0,
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
    return (
        inputs
        | {
            "scale": scale,
            "use_qk_l2norm_in_kernel": l2norm,
            "use_gate_in_kernel": gate,
            "use_sigmoid_in_kernel": sigmoid,
            "erase_scale": erase_scale,
            "resets": None if resets is None else torch.as_tensor(resets, dtype=torch.bool).reshape(B, T),
            "cu_seqlens": None if cu is None else torch.tensor(cu),
        }
        | ({} if lower_bound is None else {"lower_bound": lower_bound})
    )


def random_resets(B, T, seed=0, every=30):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, T, generator=generator) < 1 / every


@st.composite
def cases(draw, longest=200, heads=3, sizes=(1, 2, 5, 16, 24)):
    """Arguments of ``make`` for any sizes and options. heads: the most key heads, and the most value heads to each."""
    packed = draw(st.booleans())
    B = 1 if packed else draw(st.integers(1, 2))
    edges = [T for T in (1, 2, 16, 17, 63, 64, 65, 127, 128, 129) if T <= longest]
    T = draw(st.integers(1, longest) | st.sampled_from(edges))
    cu = None
    if packed:
        cu = [0, *sorted(draw(st.lists(st.integers(0, T), max_size=4))), T]
    sigmoid = draw(st.booleans())
    resets = None
    if draw(st.booleans()):
        resets = random_resets(B, T, seed=draw(st.integers(0, 100)), every=draw(st.sampled_from([2, 30])))
        resets[:, 0] = draw(st.booleans())
    return {
        "B": B,
        "T": T,
        "H": draw(st.integers(1, heads)),
        "groups": draw(st.integers(1, heads)),
        "K": draw(st.sampled_from(sizes)),
        "V": draw(st.sampled_from(sizes)),
        "decay": draw(st.sampled_from(DECAYS)),
        "l2norm": draw(st.booleans()),
        "gate": draw(st.booleans()),
        "dt_bias": draw(st.sampled_from(["[H, K]", "[H * K]", None])),
        "sigmoid": sigmoid,
        "erase_scale": draw(st.sampled_from([1.0, 2.0])) if sigmoid else 1.0,
        "state": draw(st.booleans()),
        "resets": resets,
        "cu": cu,
        "scale": draw(st.sampled_from([None, 1.0, -0.3])),
        "seed": draw(st.integers(0, 1000)),
    }


def reversed_layout(x):
    """The same values in a dense layout whose strides are in the reverse order of the axes."""
    order = list(range(x.ndim))[::-1]
    return x.permute(order).contiguous().permute(order)


def strided(x):
    """Every second element of a larger tensor along the last axis."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def leaves(inputs):
    return {name: inputs[name] for name in LEAVES if inputs.get(name) is not None}


def cast(inputs, dtype, only=LEAVES):
    """New leaves in another dtype."""
    return inputs | {
        name: value.detach().to(dtype if name in only else value.dtype).requires_grad_()
        for name, value in leaves(inputs).items()
    }


def in_half(inputs, dtype, decay_dtype=torch.float32):
    """Half precision as training has it: the decay's parameters and the state stay in fp32, raw decays need not."""
    inputs = cast(cast(inputs, dtype, only=("q", "k", "v", "b", "w")), decay_dtype, only=("g",))
    return cast(inputs, torch.float32, only=("A_log", "dt_bias", "initial_state"))


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


def on_device(inputs):
    """The same inputs on DEVICE, the differentiable ones leaves again."""
    moved = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    return moved | {name: moved[name].detach().requires_grad_() for name in leaves(inputs)}


def run_on_device(function, inputs, output_grads, backend="triton", through=RESULTS):
    """``run`` there, its results back here."""
    chosen = functools.partial(function, backend=backend)
    results = run(chosen, on_device(inputs), [grad.to(DEVICE) for grad in output_grads], through)
    return {name: x.cpu() for name, x in results.items()}


def op_arguments(inputs):
    """inputs as the operator takes them, less the backend."""
    tensors = [inputs.get(n) for n in LEAVES]
    options = [inputs[n] for n in ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_sigmoid_in_kernel")]
    scale = inputs["q"].shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    return (*tensors, inputs["cu_seqlens"], inputs["resets"], scale, *options, inputs["erase_scale"])


def assert_comparable(got, want):
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        assert torch.isfinite(exact).all(), f"the expected {name} is not finite"
        assert torch.isfinite(got[name]).all(), f"{name} is not finite"


def errors(got, want):
    """name -> (largest deviation, largest magnitude wanted)."""
    assert_comparable(got, want)
    size = {name: exact.abs().max().item() for name, exact in want.items()}
    return {name: ((got[name].double() - exact).abs().max().item(), size[name]) for name, exact in want.items()}


def assert_close(got, want, relative, floor=0.0):
    """Max-norm per tensor. floor: for tensors that are sums which cancel, in units of the largest tensor of all."""
    found = errors(got, want)
    largest = max(size for _, size in found.values())
    for name, (error, size) in found.items():
        assert error <= relative * size + floor * largest, f"{name}: off by {error:.2e} where the largest is {size:.2e}"


def assert_within_twice(got, want, alone, dtype):
    """alone: what exact arithmetic gives of inputs rounded to dtype. Of its error got may have twice, and a rounding of
    the results. A gradient of next to nothing (dg where nothing survives a token) is a difference of sums in fp32."""
    alone, eps = errors(alone, want), torch.finfo(dtype).eps
    floor = torch.finfo(torch.float32).eps * max(size for _, size in alone.values())
    for name, (error, size) in errors(got, want).items():
        limit = 2 * alone[name][0] + 2 * eps * size + floor
        assert error <= limit, f"{name}: off by {error:.2e}; rounding the inputs alone gives {alone[name][0]:.2e}"


def norm_errors(got, want):
    """name -> (norm of the deviation, norm wanted)."""
    assert_comparable(got, want)
    return {name: ((got[name].double() - x).norm().item(), x.norm().item()) for name, x in want.items()}


def assert_norms_close(got, want, relative):
    """Each tensor by its own norm, however small that is; one that is zero exactly."""
    for name, (error, size) in norm_errors(got, want).items():
        assert error <= relative * size, f"{name}: off by {error:.2e}, its norm is {size:.2e}"


def spans(inputs):
    """(row, first token, end) of every sequence."""
    if inputs["cu_seqlens"] is None:
        return [(row, 0, inputs["q"].shape[1]) for row in range(inputs["q"].shape[0])]
    return [(0, start, end) for start, end in itertools.pairwise(inputs["cu_seqlens"].tolist())]
