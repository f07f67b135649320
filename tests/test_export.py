"""A model with the mixer leaves Python's eager mode by every way that PyTorch has, and keeps its numbers."""

import io

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.ops import chunk_gdn2
from tests.gdn2_cases import LEAVES, make

ARGS = GDN2ModelArgs(
    vocab_size=40, hidden_size=32, n_layers=2, mlp_size=48, num_heads=2, head_dim=16, attn_heads=2, window=20,
    layer_pattern=("gdn2", "swa"),
)  # fmt: skip


def model_and_batch(length=90):
    torch.manual_seed(0)
    model = GDN2Model(ARGS).eval()
    model.init_weights()
    tokens = torch.randint(0, 40, (2, length))
    resets = torch.zeros(2, length, dtype=torch.bool)
    resets[:, 70] = True
    return model, (tokens, resets)


@torch.no_grad()
def exported(model, batch):
    length = torch.export.Dim("length", min=ARGS.window + 1, max=4096)  # shorter ones need no window
    return torch.export.export(model, batch, dynamic_shapes=({1: length}, {1: length}))


def test_an_exported_hybrid_is_saved_loaded_and_run_at_another_length():
    model, batch = model_and_batch()
    file = io.BytesIO()
    torch.export.save(exported(model, batch), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (90, 131):
        _, batch = model_and_batch(length)
        torch.testing.assert_close(loaded(*batch), model(*batch))


@pytest.mark.slow
def test_a_hybrid_compiled_ahead_of_time_by_inductor_keeps_its_numbers(tmp_path):
    model, batch = model_and_batch()
    path = torch._inductor.aoti_compile_and_package(exported(model, batch), package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*batch), model(*batch), rtol=1e-4, atol=1e-5)


def test_make_fx_traces_forward_and_backward_to_one_op_each():
    inputs = {name: x.detach() for name, x in make(T=70, K=8, V=8).items() if name in LEAVES[:6]}

    def gradients(*xs):
        xs = [x.detach().requires_grad_() for x in xs]
        return torch.autograd.grad(chunk_gdn2(*xs)[0].square().sum(), xs)

    values = [inputs[name] for name in "qkvgbw"]
    traced = make_fx(gradients)(*values)
    ops = [node.target for node in traced.graph.nodes if "gdn2_titan" in str(node.target)]
    assert ops == [torch.ops.gdn2_titan.chunk_gdn2.default, torch.ops.gdn2_titan.chunk_gdn2_backward.default]
    for found, expected in zip(traced(*values), gradients(*values), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
