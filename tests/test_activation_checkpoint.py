"""Activation checkpointing: nobody else's gradients, and what runs a second time, counted where it runs."""

import collections
import copy
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.parallel import (
    apply_activation_checkpoint,
    apply_compile,
    apply_fsdp,
    apply_memory_budget,
    sum_gradients,
)
from tests import fsdp_cases
from tests.activation_checkpoint_cases import LAYERS, counted, counted_calls, fresh_compiler  # noqa: F401 - fixtures
from tests.compile_cases import assert_same, batch, build, gradients, loss, step
from tests.gdn2_cases import slowly
from tests.processes import run

# mode, every: (calls of the mixer, calls of the convolution), in units of a forward pass of all layers
PLANS = {None: (1, 1), ("full", 1): (2, 2), ("full", 2): (1.5, 1.5), ("op", 1): (1, 2), ("op", 2): (1, 1.5)}
plans = pytest.mark.parametrize("plan", PLANS, ids=str)


def expected_calls(plan):
    mixer, convolution = PLANS[plan]
    return {"mixer": LAYERS * mixer, "convolution": 3 * LAYERS * convolution}


def checkpointed(model, plan):
    changed = copy.deepcopy(model)
    if plan is not None:
        apply_activation_checkpoint(changed, *plan)
    return changed


@plans
def test_eager_gradients_are_those_without_bit_for_bit_and_only_what_is_not_kept_runs_again(plan, calls):
    model, inputs = build("gdn2", repeats=LAYERS), batch(2, 70)
    changed = checkpointed(model, plan)
    assert list(changed.state_dict()) == list(model.state_dict())
    found = step(changed, *inputs)
    assert calls == expected_calls(plan)
    for name, want in step(model, *inputs).items():
        assert torch.equal(found[name], want), name


@pytest.mark.parametrize("plan, whole", [*((plan, False) for plan in PLANS), *slowly((("op", 1), True))], ids=str)
def test_compiled_gradients_are_those_of_eager_and_what_is_kept_does_not_run_again(plan, whole, calls):
    model, counter = build("gdn2", repeats=LAYERS), CompileCounterWithBackend("aot_eager")
    torch._dynamo.utils.counters.clear()  # other tests of this process break graphs
    changed = checkpointed(model, plan)
    apply_compile(changed, counter, whole=whole, dynamic=plan == ("op", 1))
    step(changed, *batch(2, 70))  # compiles
    if plan == ("op", 1):
        step(changed, *batch(3, 20))
    calls.update(mixer=0, convolution=0)
    inputs = batch(2, 70)
    found = step(changed, *inputs)
    assert calls == expected_calls(plan)
    # Equal blocks share a graph, with every second one wrapped two.
    assert counter.frame_count == (1 if plan is None else plan[1])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same(found, step(model, *inputs))


class Ops(TorchDispatchMode):
    """How often each op ran."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("documents", [False, True], ids=["no resets", "resets"])
@pytest.mark.parametrize("kind", ["gdn2", "swa", "attention"])
def test_by_op_the_backward_of_a_block_runs_no_product_no_attention_and_no_mixer_again(kind, documents):
    backward = {}
    for plan in (None, ("op", 1), ("full", 1)):
        value = loss(checkpointed(build(kind), plan), *batch(2, 20, documents))
        with Ops() as ops:
            value.backward()
        backward[plan] = ops.calls
    costly = [
        torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.gdn2_titan.chunk_gdn2.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]  # fmt: skip
    for op in costly:
        assert backward["op", 1][op] == backward[None][op], op
    again = {op for op in costly if backward["full", 1][op] > backward[None][op]}
    mixers = costly[1:3] if kind == "gdn2" else costly[3:]
    assert again == {costly[0], *mixers}, "full checkpointing would have run them"


def test_of_every_two_blocks_the_second_is_wrapped():
    changed = checkpointed(build("gdn2", repeats=4), ("full", 2))
    assert [type(block).__name__ for block in changed.layers.values()] == ["Block", "CheckpointWrapper"] * 2


def test_the_plans_can_be_imported_before_anything_else_of_the_package():
    subprocess.run([sys.executable, "-c", "import gdn2_titan.parallel"], check=True)


def test_a_checkpoint_of_a_wrapped_model_loads_into_a_plain_one_and_back():
    model = build("gdn2", "swa")
    changed = checkpointed(model, ("op", 1))
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(1)
    saved = changed.state_dict()
    assert list(saved) == list(model.state_dict())
    model.load_state_dict(saved)
    for name, p in model.named_parameters():
        assert torch.equal(p, saved[name])
    changed.load_state_dict(build("gdn2", "swa").state_dict())
    for p, q in zip(changed.parameters(), build("gdn2", "swa").parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(mode="selective"), "mode is 'selective'; it must be one of 'full', 'op'"),
        (dict(mode=None), "mode is None; it must be one of 'full', 'op'"),
        (dict(every=0), "every is 0; it must be a whole number of at least 1"),
        (dict(every="2"), "every is '2'; it must be a whole number of at least 1"),
        (dict(every=True), "every is True; it must be a whole number of at least 1"),
    ],
)
def test_unknown_modes_and_frequencies_are_refused_before_anything_is_wrapped(arguments, message):
    model = build("gdn2")
    with pytest.raises(ValueError) as refusal:
        apply_activation_checkpoint(model, **arguments)
    assert str(refusal.value) == message
    assert type(model.layers["0"]).__name__ == "Block"


# --------------------------------------------------------------------------------------------------- memory budget


def wide_values():
    """A model whose mixer's outputs are large beside its inputs, which the compiler would take for cheap."""
    torch.manual_seed(0)
    model = GDN2Model(
        GDN2ModelArgs(
            vocab_size=50, hidden_size=64, n_layers=1, mlp_size=128, num_heads=2, head_dim=16, expand_v=2.0
        )
    )  # fmt: skip
    model.init_weights()
    return model


@pytest.mark.parametrize("budget, mixer, convolution", [(1, 1, 3), (0.5, 1, 6), (0, 2, 6)])
def test_a_memory_budget_takes_the_mixer_for_what_it_costs_and_redoes_cheaper_ops_first(
    budget, mixer, convolution, calls
):
    model, inputs = wide_values(), batch(2, 64)
    changed = copy.deepcopy(model)
    apply_memory_budget(budget)
    apply_compile(changed, "aot_eager")
    found = step(changed, *inputs)
    assert calls == {"mixer": mixer, "convolution": convolution}
    assert_same(found, step(model, *inputs))


def test_a_memory_budget_outside_0_to_1_is_refused():
    for budget in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"^budget is {budget}; it must be between 0 and 1$"):
            apply_memory_budget(budget)
    assert torch._functorch.config.activation_memory_budget == 1.0


# ----------------------------------------------------------------------------------------------- with other plans


def _same_as_one_process(rank):
    """Checkpointing by op, compiled for any length, sharded: the gradients of one process, the mixer run once."""
    single = fsdp_cases.build("cpu")
    torch.manual_seed(0)
    single.init_weights()
    sharded, counter = fsdp_cases.build(), CompileCounterWithBackend("aot_eager")
    apply_activation_checkpoint(sharded, "op")
    apply_compile(sharded, counter, dynamic=True)
    mesh = init_device_mesh("cpu", (fsdp_cases.WORLD,))
    apply_fsdp(sharded, mesh, torch.float32, torch.float32)
    sum_gradients(sharded)
    sharded.to_empty(device="cpu")
    torch.manual_seed(0)
    sharded.init_weights()
    tokens, resets = fsdp_cases.batch()
    calls = counted(setattr)  # in this process, which ends with the test
    for length in (20, 40):
        short, ends = tokens[:, : length + 1], resets[:, :length]
        for model in (single, sharded):
            model.zero_grad()
        fsdp_cases.loss(single, short, ends).backward()
        calls.update(mixer=0, convolution=0)
        fsdp_cases.loss(sharded, short[rank : rank + 1], ends[rank : rank + 1]).backward()
        assert calls == {"mixer": 1, "convolution": 6}, calls
        assert counter.frame_count == 2  # a GDN-2 block and a sliding-window block
        expected, found = gradients(single), gradients(sharded)
        assert set(found) == set(expected)
        for name, gradient in found.items():
            fsdp_cases.assert_near(name, gradient.full_tensor(), expected[name])


@pytest.mark.slow
def test_selective_checkpointing_in_compiled_blocks_on_two_ranks_gives_one_processs_gradients(tmp_path):
    run(_same_as_one_process, fsdp_cases.WORLD, tmp_path / "store")
