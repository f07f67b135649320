"""The compile plan: no graph breaks, eager's numbers, and how many graphs a training run needs."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from gdn2_titan.parallel import apply_compile
from tests.compile_cases import KINDS, WINDOW, assert_same, batch, build, loss, step
from tests.gdn2_cases import slowly

no_compiler = not (shutil.which("g++") or shutil.which("c++"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # the default; plans may raise it
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [False, *slowly(True)], ids=["per block", "whole"])
def test_loss_and_gradients_of_a_compiled_hybrid_are_those_of_eager(whole):
    counters.clear()  # other tests of this process break graphs
    eager = build(*KINDS)
    compiled = copy.deepcopy(eager)
    apply_compile(compiled, "aot_eager", whole=whole)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    inputs = batch(3, 70)
    assert_same(step(compiled, *inputs), step(eager, *inputs))
    assert not counters["graph_break"]


@pytest.mark.skipif(no_compiler, reason="inductor needs a C++ compiler")
def test_loss_and_gradients_through_inductor_are_those_of_eager_in_graphs_that_it_caches():
    # It caches none with a custom autograd.Function, as the operator and the convolution could be made.
    counters.clear()
    eager = build("gdn2")
    compiled = copy.deepcopy(eager)
    apply_compile(compiled)
    inputs = batch(2, 20)
    assert_same(step(compiled, *inputs), step(eager, *inputs))
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    assert counters["aot_autograd"]["autograd_cache_hit"] + counters["aot_autograd"]["autograd_cache_miss"] == 1


@pytest.mark.parametrize(
    "whole, documents", [(False, False), (True, True), *slowly((False, True), (True, False))],
    ids=["per block", "whole, resets", "per block, resets", "whole"],
)  # fmt: skip
def test_with_marked_sizes_one_graph_per_kind_or_per_model_serves_every_batch_and_length_with_eagers_numbers(
    whole, documents
):
    eager = build(*KINDS, repeats=1 if whole else 2)
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend("aot_eager")
    apply_compile(compiled, counter, whole=whole, dynamic=True)
    shapes = [(3, 20), (5, 70), (7, WINDOW + 1)]
    if documents or whole:
        # No longer than the window: without documents no mask is needed, and a block sees whether there is one.
        shapes.append((4, WINDOW))
    for B, T in shapes:
        inputs = batch(B, T, documents)
        assert_same(step(compiled, *inputs), step(eager, *inputs))
        assert counter.frame_count == (1 if whole else len(KINDS)), (B, T)


def test_as_it_comes_validation_in_other_shapes_costs_each_kind_one_more_graph_than_training():
    model, counter = build("gdn2", "swa", repeats=2), CompileCounterWithBackend("aot_eager")
    apply_compile(model, counter)
    counts = []
    for training, B, T in ((True, 4, 64), (False, 2, 32), (True, 4, 64), (False, 6, 20), (False, 3, 40)):
        with torch.set_grad_enabled(training):
            value = loss(model.train(training), *batch(B, T))
        if training:
            value.backward()
        counts.append(counter.frame_count)
    assert counts == [2, 4, 4, 4, 4]


@pytest.mark.slow
def test_more_graphs_than_the_compilers_limit_for_one_function_are_no_error():
    # All kinds of blocks are one function to the compiler, and beyond its limit it would refuse to go on.
    model, counter = build(*KINDS), CompileCounterWithBackend("eager")
    apply_compile(model, counter)
    for documents in (False, True):
        for B, T in ((3, 20), (3, 30), (1, 9)):
            model(*batch(B, T, documents))
    assert counter.frame_count > 8
