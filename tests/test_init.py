"""What training starts from: our values and those of the authors' release, however the parameters are sharded."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.models.decoder import Block
from gdn2_titan.parallel import apply_fsdp, apply_tensor_parallel
from tests.model_cases import SMALL
from tests.processes import run

# Of 18 layers, hidden size 2,304, an MLP of 6,208, 16 heads of 128: (release, ours).
DEVIATIONS = {
    "mixer.o_proj": (3.79e-3, 3.79e-3 / 6),
    "mixer.q_proj": (3.79e-3, 3.79e-3),
    "mixer.erase_proj": (3.79e-3, 3.79e-3),
    "mlp.gate_proj": (0.0120, 0.02),
    "mlp.up_proj": (0.0120, 0.02),
    "mlp.down_proj": (1.22e-3, 3.33e-3),
}
OF_SOFTMAX = {
    "mixer.q_proj": (0.0120, 0.02),
    "mixer.k_proj": (0.0120, 0.02),
    "mixer.v_proj": (0.0120, 0.02),
    "mixer.o_proj": (2.00e-3, 3.33e-3),
}


def weights(init, kind):
    """{name: the only weight that is drawn of a block of the paper's size}, one after the other."""
    args = GDN2ModelArgs(layer_pattern=(kind,), init=init)
    with torch.device("meta"):
        block = Block(args, 0)
    for name in OF_SOFTMAX if kind == "swa" else DEVIATIONS:
        linear = block.get_submodule(name)
        empty, linear.weight = linear.weight, torch.nn.Parameter(torch.empty(linear.weight.shape))
        torch.manual_seed(0)
        block.init_weights()
        yield name, linear.weight.detach()
        linear.weight = empty


@pytest.mark.parametrize("kind", ["gdn2", "swa"])
@pytest.mark.parametrize("init", ["release", pytest.param("ours", marks=pytest.mark.slow)])
def test_blocks_of_the_papers_size_start_with_the_standard_deviations_of_the_release_or_with_ours(init, kind):
    for name, weight in weights(init, kind):
        expected = (OF_SOFTMAX if kind == "swa" else DEVIATIONS)[name][init == "ours"]
        assert float(weight.std()) == pytest.approx(expected, rel=5e-3), name
        uniform = init == "release" or (kind == "gdn2" and name.startswith("mixer"))
        widest = float(weight.abs().max() / weight.std())
        assert widest < 1.75 if uniform else widest > 4, name  # sqrt(3) of a uniform one


def test_the_releases_head_is_uniform_and_its_embeddings_are_ours():
    args = GDN2ModelArgs(**SMALL | {"vocab_size": 4000, "hidden_size": 64}, init="release")
    model = GDN2Model(args)
    model.init_weights()
    head, embeddings = model.lm_head.weight.detach(), model.tok_embeddings.weight.detach()
    assert float(head.std()) == pytest.approx((3 * 64) ** -0.5, rel=5e-3)
    assert head.abs().max() <= 64**-0.5
    assert float(embeddings.std()) == pytest.approx(0.02, rel=5e-3)


def test_what_the_release_does_not_say_otherwise_starts_as_ours_does():
    """Convolutions, decays, gates, norms and biases."""
    found = []
    for init in ("ours", "release"):
        block = Block(GDN2ModelArgs(**SMALL, init=init), 0)
        torch.manual_seed(0)
        block.init_weights()
        found.append(block.mixer.state_dict())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        scale = 2.0 if name == "o_proj.weight" else 1.0  # sqrt(2 * layers)
        torch.testing.assert_close(found[1][name], scale * tensor, msg=name)


def _starts_as_one_process(rank, init):
    args = GDN2ModelArgs(**SMALL | {"n_layers": 3, "layer_pattern": ("gdn2", "swa", "attention")}, init=init)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    models = []
    for layout in ("one process", "tp", "fsdp", "fsdp and tp"):
        with torch.device("meta"):
            model = GDN2Model(args)
        if "tp" in layout:
            apply_tensor_parallel(model, mesh["tp"])
        if "fsdp" in layout:
            apply_fsdp(model, mesh["fsdp"], torch.float32, torch.float32)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        model.init_weights()
        models.append(dict(model.named_parameters()))
    whole, *sharded = models
    for model in sharded:
        assert model.keys() == whole.keys()
        for name, parameter in model.items():
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            assert torch.equal(full, whole[name]), name


@pytest.mark.parametrize("init", ["release", pytest.param("ours", marks=pytest.mark.slow)])
def test_sharded_models_start_from_the_values_of_one_process(tmp_path, init):
    run(_starts_as_one_process, 4, tmp_path / "store", init)


def test_a_pipeline_stage_starts_by_the_depth_of_the_whole_model():
    stage = GDN2Model(GDN2ModelArgs(**SMALL | {"n_layers": 4}, init="release"))
    stage.tok_embeddings, stage.layers = None, torch.nn.ModuleDict(list(stage.layers.items())[2:])
    stage.init_weights()
    down = stage.layers["3"].mlp.down_proj.weight.detach()
    assert float(down.abs().max()) == pytest.approx((down.shape[1] * 2 * 4) ** -0.5, rel=0.05)
