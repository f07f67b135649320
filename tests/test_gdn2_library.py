"""The ops as citizens of PyTorch: opcheck, compile, export, autocast, FLOPs, and what is refused at the door."""

import functools
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from gdn2_titan.ops import chunk_gdn2, naive_recurrent_gdn2, recurrent_gdn2
from gdn2_titan.ops.gdn2 import chunked
from gdn2_titan.ops.gdn2.flops import backward_flops, forward_flops
from tests.gdn2_cases import RAW, cast, cotangents, leaves, make, op_arguments, reversed_layout, run, slowly

OPS = torch.ops.gdn2_titan
functions = pytest.mark.parametrize("function", [chunk_gdn2, recurrent_gdn2], ids=lambda f: f.__name__)


def permuted(x):
    return reversed_layout(x.detach()).requires_grad_(x.requires_grad)


OPCHECK = {
    "nothing optional": dict(state=False),
    "a state": dict(),
    "all optional but cu_seqlens": dict(**RAW, resets=[0, 0, 1, 0, 0]),
    "raw decay without a bias": dict(gate=True, dt_bias=None, state=False),
    "flat bias": dict(gate=True, dt_bias="[H * K]"),
    "packed": dict(cu=[0, 2, 2, 5], state=False),
    "packed, states, resets": dict(**RAW, cu=[0, 2, 2, 5], resets=[0, 1, 0, 0, 1]),
    "grouped, batch": dict(B=2, groups=2, **RAW),
    "bf16": dict(**RAW, groups=2, dtype=torch.bfloat16),
    "one of everything": dict(B=1, T=1, H=1, K=1, V=1),
    "across chunks": dict(T=67, H=1, dtype=torch.float32),
}
RICHEST = ("packed, states, resets", "grouped, batch")
# Of the others what a gradient or a layout could meet in a way of its own.
TELLING = ("nothing optional", "bf16", "across chunks")


@pytest.mark.parametrize(
    "case, layout",
    [*((case, None) for case in OPCHECK), (RICHEST[0], permuted),
     *slowly(*((case, permuted) for case in (RICHEST[1], *TELLING)))],
)  # fmt: skip
@pytest.mark.parametrize("name", ["chunk_gdn2", "recurrent_gdn2"])
def test_forward_ops_pass_opcheck(name, case, layout):
    inputs = make(**dict(T=5, K=2, V=3) | OPCHECK[case])
    if layout:
        inputs |= {n: layout(x) for n, x in leaves(inputs).items()}
    torch.library.opcheck(getattr(OPS, name), op_arguments(inputs))


@pytest.mark.parametrize(
    "case, given, layout",
    [
        *((case, "both", None) for case in OPCHECK),
        *((case, given, permuted) for case in RICHEST for given in ("o", "final_state")),
        *slowly(*((case, "both", permuted) for case in (*RICHEST, *TELLING))),
        *slowly(*((case, given, None) for case in TELLING for given in ("o", "final_state"))),
    ],
)
def test_the_backward_op_passes_opcheck(given, case, layout):
    inputs = make(**dict(T=5, K=2, V=3) | OPCHECK[case])
    state_dtype = torch.promote_types(inputs["q"].dtype, torch.float32)
    do, dfinal_state = cotangents(inputs)
    do, dfinal_state = do.to(inputs["v"].dtype), dfinal_state.to(state_dtype)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in op_arguments(inputs)]
    if layout:
        do, dfinal_state = layout(do), layout(dfinal_state)
        args = [layout(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    grads = {"both": (do, dfinal_state), "o": (do, None), "final_state": (None, dfinal_state)}[given]
    torch.library.opcheck(OPS.chunk_gdn2_backward, (*grads, *args))


class Spy(TorchDispatchMode):
    """Which of this package's ops ran, and which of their tensor arguments were given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gdn2_titan":
            self.calls.append((func.name().split("::")[1], [x is not None for x in args]))
        return func(*args, **(kwargs or {}))


@functions
def test_every_call_is_one_op_forward_and_one_backward_without_gradients_of_zeros(function):
    inputs = make()
    with Spy() as spy:
        o, _ = function(**inputs, output_final_state=True)
        o.sum().backward()
    assert [name for name, _ in spy.calls] == [function.__name__, "chunk_gdn2_backward"]
    assert spy.calls[1][1][:2] == [True, False]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy, runs", [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)])
def test_selective_checkpointing_that_names_the_op_does_not_run_it_again(policy, runs, compiled, monkeypatch):
    torch._dynamo.reset()
    inputs, calls, kernel = make(), [], chunked.chunk_forward
    monkeypatch.setattr(chunked, "chunk_forward", lambda *args: calls.append(1) or kernel(*args))

    def choose(context, op, *args, **kwargs):
        return policy if op is OPS.chunk_gdn2.default else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q):
        return chunk_gdn2(**inputs | {"q": 2 * q})[0].sin()

    def checkpointed(q):
        contexts = functools.partial(create_selective_checkpoint_contexts, choose)
        return checkpoint(block, q, use_reentrant=False, context_fn=contexts)

    function = torch.compile(checkpointed, fullgraph=True, backend="aot_eager") if compiled else checkpointed
    (got,) = torch.autograd.grad(function(inputs["q"]).sum(), inputs["q"])
    assert len(calls) == runs
    (want,) = torch.autograd.grad(block(inputs["q"]).sum(), inputs["q"])
    assert torch.equal(got, want)


COMPILED = {
    "plain": dict(state=False),
    "states": dict(),
    "raw, resets, grouped": dict(**RAW, groups=2, resets=3),
    "packed": dict(**RAW, cu=[0, 1, 1]),
}


def compiled_inputs(case, B, T, dtype=torch.float32):
    options = dict(COMPILED[case])
    if "cu" in options:
        B, options["cu"] = 1, [*options["cu"], T]
    if "resets" in options:
        options["resets"] = [t % 3 == 1 for t in range(B * T)]
    return make(B=B, T=T, H=2, K=4, V=6, dtype=dtype, seed=T, **options)


@functions
@pytest.mark.parametrize(
    "case, dynamic, settled_after",
    [
        ("raw, resets, grouped", True, 1),
        ("packed", None, 2),
        *slowly(("plain", True, 1), ("states", True, 1), ("packed", True, 1)),
        *slowly(("plain", None, 2), ("states", None, 2), ("raw, resets, grouped", None, 2)),
    ],
)
def test_compiled_equals_eager_bit_for_bit_and_one_graph_serves_every_batch_and_length(
    case, dynamic, settled_after, function
):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    # Both change at once, so that one compilation finds all that is dynamic; and no size equals another at first, for
    # the compiler would take equal sizes for the same size.
    counts = []
    for B, T in ((3, 5), (5, 8), (7, 70), (8, 13)):
        inputs = compiled_inputs(case, B, T)
        output_grads = cotangents(inputs)
        got, want = run(compiled, inputs, output_grads), run(function, inputs, output_grads)
        for name in want:
            assert torch.equal(got[name], want[name]), name
        counts.append(counter.frame_count)
    # Not compared with 1: the compiler hands its backend a graph twice where it starts its analysis again.
    assert counts[-1] == counts[settled_after - 1]


def test_compiled_with_batch_and_length_marked_dynamic_needs_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chunk_gdn2, fullgraph=True, backend=counter)
    for B, T in ((3, 5), (5, 70)):
        inputs = compiled_inputs("raw, resets, grouped", B, T)
        for name in ("q", "k", "v", "g", "b", "w", "resets", "initial_state"):
            torch._dynamo.mark_dynamic(inputs[name], 0)
            if name != "initial_state":
                torch._dynamo.mark_dynamic(inputs[name], 1)
        output_grads = cotangents(inputs)
        got, want = run(compiled, inputs, output_grads), run(chunk_gdn2, inputs, output_grads)
        for name in want:
            assert torch.equal(got[name], want[name]), name
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="inductor needs a C++ compiler")
def test_inductor_fuses_around_the_op_and_keeps_its_numbers_in_a_graph_that_it_caches():
    # It caches none with a custom autograd.Function: every start of a training run would compile anew.
    torch._dynamo.reset()
    counters.clear()
    inputs = compiled_inputs("raw, resets, grouped", 2, 70)
    output_grads = cotangents(inputs)

    def around(function, **kwargs):
        o, final_state = function(**kwargs | {"q": 2 * kwargs["q"] + kwargs["k"]})
        return o * o.sigmoid(), final_state

    got = run(torch.compile(functools.partial(around, chunk_gdn2), fullgraph=True), inputs, output_grads)
    want = run(functools.partial(around, naive_recurrent_gdn2), cast(inputs, torch.float64), output_grads)
    for name, exact in want.items():
        assert (got[name].double() - exact).abs().max() <= 2e-5 * exact.abs().max(), name
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
    assert counters["aot_autograd"]["autograd_cache_hit"] + counters["aot_autograd"]["autograd_cache_miss"] == 1


@functions
@pytest.mark.parametrize("case", ["states", "raw, resets, grouped"])
def test_exports_with_dynamic_batch_and_length(case, function):
    class Module(torch.nn.Module):
        def forward(self, tensors):
            options = {n: x for n, x in inputs.items() if not isinstance(x, torch.Tensor)}
            return function(**options | tensors, output_final_state=True)

    def tensors(B, T):
        return {n: x for n, x in compiled_inputs(case, B, T).items() if isinstance(x, torch.Tensor)}

    inputs = compiled_inputs(case, 3, 7)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {n: {0: batch, 1: length} for n in tensors(3, 7)} | {"initial_state": {0: batch}}
    shapes |= {n: None for n in ("A_log", "dt_bias") if n in shapes}
    module = torch.export.export(Module(), (tensors(3, 7),), dynamic_shapes=(shapes,)).module()
    for B, T in ((3, 7), (2, 70), (5, 4)):
        want = naive_recurrent_gdn2(**compiled_inputs(case, B, T), output_final_state=True)
        torch.testing.assert_close(module(tensors(B, T)), want, rtol=1e-5, atol=1e-5)


@functions
def test_autocast_changes_nothing_eager_or_compiled(function):
    torch._dynamo.reset()
    inputs = compiled_inputs("raw, resets, grouped", 2, 70)
    output_grads = cotangents(inputs)
    plain = run(function, inputs, output_grads)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for name, callee in (("eager", function), ("compiled", compiled)):
        with torch.autocast("cpu", torch.bfloat16):
            got = run(callee, inputs, output_grads)
        for result in plain:
            assert got[result].dtype == plain[result].dtype, (name, result)
            assert torch.equal(got[result], plain[result]), (name, result)


def by_hand_forward_flops(tokens, H, groups, K, V, C=64):
    """Per token: the products of the chunk form as the docstrings of chunked and flops list them."""
    VV = groups * V
    lower = 2 * (2 * C * K / 2)  # A_qk and T below the diagonal, a multiply-add each
    inverse = 2 * C * C // 3
    y, u = 2 * C * K, 2 * C * VV
    r, state, read = 2 * K * VV, 2 * K * VV, 2 * K * VV
    inside = 2 * C * VV
    return int(tokens * H * (lower + inverse + y + u + r + state + read + inside))


@pytest.mark.parametrize("packed", [False, True])
@functions
def test_flop_counter_reports_the_closed_form(function, packed):
    B, T, H, groups, K, V = (1, 100, 2, 2, 16, 8) if packed else (2, 100, 2, 2, 16, 8)
    inputs = make(B=B, T=T, H=H, groups=groups, K=K, V=V, cu=[0, 40, 100] if packed else None)
    with FlopCounterMode(display=False) as counter:
        o, _ = function(**inputs)
    assert counter.get_total_flops() == forward_flops(B * T, H, K, groups * V)
    assert counter.get_total_flops() == by_hand_forward_flops(B * T, H, groups, K, V)
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == backward_flops(B * T, H, K, groups * V)
    assert 2 < backward_flops(B * T, H, K, groups * V) / forward_flops(B * T, H, K, groups * V) < 4


@functions
def test_differentiating_twice_raises_rather_than_dropping_terms(function):
    inputs = make()
    o, _ = function(**inputs)
    (dq,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="chunk_gdn2_backward"):
        torch.autograd.grad(dq.sum(), inputs["k"])


# The shapes that refusals are told against: B = 2, T = 4, H = 2, HV = 4, K = 3, V = 5.
def zeros(*shape, **options):
    return torch.zeros(shape, **options)


QK, VALUE = (2, 4, 2, 3), (2, 4, 4, 5)
GATE = dict(use_gate_in_kernel=True, A_log=zeros(2))
PACKED = dict(zip("qkgb", [zeros(1, 4, 2, 3)] * 4, strict=True)) | dict(v=zeros(1, 4, 4, 5), w=zeros(1, 4, 4, 5))

REFUSALS = [
    *((TypeError, name, {name: None}) for name in "qkvgw"),
    *((TypeError, name, {name: [1.0]}) for name in "qkvgbw"),
    *((TypeError, name, {name: zeros(*(VALUE if name in "vw" else QK), dtype=torch.int64)}) for name in "qkvgbw"),
    (TypeError, "q", dict(q=zeros(*QK, dtype=torch.complex64))),
    (ValueError, "q", dict(q=zeros(4, 2, 3))),
    (ValueError, "v", dict(v=zeros(4, 4, 5))),
    (ValueError, "q", dict(q=zeros(2, 4, 0, 3))),
    (ValueError, "q", dict(q=zeros(2, 4, 2, 0))),
    (ValueError, "v", dict(v=zeros(2, 4, 3, 5), w=zeros(2, 4, 3, 5))),
    (ValueError, "v", dict(v=zeros(2, 4, 1, 5), w=zeros(2, 4, 1, 5))),
    (ValueError, "v", dict(v=zeros(2, 4, 0, 5), w=zeros(2, 4, 0, 5))),
    (ValueError, "v", dict(v=zeros(2, 4, 4, 0), w=zeros(2, 4, 4, 0))),
    (ValueError, "v", dict(v=zeros(2, 5, 4, 5), w=zeros(2, 5, 4, 5))),
    (ValueError, "v", dict(v=zeros(1, 4, 4, 5), w=zeros(1, 4, 4, 5))),
    (ValueError, "w", dict(w=zeros(2, 4, 4, 1))),
    *((ValueError, name, {name: zeros(2, 4, 2, 1)}) for name in "kgb"),
    *((ValueError, name, {name: zeros(2, 4, 4, 3)}) for name in "kgb"),
    (TypeError, "k", dict(k=zeros(*QK, dtype=torch.float64))),
    (TypeError, "v", dict(v=zeros(*VALUE, dtype=torch.bfloat16))),
    *((ValueError, n, {n: zeros(*(VALUE if n in "vw" else QK), device="meta")}) for n in "kvgbw"),
    (ValueError, "initial_state", dict(initial_state=zeros(2, 4, 3, 5, device="meta"))),
    (ValueError, "resets", dict(resets=zeros(2, 4, dtype=torch.bool, device="meta"))),
    (TypeError, "cu_seqlens", PACKED | dict(cu_seqlens=[0, 4])),
    (TypeError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([0.0, 4.0]))),
    (ValueError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([4]))),
    (ValueError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([[0, 4]]))),
    (ValueError, "q", dict(cu_seqlens=torch.tensor([0, 4]))),
    (ValueError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([1, 4]))),
    (ValueError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([0, 3]))),
    (ValueError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([0, 5]))),
    (ValueError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([0, 3, 2, 4]))),
    (ValueError, "cu_seqlens", PACKED | dict(cu_seqlens=torch.tensor([-1, 4]))),
    (TypeError, "resets", dict(resets=[True])),
    (TypeError, "resets", dict(resets=zeros(2, 4))),
    (ValueError, "resets", dict(resets=zeros(4, dtype=torch.bool))),
    (ValueError, "resets", dict(resets=zeros(2, 5, dtype=torch.bool))),
    (TypeError, "initial_state", dict(initial_state=0.0)),
    (TypeError, "initial_state", dict(initial_state=zeros(2, 4, 3, 5, dtype=torch.int32))),
    (ValueError, "initial_state", dict(initial_state=zeros(2, 2, 3, 5))),
    (ValueError, "initial_state", dict(initial_state=zeros(2, 4, 5, 3))),
    (ValueError, "initial_state", PACKED | dict(cu_seqlens=torch.tensor([0, 1, 4]), initial_state=zeros(1, 4, 3, 5))),
    (ValueError, "A_log", dict(use_gate_in_kernel=True)),
    (ValueError, "A_log", dict(use_gate_in_kernel=True, dt_bias=zeros(2, 3))),
    (TypeError, "A_log", dict(use_gate_in_kernel=True, A_log=1.0)),
    (TypeError, "A_log", dict(use_gate_in_kernel=True, A_log=zeros(2, dtype=torch.int64))),
    (ValueError, "A_log", dict(use_gate_in_kernel=True, A_log=zeros(3))),
    (ValueError, "A_log", dict(use_gate_in_kernel=True, A_log=zeros(2, device="meta"))),
    *((ValueError, "lower_bound", GATE | dict(lower_bound=x)) for x in (0.0, 5, float("-inf"), float("nan"), "-5")),
    (ValueError, "lower_bound", dict(lower_bound=-5.0)),
    (TypeError, "dt_bias", GATE | dict(dt_bias=0.0)),
    (TypeError, "dt_bias", GATE | dict(dt_bias=zeros(2, 3, dtype=torch.int64))),
    (ValueError, "dt_bias", GATE | dict(dt_bias=zeros(2))),
    (ValueError, "dt_bias", GATE | dict(dt_bias=zeros(3, 2))),
    (ValueError, "A_log", dict(A_log=zeros(2))),
    (ValueError, "dt_bias", dict(dt_bias=zeros(2, 3))),
    (ValueError, "erase_scale", dict(erase_scale=1.5, use_sigmoid_in_kernel=True)),
    (ValueError, "erase_scale", dict(erase_scale="2", use_sigmoid_in_kernel=True)),
    (ValueError, "erase_scale", dict(erase_scale=2.0)),
    (ValueError, "scale", dict(scale=float("nan"))),
    (ValueError, "scale", dict(scale=float("inf"))),
    (ValueError, "scale", dict(scale="1")),
]  # fmt: skip
ALL = [chunk_gdn2, recurrent_gdn2, naive_recurrent_gdn2]


@pytest.mark.parametrize("error, name, changes", REFUSALS, ids=lambda x: x if isinstance(x, str) else "")
def test_refusals_name_the_argument_what_came_and_what_is_wanted(error, name, changes):
    given = dict(zip("qkgb", [zeros(*QK)] * 4, strict=True)) | dict(v=zeros(*VALUE), w=zeros(*VALUE)) | changes
    for function in ALL:
        with pytest.raises(error) as refusal:
            function(**given)
        message = str(refusal.value)
        assert message.startswith(f"{name} is ") or message.startswith(f"{name} has "), message
        assert "must be" in message or "must start at" in message or "must have" in message, message


@functions
@pytest.mark.parametrize("backend", ["cuda", "", None, 1])
def test_an_unknown_backend_is_refused_with_the_list_of_those_there_are(backend, function):
    with pytest.raises(ValueError, match=r"^backend is .*; it must be one of 'auto', 'triton', 'torch', 'reference'"):
        function(**make(), backend=backend)


@functions
def test_the_triton_backend_is_refused_for_tensors_on_the_cpu(function, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^backend is 'triton'"):
        function(**make(), backend="triton")


def test_refusals_hold_under_compile():
    torch._dynamo.reset()
    inputs = make() | {"initial_state": zeros(3, 2, 4, 3, dtype=torch.float64)}
    with pytest.raises(Exception, match="initial_state has shape"):
        torch.compile(chunk_gdn2, fullgraph=True, backend="aot_eager")(**inputs)


IMPORTS = """
import sys, torch, torch.library, torch.utils.flop_counter  # the FLOP counter brings triton
for module in ("gdn2_titan.ops", "gdn2_titan.models"):
    before = set(sys.modules)
    __import__(module)
    print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_importing_the_op_or_the_models_adds_neither_torchtitan_nor_transformers_nor_the_op_triton():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    of_ops, of_models = (set(line.split()) for line in done.stdout.splitlines())
    assert "gdn2_titan" in of_ops and "gdn2_titan" in of_models
    assert not (of_ops | of_models) & {"torchtitan", "transformers", "datasets", "fla", "torchao"}
    assert "triton" not in of_ops
