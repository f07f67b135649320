"""Float8 and MXFP8 linear layers: which, how exact, and with FSDP2 and compilation. Emulated on CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp
from torchao.float8.float8_training_tensor import Float8TrainingTensor

from gdn2_titan.models import GDN2Model, GDN2ModelArgs, flavors, layer
from gdn2_titan.parallel import apply_compile, apply_float8, apply_fsdp, float8_share, sum_gradients
from gdn2_titan.parallel.float8 import FLOAT8_RECIPES, MXFP8_RECIPES
from tests.processes import run

RECIPES = FLOAT8_RECIPES + MXFP8_RECIPES
ARGS = GDN2ModelArgs(
    vocab_size=50, hidden_size=128, n_layers=2, mlp_size=256, num_heads=2, head_dim=64, attn_heads=2, window=8,
    layer_pattern=("gdn2", "swa"),
)  # fmt: skip


def build(args=ARGS, device="cpu"):
    with torch.device(device):
        model = GDN2Model(args)
    if device != "meta":
        torch.manual_seed(0)
        model.init_weights()
    return model


def batch():
    """Two sequences, 32 tokens to predict in each."""
    return torch.randint(0, 50, (2, 33), generator=torch.Generator().manual_seed(1))


def loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def gradients(model):
    loss(model, batch()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# Which layers

GDN2_LAYERS = {f"mixer.{name}_proj" for name in ("q", "k", "v", "erase", "write", "o")}
SOFTMAX_LAYERS = {f"mixer.{name}_proj" for name in ("q", "k", "v", "o")}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("flavor", "kinds"),
    [
        ("debug", [GDN2_LAYERS] * 4),
        # Two key heads of 32: sides of 64, too short to gain from.
        ("debug_hybrid", [GDN2_LAYERS, {"mixer.q_proj", "mixer.o_proj"}] * 2),
        ("1.3B", [GDN2_LAYERS] * 18),
        ("1.3B_hybrid", [GDN2_LAYERS, SOFTMAX_LAYERS] * 9),
    ],
)
@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8_rceil"])
def test_all_large_projections_and_mlps_are_converted_and_nothing_else(flavor, kinds, recipe):
    model = build(flavors[flavor], "meta")
    keys = set(model.state_dict())
    names = apply_float8(model, recipe)
    expected = {f"layers.{i}.{name}" for i, mixer in enumerate(kinds) for name in mixer | MLP}
    kind = {"tensorwise": "Float8Linear", "mxfp8_rceil": "MXFP8Linear"}[recipe]
    assert set(names) == {name for name, module in model.named_modules() if type(module).__name__ == kind} == expected
    assert set(model.state_dict()) == keys


def test_the_defaults_cover_nine_tenths_of_the_linear_flops_of_the_papers_models():
    for flavor, of_linear, of_all in (("1.3B", 0.932, 0.916), ("1.3B_hybrid", 0.939, 0.890)):
        model = build(flavors[flavor], "meta")
        found = float8_share(model, apply_float8(model), seq_len=4096)
        assert found == pytest.approx((of_linear, of_all), abs=0.001)
        assert found[0] > 0.9


def test_shares_are_those_that_the_flop_counter_finds():
    model = build(flavors["debug"], "meta")
    names = apply_float8(model, exclude=["mlp"])
    assert names and not any("mlp" in name for name in names)
    plain = build(flavors["debug"], "meta")
    tokens = torch.zeros(2, 512, dtype=torch.long, device="meta")
    counts = {}
    with torch.utils.flop_counter.FlopCounterMode(plain, display=False, depth=None) as counter:
        plain(tokens)
    for module, operators in counter.get_flop_counts().items():
        counts[module.removeprefix("GDN2Model.")] = sum(operators.values())
    linear = sum(counts[name] for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear))
    converted = sum(counts[name] for name in names)
    of_linear, of_all = float8_share(model, names, seq_len=512)
    assert of_linear == pytest.approx(converted / linear)
    # The counter has the short convolutions as well, which are no matrices.
    assert of_all == pytest.approx(converted / counter.get_total_flops(), rel=0.01)


def test_sides_that_the_hardware_cannot_multiply_or_that_are_short_stay():
    args = copy.copy(ARGS)
    args.mlp_size = 264  # a multiple of 8
    assert not any("mlp" in name for name in apply_float8(build(args, "meta")))
    args.mlp_size = 272  # a multiple of 16, not of 32
    assert any("mlp" in name for name in apply_float8(build(args, "meta")))
    assert not any("mlp" in name for name in apply_float8(build(args, "meta"), "mxfp8_rceil"))
    args.erase_gate = "scalar"
    assert not any("erase" in name for name in apply_float8(build(args, "meta"), smallest_side=1))  # 2 outputs
    assert not any("q_proj" in name for name in apply_float8(build(args, "meta"), smallest_side=129))


def test_an_unknown_recipe_and_one_that_cannot_be_gathered_are_refused_by_name():
    with pytest.raises(ValueError, match="recipe is 'rowise'; it must be one of tensorwise, rowwise"):
        apply_float8(build(), "rowise")
    with pytest.raises(ValueError, match="fsdp_all_gather is True; with recipe 'rowwise' it must be False"):
        apply_float8(build(), "rowwise", fsdp_all_gather=True)


# How exact


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_converted_layer_multiplies_rounded_numbers_forward_and_backward(recipe):
    """Three bits of mantissa: a factor is off by at most 1/16, a product by 1/8 (two bits in e5m2 gradients)."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(256, 128, bias=False)})
    x = torch.randn(64, 256, requires_grad=True)
    grad = torch.randn(64, 128)
    assert apply_float8(module, recipe, emulate=True) == ["layer"]
    weight = module["layer"].weight
    y = module["layer"](x)
    y.backward(grad)
    e5m2 = recipe == "tensorwise"  # whose gradients have range rather than digits
    for name, found, left, right, limit in (
        ("output", y, x, weight.t(), 1 / 8),
        ("input's gradient", x.grad, grad, weight, 3 / 16 if e5m2 else 1 / 8),
        ("weight's gradient", weight.grad, grad.t(), x, 3 / 16 if e5m2 else 1 / 8),
    ):
        left, right = left.detach(), right.detach()
        exact, bound = left @ right, left.abs() @ right.abs()
        error = ((found - exact).abs() / bound).max()
        if name == "weight's gradient" and recipe.endswith(("gw_hp", "wgrad_with_hp")):
            assert error < 1e-6, name
        else:
            assert 1e-4 < error < limit, name
            typical = distance(found, exact)
            assert 0.01 < typical < (0.07 if e5m2 else 0.05), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_in_low_precision_is_near_the_exact_one_but_not_it(recipe):
    exact = build()
    model = copy.deepcopy(exact)
    names = apply_float8(model, recipe, emulate=True)
    assert {"layers.0.mixer.o_proj", "layers.1.mixer.o_proj"} < set(names)
    assert list(model.state_dict()) == list(exact.state_dict())
    with torch.no_grad():
        assert 1e-3 < distance(model(batch()[:, :-1]), exact(batch()[:, :-1])) < 0.1
    expected = gradients(exact)
    for name, gradient in gradients(model).items():
        assert 1e-3 < distance(gradient, expected[name]) < 0.5, name


@pytest.mark.parametrize(
    "recipe",
    ["tensorwise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rowwise_with_gw_hp", "mxfp8_rceil"))],
)
def test_a_converted_block_compiles_into_one_graph_with_the_same_gradients(recipe):
    torch._dynamo.reset()
    model = build()
    apply_float8(model, recipe, emulate=True)
    compiled = copy.deepcopy(model)
    apply_compile(compiled, backend="aot_eager")  # fullgraph: a graph break is an error
    expected = gradients(model)
    for name, gradient in gradients(compiled).items():
        assert distance(gradient, expected[name]) < 1e-5, name


# FSDP2


def _as_one_process(rank, precompute, compiled):
    single = build()
    apply_float8(single, emulate=True)
    sharded = build(device="meta")
    names = apply_float8(sharded, emulate=True, fsdp_all_gather=True)
    if compiled:
        apply_compile(sharded, backend="aot_eager")
    apply_fsdp(sharded, init_device_mesh("cpu", (2,)), torch.float32, torch.float32)
    sum_gradients(sharded)
    sharded.to_empty(device="cpu")
    torch.manual_seed(0)
    sharded.init_weights()
    seen = []
    converted = sharded.get_submodule(names[0])
    if not compiled:
        converted.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4) for model in (single, sharded)]
    tokens = batch()
    for step in range(3):
        for row in tokens.split(1):  # one at a time: an activation's scale is that of a rank's batch
            loss(single, row).backward()
        loss(sharded, tokens[rank : rank + 1]).backward()
        expected = dict(single.named_parameters())
        for name, parameter in sharded.named_parameters():
            assert distance(parameter.grad.full_tensor(), expected[name].grad) < 1e-5, (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if precompute:
            precompute_float8_dynamic_scale_for_fsdp(sharded)
            scale = converted.weight._local_tensor._precomputed_scale
            largest = dict(single.named_parameters())[f"{names[0]}.weight"].abs().max()
            assert scale.item() == pytest.approx(448 / largest.item(), rel=1e-6)
    for name, parameter in sharded.named_parameters():
        assert distance(parameter.full_tensor(), expected[name]) < 1e-5, name
    assert compiled or len(seen) == 3
    for weight in seen:
        assert isinstance(weight, Float8TrainingTensor) and weight._data.dtype == torch.float8_e4m3fn
    for name, value in sharded.state_dict().items():
        assert type(value) is DTensor and type(value.to_local()) is torch.Tensor, name
        assert torch.equal(value.full_tensor(), single.state_dict()[name]), name


@pytest.mark.parametrize(
    ("precompute", "compiled"),
    [
        pytest.param(False, False, marks=pytest.mark.slow),
        (True, False),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
    ids=["dynamic", "precomputed", "compiled"],
)
def test_two_ranks_that_gather_in_float8_step_as_one_process_that_accumulates(tmp_path, precompute, compiled):
    run(_as_one_process, 2, tmp_path / "store", precompute, compiled)


def _decays_stay_exact(rank):
    model = build(device="meta")
    apply_float8(model, emulate=True, fsdp_all_gather=True)
    apply_fsdp(model, init_device_mesh("cpu", (2,)), torch.bfloat16, torch.float32)
    model.to_empty(device="cpu")
    model.init_weights()
    before = model.layers["0"].mixer.decay.A_log.full_tensor()
    assert (before - before.bfloat16().float()).abs().max() > 1e-4, "bf16 would change these values"
    seen, op = [], layer.chunk_gdn2

    def spy(q, *args, A_log, **kwargs):
        seen.append((q.dtype, A_log.clone()))
        return op(q, *args, A_log=A_log, **kwargs)

    layer.chunk_gdn2 = spy  # in this process, which ends with the test
    loss(model, batch()[rank : rank + 1]).backward()
    ((dtype, A_log),) = seen
    assert dtype == torch.bfloat16
    assert torch.equal(A_log, before)
    assert all(parameter.grad.full_tensor().isfinite().all() for parameter in model.parameters())


def test_decay_parameters_stay_in_fp32_beside_weights_gathered_in_float8(tmp_path):
    run(_decays_stay_exact, 2, tmp_path / "store")
