"""torch.library: the operators ``torch.ops.gdn2_titan.causal_conv1d*``, their shapes, gradients and FLOPs.

Of one tensor or of three, q, k and v, in one launch; functional, or overwriting the states. The PyTorch kernels serve
any device, the Triton kernels GPUs.
"""

from torch.utils.flop_counter import register_flop_formula

from ..checks import check_cu_seqlens
from ..custom_op import define, differentiable, differentiable_once, no_autocast, overwriting
from ..dispatch import use_triton
from . import windowed
from .arguments import QKV, QKV_STATES, QKV_WEIGHTS, ConvInputs

__all__ = [
    "differentiable_conv1d", "differentiable_conv1d_qkv", "inplace_conv1d", "inplace_conv1d_qkv",
]  # fmt: skip

PACKING = 'Tensor? cu_seqlens, Tensor? resets, str backend="auto"'
ONE = f"Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, {PACKING}"
THREE = (
    "Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor v_weight, bool silu, "
    f"Tensor? q_state, Tensor? k_state, Tensor? v_state, {PACKING}"
)
ARGUMENTS, QKV_ARGUMENTS = 8, 13  # of the functional operators


def _qkv(q, k, v, q_weight, k_weight, v_weight, silu, q_state, k_state, v_state, *packing):
    """The arguments of an operator on q, k and v as three records."""
    given = zip((q, k, v), (q_weight, k_weight, v_weight), (q_state, k_state, v_state), strict=True)
    return [ConvInputs(x, weight, None, silu, state, *packing) for x, weight, state in given]


def _triton(parts, names):
    """The module of Triton's kernels where they serve a call on these records, whose tensors have these names."""
    backend = parts[0].backend
    named = [(name, x) for part, one in zip(parts, names, strict=True) for name, x in zip(one, part, strict=False)]
    served = all(use_triton(name, x, backend) for name, x in named if x is not None)
    if not served or parts[0].x.numel() == 0:
        return None
    from .triton import launches  # not before it is needed: Triton is not everywhere

    return launches


NAMES = [("x", "weight", "bias")]
QKV_NAMES = [*zip(QKV, QKV_WEIGHTS, strict=True)]


def _check_bounds(parts):
    if parts[0].cu_seqlens is not None:
        check_cu_seqlens(parts[0].cu_seqlens, parts[0].x.shape[1])


def _forward(parts, names):
    """(y, final_state) of each record; the op computes the state whether or not anybody asks for it."""
    _check_bounds(parts)
    with no_autocast(parts[0].x):
        kernels = _triton(parts, names)
        return kernels.forward(parts) if kernels else [windowed.forward(part) for part in parts]


def _backward(dys, dfinal_states, parts, names):
    """(dx, dweight, dbias, dinitial_state) of each record, the last two empty where there was none."""
    with no_autocast(parts[0].x):
        kernels = _triton(parts, names)
        if kernels:
            grads = kernels.backward(dys, dfinal_states, parts)
        else:
            grads = [windowed.backward(*given) for given in zip(dys, dfinal_states, parts, strict=True)]
    return [tuple(part.x.new_empty(0) if x is None else x for x in of) for part, of in zip(parts, grads, strict=True)]


def _update(parts, names, state_indices):
    """y of each record, whose states become the final ones."""
    _check_bounds(parts)
    with no_autocast(parts[0].x):
        kernels = _triton(parts, names)
        if kernels:
            return kernels.update(parts, state_indices)
        return [windowed.update(part, state_indices) for part in parts]


def _forward_one(*args):
    return _forward([ConvInputs(*args)], NAMES)[0]


def _backward_one(dy, dfinal_state, *args):
    return _backward([dy], [dfinal_state], [ConvInputs(*args)], NAMES)[0]


def _update_one(*args):
    return _update([ConvInputs(*args[:ARGUMENTS])], NAMES, *(args[ARGUMENTS:] or [None]))[0]


def _forward_qkv(*args):
    """q, k and v, then their final states."""
    ys, final_states = zip(*_forward(_qkv(*args), QKV_NAMES), strict=True)
    return *ys, *final_states


def _backward_qkv(*args):
    """Of q, k and v, then of their weights, then of their initial states."""
    dys, dfinal_states, args = args[:3], args[3:6], args[6:]
    dxs, dweights, _, dstates = zip(*_backward(dys, dfinal_states, _qkv(*args), QKV_NAMES), strict=True)
    return *dxs, *dweights, *dstates


def _update_qkv(*args):
    return tuple(_update(_qkv(*args[:QKV_ARGUMENTS]), QKV_NAMES, *(args[QKV_ARGUMENTS:] or [None])))


def _empty(*tensors):
    """Fresh tensors of these shapes, empty for None."""
    return tuple(tensors[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _fake_forward_one(*args):
    inputs = ConvInputs(*args)
    return inputs.x.new_empty(inputs.x.shape), inputs.x.new_empty(inputs.state_shape)


def _fake_forward_qkv(*args):
    parts = _qkv(*args)
    return *_empty(*args[:3]), *(part.x.new_empty(part.state_shape) for part in parts)


def _fake_backward_one(dy, dfinal_state, x, weight, bias, silu, initial_state, *packing):
    return _empty(x, weight, bias, initial_state)


def _fake_backward_qkv(*args):
    args = args[6:]
    return _empty(*args[:6], *args[7:10])


def _in_place(arguments, *states):
    """The arguments of an operator that overwrites these, and takes indices of a pool."""
    for letter, name in zip("abc", states, strict=False):
        arguments = arguments.replace(f"Tensor? {name}", f"Tensor({letter}!) {name}")
    return f"{arguments}, Tensor? state_indices=None".replace("initial_state", "state")


_op = define("gdn2_titan::causal_conv1d", f"({ONE}) -> (Tensor, Tensor)", _forward_one, _fake_forward_one)
_backward_op = define(
    "gdn2_titan::causal_conv1d_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {ONE}) -> (Tensor, Tensor, Tensor, Tensor)", _backward_one, _fake_backward_one,
)  # fmt: skip
_inplace_op = define(
    "gdn2_titan::causal_conv1d_", f"({_in_place(ONE, 'initial_state')}) -> Tensor",
    _update_one, lambda x, *rest: x.new_empty(x.shape),
)  # fmt: skip
_qkv_op = define(
    "gdn2_titan::causal_conv1d_qkv", f"({THREE}) -> ({', '.join(['Tensor'] * 6)})", _forward_qkv, _fake_forward_qkv
)
_qkv_backward_op = define(
    "gdn2_titan::causal_conv1d_qkv_backward",
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dq_state, Tensor? dk_state, Tensor? dv_state, "
    f"{THREE}) -> ({', '.join(['Tensor'] * 9)})", _backward_qkv, _fake_backward_qkv,
)  # fmt: skip
_qkv_inplace_op = define(
    "gdn2_titan::causal_conv1d_qkv_", f"({_in_place(THREE, *QKV_STATES)}) -> (Tensor, Tensor, Tensor)",
    _update_qkv, lambda *args: _empty(*args[:3]),
)  # fmt: skip


def _save(ctx, tensors, silu, backend):
    ctx.set_materialize_grads(False)
    ctx.silu, ctx.backend = silu, backend
    ctx.save_for_backward(*tensors)


def _setup_one(ctx, args, output):
    x, weight, bias, silu, *others, backend = args
    _save(ctx, (x, weight, bias, *others), silu, backend)


def _gradients_one(ctx, dy, dfinal_state):
    if dy is None and dfinal_state is None:
        return ()
    x, weight, bias, initial_state, *packing = ctx.saved_tensors
    grads = _differentiable_backward(dy, dfinal_state, x, weight, bias, ctx.silu, initial_state, *packing, ctx.backend)
    dx, dweight, dbias, dinitial_state = grads
    return dx, dweight, None if bias is None else dbias, None, None if initial_state is None else dinitial_state


def _setup_qkv(ctx, args, output):
    *tensors, silu, q_state, k_state, v_state, cu_seqlens, resets, backend = args
    _save(ctx, (*tensors, q_state, k_state, v_state, cu_seqlens, resets), silu, backend)


def _or_zeros(grads, likes):
    """All of them or, where there is none, none: what one launch takes."""
    if all(grad is None for grad in grads):
        return grads
    return [x.new_zeros(x.shape) if grad is None else grad for grad, x in zip(grads, likes, strict=True)]


def _gradients_qkv(ctx, *grads):
    if all(grad is None for grad in grads):
        return ()
    saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
    xs, weights, states, packing = saved[:3], saved[3:6], saved[6:9], saved[9:]
    dys, dfinal_states = _or_zeros(grads[:3], xs), grads[3:]
    if any(grad is not None for grad in dfinal_states):
        N = next(grad.shape[0] for grad in dfinal_states if grad is not None)
        shapes = [x.new_empty((N, *weight[:, 1:].shape)) for x, weight in zip(xs, weights, strict=True)]
        dfinal_states = _or_zeros(dfinal_states, shapes)
    found = _differentiable_qkv_backward(*dys, *dfinal_states, *xs, *weights, ctx.silu, *states, *packing, ctx.backend)
    return *found[:6], None, *(None if x is None else grad for x, grad in zip(states, found[6:], strict=True))


differentiable_conv1d = differentiable(_op, _setup_one, _gradients_one)
differentiable_conv1d_qkv = differentiable(_qkv_op, _setup_qkv, _gradients_qkv)
_differentiable_backward = differentiable_once(_backward_op, "causal_conv1d", like="x")
_differentiable_qkv_backward = differentiable_once(_qkv_backward_op, "causal_conv1d_qkv", like="q")
inplace_conv1d = overwriting(_inplace_op, "state")
inplace_conv1d_qkv = overwriting(_qkv_inplace_op, *QKV_STATES)


def _flops(x_shape, weight_shape):
    B, T, D = x_shape
    return 2 * B * T * D * weight_shape[1]


@register_flop_formula([_op.overloadpacket, _inplace_op.overloadpacket])
def _(x_shape, weight_shape, *args, **kwargs):
    return _flops(x_shape, weight_shape)


@register_flop_formula(_backward_op.overloadpacket)
def _(dy_shape, dfinal_state_shape, x_shape, weight_shape, *args, **kwargs):
    return 2 * _flops(x_shape, weight_shape)


@register_flop_formula([_qkv_op.overloadpacket, _qkv_inplace_op.overloadpacket])
def _(*shapes, **kwargs):
    return sum(map(_flops, shapes[:3], shapes[3:6]))


@register_flop_formula(_qkv_backward_op.overloadpacket)
def _(*shapes, **kwargs):
    return 2 * sum(map(_flops, shapes[6:9], shapes[9:12]))
