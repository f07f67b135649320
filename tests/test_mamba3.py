"""Mamba-3, SISO and MIMO: the layer against its recurrence written out token by token in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from gdn2_titan.models import Mamba3
from gdn2_titan.parallel import muon_matrices
from tests.mamba_cases import FP64, some_resets

ranks = pytest.mark.parametrize("rank", [1, 3], ids=["SISO", "MIMO"])
H, P, N = 4, 6, 8


def layer(rank, dtype=FP64, **options):
    """Weights that all matter, decays of tens of tokens, and keys that turn round several times."""
    torch.manual_seed(0)
    built = Mamba3(20, H, P, N, rank, **options)
    for name, p in built.named_parameters():
        if "decay" not in name:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.5)
    torch.nn.init.normal_(built.decay.dt_bias, mean=-1.5)
    torch.nn.init.normal_(built.a_proj.weight, std=0.5)
    return built.to(dtype)


def normalised(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def turned(x, angle):
    """Channels i and i + G turned by angle i, the other half as they are."""
    G = len(angle)
    x = x.clone()
    a, b = x[..., :G].clone(), x[..., G : 2 * G].clone()
    x[..., :G] = a * torch.cos(angle) - b * torch.sin(angle)
    x[..., G : 2 * G] = b * torch.cos(angle) + a * torch.sin(angle)
    return x


def written_out(built, x, resets=None, documents_turn_afresh=False):
    """The layer one row, one token and one head at a time, in loops; the whole of a token written before it is read."""
    R, w = built.rank, dict(built.named_parameters())
    one = torch.ones(H, R, P, dtype=FP64)
    scale = {name: w.get(f"heads.{name}_scale", one) for name in ("in", "gate", "out")}
    rows = []
    for row in range(len(x)):
        outputs = []
        S, before = [torch.zeros(N, P, dtype=FP64)] * H, [None] * H
        angle = [torch.zeros(N // 4, dtype=FP64)] * H
        for t in range(x.shape[1]):
            if resets is not None and resets[row, t]:
                S, before = [torch.zeros(N, P, dtype=FP64)] * H, [None] * H
                if documents_turn_afresh:
                    angle = [torch.zeros(N // 4, dtype=FP64)] * H
            u = x[row, t]
            z, v, bc, dt, a, trap, theta = (
                w[f"{n}_proj.weight"] @ u for n in ("z", "x", "bc", "dt", "a", "trap", "angle")
            )
            B, C = normalised(bc.reshape(2, R, N)) * w["bc_norm.weight"][:, None]
            dt = torch.log1p(torch.exp(dt + w["decay.dt_bias"][:, 0]))
            A = torch.minimum(-torch.log1p(torch.exp(a)), torch.tensor(-1e-4, dtype=FP64))
            own, alpha = torch.sigmoid(trap), torch.exp(dt * A)
            beta, gamma = (1 - own) * dt * alpha, own * dt
            S, before, angle, y = list(S), list(before), list(angle), []
            for h in range(H):
                angle[h] = angle[h] + math.pi * torch.tanh(theta) * dt[h]
                k = turned(B + w["heads.bc_bias"][h, 0], angle[h])
                q = turned(C + w["heads.bc_bias"][h, 1], angle[h])
                mine = slice(h * P, (h + 1) * P)
                values = v[mine] * scale["in"][h]
                S[h] = alpha[h] * S[h] + gamma[h] * k.T @ values
                if before[h] is not None:
                    S[h] = S[h] + beta[h] * before[h]
                before[h] = k.T @ values
                o = q @ S[h] + w["heads.D"][h] * values
                y.append((o * F.silu(z[mine] * scale["gate"][h]) * scale["out"][h]).sum(0))
            outputs.append(w["o_proj.weight"] @ torch.cat(y))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@ranks
@pytest.mark.parametrize("backend", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_the_layer_is_the_recurrence_in_values_and_all_gradients_and_documents_know_nothing_of_each_other(
    rank, backend
):
    built = layer(rank, backend=backend)
    x = torch.randn(2, 75, 20, dtype=FP64, requires_grad=True)
    got, want = built(x, some_resets(2, 75)), written_out(built, x, some_resets(2, 75))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn_like(got)
    names, parameters = zip(*built.named_parameters(), strict=True)
    wanted = torch.autograd.grad(want, [x, *parameters], cotangent)
    for name, a, b in zip(["x", *names], torch.autograd.grad(got, [x, *parameters], cotangent), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), name


@torch.no_grad()
def test_memory_and_turns_of_these_tests_matter_across_chunks():
    built = layer(1)
    x = torch.randn(1, 75, 20, dtype=FP64)
    want = built(x)
    other = torch.cat((torch.randn(1, 60, 20, dtype=FP64), x[:, 60:]), 1)
    assert (want - built(other))[:, 70:].abs().max() > 1e-3 * want.abs().max()
    built.angle_proj.weight.zero_()
    assert (want - built(x))[:, 70:].abs().max() > 1e-2 * want.abs().max()


@torch.no_grad()
def test_it_does_not_matter_where_a_document_begins_to_turn():
    built, resets = layer(1), some_resets(2, 75)
    x = torch.randn(2, 75, 20, dtype=FP64)
    torch.testing.assert_close(
        written_out(built, x, resets, True), written_out(built, x, resets), rtol=1e-9, atol=1e-11
    )


@ranks
@torch.no_grad()
def test_a_layer_that_hands_on_its_state_equals_the_whole_sequence(rank):
    built, resets = layer(rank), some_resets(2, 80)
    x = torch.randn(2, 80, 20, dtype=FP64)
    want, parts, state = written_out(built, x, resets), [], None
    for start, end in ((0, 1), (1, 3), (3, 31), (31, 66), *((t, t + 1) for t in range(66, 80))):
        y, state = built(x[:, start:end], resets[:, start:end], state=state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_angles_of_a_long_text_are_right_in_fp32():
    """After 30,000 tokens that each turn by about a radian, a step in fp32 is that of a text that has just begun."""
    built = layer(1, torch.float32)
    x = torch.randn(1, 1, 20).expand(1, 30_000, 20)
    long, short = built(x, None), built(x[:, :2000], None)
    torch.testing.assert_close(long[:, -1], short[:, -1], rtol=1e-4, atol=1e-4)


def test_a_layer_starts_with_the_papers_values():
    torch.manual_seed(0)
    built = Mamba3(32, 512, 4, 4, rank=2)
    dt = F.softplus(built.decay.dt_bias)
    assert built.decay.A_log is None and 0.999e-3 <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.1001
    for name, value in {"D": 1, "bc_bias": 1, "gate_scale": 1, "in_scale": 0.5, "out_scale": 0.5}.items():
        assert (getattr(built.heads, name) == value).all(), name
    assert not any("scale" in name for name, _ in Mamba3(32, 4, 4, 4).named_parameters())


def test_a_layer_of_16_bits_keeps_its_steps_in_fp32():
    built = layer(2).bfloat16()
    x = torch.randn(1, 9, 20).bfloat16()
    y, state = built(x, return_state=True)
    assert built.decay.dt_bias.dtype == state.memory.dtype == state.turned.dtype == torch.float32
    assert y.dtype == state.key.dtype == torch.bfloat16
    want = written_out(built.double(), x.double())
    assert (y.double() - want).abs().max() < 0.1 * want.abs().max()


@ranks
def test_a_layer_runs_under_autocast(rank):
    built, x = layer(rank, torch.float32), torch.randn(2, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = built(x)
        y.float().sum().backward()
    want = built(x)
    assert y.dtype == torch.bfloat16 and (y - want).abs().max() < 0.05 * want.abs().max()


def test_muon_takes_values_and_gate_head_by_head_and_each_key_and_query_apart():
    built = layer(3)
    found = {name: muon_matrices(built)[p] for name, p in built.named_parameters() if p in muon_matrices(built)}
    assert found == {"z_proj.weight": P, "x_proj.weight": P, "bc_proj.weight": N, "o_proj.weight": None}


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^rank is 0; it must be a whole number of at least 1$"):
        Mamba3(20, 4, rank=0)
    with pytest.raises(ValueError, match=r"^state_size is 6; of Mamba-3 layers it must be a multiple of 4$"):
        Mamba3(20, 4, state_size=6)
