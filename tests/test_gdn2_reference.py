"""naive_recurrent_gdn2, which all else is measured by, against the recurrence written with matrices in NumPy."""

import math

import numpy as np
import pytest
import torch

from gdn2_titan.ops import naive_recurrent_gdn2
from tests.gdn2_cases import RESULTS, make, spans


def by_hand(inputs):
    """S_t = (I - k_t (b_t * k_t)^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t * v_t)^T, o_t = scale * S_t^T q_t."""
    q, k, v, g, b, w, A_log, dt_bias, initial_state = (
        None if inputs.get(name) is None else inputs[name].detach().numpy()
        for name in ("q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state")
    )
    _, _, H, K = q.shape
    HV, V = v.shape[2:]
    scale = 1 / math.sqrt(K) if inputs["scale"] is None else inputs["scale"]
    o = np.full(v.shape, np.nan)
    final_state = np.full((len(spans(inputs)), HV, K, V), np.nan)
    for n, (row, start, end) in enumerate(spans(inputs)):
        for j in range(HV):
            h = j // (HV // H)
            state = np.zeros((K, V)) if initial_state is None else initial_state[n, j]
            for t in range(start, end):
                query, key, decay, erase, write = q[row, t, h], k[row, t, h], g[row, t, h], b[row, t, h], w[row, t, j]
                if inputs["use_qk_l2norm_in_kernel"]:
                    query = query / math.sqrt(sum(x * x for x in query) + 1e-6)
                    key = key / math.sqrt(sum(x * x for x in key) + 1e-6)
                if inputs["use_gate_in_kernel"]:
                    raw = decay if dt_bias is None else decay + dt_bias.reshape(H, K)[h]
                    decay = np.array([-math.exp(A_log[h]) * math.log(1 + math.exp(x)) for x in raw])
                if inputs["use_sigmoid_in_kernel"]:
                    erase = inputs["erase_scale"] / (1 + np.exp(-erase))
                    write = 1 / (1 + np.exp(-write))
                if inputs["resets"] is not None and inputs["resets"][row, t]:
                    state = np.zeros((K, V))
                erasure = np.eye(K) - np.outer(key, erase * key)
                state = erasure @ np.diag(np.exp(decay)) @ state + np.outer(key, write * v[row, t, j])
                o[row, t, j] = scale * state.T @ query
            final_state[n, j] = state
    return torch.from_numpy(o), torch.from_numpy(final_state)


RAW = dict(l2norm=True, gate=True, sigmoid=True)
CASES = {
    "plain": dict(state=False),
    "batch, grouped value heads and initial state": dict(B=2, H=2, groups=3),
    "scale": dict(scale=0.37),
    "resets at the first token and inside": dict(B=2, resets=[1, 0, 0, 1, 1, 0, 0, 0] + [0, 0, 0, 0, 0, 1, 0, 1]),
    "packed with empty sequences and states": dict(cu=[0, 0, 3, 3, 7, 8, 8], groups=2),
    "packed without states": dict(cu=[0, 2, 8], state=False),
    "packed and resets": dict(cu=[0, 4, 8], resets=[0, 1, 0, 0, 1, 0, 0, 1]),
    "l2norm": dict(l2norm=True),
    "raw decay": dict(gate=True),
    "raw decay, flat bias": dict(gate=True, dt_bias="[H * K]"),
    "raw decay, no bias": dict(gate=True, dt_bias=None),
    "gate logits": dict(sigmoid=True),
    "gate logits, erase up to 2": dict(sigmoid=True, erase_scale=2.0),
    "everything": dict(**RAW, erase_scale=2.0, groups=2, cu=[0, 3, 3, 8], resets=[0, 0, 1, 0, 0, 1, 0, 0], scale=2.0),
    "one channel": dict(K=1, V=1, H=1),
    "decay to nothing": dict(decay="spikes of -inf"),
    "mixed decay": dict(decay="mixed", B=3, K=5, V=7),
}


@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_recurrence_written_with_matrices(case):
    inputs = make(**CASES[case])
    outputs = naive_recurrent_gdn2(**inputs, output_final_state=True)
    for name, got, want in zip(RESULTS, outputs, by_hand(inputs), strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


def test_final_state_is_none_unless_asked_for():
    assert naive_recurrent_gdn2(**make())[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_below_fp64_it_computes_in_fp32_and_returns_v_s_dtype_and_an_fp32_state(dtype):
    inputs = make(T=20, dtype=dtype)
    o, final_state = naive_recurrent_gdn2(**inputs, output_final_state=True)
    assert (o.dtype, final_state.dtype) == (dtype, torch.float32)
    wide = inputs | {name: inputs[name].detach().double() for name in ("q", "k", "v", "g", "b", "w", "initial_state")}
    exact, exact_state = by_hand(wide)
    torch.testing.assert_close(final_state.detach().double(), exact_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o.detach(), exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
