"""A_log and dt_bias are exact whatever dtype somebody gives to the model around them."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs
from gdn2_titan.parallel import apply_fsdp
from tests.model_cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    GATES,
    SMALL,
    assert_exact,
    by_hand,
    decays,
    gate_structures,
    layer,
)  # fmt: skip
from tests.processes import run

NARROW = (BF16, FP16)


def built(**options):
    torch.manual_seed(0)
    return GatedDeltaNet2(32, 2, 8, **options)


CASTS = {
    "to(bfloat16)": lambda m: m.to(BF16),
    "to(float16)": lambda m: m.to(FP16),
    "to(device, dtype)": lambda m: m.to("cpu", BF16, non_blocking=True),
    "to(like a tensor)": lambda m: m.to(torch.zeros(1, dtype=BF16)),
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "type()": lambda m: m.type(BF16),
    "float8": lambda m: m.to(torch.float8_e4m3fn),
    "twice": lambda m: m.bfloat16().half(),
    "and back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("swap", [False, True], ids=["set", "swap"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_the_layer_leaves_decays_in_fp32_unrounded(cast, swap, monkeypatch):
    module = built()
    expected = decays(module)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        CASTS[cast](module)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert_exact(module, expected)
    assert module.q_proj.weight.dtype == FP32 if cast == "and back" else module.q_proj.weight.dtype.itemsize < 4


@pytest.mark.parametrize("dtype", NARROW)
def test_a_cast_of_anybodys_model_around_the_layer_leaves_them_in_fp32(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), built())
    expected = decays(model)
    assert_exact(model.to(dtype), expected)
    assert model[0].weight.dtype == dtype


def test_a_float64_model_has_float64_decays_and_comes_to_16_bits_by_way_of_fp32():
    for widen in (lambda m: m.double(), lambda m: m.to(FP64), lambda m: m.type(FP64)):
        module = built()
        expected = decays(module)
        assert_exact(widen(module), expected, FP64)
        assert_exact(module.bfloat16(), expected)
        assert_exact(module.float(), expected)


@pytest.mark.parametrize(("default", "expected"), [(BF16, FP32), (FP16, FP32), (FP32, FP32), (FP64, FP64)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_born_under_a_default_dtype_has_them_in_fp32_or_float64(default, expected, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device(device):
            model = GDN2Model(GDN2ModelArgs(**SMALL))
        model.to_empty(device="cpu")
        model.init_weights()
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in decays(model).values()} == {expected}
    assert model.lm_head.weight.dtype == default
    assert all(p._no_weight_decay for name, p in model.named_parameters() if "decay." in name)
    if default.itemsize < 4:
        assert any(not torch.equal(p, p.to(default).to(p.dtype)) for p in decays(model).values())  # drawn in fp32


@pytest.mark.parametrize("swap", [False, True], ids=["set", "swap"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_in_16_bits_is_widened(assign, device, swap):
    if device == "meta" and not assign:
        pytest.skip("nothing is loaded into a parameter without memory")
    file = {name: value.to(BF16) for name, value in built().state_dict().items()}
    kept = {name: value.clone() for name, value in file.items()}
    with torch.device(device):
        module = GatedDeltaNet2(32, 2, 8).bfloat16()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        module.load_state_dict(file, assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for name, p in decays(module).items():
        assert p.dtype == FP32 and torch.equal(p, kept[name].float())
    assert file["decay.A_log"].dtype == BF16, "the caller's file is changed"
    assert all(p._no_weight_decay for p in module.decay.parameters())


def saved_and_loaded(module):
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, lambda m: m.share_memory()],
    ids=["deepcopy", "pickle", "torch.save", "share_memory"],
)  # fmt: skip
def test_a_copy_has_them_as_they_are_and_marked(duplicate):
    module = built().bfloat16()
    assert_exact(duplicate(module), decays(module))


def test_gradients_of_a_layer_that_is_cast_stay_as_exact_as_what_they_belong_to():
    module = built()
    module(torch.randn(1, 5, 32)).sum().backward()
    expected = module.decay.dt_bias.grad.clone()
    module.bfloat16()
    assert torch.equal(module.decay.dt_bias.grad, expected) and module.q_proj.weight.grad.dtype == BF16


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_what_a_parametrization_computes_a_decay_from_is_not_rounded_either():
    module = built()
    expected = 2 * module.decay.A_log.detach()
    parametrize.register_parametrization(module.decay, "A_log", Doubled())
    module.bfloat16()
    assert module.decay.A_log.dtype == FP32 and torch.equal(module.decay.A_log, expected)


@gate_structures
def test_a_layer_in_bf16_equals_its_formulas_with_exact_decays_in_fp64(structure):
    module = layer(dtype=FP32, **GATES[structure]).bfloat16()
    torch.manual_seed(3)
    x = torch.randn(2, 21, 32).bfloat16()
    resets = torch.rand(2, 21) < 0.1
    want = by_hand(copy.deepcopy(module).double(), x.double(), resets, GATES[structure])
    got = module(x, resets)
    assert got.dtype == BF16
    assert (got.double() - want).norm() < 0.02 * want.norm()


def test_twenty_steps_of_adamw_in_bf16_move_every_decay():
    torch.manual_seed(0)
    model = GDN2Model(GDN2ModelArgs(**SMALL | {"layer_pattern": ("gdn2",)}))
    model.init_weights()
    model.bfloat16()
    before = decays(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    tokens = torch.randint(SMALL["vocab_size"], (2, 33))
    for _ in range(20):
        logits = model(tokens[:, :-1]).float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in decays(model).items():
        assert torch.isfinite(p).all()
        assert (p != before[name]).all(), name


def _marked_when_sharded(rank):
    mesh = init_device_mesh("cpu", (1,))
    for shard in (
        lambda model: apply_fsdp(model, mesh, BF16, FP32),
        lambda model: fully_shard(model, mesh=mesh),  # a plan that knows nothing of decays
    ):
        with torch.device("meta"):
            model = GDN2Model(GDN2ModelArgs(**SMALL))
        shard(model)
        model.to_empty(device="cpu")
        model.init_weights()
        for _ in range(2):
            model(torch.zeros(1, 8, dtype=torch.long)).float().sum().backward()
            marked = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
            assert marked == {name for name, _ in model.named_parameters() if "decay." in name} != set()


def test_marks_are_on_what_an_optimizer_sees_under_fsdp(tmp_path):
    run(_marked_when_sharded, 1, tmp_path / "store")


def test_a_trainer_of_ones_own_that_looks_for_the_marks_decays_all_but_them():
    module = built()
    spared = {name for name, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert spared == {"decay.A_log", "decay.dt_bias"}
