"""A long sequence on one device as segments side by side, where batch and heads are too few to fill the device.

Forward, all segments run at once as maps of the state they are entered with (``segments``), side by side as rows of the
batch. Folding the maps gives the entering states, and o = o_0 + P S. Backward is the mirror image: P^T dO and the
transitions give the gradient of the state that each segment leaves, and the ordinary backward does the rest.

Forward returns what backward needs beside the inputs: P, the entering states and the transitions, and A and A_qk as
``chunk_gdn2`` does.
"""

import numbers
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..custom_op import define, differentiable, differentiable_once, no_autocast
from ..dispatch import triton_can_serve
from .arguments import GDN2Inputs, GDN2Options
from .flops import CHUNK, backward_flops, segment_flops
from .folding import fold
from .library import ARGUMENTS, GATED, GRADIENTS, OPTIONS, SQUARES, given, kernels, known, new_squares, or_empty
from .maps import apart, by_heads, side_by_side

__all__ = ["check_num_segments", "number_of_segments", "segments_of", "split_gdn2"]


def _records(*args):
    """As in ``library``, with the count of segments in place of cu_seqlens."""
    q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, count, *options = args[:ARGUMENTS]
    inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, initial_state, resets=resets)
    return inputs, count, GDN2Options(*options)


def _positions(inputs, count, options):
    return *inputs.differentiable, inputs.resets, count, *options


def _rows(x, count):
    """x [B, T, ...] -> its segments as rows of the batch [B * count, T / count, ...]."""
    return x.unflatten(1, (count, -1)).flatten(0, 1)


def _owing(initial_state):
    """The segments, as rows of the batch, that may be entered with a state: without one the very first is not."""
    return slice(initial_state is None, None)


def _by_rows_or_heads(*tensors):
    """Tensors [R, H, ...] -> tuples of [R, ...] or of [H, ...], whichever are fewer, and along which axis: batches of
    matrices with one stride, which a library multiplies where they lie; those with two it would copy."""
    axis = 0 if 0 < tensors[0].shape[0] <= tensors[0].shape[1] else 1
    return zip(*(x.unbind(axis) for x in tensors), strict=True), axis


def _add_read_(o, P, S):
    """``o += read(P, S)`` of ``maps``; o [R, L, HV, V] and P [R, L, H, K] in one dtype."""
    heads = P.shape[2]
    batches, _ = _by_rows_or_heads(by_heads(o, heads), P.transpose(1, 2), side_by_side(S.to(P.dtype), heads))
    for o, P, S in batches:
        o.baddbmm_(P, S)


def _read_transposed(P, do, dtype):
    """``read_transposed`` of ``maps``, which cannot loop over rows: a compiler traces it for any number of them."""
    V = do.shape[-1]
    batches, axis = _by_rows_or_heads(P.permute(0, 2, 3, 1), by_heads(do.to(P.dtype), P.shape[2]))
    return apart(torch.stack([P @ do for P, do in batches], axis).to(dtype), V)


def _segmented_forward(*args):
    """``chunk_gdn2`` of T tokens that the ``count`` of segments divides: o and the final state. Then, for backward,
    P [B, T, H, K] in q's dtype, entering states [B, count, HV, K, V], transitions [B, count, H, K, K], and A and A_qk
    of the segments as rows of the batch."""
    inputs, count, options = _records(*args)
    q, v, initial_state = inputs.q, inputs.v, inputs.initial_state
    with no_autocast(q):
        rows = inputs.map_tokens(lambda x: _rows(x, count))
        squares = new_squares(rows, options.backend)
        o, P, M, D = kernels(rows, options.backend).segment_forward(rows, options, *given(squares))
        M, D = M.unflatten(0, (-1, count)), D.unflatten(0, (-1, count))
        state = None if initial_state is None else initial_state.to(D.dtype)
        entering, state = fold(M, D, state, options.backend)
        o, P, owing = o.contiguous(), P.contiguous(), _owing(initial_state)
        _add_read_(o[owing], P[owing], entering.flatten(0, 1)[owing])
    return o.view(v.shape), state.contiguous(), P.view(q.shape), entering, M.contiguous(), *squares


def _fake_segmented_forward(*args):
    inputs, count, options = _records(*args)
    q, v, (B, HV, K, V) = inputs.q, inputs.v, inputs.state_shape
    shapes = (B, HV, K, V), (B, count, HV, K, V), (B, count, q.shape[2], K, K)
    final_state, entering, transitions = (q.new_empty(shape, dtype=inputs.compute_dtype) for shape in shapes)
    squares = new_squares(inputs.map_tokens(lambda x: _rows(x, count)), options.backend)
    return v.new_empty(v.shape), final_state, q.new_empty(q.shape), entering, transitions, *squares


def _segmented_backward(do, dfinal_state, read_rows, entering, transitions, *args):
    inputs, count, options = _records(*args)
    with no_autocast(inputs.q):
        initial_state = inputs.initial_state
        dentering = entering.new_zeros(entering.shape)  # what outputs give
        if do is not None:
            do, owing = _rows(do, count), _owing(initial_state)
            dread = _read_transposed(_rows(read_rows, count)[owing], do[owing], entering.dtype)
            dentering.flatten(0, 1)[owing] = dread
        rows = inputs.map_tokens(lambda x: _rows(x, count), initial_state=entering.flatten(0, 1))
        squares = given(args[ARGUMENTS:])
        dstate = None if dfinal_state is None else dfinal_state.to(entering.dtype)
        leaving, dstate = fold(transitions, dentering, dstate, options.backend, transposed=True)
        grads = kernels(rows, options.backend).chunk_backward(do, leaving.flatten(0, 1), rows, options, *squares)
        pairs = zip(grads.tokens, inputs.tokens, strict=True)
        tokens = [None if x is None else grad.view(x.shape) for grad, x in pairs]
        dinitial_state = None if initial_state is None else dstate.to(initial_state.dtype)
        return or_empty(GDN2Inputs(*tokens, grads.A_log, grads.dt_bias, dinitial_state))


def _fake_segmented_backward(do, dfinal_state, read_rows, entering, transitions, *args):
    inputs, _, _ = _records(*args)
    return or_empty(inputs.map(lambda x: x.new_empty(x.shape)))


INPUTS = f"{GATED}, Tensor? initial_state, Tensor? resets, SymInt segments, {OPTIONS}"
KEPT = "Tensor read_rows, Tensor entering, Tensor transitions"
_forward_op = define(
    "gdn2_titan::segmented_gdn2", f"({INPUTS}) -> ({', '.join(['Tensor'] * 7)})",
    _segmented_forward, _fake_segmented_forward,
)  # fmt: skip
_backward_op = define(
    "gdn2_titan::segmented_gdn2_backward",
    f"(Tensor? do, Tensor? dfinal_state, {KEPT}, {INPUTS}, {SQUARES}) -> {GRADIENTS}",
    _segmented_backward, _fake_segmented_backward,
)  # fmt: skip


def _setup_context(ctx, args, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    inputs, ctx.count, ctx.options = _records(*args)
    ctx.save_for_backward(*output[2:], *inputs)


def _backward(ctx, do, dfinal_state, *others):
    if do is None and dfinal_state is None:
        return ()
    saved = ctx.saved_tensors
    (read_rows, entering, transitions, *squares), inputs = saved[:5], GDN2Inputs(*saved[5:])
    positions = _positions(inputs, ctx.count, ctx.options)
    grads = _differentiable_backward(do, dfinal_state, read_rows, entering, transitions, *positions, *known(squares))
    return tuple(None if x is None else grad for x, grad in zip(inputs.differentiable, grads, strict=True))


_differentiable_forward = differentiable(_forward_op, _setup_context, _backward)
_differentiable_backward = differentiable_once(_backward_op, "chunk_gdn2", like="v")


def _map_products(q_shape, v_shape, segments):
    """FLOPs of P S or P^T dO, and of M S or M^T dS."""
    (B, T, _, K), (HV, V) = q_shape, v_shape[2:]
    return 2 * B * HV * K * V * (T + segments * K)


@register_flop_formula(torch.ops.gdn2_titan.segmented_gdn2)
def _(q_shape, k_shape, v_shape, g, b, w, A_log, dt_bias, state, resets, segments, *args, out_shape=None, **kwargs):
    (B, T, H, K), (HV, V) = q_shape, v_shape[2:]
    return segment_flops(B * T, H, K, HV // H * V, b is not None) + _map_products(q_shape, v_shape, segments)


@register_flop_formula(torch.ops.gdn2_titan.segmented_gdn2_backward)
def _(do, dfinal, P, entering, transitions, q_shape, k_shape, v_shape, g, b, *args, out_shape=None, **kwargs):
    (B, T, H, K), (HV, V) = q_shape, v_shape[2:]
    A_qk_shape = (args[ARGUMENTS - 4 :] or (None,))[0]
    known = bool(A_qk_shape and A_qk_shape[0])
    backward = backward_flops(B * T, H, K, HV // H * V, known=known, erases=b is not None)
    return backward + _map_products(q_shape, v_shape, entering[1])


COUNTS = (64, 32, 16, 8, 4)  # two save less than their maps cost
SHORTEST = 16 * CHUNK  # tokens of a segment: the products that join two segments cost about as much as two chunks
COLUMNS = 64  # of the state, to a program of the kernel that goes from chunk to chunk


def number_of_segments(B: int, T: int, H: int, HV: int, K: int, V: int, processors: int) -> int:
    """As many as ``processors`` run side by side, two programs each: then the kernel takes twice as many columns to a
    program, or two rounds. Sizes that a compiler leaves open count as too small or too large."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which takes a second

    programs = B * (HV * -(-V // COLUMNS) + H * -(-K // COLUMNS))  # of one segment: for its values and for its map
    for count in COUNTS:
        if statically_known_true(count * programs <= 2 * processors) and statically_known_true(count * SHORTEST <= T):
            return count
    return 1


def check_num_segments(value: int | str) -> None:
    """Raise ValueError unless value is "auto" or a whole number of at least 1."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
        raise ValueError(f"num_segments is {value!r}; it must be 'auto' or a whole number of at least 1")


def segments_of(q: Tensor, v: Tensor, num_segments: int | str, backend: str = "auto") -> int:
    """The number asked for, "auto" resolved: PyTorch's kernels gain nothing by segments."""
    check_num_segments(num_segments)
    if num_segments != "auto":
        return int(num_segments)
    if not triton_can_serve(q, backend, (q.shape[-1], v.shape[-1])):
        return 1
    from ..triton import target  # a copy without the Triton kernels has none

    return number_of_segments(*q.shape[:3], v.shape[2], *q.shape[3:], *v.shape[3:], target.processors(q))


def split_gdn2(op: Callable, count: int, inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor]:
    """``op`` (o, final state; without cu_seqlens) of ``count`` segments of equal length, whole chunks unless
    count divides T. What is left over follows them and runs by ``op`` itself; so does a sequence that is too short."""
    T = inputs.q.shape[1]
    length = T // count if T % count == 0 else T // (count * CHUNK) * CHUNK
    cut = length * count
    if length == 0:
        return op(*inputs, *options)
    whole = inputs.map_tokens(lambda x: x[:, :cut], inputs.initial_state)
    o, state, *_ = _differentiable_forward(*_positions(whole, count, options))
    if cut == T:
        return o, state
    o_rest, state = op(*inputs.map_tokens(lambda x: x[:, cut:], state), *options)
    return torch.cat((o, o_rest), 1), state
