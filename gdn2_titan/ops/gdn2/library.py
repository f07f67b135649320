"""torch.library: the operators ``torch.ops.gdn2_titan.*``, their shapes, their gradients and their FLOPs.

One functional op forward and one backward, opaque to the compiler. The PyTorch kernels serve any device, the Triton
kernels GPUs; what those save for the backward, A and A_qk, is two more results of ``chunk_gdn2_saving``.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..custom_op import define, differentiable, differentiable_once, no_autocast, overwriting
from ..dispatch import triton_can_serve, use_triton
from ..elementwise import BATCH_INVARIANT
from . import batch_invariant, chunked, reference, tokenless
from .arguments import GDN2Inputs, GDN2Options
from .flops import backward_flops, forward_flops

__all__ = [
    "ARGUMENTS", "GATED", "GRADIENTS", "OPTIONS", "SQUARES", "differentiable_chunk_gdn2",
    "differentiable_chunk_gdn2_backward", "differentiable_recurrent_gdn2", "given", "inplace_recurrent_gdn2", "kernels",
    "known", "new_squares", "or_empty",
]  # fmt: skip

GATED = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? b, Tensor w, Tensor? A_log, Tensor? dt_bias"
BOUND = ", float? lower_bound=None"
OPTIONS = f'float scale, bool l2norm, bool gate, bool sigmoid, float erase_scale, str backend="auto"{BOUND}'
INPUTS = f"{GATED}, Tensor? initial_state, Tensor? cu_seqlens, Tensor? resets, {OPTIONS}"
INPLACE_INPUTS = INPUTS.replace("Tensor? initial_state", "Tensor(a!) state").removesuffix(BOUND)
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
SQUARES = "Tensor? A=None, Tensor? A_qk=None"
TENSORS = len(GDN2Inputs._fields)
ARGUMENTS = TENSORS + len(GDN2Options._fields)


def _records(*args):
    """The arguments of an operator, whose positions are the fields of the two, the last ones left out by default."""
    return GDN2Inputs(*args[:TENSORS]), GDN2Options(*args[TENSORS:ARGUMENTS])


def _use_triton(inputs, backend):
    return use_triton("q", inputs.q, backend, (inputs.q.shape[-1], inputs.v.shape[-1])) and inputs.q.numel() > 0


def kernels(inputs: GDN2Inputs, backend: str) -> ModuleType:
    """The module whose ``chunk_forward``, ``chunk_backward`` and ``segment_forward`` serve a call."""
    if _use_triton(inputs, backend):
        from .triton import chunk  # not before it is needed: Triton is not everywhere

        return chunk
    return chunked if inputs.q.numel() > 0 else tokenless


def or_empty(grads: GDN2Inputs) -> tuple[Tensor, ...]:
    """The gradients as a backward operator returns them: empty where the input is absent."""
    return tuple(grads.q.new_empty(0) if x is None else x.contiguous() for x in grads.differentiable)


def new_squares(inputs: GDN2Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """A and A_qk, to be saved for the backward; of no chunk where PyTorch's kernels compute them again, and A where
    nothing is erased."""
    chunks, *square = inputs.square_shape
    if not _use_triton(inputs, backend):
        chunks = 0
    return inputs.q.new_empty(0 if inputs.b is None else chunks, *square), inputs.q.new_empty(chunks, *square)


def known(squares: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """``new_squares`` as a backward operator takes them, which DTensor shards: not those of no chunk."""
    found = tuple(x if x.shape[0] > 0 else None for x in squares)
    return found if any(x is not None for x in found) else ()


def given(squares: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], ...]:
    """The last argument of kernels that take these squares, A and A_qk; none where there are none."""
    return (tuple(squares),) if squares and squares[1] is not None and squares[1].shape[0] > 0 else ()


def _chunk_forward(*args, squares=()):
    inputs, options = _records(*args)
    with no_autocast(inputs.q):
        o, final_state = kernels(inputs, options.backend).chunk_forward(inputs, options, *given(squares))
    return o.contiguous(), final_state.contiguous()


def _saving_forward(*args):
    inputs, options = _records(*args)
    squares = new_squares(inputs, options.backend)
    return *_chunk_forward(*args, squares=squares), *squares


def _token_by_token(options):
    return batch_invariant.recurrent if options.backend == BATCH_INVARIANT else reference.recurrent


def _recurrent_forward(*args):
    inputs, options = _records(*args)
    with no_autocast(inputs.q):
        if _use_triton(inputs, options.backend):
            from .triton import recurrent

            o, final_state = recurrent.recurrent_forward(inputs, options)
        else:
            o, final_state = _token_by_token(options)(inputs, options)
    return o.contiguous(), final_state.contiguous()


def _recurrent_inplace(*args):
    """o; ``state``, in the compute dtype, is the initial state and becomes the final one."""
    # Where the other operators have their last option, this one has state_indices.
    state_indices, lower_bound = (*args[ARGUMENTS - 1 :], None, None)[:2]
    inputs, options = _records(*args[: ARGUMENTS - 1])
    options = options._replace(lower_bound=lower_bound)
    with no_autocast(inputs.q):
        if _use_triton(inputs, options.backend):
            from .triton import recurrent

            o, _ = recurrent.recurrent_forward(inputs, options, inputs.initial_state, state_indices)
        else:
            o = reference.update(inputs, options, inputs.initial_state, state_indices, _token_by_token(options))
    return o.contiguous()


def _chunk_backward(do, dfinal_state, *args):
    inputs, options = _records(*args)
    squares = given(args[ARGUMENTS:])
    with no_autocast(inputs.q):
        return or_empty(kernels(inputs, options.backend).chunk_backward(do, dfinal_state, inputs, options, *squares))


def _fake_forward(*args):
    inputs, _ = _records(*args)
    return inputs.v.new_empty(inputs.v.shape), inputs.q.new_empty(inputs.state_shape, dtype=inputs.compute_dtype)


def _fake_saving_forward(*args):
    inputs, options = _records(*args)
    return *_fake_forward(*args), *new_squares(inputs, options.backend)


def _fake_backward(do, dfinal_state, *args):
    inputs, _ = _records(*args)
    return or_empty(inputs.map(lambda x: x.new_empty(x.shape)))


_chunk_op = define("gdn2_titan::chunk_gdn2", f"({INPUTS}) -> (Tensor, Tensor)", _chunk_forward, _fake_forward)
# The same for a call of the Triton kernels that a backward follows.
_saving_op = define(
    "gdn2_titan::chunk_gdn2_saving", f"({INPUTS}) -> (Tensor o, Tensor final_state, Tensor A, Tensor A_qk)",
    _saving_forward, _fake_saving_forward,
)  # fmt: skip
_recurrent_op = define(
    "gdn2_titan::recurrent_gdn2", f"({INPUTS}) -> (Tensor, Tensor)", _recurrent_forward, _fake_forward
)
_inplace_op = define(
    "gdn2_titan::recurrent_gdn2_",
    f"({INPLACE_INPUTS}, Tensor? state_indices=None{BOUND}) -> Tensor",
    _recurrent_inplace, lambda q, k, v, *rest: v.new_empty(v.shape),
)  # fmt: skip
_backward_op = define(
    "gdn2_titan::chunk_gdn2_backward", f"(Tensor? do, Tensor? dfinal_state, {INPUTS}, {SQUARES}) -> {GRADIENTS}",
    _chunk_backward, _fake_backward,
)  # fmt: skip


def _setup_context(ctx, args, output):
    ctx.set_materialize_grads(False)
    inputs, ctx.options = _records(*args)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs, *output[2:])


def _backward(ctx, do, dfinal_state, *others):
    if do is None and dfinal_state is None:
        return ()
    saved = ctx.saved_tensors
    inputs, squares = GDN2Inputs(*saved[:TENSORS]), saved[TENSORS:]
    # The recurrent op too: its gradient is the same function of the same inputs. What is not known is made of them.
    grads = differentiable_chunk_gdn2_backward(do, dfinal_state, *inputs, *ctx.options, *known(squares))
    return tuple(None if x is None else grad for x, grad in zip(inputs.differentiable, grads, strict=True))


_differentiable_chunk_gdn2 = differentiable(_chunk_op, _setup_context, _backward)
_differentiable_saving = differentiable(_saving_op, _setup_context, _backward)
differentiable_recurrent_gdn2 = differentiable(_recurrent_op, _setup_context, _backward)
differentiable_chunk_gdn2_backward = differentiable_once(_backward_op, "chunk_gdn2 and recurrent_gdn2", like="v")
inplace_recurrent_gdn2 = overwriting(_inplace_op, "state")


def differentiable_chunk_gdn2(*args: object) -> tuple[Tensor, Tensor]:
    """o and the final state. args: the fields of ``GDN2Inputs`` and of ``GDN2Options``."""
    inputs, options = _records(*args)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs.differentiable)
    if needs_grad and (options.backend == "triton" or inputs.q.device.type == "cuda"):
        sizes = inputs.q.shape[-1], inputs.v.shape[-1]
        if options.backend == "triton" or triton_can_serve(inputs.q, options.backend, sizes):
            return _differentiable_saving(*args)[:2]
    return _differentiable_chunk_gdn2(*args)


def _sizes(q_shape, v_shape):
    B, T, H, K = q_shape
    return B * T, H, K, v_shape[2] // H * v_shape[3]


@register_flop_formula([op.overloadpacket for op in (_chunk_op, _saving_op, _recurrent_op, _inplace_op)])
def _(q_shape, k_shape, v_shape, g, b, *args, out_shape=None, **kwargs):
    return forward_flops(*_sizes(q_shape, v_shape), erases=b is not None)


@register_flop_formula(torch.ops.gdn2_titan.chunk_gdn2_backward)
def _(do_shape, dfinal_shape, q_shape, k_shape, v_shape, g, b, *args, out_shape=None, **kwargs):
    A_qk_shape = (args[ARGUMENTS - 4 :] or (None,))[0]
    known = bool(A_qk_shape and A_qk_shape[0])
    return backward_flops(*_sizes(q_shape, v_shape), known=known, erases=b is not None)
