"""DTensors through the operators, on processes over gloo, against the same operator on plain tensors in float64."""

import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import local_map

from gdn2_titan.ops import (
    causal_conv1d,
    causal_conv1d_qkv,
    causal_conv1d_qkv_,
    chunk_gdn2,
    recurrent_gdn2,
    recurrent_gdn2_,
)  # fmt: skip
from tests import conv_cases
from tests.gdn2_cases import RAW, make
from tests.processes import run

ACTIVATIONS = ("q", "k", "v", "g", "b", "w", "x", "o")
PARAMETERS = ("A_log", "dt_bias", "weight", "bias")
# The axis on which each tensor is sharded; replicated where it is not listed.
AXES = {
    "whole": {},
    "batch": dict.fromkeys((*ACTIVATIONS, "initial_state", "final_state", "resets"), 0),
    "heads": dict.fromkeys(ACTIVATIONS, 2)
    | dict.fromkeys(("initial_state", "final_state"), 1)
    | dict.fromkeys(PARAMETERS, 0),
}
RESETS = [[False, False, True, False, False], [False, True, False, False, True]]


def conv(**inputs):
    return causal_conv1d(**inputs, activation="silu")


CASES = {
    "plain": (chunk_gdn2, make(B=2, T=5, state=False)),
    "grouped, with state": (chunk_gdn2, make(B=2, T=5, groups=2)),
    "raw": (chunk_gdn2, make(B=2, T=5, groups=2, resets=RESETS, **RAW)),
    "flat dt_bias": (chunk_gdn2, make(B=2, T=5, groups=2, dt_bias="[H * K]", state=False, **RAW)),
    "no dt_bias": (chunk_gdn2, make(B=2, T=5, dt_bias=None, **RAW)),
    "bounded gates": (chunk_gdn2, make(B=2, T=5, groups=2, lower_bound=-5.0, **RAW)),
    "no A_log": (chunk_gdn2, make(B=2, T=5, groups=2, lower_bound=-5.0, **RAW) | {"A_log": None}),
    "segments": (functools.partial(chunk_gdn2, num_segments=3), make(B=2, T=6, groups=2, **RAW)),
    "recurrent": (recurrent_gdn2, make(B=2, T=5, groups=2, resets=RESETS, **RAW)),
    "conv": (conv, conv_cases.make(D=4, resets=RESETS)),
    "plain conv": (conv, conv_cases.make(D=4, bias=False, state=False)),
}
PACKED = {
    "packed": (chunk_gdn2, make(T=5, groups=2, cu=[0, 0, 2, 5], **RAW)),
    "packed conv": (conv, conv_cases.make(B=1, T=5, D=4, cu=[0, 0, 2, 5])),
}


def placements(name, ways):
    return [Shard(AXES[way][name]) if name in AXES[way] else Replicate() for way in ways]


def promised(name, ways):
    """The placements of an output, or of the gradient d<name>: ranks with different sequences hold summands."""
    if name[1:] in PARAMETERS:
        return tuple(Partial() if way == "batch" else Shard(0) if way == "heads" else Replicate() for way in ways)
    return tuple(placements(name if name in ("o", "final_state") else name[1:], ways))


def distribute(tensors, mesh, ways, **others):
    """The tensors among them as DTensors, leaves again. others: placements by name where they are not those of ways."""
    found = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    return tensors | {
        name: distribute_tensor(x.detach(), mesh, others.get(name) or placements(name, ways)).requires_grad_(
            x.requires_grad
        )
        for name, x in found.items()
    }


def cotangents(function, inputs, through=("o", "final_state")):
    generator = torch.Generator().manual_seed(1)
    outputs = dict(zip(("o", "final_state"), function(**inputs, output_final_state=True), strict=True))
    return {name: torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64) for name in through}


def evaluate(function, inputs, seeds):
    """{"o", "final_state", "dq", ...}, seeds being the gradients of some of the outputs."""
    outputs = dict(zip(("o", "final_state"), function(**inputs, output_final_state=True), strict=True))
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    grads = torch.autograd.grad([outputs[name] for name in seeds], list(leaves.values()), list(seeds.values()))
    return outputs | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(case, got, want):
    assert got.keys() == want.keys()
    for name, exact in want.items():
        error = (got[name].full_tensor() - exact).abs().max().item()
        assert error < 1e-12 * max(1, exact.abs().max().item()), f"{case}: {name} is off by {error:.1e}"


def assert_placed(case, got, ways):
    for name, x in got.items():
        assert x.placements == promised(name, ways), f"{case}, {ways}: {name} is {x.placements}"


def check_without_communication(case, mesh, ways, function, inputs, through=("o", "final_state")):
    seeds = cotangents(function, inputs, through)
    sharded, sharded_seeds = distribute(inputs, mesh, ways), distribute(seeds, mesh, ways)
    with CommDebugMode() as communication:
        got = evaluate(function, sharded, sharded_seeds)
    counts = dict(communication.get_comm_counts())
    assert not counts, f"{case}, {ways}: {counts}"
    assert_placed(case, got, ways)
    assert_same(f"{case}, {ways}", got, evaluate(function, inputs, seeds))


def check_redistributed(case, mesh, function, inputs, seed_placements=None, ways=("whole",), **others):
    """others: the layouts, by name, in which arguments arrive that are not laid out as ways has them."""
    seeds = cotangents(function, inputs)
    sharded_seeds = distribute(seeds, mesh, ways)
    for name in seed_placements or {}:
        sharded_seeds[name] = in_layout(seeds[name], mesh, seed_placements[name])
    got = evaluate(function, distribute(inputs, mesh, ways, **others), sharded_seeds)
    assert_same(case, got, evaluate(function, inputs, seeds))
    return got


def in_layout(x, mesh, layout):
    if all(placement.is_partial() for placement in layout):
        return DTensor.from_local(x / mesh.size(), mesh, layout)
    return distribute_tensor(x, mesh, layout)


def _sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    for case, (function, inputs) in CASES.items():
        for way in AXES:
            check_without_communication(case, mesh, (way,), function, inputs)
        for through in (("o",), ("final_state",)):
            check_without_communication(f"{case} through {through}", mesh, ("heads",), function, inputs, through)
    for case, (function, inputs) in PACKED.items():
        check_without_communication(case, mesh, ("heads",), function, inputs)


def _redistributed(rank):
    mesh = init_device_mesh("cpu", (2,))
    function, inputs = CASES["raw"]
    activations = ("q", "k", "v", "g", "b", "w")
    sequence, features = dict.fromkeys(activations, [Shard(1)]), dict.fromkeys(activations, [Shard(3)])
    check_redistributed("sequence", mesh, function, inputs, **sequence, resets=[Shard(1)])
    check_redistributed("features", mesh, function, inputs, **features, initial_state=[Shard(2)])
    check_redistributed("q alone on heads", mesh, function, inputs, q=[Shard(2)])
    check_redistributed("batch and heads", mesh, function, inputs, ways=("batch",), k=[Shard(2)], A_log=[Shard(0)])
    function, inputs = CASES["conv"]
    check_redistributed("conv sequence", mesh, function, inputs, x=[Shard(1)], weight=[Shard(1)])
    function, inputs = PACKED["packed"]
    check_redistributed("packed, rows sharded", mesh, function, inputs, initial_state=[Shard(0)])

    # What the gradients arrive as must not move what the forward pass could keep.
    function, inputs = CASES["raw"]
    for layout in ([Shard(1)], [Partial()], [Replicate()]):
        for way in ("batch", "heads"):
            case = f"{way}, gradients {layout}"
            layouts = {"o": layout, "final_state": layout}
            got = check_redistributed(case, mesh, function, inputs, layouts, (way,))
            assert_placed(case, got, (way,))


def _indivisible(rank):
    mesh = init_device_mesh("cpu", (2,))
    three_heads = make(B=2, T=5, H=3, groups=2, resets=RESETS, **RAW)
    assert_placed("three heads", check_redistributed("three heads", mesh, chunk_gdn2, three_heads), ("whole",))
    check_redistributed("three heads, sharded", mesh, chunk_gdn2, three_heads, ways=("heads",))
    # Summands could be scattered over the six value heads, which is cheaper than to sum them on every rank.
    one_row = make(T=5, H=3, groups=2, **RAW)
    summands = {"o": [Partial()], "final_state": [Partial()]}
    check_redistributed("three heads, summands", mesh, chunk_gdn2, one_row, summands)
    three_rows = make(B=3, T=5, H=3, groups=2, **RAW)
    check_redistributed("three rows", mesh, chunk_gdn2, three_rows, ways=("batch",))
    three_channels = conv_cases.make(B=3, D=3)
    for way in ("batch", "heads"):
        check_redistributed(f"conv, three, {way}", mesh, conv, three_channels, ways=(way,))


def in_place_inputs():
    inputs = make(B=2, T=5, groups=2, resets=RESETS, **RAW)
    inputs |= {name: x.detach() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    return inputs, inputs.pop("initial_state")


def _in_place(rank):
    mesh = init_device_mesh("cpu", (2,))
    check_in_place(mesh, recurrent_gdn2_)
    inputs, state = in_place_inputs()
    for way in AXES:
        sharded = distribute(inputs, mesh, (way,))
        sharded_state = distribute_tensor(state, mesh, placements("initial_state", (way,)))
        with CommDebugMode() as communication:
            recurrent_gdn2_(**sharded, state=sharded_state)
        assert not communication.get_comm_counts()
    with pytest.raises(ValueError, match="state_indices is given with DTensors; it must be None"):
        recurrent_gdn2_(**sharded, state=sharded_state, state_indices=torch.arange(2))


def check_in_place(mesh, function):
    inputs, initial = in_place_inputs()
    state = initial.clone()
    o = recurrent_gdn2_(**inputs, state=state)
    layouts = [(way, placements("initial_state", (way,))) for way in AXES]
    layouts += [("heads", [Shard(0)]), ("batch", [Shard(2)]), ("heads", [Replicate()])]
    for way, layout in layouts:
        sharded, sharded_state = distribute(inputs, mesh, (way,)), distribute_tensor(initial.clone(), mesh, layout)
        sharded_o = function(**sharded, state=sharded_state)
        assert sharded_state.placements == tuple(layout)
        if layout == placements("initial_state", (way,)):
            assert sharded_o.placements == promised("o", (way,))
        assert_same(f"{way}, {layout}", {"o": sharded_o, "state": sharded_state}, {"o": o, "state": state})


QKV_CHANNELS = (4, 4, 8)
QKV_WAYS = {  # axes by the end of a name
    "whole": {}, "batch": {"x": 0, "state": 0}, "heads": {"x": 2, "weight": 0, "state": 1},
}  # fmt: skip


def qkv(way=None, mesh=None):
    """Arguments of causal_conv1d_qkv, as DTensors on a mesh."""
    found = {}
    for name, D in zip("qkv", QKV_CHANNELS, strict=True):
        made = conv_cases.make(D=D, bias=False, seed=D)
        for end, x in (("x", made["x"]), ("weight", made["weight"]), ("state", made["initial_state"])):
            if mesh is not None:
                placement = Shard(QKV_WAYS[way][end]) if end in QKV_WAYS[way] else Replicate()
                x = distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
            found[name if end == "x" else f"{name}_{end}"] = x
    return found


def _qkv(rank):
    """Forward, backward and a step in place, sharded on batch or channels."""
    mesh = init_device_mesh("cpu", (2,))

    def outputs_and_gradients(inputs):
        *ys, finals = causal_conv1d_qkv(**inputs, activation="silu", output_final_state=True)
        outputs = [*ys, *finals]
        grads = torch.autograd.grad(outputs, list(inputs.values()), [x.detach() for x in outputs])
        with torch.no_grad():
            states = {name: inputs[name].detach().clone() for name in ("q_state", "k_state", "v_state")}
            stepped = causal_conv1d_qkv_(**inputs | states, activation="silu")
        return [*outputs, *grads, *stepped, *states.values()]

    want = outputs_and_gradients(qkv())
    for way in QKV_WAYS:
        sharded = qkv(way, mesh)
        with CommDebugMode() as communication:
            got = outputs_and_gradients(sharded)
        assert not communication.get_comm_counts(), way
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            torch.testing.assert_close(a.full_tensor(), b, rtol=1e-12, atol=1e-12, msg=f"{way}, {number}")


def _mixed(rank):
    mesh = init_device_mesh("cpu", (2,))
    inputs = make(B=2, T=5, **RAW)
    for name in ("q", "v", "A_log", "initial_state"):
        sharded = distribute(inputs, mesh, ("batch",)) | {name: inputs[name]}
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            chunk_gdn2(**sharded)


def _all_of(rank, *functions):
    for function in functions:
        function(rank)


def test_on_batch_or_heads_it_is_one_process_without_communication_and_other_layouts_are_redistributed(tmp_path):
    run(_all_of, 2, tmp_path / "store", _sharded, _redistributed, _indivisible, _in_place, _qkv, _mixed)


def _two_dimensions(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    for way in (("batch", "heads"), ("heads", "batch"), ("whole", "heads"), ("batch", "whole")):
        for case in ("raw", "recurrent", "conv"):
            check_without_communication(case, mesh, way, *CASES[case])
    four = make(B=4, T=5, H=4, groups=2, **RAW)
    for way in (("batch", "batch"), ("heads", "heads")):
        check_without_communication("four", mesh, way, chunk_gdn2, four)
    # Two parts are fine, four are not: what comes in two is left there, and nothing is ever cut in four.
    six = make(B=6, T=5, H=6, groups=2, **RAW)
    check_without_communication("six", mesh, ("batch", "heads"), chunk_gdn2, six)
    one_row = make(T=5, H=6, groups=2, **RAW)
    check_without_communication("six heads", mesh, ("whole", "heads"), chunk_gdn2, one_row)
    summands = dict.fromkeys(("o", "final_state"), [Partial(), Partial()])
    check_redistributed("six heads, summands", mesh, chunk_gdn2, one_row, summands, ("whole", "whole"))
    sequence = dict.fromkeys(("q", "k", "v", "g", "b", "w"), [Shard(1), Shard(2)])
    check_redistributed("six heads, sequence", mesh, chunk_gdn2, one_row, ways=("whole", "heads"), **sequence)


@pytest.mark.slow
def test_on_a_mesh_of_two_dimensions_each_splits_what_it_may(tmp_path):
    run(_two_dimensions, 4, tmp_path / "store")


ORDER = ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state", "resets")


def check_local_map(mesh, way, compile):
    _, inputs = CASES["raw"]
    options = {name: x for name, x in inputs.items() if name not in ORDER}

    def on_parts(*tensors):
        return chunk_gdn2(**dict(zip(ORDER, tensors, strict=True)), **options, output_final_state=True)

    mapped = local_map(
        on_parts,
        out_placements=(promised("o", (way,)), promised("final_state", (way,))),
        in_placements=tuple(placements(name, (way,)) for name in ORDER),
        in_grad_placements=tuple(promised(f"d{name}", (way,)) for name in ORDER),
        device_mesh=mesh,
    )
    mapped = compile(mapped)

    def function(output_final_state, **arguments):
        return mapped(*(arguments[name] for name in ORDER))

    seeds = cotangents(chunk_gdn2, inputs)
    tensors = distribute({name: inputs[name] for name in ORDER}, mesh, (way,))
    got = evaluate(function, tensors, distribute(seeds, mesh, (way,)))
    assert_placed("local_map", got, (way,))
    assert_same(f"local_map, {way}", got, evaluate(chunk_gdn2, inputs, seeds))


def _compiled(rank):
    mesh = init_device_mesh("cpu", (2,))
    compile = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    for way in ("batch", "heads"):
        for case in ("raw", "conv"):
            torch.compiler.reset()
            function, inputs = CASES[case]
            seeds = cotangents(function, inputs)
            got = evaluate(compile(function), distribute(inputs, mesh, (way,)), distribute(seeds, mesh, (way,)))
            assert_placed(f"{case}, compiled", got, (way,))
            assert_same(f"{case}, compiled, {way}", got, evaluate(function, inputs, seeds))
        check_local_map(mesh, way, lambda function: function)
        torch.compiler.reset()
        check_local_map(mesh, way, compile)
    for check, function in ((check_growing, chunk_gdn2), (check_in_place, recurrent_gdn2_)):
        torch.compiler.reset()
        check(mesh, compile(function))


def check_growing(mesh, compiled):
    """The sequence becomes a dynamic size, and arrives in parts, so that the graph redistributes it."""
    sequence = dict.fromkeys(("q", "k", "v", "g", "b", "w"), [Shard(1)])
    for T in (6, 8, 10):
        inputs = make(B=2, T=T, groups=2, **RAW)
        seeds = cotangents(chunk_gdn2, inputs)
        got = evaluate(compiled, distribute(inputs, mesh, ("whole",), **sequence), distribute(seeds, mesh, ("whole",)))
        assert_same(f"compiled, {T} tokens", got, evaluate(chunk_gdn2, inputs, seeds))


@pytest.mark.slow
def test_compiled_and_under_local_map_it_is_one_process(tmp_path):
    run(_compiled, 2, tmp_path / "store")
