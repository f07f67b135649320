"""Inside one chunk: decayed products and the triangular inverse, by halving.

Wanted for every chunk of C tokens, with G_r the sum of g up to and including r,

    A_qk[r, s] = sum_d q_r k_s exp(G_r - G_s)    r >= s
    T[r, s]    = sum_d b_r k_r k_s exp(G_r - G_s)    r > s        A = (I + T)^-1

A chunk is halved again and again. Where the rows r lie in the right half of a block and the columns s in its left half,

    exp(G_r - G_s) = exp(g summed from the middle to r) * exp(g summed from s + 1 to the middle)

is a product of two factors that each lie in [0, 1], whatever the decay, and the block is one matrix product. The
diagonal needs no exponential. The rows and columns carry their factors along while the blocks double: when two blocks
of m tokens are joined, rows of the right one take on the decay over the left one, columns of the left one the decay
over the right one. So only exp(g) and products of numbers in [0, 1] ever occur, log2(C) deep: nothing overflows and
nothing cancels, and a decay of -1e6 or -inf does no harm to its neighbours. When the block is the chunk, the rows have
become Q = exp(G) * q and E = exp(G) * b * k, the columns Kt = exp(G_C - G) * k. The backward unwinds the same factors.

The inverse is joined from the inverses of the halves in the same sweep:

    [[P, 0], [M, Q]]^-1 = [[P^-1, 0], [-Q^-1 M P^-1, Q^-1]]

Where nothing is erased there are no rows E, no T, and nothing to invert.

C must be a power of two. Shapes: M is the number of chunks (times batch and heads), R is 2, or 1 where nothing is
erased, K the key size, n = C / 2m.
"""

import torch
from torch import Tensor

__all__ = ["intra_chunk", "intra_chunk_backward"]


def _halves(x, m):
    """x [M, C, ...] contiguous -> views [M * n, m, ...] of the left and the right halves of all blocks of 2m tokens."""
    x = x.view(-1, 2, m, *x.shape[2:])
    return x[:, 0], x[:, 1]


def _blocks(x, m, row, column, per_token=1):
    """Views [M * n, m * per_token, m] into the blocks of 2m tokens along the diagonal of x [M, C * per_token + 1, C].

    row, column: 0 for the left, 1 for the right half. The spare last row of each matrix is what makes the blocks of
    all matrices one evenly strided batch, which ``torch.bmm`` reads without a copy.
    """
    M, R, C = x.shape
    stride = 2 * m * (per_token * C + 1)
    offset = m * (row * per_token * C + column)
    return x.as_strided((M * C // (2 * m), m * per_token, m), (stride, C, 1), x.storage_offset() + offset)


def intra_chunk(qe: Tensor, k: Tensor, gamma: Tensor, keep: list | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """A_qk and A [M, C, C] and exp(G_C) [M, K], from qe [M, C, R, K], k and gamma = exp(g) [M, C, K]; A is None where
    R is 1.

    qe holds q and b * k of each token side by side, so that they share one product; or q alone. qe and k are
    overwritten with (Q, E) and Kt. keep: a list that receives what ``intra_chunk_backward`` needs of each level.
    """
    M, C, K = k.shape
    R = qe.shape[2]
    a_qk, inverse = k.new_zeros(M, C + 1, C), None if R == 1 else k.new_zeros(M, C + 1, C)
    a_qk.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(qe[:, :, 0], k))
    if inverse is not None:
        inverse.diagonal(dim1=1, dim2=2).fill_(1)
    qe.mul_(gamma.unsqueeze(2))
    total = gamma  # over each block of m tokens
    m = 1
    while m < C:
        rows, cols = _halves(qe, m)[1].flatten(1, 2), _halves(k, m)[0]  # [M * n, R * m, K], [M * n, m, K]
        product = torch.bmm(rows, cols.mT).view(-1, m, R, m)
        _blocks(a_qk, m, 1, 0).copy_(product[:, :, 0])
        if inverse is not None:
            joined = torch.bmm(_blocks(inverse, m, 1, 1), product[:, :, 1]).bmm(_blocks(inverse, m, 0, 0))
            torch.neg(joined, out=_blocks(inverse, m, 1, 0))
        left, right = _halves(total.view(M, -1, K), 1)  # [M * n, 1, K]
        if keep is not None:
            keep.append((rows.clone(), cols.clone(), left, right))
        rows.mul_(left)
        cols.mul_(right)
        total = left * right
        m *= 2
    return a_qk[:, :C], None if inverse is None else inverse[:, :C], total.view(M, K)


def intra_chunk_backward(
    dproduct: Tensor, dqe: Tensor, dk: Tensor, dtotal: Tensor, gamma: Tensor, keep: list
) -> Tensor:
    """From the gradients of Q, E and Kt, in place, to those of q, b * k and k, those of A_qk and T included.

    dproduct [M, R C + 1, C]: the gradients of A_qk and T (not of its inverse), their rows alternating, and a spare row;
    only r > s is read, the caller adds the diagonal of A_qk, which holds no decay. dqe [M, C, R, K], dk [M, C, K].
    keep: from ``intra_chunk``, emptied here. dtotal [M, K]: the gradient of G_C through the state.

    Returns what g [M, C, K] gains from all decays that rows and columns took on when blocks were joined. What is left
    is exp(g) of the row itself: the caller adds q * dq + (b * k) * d(b * k). A gradient goes only where there was a
    decay, so it vanishes with the decay; a difference of row and column sums would leave rounding errors instead.
    """
    M, C, K = dk.shape
    R = dqe.shape[2]
    dlog = dtotal.reshape(M, 1, K)  # with respect to the log of ``total``
    while keep:
        rows, cols, left, right = keep.pop()
        m = cols.shape[1]
        dblock = _blocks(dproduct, m, 1, 0, per_token=R)  # [M * n, R m, m]
        drows, dcols = _halves(dqe, m)[1].flatten(1, 2), _halves(dk, m)[0]
        if m > 1:
            more_rows, more_cols = torch.bmm(dblock, cols), torch.bmm(dblock.mT, rows)
        else:  # torch.bmm would run a slow scalar loop over products this small
            more_rows, more_cols = dblock * cols, (dblock * rows).sum(1, keepdim=True)
        dlog = dlog.view(-1, 1, K).repeat(1, 2, 1)  # [M * n, 2, K]
        dlog[:, :1].addcmul_(left, rows.mul_(drows).sum(1, keepdim=True))
        dlog[:, 1:].addcmul_(right, cols.mul_(dcols).sum(1, keepdim=True))
        torch.addcmul(more_rows, drows, left, out=drows)
        torch.addcmul(more_cols, dcols, right, out=dcols)
    dqe.mul_(gamma.unsqueeze(2))
    return dlog.view(M, C, K)
