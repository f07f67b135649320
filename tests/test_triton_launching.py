"""Which configuration a kernel starts with: what it may depend on, and how it is pinned. No kernel runs here."""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.triton import chunk
from gdn2_titan.ops.triton import launching, target
from tests.gdn2_cases import RAW, cotangents, make, op_arguments

BF16, FP32 = torch.bfloat16, torch.float32
ARCHITECTURES = (0, 80, 90, 100, "gfx942")
FORWARD = ["prepare_kernel", "scan_kernel"]
SEGMENT = ["prepare_kernel", "segment_kernel"]
BACKWARD = ["prepare_kernel", "scan_kernel", "reverse_kernel", "gradient_kernel"]


@pytest.fixture
def launches_of(monkeypatch):
    """A function of inputs: the launches that the chunk op, forward and backward, and but for packed sequences
    the segment op, would make of them on arch."""

    def function(inputs, arch=0):
        launches = []
        monkeypatch.setattr(target, "arch", lambda x: arch)
        monkeypatch.setattr(launching, "launch", lambda *args: launches.append(Launch(*args)))
        arguments = op_arguments(inputs)
        tensors, options = GDN2Inputs(*arguments[:11]), GDN2Options(*arguments[11:])
        with torch.no_grad():
            chunk.chunk_forward(tensors, options)
            forward = list(launches)
            launches.clear()
            chunk.chunk_backward(*cotangents(inputs), tensors, options)
            backward = list(launches)
            launches.clear()
            if inputs["cu_seqlens"] is None:
                chunk.segment_forward(tensors._replace(initial_state=None), options)
        return forward, backward, launches

    return function


class Launch(SimpleNamespace):
    def __init__(self, kernel, grid, candidates, args, constants):
        name, parameters = kernel.__name__, inspect.signature(kernel.fn).parameters
        super().__init__(name=name, parameters=parameters, candidates=candidates, args=args, constants=constants)


def names(launches):
    return [launch.name for launch in launches]


@pytest.mark.parametrize("options", [dict(state=False), RAW], ids=["plain", "raw"])
def test_two_launches_forward_and_of_a_segment_and_four_backward_whatever_the_length(options, launches_of):
    for T, cu in ((1, None), (200, None), (200, [0, 0, 3, 200])):
        forward, backward, segment = launches_of(make(T=T, cu=cu, dtype=FP32, **options))
        assert (names(forward), names(backward)) == (FORWARD, BACKWARD)
        assert names(segment) == (SEGMENT if cu is None else [])


def choices(launches):
    """What tuning is keyed on, and what it chooses from."""
    return [(launch.name, launch.candidates, launch.constants) for part in launches for launch in part]


def test_what_tuning_is_keyed_on_does_not_hold_the_length_the_batch_or_the_number_of_sequences(launches_of):
    batches = [dict(T=1), dict(T=64), dict(T=200), dict(T=5, B=3)]
    packed = [dict(T=1, cu=[0, 1]), dict(T=200, cu=[0, 200]), dict(T=70, cu=[0, 0, 1, 2, 65, 65, 70])]
    for group in (batches, packed):
        found = [choices(launches_of(make(K=16, V=48, dtype=BF16, **sizes), arch=90)) for sizes in group]
        assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_candidate_sets_the_launch_options_and_exactly_the_constants_that_are_left(dtype, arch, launches_of):
    for launch in sum(launches_of(make(T=3, K=80, V=48, dtype=dtype, **RAW), arch), []):
        assert launch.candidates
        for candidate in launch.candidates:
            assert {"num_warps", "num_stages"} <= candidate.keys(), launch.name
            blocks = candidate.keys() - {"num_warps", "num_stages", "maxnreg", "waves_per_eu", "matrix_instr_nonkdim"}
            given = [*launch.args, *launch.constants, *blocks]
            assert sorted(given) == sorted(launch.parameters), launch.name


class Kernel:
    """Stands in for a Triton kernel: records what it is started with."""

    def __init__(self, name="some_kernel"):
        self.__name__, self.started = name, []

    def __getitem__(self, grid):
        return lambda **given: self.started.append(given)


CANDIDATES = (dict(BV=64, num_warps=4, num_stages=1), dict(BV=32, num_warps=8, num_stages=2))


@pytest.fixture
def compiled(monkeypatch):
    """As where kernels are compiled, which is where they are tuned."""
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.delenv("GDN2_TITAN_AUTOTUNE", raising=False)
    monkeypatch.setattr(launching, "_tuners", {})
    monkeypatch.setattr(launching, "_pinned", {})


def start(kernel, candidates=CANDIDATES, **constants):
    launching.launch(kernel, lambda meta: (1,), candidates, {"x": torch.zeros(1)}, {"K": 16} | constants)
    return {name: x for name, x in kernel.started[-1].items() if name not in ("x", "K")}


@pytest.mark.usefixtures("compiled")
def test_a_pinned_configuration_is_used_until_it_is_unpinned(monkeypatch):
    monkeypatch.setenv("GDN2_TITAN_AUTOTUNE", "0")
    kernel, other = Kernel(), Kernel("other_kernel")
    pinned = dict(BV=16, num_warps=1, num_stages=1)
    launching.pin("some_kernel", **pinned)
    assert start(kernel) == start(kernel, CANDIDATES[:1]) == pinned
    assert start(other) == CANDIDATES[0]
    launching.pin("some_kernel")
    assert start(kernel) == CANDIDATES[0]
    launching.pin("some_kernel")  # that nothing is pinned is no error


@pytest.mark.usefixtures("compiled")
def test_a_pin_goes_before_tuning():
    kernel = Kernel()
    launching.pin("some_kernel", **CANDIDATES[1])
    assert start(kernel) == CANDIDATES[1]
    assert not launching._tuners


@pytest.mark.usefixtures("compiled")
def test_without_autotuning_the_first_candidate_is_used(monkeypatch):
    monkeypatch.setenv("GDN2_TITAN_AUTOTUNE", "0")
    assert start(Kernel()) == CANDIDATES[0]
    monkeypatch.delenv("GDN2_TITAN_AUTOTUNE")
    assert start(Kernel(), CANDIDATES[1:]) == CANDIDATES[1]  # one candidate: nothing to tune


@pytest.mark.usefixtures("compiled")
def test_one_tuner_serves_all_launches_of_the_same_candidates_and_is_keyed_on_the_constants(monkeypatch):
    tuners = []

    def autotune(configs, key):
        tuners.append((configs, key))
        return lambda kernel: kernel

    monkeypatch.setattr(triton, "autotune", autotune)
    kernel = Kernel()
    for K in (16, 16, 32):
        assert start(kernel, K=K) == {}
    assert len(tuners) == 1
    configs, key = tuners[0]
    assert key == ["K"]
    assert [config.all_kwargs() for config in configs] == [
        {n: candidate[n] for n in candidate} | {"num_ctas": 1} for candidate in CANDIDATES
    ]
