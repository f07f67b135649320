"""The ops on a GPU, against the definition in fp64 on the CPU: the cases of the other tests, and what only a GPU shows.

At real sizes the fp64 side is the chunked PyTorch form, which the other tests hold to the definition within 1e-10.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.ops import chunk_gdn2, recurrent_gdn2, recurrent_gdn2_
from tests import conv_cases
from tests.gdn2_cases import (
    DECAYS,
    DEVICE,
    LEAVES,
    RAW,
    assert_close,
    assert_within_twice,
    cast,
    cotangents,
    errors,
    golden,
    in_half,
    leaves,
    make,
    on_device,
    random_resets,
    run,
    run_on_device,
)  # fmt: skip
from tests.kernel_launches import without_pytorchs_kernels
from tests.segment_cases import segment, segment_by_definition, without_gradients

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
functions = pytest.mark.parametrize("function", [chunk_gdn2, recurrent_gdn2], ids=lambda f: f.__name__)


def golden_chunked(inputs, output_grads):
    return run(functools.partial(chunk_gdn2, backend="torch"), cast(inputs, torch.float64), output_grads)


def assert_twice_rounding_at_most(function, exact_inputs, dtype, decay_dtype=FP32):
    """The error against fp64 is at most twice that of rounding the inputs, and a last rounding of the results."""
    rounded, output_grads = in_half(exact_inputs, dtype, decay_dtype), cotangents(exact_inputs)
    rounded_grads = [output_grads[0].to(dtype).double(), output_grads[1].float().double()]
    want, alone = golden_chunked(exact_inputs, output_grads), golden_chunked(rounded, rounded_grads)
    assert_within_twice(run_on_device(function, rounded, rounded_grads), want, alone, dtype)


@functions
@pytest.mark.parametrize("decay", DECAYS)
def test_every_strength_of_decay_is_exact_to_rounding(decay, function):
    inputs = make(B=2, T=150, H=2, groups=2, K=16, V=8, decay=decay, dtype=FP32)
    output_grads = cotangents(inputs)
    floor = 32 * torch.finfo(FP32).eps
    assert_close(run_on_device(function, inputs, output_grads), golden(inputs, output_grads), 1e-5, floor)


SMALL = {
    "one token": dict(T=1),
    "a chunk": dict(T=64),
    "a chunk and a token": dict(T=65),
    "odd sizes": dict(T=100, K=5, V=3),
    "no state": dict(T=100, state=False),
    "resets": dict(T=150, resets=random_resets(1, 150)),
    "every token resets": dict(T=70, resets=[True] * 70),
    "packed, empty ones too": dict(T=165, cu=[0, 0, 70, 71, 71, 100, 165]),
    "packed, resets": dict(T=100, cu=[0, 30, 100], resets=random_resets(1, 100, every=10)),
    "raw": dict(T=150, **RAW),
    "raw, flat bias, grouped, packed": dict(T=150, groups=3, cu=[0, 64, 150], **RAW | {"dt_bias": "[H * K]"}),
    "raw decay without a bias": dict(T=100, gate=True, dt_bias=None),
}


@functions
@pytest.mark.parametrize("case", SMALL)
def test_every_option_agrees_with_the_definition(case, function):
    inputs = make(**dict(K=16, V=16) | SMALL[case], dtype=FP32)
    output_grads = cotangents(inputs)
    floor = 32 * torch.finfo(FP32).eps
    assert_close(run_on_device(function, inputs, output_grads), golden(inputs, output_grads), 1e-5, floor)


SIZES = {"K = V = 64": (64, 64), "K = V = 128": (128, 128), "K = V = 256": (256, 256), "K = 80, V = 48": (80, 48)}


@pytest.mark.parametrize("size", SIZES)
def test_real_sizes_in_fp32_are_exact_to_rounding(size):
    K, V = SIZES[size]
    inputs = make(T=4096, H=4, K=K, V=V, **RAW, resets=random_resets(1, 4096, every=1000), dtype=FP32)
    output_grads = cotangents(inputs)
    floor = 32 * torch.finfo(FP32).eps
    assert_close(run_on_device(chunk_gdn2, inputs, output_grads), golden_chunked(inputs, output_grads), 1e-5, floor)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_real_sizes_in_half_precision_err_at_most_twice_what_rounding_the_inputs_does(size, dtype):
    K, V = SIZES[size]
    exact_inputs = make(T=4096, H=4, K=K, V=V, **RAW, resets=random_resets(1, 4096, every=1000))
    assert_twice_rounding_at_most(chunk_gdn2, exact_inputs, dtype)


HALF = {
    "weak": dict(),
    "strong": dict(decay="strong"),
    "mixed": dict(decay="mixed"),
    "spikes": dict(decay="spikes of -1e6"),
    "grouped, batch": dict(B=2, groups=4),
    "packed": dict(cu=[0, 0, 300, 301, 1000]),
    "raw, resets, grouped": dict(**RAW, groups=2, resets=random_resets(1, 1000)),
}


@functions
@pytest.mark.parametrize("decay_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", HALF)
def test_bf16_errs_at_most_twice_what_rounding_the_inputs_does(case, decay_dtype, function):
    exact_inputs = make(**dict(T=1000, H=2, K=128, V=128) | HALF[case])
    assert_twice_rounding_at_most(function, exact_inputs, BF16, decay_dtype)


def test_decoding_in_place_equals_the_whole_sequence():
    inputs = on_device(make(B=3, T=20, groups=2, K=64, V=64, **RAW, dtype=FP32))
    with torch.no_grad():
        want, want_state = recurrent_gdn2(**inputs, output_final_state=True, backend="torch")
        options = {n: x for n, x in inputs.items() if n not in ("q", "k", "v", "g", "b", "w", "initial_state")}
        state = inputs["initial_state"].detach().clone()
        steps = ({n: inputs[n][:, t : t + 1] for n in ("q", "k", "v", "g", "b", "w")} for t in range(20))
        got = torch.cat([recurrent_gdn2_(**step, **options, state=state, backend="triton") for step in steps], 1)
    assert_close({"o": got, "state": state}, {"o": want.double(), "state": want_state.double()}, 1e-5)


SEGMENTS = {
    "plain": dict(),
    "grouped, batch": dict(B=2, groups=2),
    "raw, a reset": dict(**RAW, resets=[False] * 999 + [True]),
}


@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_map_of_a_segment_in_fp32_is_exact_to_rounding(size, case):
    K, V = SIZES[size]
    inputs = make(**dict(T=1000, H=2, K=K, V=V, state=False, dtype=FP32) | SEGMENTS[case])
    floor = 32 * torch.finfo(FP32).eps
    with torch.no_grad():
        got = {name: x.cpu() for name, x in segment(on_device(inputs)).items()}
        assert_close(got, segment_by_definition(inputs), 1e-5, floor)


@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_map_of_a_segment_in_bf16_errs_at_most_twice_what_rounding_the_inputs_does(size, case):
    K, V = SIZES[size]
    exact_inputs = make(**dict(T=1000, H=2, K=K, V=V, state=False) | SEGMENTS[case])
    rounded = cast(exact_inputs, BF16, only=("q", "k", "v", "b", "w"))
    rounded = cast(rounded, FP32, only=("g", "A_log", "dt_bias"))
    with torch.no_grad():
        want = segment_by_definition(exact_inputs)
        alone = errors(segment_by_definition(rounded), want)
        got = {name: x.cpu() for name, x in segment(on_device(rounded)).items()}
    eps = torch.finfo(BF16).eps
    floor = torch.finfo(FP32).eps * max(size for _, size in alone.values())
    for name, (error, size) in errors(got, want).items():
        limit = 2 * alone[name][0] + 2 * eps * size + floor
        assert error <= limit, f"{name}: off by {error:.2e}; rounding the inputs alone gives {alone[name][0]:.2e}"


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_on_a_gpu_the_triton_kernels_run_and_nothing_else(backend, monkeypatch):
    without_pytorchs_kernels(monkeypatch)
    inputs = make(T=100, K=16, V=16, **RAW, dtype=BF16)
    run_on_device(chunk_gdn2, inputs, cotangents(inputs), backend)


def test_compiled_without_a_break_it_gives_what_it_gives_eagerly(monkeypatch):
    without_pytorchs_kernels(monkeypatch)

    def step(inputs):
        return chunk_gdn2(**inputs, output_final_state=True, backend="auto")

    compiled = torch.compile(step, fullgraph=True)
    for T in (200, 333):
        inputs = on_device(make(B=2, T=T, H=2, K=64, V=64, **RAW, resets=random_resets(2, T), dtype=BF16))
        output_grads = [grad.to(DEVICE) for grad in cotangents(inputs)]
        results = {}
        for function in (step, compiled):
            outputs = function(inputs)
            grads = [grad.to(x.dtype) for grad, x in zip(output_grads, outputs, strict=True)]
            results[function] = [*outputs, *torch.autograd.grad(outputs, list(leaves(inputs).values()), grads)]
        for eager, graph in zip(results[step], results[compiled], strict=True):
            torch.testing.assert_close(graph, eager, rtol=0, atol=0)


def test_forward_and_backward_with_resets_do_not_wait_for_the_gpu():
    inputs = on_device(make(T=300, K=64, V=64, **RAW, resets=random_resets(1, 300), dtype=BF16))
    do = torch.ones_like(inputs["v"])

    def step():
        torch.autograd.grad(chunk_gdn2(**inputs, backend="triton")[0], list(leaves(inputs).values()), do,
                            allow_unused=True)  # fmt: skip

    step()  # compiles and tunes
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_cuda_graph_of_forward_and_backward_replays_with_new_inputs_and_resets():
    T = 300
    static = on_device(make(T=T, K=64, V=64, **RAW, resets=random_resets(1, T), dtype=BF16))
    do = torch.ones_like(static["v"])

    def step(inputs):
        o, _ = chunk_gdn2(**inputs, backend="triton")
        return [o.detach(), *torch.autograd.grad(o, list(leaves(inputs).values()), do)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for seed in (1, 2):
        new = on_device(make(T=T, K=64, V=64, **RAW, resets=random_resets(1, T, seed), dtype=BF16, seed=seed))
        with torch.no_grad():
            for name in (*leaves(static), "resets"):
                static[name].copy_(new[name])
        graph.replay()
        for got, want in zip(captured, step(new), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def on_gpu(inputs):
    return {
        name: None if value is None else value.detach().cuda().requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }


CONVOLUTIONS = {
    "batch": dict(B=2, T=4099, D=2304),
    "width 2": dict(B=2, T=1000, D=300, W=2, bias=False, state=False),
    "width 3": dict(B=3, T=1000, D=300, W=3),
    "decode": dict(B=64, T=1, D=2048),
    "resets": dict(B=2, T=4096, D=1024, resets=[t % 97 in (0, 1, 50) for t in range(8192)]),
    "packed": dict(B=1, T=8192, D=1024, cu=[0, 0, *range(1, 8192, 31), 8192, 8192]),
    "packed with resets": dict(
        B=1, T=8192, D=520, cu=[0, 5, 4000, 4001, 8192], resets=[t % 97 in (0, 1, 50) for t in range(8192)]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_at_real_sizes_err_at_most_twice_as_much_as_pytorchs_kernel(case, activation, dtype):
    inputs = on_gpu(conv_cases.make(dtype=dtype, **CONVOLUTIONS[case]))
    got = conv_cases.results_of(inputs, activation, "auto")
    torch_path = conv_cases.results_of(inputs, activation, "torch")
    want = conv_cases.results_of(conv_cases.in_fp64(inputs), activation, "torch")
    for name, exact in want.items():
        assert got[name].dtype == torch_path[name].dtype == dtype, name
        errors = [(result[name].double() - exact).abs().max().item() for result in (got, torch_path)]
        slack = max(torch.finfo(dtype).eps / 8, 1e-6) * exact.abs().max().item()
        assert errors[0] <= 2 * errors[1] + slack, f"{name}: off by {errors[0]:.2e}, PyTorch by {errors[1]:.2e}"


def test_states_of_more_than_2_to_the_31_numbers_are_addressed_right():
    N, HV, K, V = 2049, 16, 256, 256
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of GPU memory")
    last = without_gradients(on_device(make(B=1, T=1, H=HV, K=K, V=V, **RAW, dtype=FP32)))
    want = recurrent_gdn2(**last, output_final_state=True, backend="triton")
    state = torch.zeros(N, HV, K, V, device="cuda")
    state[-1:] = last.pop("initial_state")
    many = {n: x.expand(N, *x.shape[1:]) if n in LEAVES and x.ndim == 4 else x for n, x in last.items()}
    o = recurrent_gdn2_(**many, state=state, backend="triton")
    assert torch.equal(o[-1:], want[0]) and torch.equal(state[-1:], want[1])


VOCABULARY, SPAN, REPEATS = 32, 8, 16


def repeating_batch(generator, batch=8):
    """Tokens [batch, REPEATS * SPAN]: a random span over and over. Past its first occurrence it can be remembered."""
    span = torch.randint(VOCABULARY, (batch, SPAN), generator=generator)
    return span.repeat(1, REPEATS)


def losses_of_training(steps, dtype):
    """Cross-entropy of each step of training a small model, in fp32 or under autocast."""
    torch.manual_seed(0)
    args = GDN2ModelArgs(vocab_size=VOCABULARY, hidden_size=128, n_layers=2, mlp_size=256, num_heads=2, head_dim=64)
    model = GDN2Model(args)
    model.init_weights()
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = repeating_batch(generator).to(DEVICE)
        with torch.autocast(DEVICE, dtype=BF16, enabled=dtype == BF16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.slow
def test_2000_steps_of_training_in_bf16_stay_beside_those_in_fp32():
    steps = 2000
    fp32, bf16 = (losses_of_training(steps, dtype) for dtype in (FP32, BF16))
    assert torch.isfinite(fp32).all() and torch.isfinite(bf16).all()
    # Averages over 200 steps, long after all is learned; 5% and a hundredth of a nat are what bf16 may cost.
    for start in range(1400, steps, 200):
        exact, rounded = (losses[start : start + 200].mean() for losses in (fp32, bf16))
        assert rounded <= 1.05 * exact + 0.01, f"steps from {start}: {rounded:.4f} and {exact:.4f} in fp32"
    # Only the first occurrence of a span cannot be foreseen, log(32) / 16 = 0.22 nats a token.
    assert bf16[-200:].mean() < 2 * math.log(VOCABULARY) / REPEATS
