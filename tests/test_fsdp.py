"""The FSDP2 plan on two processes over gloo, compared with one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gdn2_titan.models import layer
from gdn2_titan.parallel import apply_compile, apply_fsdp, shard_decays, sum_gradients
from tests.fsdp_cases import WORLD, assert_near, batch, build, loss
from tests.processes import run


def _same_as_one_process(rank, compiled, reshard, offload=False):
    single = build("cpu")
    torch.manual_seed(0)
    single.init_weights()
    sharded = build()
    if compiled:
        apply_compile(sharded, backend="aot_eager")
    apply_fsdp(sharded, init_device_mesh("cpu", (WORLD,)), torch.float32, torch.float32, reshard, cpu_offload=offload)
    sum_gradients(sharded)
    sharded.to_empty(device="cpu")
    torch.manual_seed(0)
    sharded.init_weights()
    tokens, resets = batch()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4) for model in (single, sharded)]
    for _ in range(3):
        loss(single, tokens, resets).backward()
        loss(sharded, tokens[rank : rank + 1], resets[rank : rank + 1]).backward()
        expected = dict(single.named_parameters())
        for name, parameter in sharded.named_parameters():
            assert_near(name, parameter.grad.full_tensor(), expected[name].grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in sharded.named_parameters():
        assert_near(name, parameter.full_tensor(), expected[name])


@pytest.mark.parametrize(
    ("compiled", "reshard"),
    [(False, True), (True, True), pytest.param(False, False, marks=pytest.mark.slow),
     pytest.param(True, False, marks=pytest.mark.slow)],
    ids=["reshard-eager", "reshard-compiled-fullgraph", "keep-eager", "keep-compiled-fullgraph"],
)  # fmt: skip
def test_two_ranks_start_step_and_differentiate_as_one_process(tmp_path, compiled, reshard):
    run(_same_as_one_process, WORLD, tmp_path / "store", compiled, reshard)


def test_so_they_do_with_their_parameters_offloaded(tmp_path):
    run(_same_as_one_process, WORLD, tmp_path / "store", False, True, True)


def _another_plan(model, mesh, param_dtype, reduce_dtype):
    """As a training loop of one's own has it, with the decays before it."""
    shard_decays(model, mesh, reduce_dtype)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for unit in (*model.layers.values(), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for unit in (*model.layers.values(), model, model.layers["0"].mixer.decay):
        unit.set_force_sum_reduction_for_comms(True)  # for gloo


def _decays_stay_exact(rank, plan):
    model = build()
    plan(model, init_device_mesh("cpu", (WORLD,)), torch.bfloat16, torch.float32)
    model.to_empty(device="cpu")
    model.init_weights()
    tokens, resets = batch()
    before = {n: p.full_tensor() for n, p in model.named_parameters() if "decay." in n}
    assert before, "the model has decay parameters"
    rounded = [(p - p.bfloat16().float()).abs().max() for p in before.values()]
    assert all(error > 1e-4 for error in rounded), "bf16 would change these values"
    seen = []
    op = layer.chunk_gdn2

    def spy(q, *args, A_log, dt_bias, **kwargs):
        seen.append((q.dtype, A_log.clone(), dt_bias.clone()))
        return op(q, *args, A_log=A_log, dt_bias=dt_bias, **kwargs)

    layer.chunk_gdn2 = spy  # in this process, which ends with the test
    value = loss(model, tokens[rank : rank + 1], resets[rank : rank + 1])
    value.backward()
    assert all(p.grad.full_tensor().isfinite().all() for p in model.parameters())
    ((dtype, A_log, dt_bias),) = seen
    assert dtype == torch.bfloat16
    assert torch.equal(A_log, before["layers.0.mixer.decay.A_log"])
    assert torch.equal(dt_bias, before["layers.0.mixer.decay.dt_bias"])


@pytest.mark.parametrize("plan", [apply_fsdp, _another_plan], ids=["our-plan", "another"])
def test_decay_parameters_reach_the_op_unrounded_under_a_bf16_policy(tmp_path, plan):
    run(_decays_stay_exact, WORLD, tmp_path / "store", plan)
