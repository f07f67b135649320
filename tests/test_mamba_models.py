"""Models with Mamba layers: decoding, one graph, and two ranks that share sequences, heads or parameters, as one."""

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.models.decoding import Decoding
from gdn2_titan.models.flops import flops_per_token, mixing_flops, state_bytes
from gdn2_titan.ops.gdn2.flops import CHUNK
from gdn2_titan.parallel import apply_context_parallel, apply_fsdp, apply_tensor_parallel, sum_gradients
from tests.context_parallel_cases import part, summed
from tests.mamba_cases import FP64, MODELS, batch, gradients, loss, model
from tests.processes import run

kinds = pytest.mark.parametrize("kind", MODELS)


@kinds
def test_a_model_decodes_as_it_reads(kind):
    built, (tokens, _) = model(kind), batch()
    with torch.no_grad():
        want = built(tokens)
        reader = Decoding(built)
        reader(tokens[:1, :30])
        for t in range(30, 49):
            torch.testing.assert_close(reader(tokens[:1, t : t + 1]), want[:1, t], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@kinds
def test_a_model_compiles_into_one_graph(kind):
    torch._dynamo.reset()
    built, (tokens, resets) = model(kind, torch.float32), batch()
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    got, want = (f(tokens[:, :-1], resets) for f in (compiled, built))
    torch.testing.assert_close(got, want)
    got.square().sum().backward()


@pytest.mark.slow
@kinds
@torch.no_grad()
def test_an_exported_model_serves_another_length(kind):
    built, (tokens, resets) = model(kind, torch.float32).eval(), batch()
    tokens = tokens[:, 1:].contiguous()
    length = torch.export.Dim("length", min=10, max=4096)
    exported = torch.export.export(built, (tokens, resets), dynamic_shapes=({1: length}, {1: length})).module()
    for count in (48, 30):
        inputs = tokens[:, :count].contiguous(), resets[:, :count].contiguous()
        torch.testing.assert_close(exported(*inputs), built(*inputs))


@kinds
def test_the_state_of_a_model_is_as_large_as_is_said(kind):
    built, (tokens, _) = model(kind, torch.float32), batch()
    reader = Decoding(built)
    reader(tokens[:1, :9])
    kept = sum(x.nbytes for state in reader._states for x in state)
    assert state_bytes(MODELS[kind], 9) == kept


def test_their_flops_are_those_of_gated_linear_attention_and_of_what_a_token_has_within_it():
    def linear(K, V, H):
        return H * (CHUNK * K + 2 * K * V + 2 * K * V + 2 * CHUNK * V)

    assert mixing_flops(MODELS["mamba2"], 0, 128) == linear(8, 6, 4)
    assert mixing_flops(MODELS["mamba3"], 0, 128) == linear(8, 6, 4) + 2 * 4 * (8 + 6)
    assert mixing_flops(MODELS["mamba3 MIMO"], 0, 128) == 3 * linear(8, 6, 4) + 2 * 4 * 9 * (8 + 6)
    assert flops_per_token(MODELS["mamba2"], 10, 0, 128) > 60


@pytest.mark.parametrize("field", ["mamba_heads", "mamba_head_dim", "mamba_state", "mamba_rank"])
def test_a_size_that_is_no_count_is_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"^{field} is 0; it must be a whole number of at least 1$"):
        GDN2Model(GDN2ModelArgs(**{field: 0}))


def test_a_state_that_cannot_be_turned_is_refused():
    GDN2ModelArgs(mamba_state=6, layer_pattern=("mamba2",)).validate()
    with pytest.raises(ValueError, match=r"^mamba_state is 6; of Mamba-3 layers it must be a multiple of 4$"):
        GDN2ModelArgs(mamba_state=6, layer_pattern=("mamba3",)).validate()


def expected(kind):
    built, (tokens, resets) = model(kind), batch()
    value = loss(built, tokens[:, :-1], tokens[:, 1:], resets)
    value.backward()
    return value.detach(), gradients(built)


def assert_same(found, wanted, tolerance=1e-9):
    (value, grads), (want, want_grads) = found, wanted
    assert math.isclose(value.item(), want.item(), rel_tol=tolerance)
    for name, grad in want_grads.items():
        error = (grads[name] - grad).abs().max() / grad.abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def _sequences_shared(rank, layout):
    for kind in MODELS:
        built, (tokens, resets) = model(kind), batch()
        apply_context_parallel(built, init_device_mesh("cpu", (2,)), layout)
        shards = built.shards
        value = loss(built, *(part(x, shards) for x in (tokens[:, :-1], tokens[:, 1:], resets)))
        value.backward()
        assert_same((summed(value.detach()), {n: summed(g) for n, g in gradients(built).items()}), expected(kind))


@pytest.mark.parametrize("layout", ["head_tail", pytest.param("contiguous", marks=pytest.mark.slow)])
def test_two_ranks_share_sequences_as_one_has_them(tmp_path, layout):
    run(_sequences_shared, 2, tmp_path / "store", layout)


def _heads_shared(rank):
    for kind in MODELS:
        built, (tokens, resets) = model(kind), batch()
        apply_tensor_parallel(built, init_device_mesh("cpu", (2,)), loss_parallel=False)
        value = loss(built, tokens[:, :-1], tokens[:, 1:], resets)
        value.backward()
        grads = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(built).items()}
        assert_same((value.detach(), grads), expected(kind))
        assert built.layers["0"].mixer.x_proj.weight.to_local().shape[0] == 12


@pytest.mark.slow
def test_two_ranks_share_heads_as_one_has_them(tmp_path):
    run(_heads_shared, 2, tmp_path / "store")


def _parameters_shared(rank):
    for kind in MODELS:
        built, (tokens, resets) = model(kind), batch()
        apply_fsdp(built, init_device_mesh("cpu", (2,)), FP64, FP64)
        sum_gradients(built)
        mine = slice(rank, rank + 1)
        value = loss(built, tokens[mine, :-1], tokens[mine, 1:], resets[mine])
        value.backward()
        grads = {n: g.full_tensor() for n, g in gradients(built).items()}
        # FSDP2 casts the angles of the softmax layers, which are fp32, to the parameters' fp64.
        assert_same((summed(value.detach()), grads), expected(kind), 1e-6)


@pytest.mark.slow
def test_two_ranks_share_parameters_as_one_has_them(tmp_path):
    run(_parameters_shared, 2, tmp_path / "store")
