"""What each token erases from the memory and writes to it, by the recurrence itself."""

from typing import NamedTuple

import torch

__all__ = ["Memory", "follow_memory"]


class Memory(NamedTuple):
    """Frobenius norms [T, HV] per token and value head, and what shows that it is the same memory: o and the state."""

    decayed: torch.Tensor  # ||S_{t-1}|| - ||D||, where D = Diag(exp(g_t)) S_{t-1}
    erased: torch.Tensor  # ||k_t (b_t * k_t)^T D||
    written: torch.Tensor  # ||k_t (w_t * v_t)^T||
    state: torch.Tensor  # ||S_t||
    o: torch.Tensor  # [T, HV, V]
    final_state: torch.Tensor  # [HV, K, V]


def follow_memory(q, k, g, b, v, w):
    """A Memory of one sequence that starts with an empty state. Holds one state at a time.

    Args: q, k, g, b [T, H, K]; v, w [T, HV, V], of one dtype, every gate applied, q and k normalised.
    """
    T, H, K = q.shape
    HV, V = v.shape[1:]
    S = q.new_zeros(HV, K, V)
    norms = q.new_empty(4, T, HV)
    o = torch.empty_like(v)
    for t in range(T):
        # Value head j reads key head j // (HV // H).
        query, key, decay, erase = (x[t].repeat_interleave(HV // H, 0) for x in (q, k, g.exp(), b))
        before = S.norm(dim=(1, 2))
        S = decay[:, :, None] * S
        read, written = torch.einsum("hk,hkv->hv", erase * key, S), w[t] * v[t]
        # What is erased and what is written are products of a column and a row: so are their norms.
        length = key.norm(dim=1)
        norms[0, t], norms[1, t] = before - S.norm(dim=(1, 2)), length * read.norm(dim=1)
        S = S + key[:, :, None] * (written - read)[:, None, :]
        norms[2, t], norms[3, t] = length * written.norm(dim=1), S.norm(dim=(1, 2))
        o[t] = K**-0.5 * torch.einsum("hk,hkv->hv", query, S)
    return Memory(*norms, o, S)
