"""Mamba-2: the layer against its recurrence written out token by token in fp64."""

import pytest
import torch

from gdn2_titan.models import GDN2ModelArgs, Mamba2
from gdn2_titan.parallel import muon_matrices
from tests.mamba_cases import FP64, some_resets


def layer(dtype=FP64, **options):
    """Weights that all matter, and decays of tens of tokens."""
    torch.manual_seed(0)
    built = Mamba2(20, 4, 6, 5, **options)
    for name, p in built.named_parameters():
        if "decay" not in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.5)
    torch.nn.init.uniform_(built.decay.A_log, -1, 1)
    return built.to(dtype)


def written_out(built, x, resets=None):
    """The layer one row, one token and one head at a time, in loops."""
    H, P, N, weights = 4, 6, 5, dict(built.named_parameters())

    def silu(y):
        return y / (1 + torch.exp(-y))

    def convolved(name, projected, t, start):
        weight, y = weights[f"{name}_conv1d.weight"], weights[f"{name}_conv1d.bias"]
        for tap in range(4):
            if t - 3 + tap >= start:
                y = y + weight[:, tap] * projected[t - 3 + tap]
        return silu(y)

    A, bias = -torch.exp(weights["decay.A_log"].to(FP64)), weights["decay.dt_bias"].to(FP64)[:, 0]
    rows = []
    for row in range(len(x)):
        z, values, bc, raw = (x[row] @ weights[f"{name}_proj.weight"].T for name in ("z", "x", "bc", "dt"))
        states, outputs, start = [torch.zeros(N, P, dtype=FP64)] * H, [], 0
        for t in range(x.shape[1]):
            if resets is not None and resets[row, t]:
                states, start = [torch.zeros(N, P, dtype=FP64)] * H, t
            v, keys = convolved("x", values, t, start), convolved("bc", bc, t, start)
            B, C = keys[:N], keys[N:]
            dt, y = torch.log1p(torch.exp(raw[t] + bias)), []
            for h in range(H):
                vh = v[h * P : (h + 1) * P]
                states[h] = torch.exp(dt[h] * A[h]) * states[h] + dt[h] * torch.outer(B, vh)
                y.append(states[h].T @ C + weights["skip.weight"][h] * vh)
            y = torch.cat(y) * silu(z[t])
            y = y / torch.sqrt((y * y).sum() / (H * P) + built.o_norm.eps) * weights["o_norm.weight"]
            outputs.append(weights["o_proj.weight"] @ y)
            states = list(states)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_layer_is_the_recurrence_in_values_and_all_gradients_and_documents_know_nothing_of_each_other(backend):
    built = layer(backend=backend)
    x = torch.randn(2, 75, 20, dtype=FP64, requires_grad=True)
    got, want = built(x, some_resets(2, 75)), written_out(built, x, some_resets(2, 75))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn_like(got)
    names, parameters = zip(*built.named_parameters(), strict=True)
    wanted = torch.autograd.grad(want, [x, *parameters], cotangent)
    for name, a, b in zip(["x", *names], torch.autograd.grad(got, [x, *parameters], cotangent), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), name


def test_memory_of_these_tests_crosses_chunks():
    built = layer()
    x = torch.randn(1, 75, 20, dtype=FP64)
    other = torch.cat((torch.randn(1, 60, 20, dtype=FP64), x[:, 60:]), 1)
    with torch.no_grad():
        assert (built(x) - built(other))[:, 70:].abs().max() > 1e-3 * built(x).abs().max()


def test_a_layer_that_hands_on_its_state_equals_the_whole_sequence():
    built, resets = layer(), some_resets(2, 80)
    x = torch.randn(2, 80, 20, dtype=FP64)
    with torch.no_grad():
        want, parts, state = written_out(built, x, resets), [], None
        for start, end in ((0, 1), (1, 3), (3, 66), *((t, t + 1) for t in range(66, 80))):
            y, state = built(x[:, start:end], resets[:, start:end], state=state, return_state=True)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-11)


def test_a_layer_starts_with_the_papers_decays_and_a_skip_of_one():
    torch.manual_seed(0)
    built = Mamba2(32, 512, 4, 4)
    A, dt = built.decay.A_log.exp(), torch.nn.functional.softplus(built.decay.dt_bias)
    assert 0.999 <= A.min() < 1.2 and 15.8 < A.max() <= 16.001
    assert 0.999e-3 <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.1001
    assert (built.skip.weight == 1).all() and (built.o_norm.weight == 1).all()
    assert built.x_conv1d.bias.abs().max() <= 0.5 and built.bc_conv1d.weight.std() > 0.2


def test_the_papers_shape_is_the_default_of_a_model():
    args = GDN2ModelArgs(layer_pattern=("mamba2",))
    assert args.mamba_heads * args.mamba_head_dim == 2 * args.hidden_size and args.mamba_state == 64


def test_a_decay_stays_in_fp32_in_a_layer_of_16_bits():
    built = layer().bfloat16()
    assert built.decay.A_log.dtype == torch.float32 and built(torch.randn(1, 9, 20).bfloat16()).dtype == torch.bfloat16


def test_a_layer_runs_under_autocast():
    built, x = layer(torch.float32), torch.randn(2, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = built(x)
        y.float().sum().backward()
    want = built(x)
    assert y.dtype == torch.bfloat16 and (y - want).abs().max() < 0.05 * want.abs().max()


def test_muon_takes_values_and_gate_head_by_head_keys_and_queries_apart():
    built = layer()
    found = {name: muon_matrices(built)[p] for name, p in built.named_parameters() if p in muon_matrices(built)}
    assert found == {"z_proj.weight": 6, "x_proj.weight": 6, "bc_proj.weight": 5, "o_proj.weight": None}


def test_a_size_that_is_no_count_is_refused():
    with pytest.raises(ValueError, match=r"^num_heads is 0; it must be a whole number of at least 1$"):
        Mamba2(20, 0)
