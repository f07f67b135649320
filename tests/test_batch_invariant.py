"""backend "batch_invariant": bit for bit the same for a row alone and among others, at once and token by token."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gdn2_titan.convert.hf import GDN2Cache, GDN2ForTokenClassification
from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.batch_invariant import RowLinear
from gdn2_titan.ops import causal_conv1d_qkv, causal_conv1d_qkv_, chunk_gdn2, naive_recurrent_gdn2, recurrent_gdn2_
from gdn2_titan.ops.elementwise import sigmoid, silu, softplus
from gdn2_titan.parallel import check_tensor_parallel
from tests.hf_cases import GREEDY, HYBRID, RECURRENT, WINDOWED, assert_equal, left_padded, pair, tokens
from tests.model_cases import GATES

patterns = pytest.mark.parametrize("pattern", [RECURRENT, WINDOWED, HYBRID], ids="+".join)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
# Sides that no vector's length divides: what is left over at the end of a row is where kernels differ.
ODD = dict(mlp_size=37, hidden_size=36, attn_heads=2, attn_kv_heads=1, head_dim=6, expand_v=1.5, window=5)


def invariant(dtype=torch.float32, **changes):
    """(GDN2ForCausalLM, GDN2Model) of the same weights."""
    return [model.to(dtype) for model in pair(backend="batch_invariant", **ODD | changes)]


def in_pieces(theirs, ids, lengths):
    """The logits of ids [B, T] that come in pieces of these lengths."""
    cache = GDN2Cache(3)
    return torch.cat([theirs(piece, past_key_values=cache).logits for piece in ids.split(lengths, 1)], 1)


@patterns
@dtypes
@torch.no_grad()
def test_a_row_has_the_bits_that_it_has_alone_in_any_batch(pattern, dtype):
    _, ours = invariant(dtype, layer_pattern=pattern)
    ids = tokens(5, 21)
    whole = ours(ids)
    for rows in (slice(0, 1), slice(2, 3), slice(0, 2), slice(1, 4), [4, 0, 3, 2]):
        assert torch.equal(ours(ids[rows]), whole[rows])


@patterns
@dtypes
@torch.no_grad()
def test_a_text_token_by_token_has_the_bits_of_the_whole(pattern, dtype):
    theirs, ours = invariant(dtype, layer_pattern=pattern)
    ids = tokens(3, 21)
    whole = ours(ids)
    assert torch.equal(in_pieces(theirs, ids, 1), whole)
    assert torch.equal(in_pieces(theirs, ids[1:2], [5, 1, 1, 12, 2]), whole[1:2])


@pytest.mark.parametrize("structure", GATES)
@torch.no_grad()
def test_every_gate_structure_has_the_same_bits_in_steps_and_in_batches(structure):
    theirs, ours = invariant(layer_pattern=RECURRENT, **{"num_v_heads": None} | GATES[structure])
    ids = tokens(3, 9)
    whole = ours(ids)
    assert torch.equal(in_pieces(theirs, ids[2:], 1), whole[2:])


@torch.no_grad()
def test_padding_beside_a_text_changes_no_bit_of_it():
    theirs, ours = invariant()
    ids, mask, rows = left_padded([17, 4, 11])
    logits = theirs(ids, attention_mask=mask).logits
    for row, text in enumerate(rows):
        assert torch.equal(logits[row, -len(text) :], ours(text[None])[0])


@torch.no_grad()
def test_a_head_for_labels_gives_a_row_the_same_bits_alone():
    theirs, _ = invariant()
    labels = GDN2ForTokenClassification(theirs.config).eval()
    ids = tokens(3, 12)
    assert torch.equal(labels(ids[1:2]).logits, labels(ids).logits[1:2])


def test_a_training_sees_the_bits_of_generation():
    theirs, ours = invariant()
    options = dict(max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **GREEDY)
    said = theirs.generate(tokens(2, 9), **options)
    assert ours(said.sequences[:, :-1]).requires_grad
    assert torch.equal(ours(said.sequences[:, :-1])[:, 8:], torch.stack(said.logits, 1))


def test_prompt_lookup_has_the_bits_of_greedy_generation():
    theirs, _ = invariant()
    text = tokens(1, 8).repeat(1, 3)
    options = dict(max_new_tokens=16, return_dict_in_generate=True, output_logits=True, **GREEDY)
    plain, looked_up = theirs.generate(text, **options), theirs.generate(text, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(torch.stack(plain.logits), torch.stack(looked_up.logits))


@patterns
def test_logits_and_gradients_are_those_of_the_other_backends(pattern):
    changes = ODD | {"layer_pattern": pattern}
    (_, ours), (_, plain) = pair(backend="batch_invariant", **changes), pair(**changes)
    ids, found = tokens(2, 20), []
    for model in (ours, plain):
        logits = model.double()(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_under_autocast_a_linear_layer_has_a_gradient():
    layer, x = RowLinear(7, 5), torch.randn(3, 4, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    x_again = x.detach().requires_grad_()
    F.linear(x_again, layer.weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, x_again.grad, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------------------- operators


def operands(T=23, B=3, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, g, b = (torch.randn(B, T, 2, 7, dtype=dtype) for _ in range(4))
    v, w = (torch.randn(B, T, 4, 5, dtype=dtype) for _ in range(2))
    raw = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_sigmoid_in_kernel=True)
    return (q, k, v, g - 2, b, w), raw | dict(A_log=torch.randn(2), dt_bias=torch.randn(2, 7))


@pytest.mark.parametrize("bound", [None, -3.0])
def test_the_operator_in_steps_in_place_and_packed_has_the_bits_of_whole_sequences(bound):
    tensors, options = operands()
    options |= dict(backend="batch_invariant", lower_bound=bound)
    o, final = chunk_gdn2(*tensors, output_final_state=True, num_segments="auto", **options)
    state = torch.zeros(3, 4, 7, 5)
    steps = [recurrent_gdn2_(*(x[:, t : t + 1] for x in tensors), state, **options) for t in range(23)]
    assert torch.equal(torch.cat(steps, 1), o) and torch.equal(state, final)
    packed = [x[:2].flatten(0, 1)[None] for x in tensors]
    bounds = torch.tensor([0, 23, 46])
    again, finals = chunk_gdn2(*packed, cu_seqlens=bounds, output_final_state=True, **options)
    assert torch.equal(again[0].view(2, 23, 4, 5), o[:2]) and torch.equal(finals, final[:2])
    resets = torch.zeros(1, 46, dtype=torch.bool)
    resets[0, 23] = True
    assert torch.equal(chunk_gdn2(*packed, resets=resets, **options)[0], again)


def test_the_operator_is_right_to_fp32():
    tensors, options = operands()
    o = chunk_gdn2(*tensors, backend="batch_invariant", **options)[0]
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = naive_recurrent_gdn2(*(x.double() for x in tensors), **wide)[0]
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_token_has_no_output_and_leaves_the_state():
    tensors, options = operands(T=0)
    state = torch.randn(3, 4, 7, 5)
    o, final = chunk_gdn2(*tensors, initial_state=state, output_final_state=True, backend="batch_invariant", **options)
    assert o.shape == (3, 0, 4, 5) and torch.equal(final, state)


def test_the_convolutions_in_steps_have_the_bits_of_whole_sequences():
    torch.manual_seed(0)
    qkv, weights = [torch.randn(3, 19, D) for D in (7, 7, 9)], [torch.randn(D, 4) for D in (7, 7, 9)]
    *whole, finals = causal_conv1d_qkv(*qkv, *weights, "silu", output_final_state=True, backend="batch_invariant")
    states = [torch.zeros(3, D, 3) for D in (7, 7, 9)]
    for t in range(19):
        step = [x[:, t : t + 1] for x in qkv]
        found = causal_conv1d_qkv_(*step, *weights, *states, "silu", backend="batch_invariant")
        assert all(torch.equal(y, x[:, t : t + 1]) for y, x in zip(found, whole, strict=True))
    assert all(map(torch.equal, states, finals))
    assert_equal(whole[0], causal_conv1d_qkv(*qkv, *weights, "silu")[0])


@pytest.mark.parametrize("ours, theirs", [(sigmoid, torch.sigmoid), (silu, F.silu), (softplus, F.softplus)])
def test_elementwise_functions_and_their_slopes_are_right_at_any_number(ours, theirs):
    x = torch.cat((torch.linspace(-20, 20, 101), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]))).requires_grad_()
    wide = x.detach().double().requires_grad_()
    for f, at in ((ours, x), (theirs, wide)):
        f(at).sum().backward()
    torch.testing.assert_close(ours(x).double(), theirs(wide), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- at the door


def test_what_cannot_be_honoured_is_refused():
    tensors, options = operands()
    with pytest.raises(ValueError, match="num_segments is 4; with backend='batch_invariant' it must be 1 or 'auto'"):
        chunk_gdn2(*tensors, backend="batch_invariant", num_segments=4, **options)
    args = GDN2ModelArgs(backend="batch_invariant")
    with pytest.raises(ValueError, match="backend is 'batch_invariant'; with tensor parallelism"):
        check_tensor_parallel(args, 2)
    with pytest.raises(ValueError, match="backend is 'batch_invariant'; of Mamba layers it must be another one"):
        dataclasses.replace(args, layer_pattern=("gdn2", "mamba2")).validate()
    with pytest.raises(RuntimeError, match="the model gets an input on meta; it must run on the CPU, uncompiled"):
        RowLinear(4, 4, device="meta")(torch.zeros(1, 4, device="meta"))
    with pytest.raises(RuntimeError, match="the model is compiled; it must run on the CPU, uncompiled"):
        torch.compile(RowLinear(4, 4), backend="eager", fullgraph=True)(torch.zeros(1, 4))


def test_a_machine_whose_products_depend_on_a_rows_place_is_refused(monkeypatch):
    product = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: product(x, *rest) + torch.arange(len(x))[:, None] * 1e-6)
    with pytest.raises(
        RuntimeError, match=r"torch.float32 product of 16 rows with a matrix \[6, 11\] depends on a row"
    ):
        RowLinear(11, 6)(torch.zeros(1, 11))
