"""The content gate: the layer against its definition written out token by token in fp64, states, models, refusals."""

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs, flavors
from gdn2_titan.models.decoding import Decoding
from gdn2_titan.models.flops import flops_per_token, parameter_counts, state_bytes
from gdn2_titan.models.layer import STATISTICS
from gdn2_titan.models.rows import Rows
from gdn2_titan.ops.context_parallel.layout import SequenceShards
from gdn2_titan.parallel import (
    apply_activation_checkpoint,
    apply_compile,
    apply_context_parallel,
    apply_fsdp,
    apply_tensor_parallel,
    muon_matrices,
    sum_gradients,
)
from tests.content_cases import ARGS, CHUNK, FP64, SHAPES, documents, expected, layer, model
from tests.context_parallel_cases import summed
from tests.processes import run

slow = pytest.mark.slow
GROUPED = "scalar erase, grouped, wide, negative"


def tokens(B=2, T=150, seed=1):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize(
    "shape, with_resets",
    [("CARVE", False), (GROUPED, True), *(pytest.param(x, True, marks=slow) for x in SHAPES if x != GROUPED)],
)
def test_the_layer_is_its_definition_in_values_and_all_gradients(shape, with_resets):
    built, options = layer(**SHAPES[shape]), SHAPES[shape]
    x = torch.randn(2, 150, 20, dtype=FP64, requires_grad=True)
    resets = documents(2, 150) if with_resets else None
    got, want = built(x, resets), expected(built, x, resets, options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(got)
    names, parameters = zip(*built.named_parameters(), strict=True)
    wanted = torch.autograd.grad(want, [x, *parameters], cotangent)
    for name, a, b in zip(["x", *names], torch.autograd.grad(got, [x, *parameters], cotangent), wanted, strict=True):
        tolerance = 1e-6 if name.startswith("decay.") else 1e-9  # these are fp32
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name


def test_a_layer_starts_as_one_without_and_the_first_chunk_stays_so():
    built = GatedDeltaNet2(20, 2, 5, write_gate="scalar", content_gate=True).double()
    plain = GatedDeltaNet2(20, 2, 5, write_gate="scalar").double()
    plain.load_state_dict({name: x for name, x in built.state_dict().items() if "content" not in name})
    x = torch.randn(2, 150, 20, dtype=FP64)
    with torch.no_grad():
        torch.testing.assert_close(built(x), plain(x), rtol=1e-10, atol=1e-12)
        assert built.content.down.abs().max() > 0
        built.content.up.normal_()
        change = (built(x) - plain(x)).abs().amax((0, 2))
    assert change[:CHUNK].max() < 1e-12 and change[CHUNK:].min() > 1e-8


def test_a_documents_outputs_are_those_of_the_document_alone_wherever_it_begins():
    built = layer(num_v_heads=4)
    x = torch.randn(1, 220, 20, dtype=FP64)
    starts = [0, 10, 77, 78, 200, 220]
    resets = torch.zeros(1, 220, dtype=torch.bool)
    resets[0, starts[1:-1]] = True
    with torch.no_grad():
        alone = [built(x[:, i:j]) for i, j in zip(starts[:-1], starts[1:], strict=True)]
        torch.testing.assert_close(built(x, resets), torch.cat(alone, 1), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("step", [1, pytest.param(70, marks=slow)])
def test_a_layer_that_hands_on_its_state_equals_the_whole_sequence(step):
    built, resets = layer(**SHAPES["CARVE"]), documents(2, 150)
    x = torch.randn(2, 150, 20, dtype=FP64)
    with torch.no_grad():
        want, parts, state = expected(built, x, resets), [], None
        for start, end in ((0, 1), (1, 3), (3, 66), *((t, min(t + step, 150)) for t in range(66, 150, step))):
            y, state = built(x[:, start:end], resets[:, start:end], state=state, return_state=True)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-9, atol=1e-10)


def rows_of(lengths, begins):
    """Rows end to end, of which some have a second document that begins at that token."""
    starts, first, last, count, at = [], [], [], 0, 0
    for length, begin in zip(lengths, begins, strict=True):
        of_row = [0] if begin is None else [0, begin]
        first.append(count)
        count += len(of_row)
        last.append(count - 1)
        starts += [at + x for x in of_row]
        at += length
    L = max(lengths)
    slots = torch.cat([torch.arange(n) + row * L for row, n in enumerate(lengths)])
    tensors = map(torch.tensor, ([*starts, at], first, last))
    return Rows(len(lengths), L, L, torch.tensor(lengths), slots, *tensors)


def test_rows_of_unequal_lengths_are_each_what_it_is_alone_and_go_on_where_they_stood():
    built = layer(num_v_heads=4)
    pieces = [([70, 3, 140], [None, None, 65]), ([10, 130, 1], [0, None, None]), ([1, 1, 1], [None, None, 0])]
    state, alone = None, [None] * 3
    with torch.no_grad():
        for lengths, begins in pieces:
            parts, wanted = [torch.randn(1, n, 20, dtype=FP64) for n in lengths], []
            rows = rows_of(lengths, begins)
            got, state = built(torch.cat(parts, 1), state=state, return_state=True, rows=rows)
            for row, (x, begin) in enumerate(zip(parts, begins, strict=True)):
                resets = torch.zeros(1, x.shape[1], dtype=torch.bool)
                if begin is not None:
                    resets[0, begin] = True
                y, alone[row] = built(x, resets, state=alone[row], return_state=True)
                wanted.append(y)
            torch.testing.assert_close(got, torch.cat(wanted, 1), rtol=1e-10, atol=1e-11)
            for name, found, *each in zip(state._fields, state, *alone, strict=True):
                torch.testing.assert_close(found, torch.cat(each), rtol=1e-10, atol=1e-11, msg=name)


def test_the_state_after_a_part_of_a_record_is_that_of_the_part():
    built, record = layer(), []
    x = torch.randn(2, 140, 20, dtype=FP64)
    with torch.no_grad():
        _, state = built(x[:, :40], return_state=True)
        built(x[:, 40:], state=state, return_state=True, record=record)
        found = built.state_after([t[:, :30] for t in record], None, state=state, rows=None)
        _, wanted = built(x[:, :70], return_state=True)
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=name)


def test_statistics_are_of_the_gate_with_its_term():
    built = layer(torch.float32, **SHAPES["CARVE"])
    x = torch.randn(1, 150, 20)
    built.record_statistics = True
    logits = []
    built.content.register_forward_hook(lambda module, inputs, term: logits.append(term))
    with torch.no_grad():
        built(x)
        terms = torch.cat([t.repeat_interleave(min(CHUNK, 150 - CHUNK * i), 0) for i, t in enumerate(logits)])
        erase = torch.sigmoid(built.erase_proj(x[0]).unflatten(-1, (2, 5)) + terms)
    found = dict(zip(STATISTICS, built.statistics.tolist(), strict=True))
    assert math.isclose(found["erase_gate_mean"], erase.mean(), rel_tol=1e-5)
    assert math.isclose(found["erase_gate_std"], erase.std(), rel_tol=1e-5)


def test_a_layer_of_16_bits_keeps_what_it_read_in_fp32():
    built = layer(torch.bfloat16, **SHAPES["CARVE"])
    y, state = built(torch.randn(2, 100, 20).bfloat16(), return_state=True)
    assert y.dtype == torch.bfloat16 and built.content.up.dtype == torch.bfloat16
    assert state.total.dtype == state.mean.dtype == torch.float32 and state.count.tolist() == [36, 36]
    built, x = layer(torch.float32), torch.randn(2, 100, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = built(x, documents(2, 120)[:, :100])
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and built.content.up.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- in models


def test_a_model_decodes_as_it_reads():
    built, ids = model(), tokens(1)
    with torch.no_grad():
        want = built(ids)
        reader = Decoding(built)
        for start, end in ((0, 20), (20, 120), *((t, t + 1) for t in range(120, 150))):
            torch.testing.assert_close(reader(ids[:, start:end]), want[:, end - 1], rtol=1e-6, atol=1e-6)


def test_the_state_of_a_model_is_as_large_as_is_said():
    built = model(torch.float32)
    reader = Decoding(built)
    reader(tokens(1, 9))
    assert state_bytes(built.args, 9) == sum(x.nbytes for state in reader._states for x in state)


@pytest.mark.slow
def test_a_model_compiles_into_one_graph_for_each_length():
    torch._dynamo.reset()
    built, plain = model(torch.float32), model(torch.float32)
    apply_compile(built, backend="aot_eager")
    for T in (70, 90):
        ids, resets = tokens(2, T), documents(2, 120)[:, :T]
        got = built(ids, resets)
        torch.testing.assert_close(got, plain(ids, resets))
        got.square().sum().backward()


@pytest.mark.parametrize("mode", ["op", pytest.param("full", marks=slow)])
def test_checkpointed_blocks_have_the_same_gradients(mode):
    ids, resets, found = tokens(), documents(2, 150), []
    for wrapped in (False, True):
        built = model()
        if wrapped:
            apply_activation_checkpoint(built, mode)
        built(ids, resets).square().mean().backward()
        found.append([p.grad for p in built.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_content_gate_is_counted_once_a_chunk_and_of_low_rank():
    built, plain = model(), GDN2Model(GDN2ModelArgs(**vars(ARGS) | {"content_gate": False}))
    more = parameter_counts(built)[0] - parameter_counts(plain)[0]
    assert more == 16 * (4 * 8 + 2 * 8)  # in the one GDN-2 layer, U and P of rank 16
    counts = [flops_per_token(each.args, *parameter_counts(each), 128) for each in (built, plain)]
    assert counts[0] - counts[1] == pytest.approx(6 * more / CHUNK, abs=1)


def test_muon_leaves_it_to_adamw():
    built = model()
    assert not any("content" in name for name, p in built.named_parameters() if p in muon_matrices(built))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"erase_gate": "mean"}, "erase_gate is 'mean'; with content_gate it must be 'channel' or 'scalar'"),
        ({"write_gate": "mean"}, "write_gate is 'mean'; with content_gate it must be 'channel' or 'scalar'"),
        (
            {"tied_gates": True},
            "tied_gates is True; with content_gate, which is of the erase gate alone, it must be false",
        ),
        ({"backend": "batch_invariant"}, "backend is 'batch_invariant'; with content_gate it must be another one"),
        (
            {"layer_pattern": ("mamba2", "swa")},
            "content_gate is True; with layer_pattern ['mamba2', 'swa'] it must be false, none has it",
        ),
        ({"content_gate": 1}, "content_gate is 1; it must be true or false"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        GDN2Model(GDN2ModelArgs(**vars(flavors["debug"]) | {"content_gate": True} | changes))
    assert str(error.value) == sentence


def test_segments_are_refused():
    sentence = r"^num_segments is 2; with content_gate it must be 1 or 'auto'$"
    with pytest.raises(ValueError, match=sentence):
        GatedDeltaNet2(20, 2, 5, content_gate=True, num_segments=2)
    built = layer()
    built.num_segments = 2
    with pytest.raises(ValueError, match=sentence):
        built(torch.randn(1, 9, 20, dtype=FP64))


# ------------------------------------------------------------------------------------------------------- two processes


def loss(built, mine=slice(None)):
    ids, resets = tokens(2, 151)[mine], documents(2, 150)[mine]
    logits = built(ids[:, :-1], resets).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")


def assert_trained_as_one(built, value, tolerance):
    one = model()
    want = loss(one)
    want.backward()
    assert math.isclose(value, want, rel_tol=tolerance)
    for name, p in built.named_parameters():
        grad, wanted = p.grad, one.get_parameter(name).grad
        error = ((grad.full_tensor() if isinstance(grad, DTensor) else grad) - wanted).abs().max() / wanted.abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def _heads_or_parameters_shared(rank):
    mesh, built = init_device_mesh("cpu", (2,)), model()
    apply_tensor_parallel(built, mesh, loss_parallel=False)
    assert built.layers["0"].mixer.content.down.to_local().shape[0] == 1
    value = loss(built)
    value.backward()
    assert_trained_as_one(built, value.detach(), 1e-9)

    built = model()
    apply_fsdp(built, mesh, FP64, FP64)
    sum_gradients(built)
    value = loss(built, slice(rank, rank + 1))
    value.backward()
    # FSDP2 casts the angles of the softmax layers, which are fp32, to the parameters' fp64.
    assert_trained_as_one(built, summed(value.detach()), 1e-6)


@pytest.mark.slow
def test_two_ranks_share_heads_or_parameters_as_one_has_them(tmp_path):
    run(_heads_or_parameters_shared, 2, tmp_path / "store")


def _sequences_shared(rank):
    mesh, built = init_device_mesh("cpu", (2,)), model()
    with pytest.raises(ValueError, match=r"^content_gate is True; with context parallelism it must be false$"):
        apply_context_parallel(built, mesh)
    mixer = built.layers["0"].mixer
    mixer.shards = SequenceShards.of(mesh, "contiguous")
    with pytest.raises(ValueError, match=r"^content_gate is True; where ranks share the sequence it must be False$"):
        mixer(torch.randn(1, 9, 32, dtype=FP64))


@pytest.mark.slow
def test_ranks_that_would_share_sequences_are_refused(tmp_path):
    run(_sequences_shared, 2, tmp_path / "store")
