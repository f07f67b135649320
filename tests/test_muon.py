"""Muon against singular values in fp64, for whole and for sharded matrices, and which weights are its."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs
from gdn2_titan.parallel import Muon, apply_fsdp, apply_tensor_parallel, muon_matrices
from tests.model_cases import GATES, SMALL
from tests.processes import run

OPTIONS = dict(lr=0.1, weight_decay=0.3, momentum=0.9, ns_steps=5, adjust_lr_fn="match_rms_adamw")


def made_alike(matrix, steps=5):
    """The matrix with each singular value s replaced by the polynomial of it, again and again."""
    U, s, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s) @ V


def stepped(weight, gradients, rows, nesterov=True, ratio=None):
    """The weight after a step with each of the gradients, matrix by matrix, by the definition."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    ratio = ratio or (lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)))
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        update = 0.1 * gradient.double() + 0.9 * momentum if nesterov else momentum
        blocks = [made_alike(block) * ratio(*block.shape) for block in update.split(rows)]
        weight = weight * (1 - 0.1 * 0.3) - 0.1 * torch.cat(blocks)
    return weight


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_steps(weight, gradients, **group):
    p = nn.Parameter(weight.clone())
    optimizer = Muon([{"params": [p]} | group], **OPTIONS)
    for gradient in gradients:
        p.grad = gradient
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rows", [None, 4])
def test_steps_are_those_of_the_definition_for_one_matrix_and_for_one_a_head(shape, rows):
    weight, gradients = random(*shape), [random(*shape, seed=i) for i in range(1, 4)]
    for options in ({}, {"nesterov": False}, {"adjust_lr_fn": "original"}):
        original = (lambda rows, columns: max(1, rows / columns) ** 0.5) if "adjust_lr_fn" in options else None
        expected = stepped(weight, gradients, rows or shape[0], options.get("nesterov", True), original)
        torch.testing.assert_close(run_steps(weight, gradients, head_rows=rows, **options), expected)


def test_one_matrix_steps_as_torchs_muon_to_the_rounding_of_its_bfloat16():
    weight, gradient = random(24, 40).float(), random(24, 40, seed=1).float()
    p = nn.Parameter(weight.clone())
    p.grad = gradient
    torch.optim.Muon([p], **OPTIONS).step()
    step = run_steps(weight, [gradient]) - weight
    assert (p.detach() - weight - step).norm() < 0.01 * step.norm()


def test_a_head_does_not_depend_on_the_gradient_of_another():
    weight, gradient = random(12, 20), random(12, 20, seed=1)
    other = torch.cat((gradient[:4], 100 * random(8, 20, seed=2)))
    found = [run_steps(weight, [one], head_rows=4)[:4] for one in (gradient, other)]
    assert torch.equal(*found)


def test_rows_that_are_no_whole_heads_are_refused():
    with pytest.raises(ValueError, match="head_rows is 5; it must divide the 12 rows of every weight"):
        Muon([{"params": [nn.Parameter(random(12, 20))], "head_rows": 5}], **OPTIONS)


# ------------------------------------------------------------------------------------------------------ which weights

GDN2 = {"q_proj": 8, "k_proj": 8, "v_proj": 16, "erase_proj": 8, "write_proj": 16, "o_proj": None}
ALIKE = {"num_v_heads": 4, "expand_v": 2.0}


def matrices(module):
    found = muon_matrices(module)
    return {name.removesuffix(".weight"): found[p] for name, p in module.named_parameters() if p in found}


def test_of_a_models_blocks_it_takes_projections_to_heads_head_by_head_and_other_matrices_whole():
    model = GDN2Model(GDN2ModelArgs(**SMALL | ALIKE | {"layer_pattern": ("gdn2", "swa"), "attn_kv_heads": 2}))
    mlp = {f"mlp.{name}_proj": None for name in ("gate", "up", "down")}
    softmax = {"q_proj": 8, "k_proj": 8, "v_proj": 8, "o_proj": None}
    expected = [mlp | {f"mixer.{name}": rows for name, rows in of.items()} for of in (GDN2, softmax)]
    assert matrices(model) == {f"layers.{i}.{name}": rows for i in (0, 1) for name, rows in expected[i].items()}


@pytest.mark.parametrize("structure", GATES)
def test_gates_and_decays_of_one_number_a_head_and_low_rank_factors_are_not_its_full_ranks_are(structure):
    layer = GatedDeltaNet2(32, 2, 8, **ALIKE | GATES[structure])
    expected = dict(GDN2)
    if layer.tied_gates or GATES[structure].get("erase_gate") == "scalar":
        del expected["erase_proj"]
    if layer.tied_gates or GATES[structure].get("write_gate") == "scalar":
        del expected["write_proj"]
    if GATES[structure].get("gate_rank") == "full":
        expected |= {"decay_proj": 8, "gate_proj": 16}
    assert matrices(layer) == expected


# ------------------------------------------------------------------------------------------------------------ shards


LAYOUTS = ("tp", "fsdp", "fsdp-tp", "hsdp", "fsdp4")


def _as_one_process(rank, heads):
    """In fp64, of a model whose shards are whole heads or not, and whose MLP no number of ranks divides."""
    sizes = {"num_heads": heads, "mlp_size": 50, "layer_pattern": ("gdn2", "swa")}
    args = GDN2ModelArgs(**SMALL | sizes)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    every = init_device_mesh("cpu", (4,))

    def build(layout):
        with torch.device("meta"):
            model = GDN2Model(args).double()
        if "tp" in layout:
            apply_tensor_parallel(model, mesh["inner"])
        shards = {"fsdp": mesh["outer"], "fsdp-tp": mesh["outer"], "hsdp": mesh, "fsdp4": every}
        if layout in shards:
            apply_fsdp(model, shards[layout], torch.float64, torch.float64)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        model.init_weights()
        return model

    def step(model):
        found, names = muon_matrices(model), {p: name for name, p in model.named_parameters()}
        order = {name: i for i, name in enumerate(sorted(names.values()))}
        groups = {rows: {"params": [], "head_rows": rows} for rows in found.values()}
        for p, rows in found.items():
            groups[rows]["params"].append(p)
        optimizer = Muon(groups.values(), **OPTIONS)
        for i in range(2):
            for p in found:
                gradient = random(*p.shape, seed=2 * order[names[p]] + i)
                p.grad = distributed(gradient, p)
            optimizer.step()
        return {names[p]: p.full_tensor() if isinstance(p, DTensor) else p for p in found}

    def distributed(gradient, p):
        if not isinstance(p, DTensor):
            return gradient
        return distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)

    whole = step(build("one process"))
    for layout in LAYOUTS:
        for name, found in step(build(layout)).items():
            torch.testing.assert_close(found, whole[name], rtol=0, atol=1e-12, msg=f"{layout}: {name}")


@pytest.mark.parametrize(
    "heads", [pytest.param(4, id="shards of whole heads", marks=pytest.mark.slow), pytest.param(2, id="parts of heads")]
)
def test_sharded_matrices_step_as_whole_ones(tmp_path, heads):
    run(_as_one_process, 4, tmp_path / "store", heads)
