"""The short convolution written token by token, cases for it, and how an implementation is compared with it."""

import torch

from gdn2_titan.ops.short_conv.api import causal_conv1d

FORWARD = torch.ops.gdn2_titan.causal_conv1d
BACKWARD = torch.ops.gdn2_titan.causal_conv1d_backward
GRAD_NAMES = ("x", "weight", "bias", "initial_state")


def oracle(x, weight, bias=None, activation=None, initial_state=None, cu_seqlens=None, resets=None):
    """The definition: every sequence keeps the last W - 1 inputs of the current document and moves on by one token."""
    B, T, D = x.shape
    S = weight.shape[1] - 1
    if cu_seqlens is None:
        spans = [(row, 0, T) for row in range(B)]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    zero = torch.zeros(D, dtype=x.dtype)
    y, states = {}, []
    for n, (row, start, end) in enumerate(spans):
        past = [zero] * S if initial_state is None else [initial_state[n, :, j] for j in range(S)]
        for t in range(start, end):
            if resets is not None and resets[row, t]:
                past = [zero] * S
            taps = past + [x[row, t]]
            pre = sum(weight[:, j] * tap for j, tap in enumerate(taps))
            if bias is not None:
                pre = pre + bias
            y[row, t] = pre / (1 + torch.exp(-pre)) if activation else pre
            past = taps[1:]
        states.append(torch.stack(past, 1))
    rows = [torch.stack([y[row, t] for t in range(T)]) for row in range(B)]
    return torch.stack(rows), torch.stack(states)


def make(B=2, T=5, D=3, W=4, bias=True, state=True, cu=None, resets=None, dtype=torch.float64, seed=0):
    """Keyword arguments of causal_conv1d; the differentiable ones require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    N = B if cu is None else len(cu) - 1
    return {
        "x": randn(B, T, D),
        "weight": randn(D, W),
        "bias": randn(D) if bias else None,
        "initial_state": randn(N, D, W - 1) if state else None,
        "cu_seqlens": None if cu is None else torch.tensor(cu),
        "resets": None if resets is None else torch.tensor(resets).reshape(B, T),
    }


def in_fp64(inputs):
    return {
        name: value.detach().double().requires_grad_() if name in GRAD_NAMES and value is not None else value
        for name, value in inputs.items()
    }


def leaves(inputs):
    return {name: inputs[name] for name in GRAD_NAMES if inputs[name] is not None}


def gradients(inputs, outputs, output_grads):
    grads = torch.autograd.grad(outputs, list(leaves(inputs).values()), output_grads, materialize_grads=True)
    return dict(zip(leaves(inputs), grads, strict=True))


def output_gradients(y, final_state, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in (y, final_state)]


def run_both(inputs, activation, through="both", backend="auto"):
    """Outputs and gradients of the op and of the oracle on the same numbers, each as a dict of named tensors."""
    results = []
    used = {"both": slice(0, 2), "y": slice(0, 1), "final_state": slice(1, 2)}[through]
    exact = in_fp64(inputs)
    outs = causal_conv1d(**inputs, activation=activation, output_final_state=True, backend=backend)
    out_grads = output_gradients(*outs)
    for args, values in ((inputs, outs), (exact, oracle(**exact, activation=activation))):
        named = dict(zip(("y", "final_state"), values, strict=True))
        targets = [grad.to(value.dtype) for grad, value in zip(out_grads, values, strict=True)]
        grads = gradients(args, values[used], targets[used])
        named |= {f"d{name}": grad for name, grad in grads.items()}
        results.append(named)
    return results


def results_of(inputs, activation, backend):
    """Outputs and gradients by name, for output gradients that depend on nothing but the shapes."""
    outs = causal_conv1d(**inputs, activation=activation, output_final_state=True, backend=backend)
    grads = gradients(inputs, outs, [grad.to(outs[0]) for grad in output_gradients(*outs)])
    return dict(zip(("y", "final_state"), outs, strict=True)) | {f"d{name}": grad for name, grad in grads.items()}


def assert_close(got, want, relative):
    assert got.keys() == want.keys()
    for name, exact in want.items():
        # A tensor of one element may be a sum that cancels, so that its own size does not measure the rounding.
        slack = 4 * torch.finfo(got[name].dtype).eps
        error = (got[name].double() - exact).abs().max().item()
        assert error <= relative * exact.abs().max().item() + slack, f"{name}: off by {error:.2e}"


# Options in the shapes where they interact: name -> arguments of make.
VARIANTS = {
    "plain": dict(bias=False, state=False),
    "state": dict(),
    "shorter than the state": dict(T=2),
    "one token": dict(T=1),
    "resets": dict(resets=[1, 0, 0, 1, 0, 0, 1, 1, 0, 0]),
    "packed": dict(B=1, T=7, cu=[0, 0, 3, 4, 4, 7, 7]),
    "packed without state": dict(B=1, T=7, cu=[0, 3, 7], state=False),
    "packed with resets": dict(B=1, T=7, cu=[0, 0, 3, 4, 7], resets=[0, 0, 1, 1, 0, 1, 0]),
}


def variant_inputs(variant, **changes):
    options = VARIANTS[variant] | changes
    if options.get("resets") is not None:
        options["resets"] = [bool(flag) for flag in options["resets"]]
    return make(**options)


def op_arguments(inputs, silu=True, backend="auto"):
    inputs = inputs | {"silu": silu, "backend": backend}
    names = ("x", "weight", "bias", "silu", "initial_state", "cu_seqlens", "resets", "backend")
    return tuple(inputs[name] for name in names)


def permuted(tensor):
    """The same values in a dense layout whose strides are not in the order of the axes."""
    order = list(range(tensor.ndim))[::-1]
    return tensor.detach().permute(order).contiguous().permute(order).requires_grad_(tensor.requires_grad)
