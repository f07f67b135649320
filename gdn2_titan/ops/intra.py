"""Inside one chunk: decayed products and the triangular inverse, by halving.

Wanted for every chunk of C tokens, with G_r the sum of g up to and including r,

    A_qk[r, s] = sum_d q_r k_s exp(G_r - G_s)    r >= s
    T[r, s]    = sum_d b_r k_r k_s exp(G_r - G_s)    r > s        A = (I + T)^-1

A chunk is halved again and again. Where the rows r lie in the right half of a block and the columns s in its left half,

    exp(G_r - G_s) = exp(g summed from the middle to r) * exp(g summed from s + 1 to the middle)

is a product of two factors that each lie in [0, 1], whatever the decay, and the block is one matrix product. The
diagonal needs no exponential. The sums are built up by adding, never by subtracting, so a decay of -1e6 or -inf does
no harm to its neighbours. The inverse is joined from the inverses of the halves in the same sweep:

    [[P, 0], [M, Q]]^-1 = [[P^-1, 0], [-Q^-1 M P^-1, Q^-1]]

C must be a power of two. Shapes: M is the number of chunks (times batch and heads), K the key size.
"""

import torch

__all__ = ["Decays", "intra_chunk", "intra_chunk_backward"]


def _right(x, m):
    """The right halves of the blocks of 2m tokens: a view [M, C / 2m, m, ...] of x [M, C, ...]."""
    return x.view(x.shape[0], -1, 2, m, *x.shape[2:])[:, :, 1]


def _left(x, m):
    return x.view(x.shape[0], -1, 2, m, *x.shape[2:])[:, :, 0]


def _block(x, m):
    """The sub-diagonal blocks (right rows, left columns) of x [M, C, C]: a view [M, C / 2m, m, m]."""
    M, C, _ = x.shape
    blocks = x.view(M, C // (2 * m), 2 * m, C // (2 * m), 2 * m).diagonal(dim1=1, dim2=3)  # [M, 2m, 2m, C / 2m]
    return blocks[:, m:, :m].permute(0, 3, 1, 2)


class Decays:
    """Decay factors within blocks that double in size, from gamma = exp(g) [M, C, K]: ``up`` from a block's start to r,
    both included; ``down`` from s + 1 to the block's end; ``total`` over the block [M, C / m, K]. Only products of
    numbers in [0, 1], log2(C) deep: nothing overflows, nothing cancels, and one exponential per token is all it takes.
    """

    def __init__(self, gamma):
        self.up, self.down, self.total = gamma.clone(), torch.ones_like(gamma), gamma

    def double(self, m):
        """From blocks of m tokens to blocks of 2m."""
        total = self.total.view(self.total.shape[0], -1, 2, self.total.shape[-1])
        _right(self.up, m).mul_(total[:, :, :1])
        _left(self.down, m).mul_(total[:, :, 1:])
        self.total = total[:, :, 0] * total[:, :, 1]


def intra_chunk(q, kb, k, gamma, keep=None):
    """q (scaled), kb = b * k, k, g [M, C, K] -> A_qk [M, C, C], A [M, C, C], DecaySums over whole chunks.

    keep: a list that receives each level's factors for ``intra_chunk_backward``.
    """
    M, C, K = k.shape
    decays = Decays(gamma)
    qb = torch.stack((q, kb), 2)  # [M, C, 2, K]: a token's query and erase row side by side share one product
    a_qk = k.new_zeros(M, C, C)
    a_qk.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    inverse = k.new_ones(M, C, 1, 1)  # of the diagonal blocks, [M, C / m, m, m]
    m = 1
    while m < C:
        n = C // (2 * m)
        up, down = _right(decays.up, m), _left(decays.down, m)  # [M, n, m, K]
        rows = _right(qb, m) * up.unsqueeze(-2)  # [M, n, m, 2, K]
        cols = _left(k, m) * down  # [M, n, m, K]
        product = torch.bmm(rows.view(M * n, 2 * m, K), cols.view(M * n, m, K).mT).view(M, n, m, 2, m)
        _block(a_qk, m).copy_(product[..., 0, :])
        halves = inverse.view(M, n, 2, m, m)
        joined = inverse.new_zeros(M, n, 2 * m, 2 * m)
        joined[:, :, :m, :m] = halves[:, :, 0]
        joined[:, :, m:, m:] = halves[:, :, 1]
        joined[:, :, m:, :m] = (halves[:, :, 1] @ product[..., 1, :] @ halves[:, :, 0]).neg_()
        inverse = joined
        if keep is not None:
            keep.append((up.clone(), down.clone(), rows, cols))
        decays.double(m)
        m *= 2
    return a_qk, inverse.view(M, C, C), decays


def intra_chunk_backward(da_qk, dt, K, keep):
    """Gradients of the decayed products below the diagonal, with respect to q (scaled), b * k and k.

    da_qk, dt [M, C, C]: gradients of A_qk and of T (not of its inverse); only r > s is read, the caller adds the
    diagonal, which holds no decay. keep: from ``intra_chunk``, emptied here.
    Returns dqb [M, C, 2, K] (the gradients of q and of b * k side by side) and dk [M, C, K].
    """
    M, C, _ = da_qk.shape
    dqb, dk = da_qk.new_zeros(M, C, 2, K), da_qk.new_zeros(M, C, K)
    while keep:
        up, down, rows, cols = keep.pop()
        n, m = up.shape[1:3]
        dproduct = torch.stack((_block(da_qk, m), _block(dt, m)), 3).view(M * n, 2 * m, m)
        drows = torch.bmm(dproduct, cols.view(M * n, m, K)).view(M, n, m, 2, K)
        dcols = torch.bmm(dproduct.mT, rows.view(M * n, 2 * m, K)).view(M, n, m, K)
        _right(dqb, m).addcmul_(drows, up.unsqueeze(-2))
        _left(dk, m).addcmul_(dcols, down)
    return dqb, dk
