"""Segments on one device: the program that a GPU's layer runs for long sequences, on a CPU, as PyTorch composes it."""

import functools
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.func import grad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs
from gdn2_titan.ops import chunk_gdn2, naive_recurrent_gdn2
from gdn2_titan.ops.gdn2 import chunked
from gdn2_titan.ops.gdn2.flops import backward_flops, forward_flops
from gdn2_titan.ops.gdn2.segmented import number_of_segments
from gdn2_titan.parallel.activation_checkpoint import SAVED_OPS
from tests.gdn2_cases import (
    RAW,
    assert_close,
    cast,
    cotangents,
    golden,
    leaves,
    make,
    op_arguments,
    random_resets,
    run,
    slowly,
)

OPS = torch.ops.gdn2_titan
ARGS = GDN2ModelArgs(
    vocab_size=40, hidden_size=32, n_layers=2, mlp_size=48, num_heads=2, head_dim=8, attn_heads=2, window=20,
    layer_pattern=("gdn2", "swa"),
)  # fmt: skip


def in_segments(count):
    return functools.partial(chunk_gdn2, num_segments=count)


def arguments(inputs, segments):
    tensors, resets, numbers = op_arguments(inputs)[:9], inputs["resets"], op_arguments(inputs)[11:]
    return (*tensors, resets, segments, *numbers)


@pytest.mark.parametrize("options", [dict(state=False), dict(**RAW, groups=2, resets=[0, 0, 1, 0, 1, 0])],
                         ids=["plain", "raw, resets, grouped"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_operator_passes_opcheck(options, dtype):
    torch.library.opcheck(OPS.segmented_gdn2, arguments(make(T=6, K=2, V=3, dtype=dtype, **options), 3))


@pytest.mark.parametrize(
    "T, count",
    [(1, 2), (63, 3), (96, 3), (200, 2), (1000, 8), *slowly((1, 8), (63, 2), (96, 2), (96, 8), (200, 3), (1000, 3))],
)
def test_a_sequence_cut_in_segments_is_the_sequence_in_values_and_all_gradients(T, count):
    inputs = make(B=2, T=T, H=2, groups=2, K=5, V=3, resets=random_resets(2, T, every=90))
    grads = cotangents(inputs)
    got = run(in_segments(count), inputs, grads)
    assert_close(got, golden(inputs, grads), 1e-10)


def test_a_cut_sequence_takes_every_option_and_needs_no_state():
    inputs = make(B=1, T=300, H=4, groups=2, K=16, V=16, state=False, **RAW)
    grads = cotangents(inputs)
    got = run(in_segments(4), cast(inputs, torch.float32), grads, through=("o",))
    assert_close(got, golden(inputs, grads, through=("o",)), 1e-5, 1e-6)


@pytest.mark.parametrize("T", [300, *slowly(256)])
def test_a_cut_sequence_compiles_as_one_graph(T):
    inputs = make(B=2, T=T, H=2, K=8, V=8)
    grads = cotangents(inputs)
    function = in_segments(4)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = run(compiled, inputs, grads), run(function, inputs, grads)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-13)


def test_auto_cuts_long_sequences_of_few_heads_and_nothing_on_a_cpu(monkeypatch):
    sizes = dict(H=16, HV=16, K=128, V=128)
    assert number_of_segments(B=1, T=131072, **sizes, processors=132) == 4
    assert number_of_segments(B=1, T=131072, H=32, HV=32, K=64, V=64, processors=132) == 4
    assert number_of_segments(B=2, T=131072, **sizes, processors=132) == 1
    assert number_of_segments(B=1, T=131072, **sizes | dict(H=2, HV=2), processors=132) == 32
    assert number_of_segments(B=1, T=4096, **sizes | dict(H=2, HV=2), processors=132) == 4
    assert number_of_segments(B=1, T=1024, **sizes | dict(H=2, HV=2), processors=132) == 1
    assert number_of_segments(B=8, T=131072, **sizes, processors=132) == 1
    inputs = make(B=1, T=20000, H=1, K=2, V=2, dtype=torch.float32)
    monkeypatch.setattr("gdn2_titan.ops.gdn2.api.split_gdn2", None)  # not called
    chunk_gdn2(**inputs)
    asked = []
    monkeypatch.setattr("gdn2_titan.ops.gdn2.api.split_gdn2", lambda op, count, *args: (asked.append(count), None))
    monkeypatch.setattr("gdn2_titan.ops.gdn2.segmented.triton_can_serve", lambda *args: True)
    chunk_gdn2(**inputs)
    chunk_gdn2(**inputs, num_segments=1)
    assert asked == [16]


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "many"])
def test_a_number_of_segments_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match=r"num_segments is .*; it must be 'auto' or a whole number of at least 1"):
        chunk_gdn2(**make(T=5), num_segments=count)


def test_packed_sequences_are_not_cut_further():
    inputs = make(T=300, cu=[0, 100, 300])
    want, _ = naive_recurrent_gdn2(**inputs)
    got, _ = chunk_gdn2(**inputs, num_segments=4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert leaves(inputs)


@pytest.mark.parametrize("T", [6, 130, 131])
def test_resets_on_the_edges_and_inside_are_those_of_the_definition(T):
    resets = torch.zeros(2, T, dtype=torch.bool)
    resets[0, [T // 2 - 1, T // 2]] = True
    resets[1, [0, T // 4, T - 1]] = True
    inputs = make(B=2, T=T, H=2, groups=2, K=4, V=3, resets=resets, **RAW)
    grads = cotangents(inputs)
    for through in (("o",), ("final_state",), ("o", "final_state")):
        assert_close(run(in_segments(2), inputs, grads, through), golden(inputs, grads, through), 1e-10, 1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_layer_in_segments_equals_the_definition_token_by_token(count, monkeypatch):
    torch.manual_seed(0)
    layer = GatedDeltaNet2(24, 2, 8, num_v_heads=4, num_segments=count).double()
    x, resets = torch.randn(2, 12, 24, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 12 // count], resets[1, 5] = True, True
    inputs = [x.requires_grad_(), *layer.parameters()]

    def evaluate():
        y, state = layer(x, resets, return_state=True)
        return [y, state.memory, *torch.autograd.grad(y.sin().sum() + state.memory.square().sum(), inputs)]

    calls, kernel = [], chunked.segment_forward
    monkeypatch.setattr(chunked, "segment_forward", lambda *args: calls.append(args[0].q.shape[0]) or kernel(*args))
    got = evaluate()
    assert calls == [2 * count]

    def by_definition(*args, num_segments, backend, **options):
        return naive_recurrent_gdn2(*args, **options)

    monkeypatch.setattr("gdn2_titan.models.layer.chunk_gdn2", by_definition)
    for a, b in zip(got, evaluate(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_decoder_in_segments_equals_the_one_in_one_segment_of_which_it_saves_no_state_dict_entry():
    torch.manual_seed(0)
    model = GDN2Model(ARGS).double()
    tokens = torch.randint(0, 40, (2, 135))
    results = []
    for count in (1, 3):
        for module in model.modules():
            if isinstance(module, GatedDeltaNet2):
                module.num_segments = count
        loss = model(tokens).square().mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0, -2, 1.5, True, "most"])
def test_a_layer_refuses_a_number_of_segments_that_is_none(value):
    with pytest.raises(ValueError, match=r"num_segments is .*; it must be 'auto' or a whole number of at least 1"):
        GatedDeltaNet2(32, 2, 16, num_segments=value)


def test_func_grad_and_vmap_of_it_are_the_ordinary_gradients():
    inputs = make(T=6)
    given = {name: x.detach() for name, x in leaves(inputs).items()}

    def loss(tensors):
        o, state = chunk_gdn2(**inputs | tensors, output_final_state=True, num_segments=2)
        return o.sin().sum() + state.square().sum()

    want = dict(zip(given, torch.autograd.grad(loss(leaves(inputs)), list(leaves(inputs).values())), strict=True))
    for name, got in grad(loss)(given).items():
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-12)
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)
    several = torch.func.vmap(lambda c: grad(loss)(given | {"v": c * given["v"]})["v"])(scales)
    torch.testing.assert_close(several[0], want["v"], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="inductor needs a C++ compiler")
def test_a_compiled_graph_is_one_that_the_compiler_caches():
    torch._dynamo.reset()
    counters.clear()
    inputs = make(T=6, dtype=torch.float32)
    torch.compile(lambda x: chunk_gdn2(**x, num_segments=2)[0].sum(), fullgraph=True)(inputs).backward()
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    assert counters["aot_autograd"]["autograd_cache_hit"] + counters["aot_autograd"]["autograd_cache_miss"] == 1


@pytest.mark.parametrize("T", [128, 131])
def test_on_meta_tensors_it_gives_the_shapes_and_dtypes_of_the_computation(T):
    inputs = make(B=2, T=T, K=4, V=3, groups=2, dtype=torch.float32)
    meta = inputs | {name: x.detach().to("meta").requires_grad_() for name, x in leaves(inputs).items()}
    real, shapes = (chunk_gdn2(**x, output_final_state=True, num_segments=2) for x in (inputs, meta))
    for a, b in zip(real, shapes, strict=True):
        assert b.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)
    shapes[0].sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves(meta).values())


def test_a_layer_in_segments_is_exported_with_the_operator():
    layer = GatedDeltaNet2(32, 2, 8, num_segments=2).eval()
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert OPS.segmented_gdn2.default in [node.target for node in program.graph.nodes]
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("policy, runs", [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)])
def test_selective_checkpointing_that_names_the_op_does_not_run_it_again(policy, runs, monkeypatch):
    inputs, calls, kernel = make(T=6), [], chunked.segment_forward
    monkeypatch.setattr(chunked, "segment_forward", lambda *args: calls.append(1) or kernel(*args))

    def choose(context, op, *args, **kwargs):
        return policy if op is OPS.segmented_gdn2.default else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q):
        return chunk_gdn2(**inputs | {"q": 2 * q}, num_segments=2)[0].sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    o = checkpoint(block, inputs["q"], use_reentrant=False, context_fn=contexts)
    (got,) = torch.autograd.grad(o.sum(), inputs["q"])
    assert len(calls) == runs
    assert torch.equal(got, torch.autograd.grad(block(inputs["q"]).sum(), inputs["q"])[0])


def test_checkpointing_by_op_saves_it():
    assert OPS.segmented_gdn2.default in SAVED_OPS


def test_flops_are_those_of_k_more_columns_and_of_the_maps():
    B, T, H, groups, K, V, segments = 2, 128, 2, 3, 8, 4, 4
    inputs = make(B=B, T=T, H=H, groups=groups, K=K, V=V)
    with FlopCounterMode(display=False) as counter:
        chunk_gdn2(**inputs, num_segments=segments)[0].sum().backward()
    maps = 2 * B * H * groups * K * V * (T + segments * K)
    ordinary = forward_flops(B * T, H, K, groups * V + K) + backward_flops(B * T, H, K, groups * V)
    assert counter.get_total_flops() == ordinary + 2 * maps


def test_autocast_changes_nothing():
    inputs = make(T=6, dtype=torch.float32)
    grads = cotangents(inputs)
    want = run(in_segments(3), inputs, grads)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(in_segments(3), inputs, grads)
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_differentiating_twice_raises():
    inputs = make(T=6)
    (dk,) = torch.autograd.grad(chunk_gdn2(**inputs, num_segments=2)[0].sin().sum(), inputs["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dk.sum().backward()
