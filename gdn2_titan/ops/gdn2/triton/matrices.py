"""The matrices that sums of decays are products with, as a table: kernels would make them anew at every use, element by
element, and that would be a fifth of their code."""

import functools

import torch
from torch import Tensor

from ..flops import CHUNK

__all__ = ["BEHIND", "FROM", "MASKS", "UP_TO", "WEIGHTS", "sum_matrices"]

DEPTH = CHUNK.bit_length() - 1
# Numbers in the table; of the weights and of the masks there are 2 DEPTH, in the order of ``decays.step_number``.
UP_TO, BEHIND, FROM, WEIGHTS, MASKS = 0, 1, 2, 3, 3 + 2 * DEPTH


@functools.cache
def sum_matrices(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n, CHUNK, CHUNK] of 0, 1 and +-1/2, row r and column j: whether j <= r, j > r, j >= r; the weights of token j in
    the log of the factor of row r, step by step (see ``decays``); and which products of row r and column j <= r a step
    makes."""
    if device.type != "cuda":
        return _matrices(device, dtype)
    # Whoever makes a CUDA graph gives it all that the current stream allocates, and this outlives the graph.
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        found = _matrices(device, dtype)
    stream.synchronize()
    return found


def _matrices(device, dtype):
    r = torch.arange(CHUNK, device=device)[:, None]
    j = r.T
    weights, masks = [], []
    for depth in range(DEPTH):  # blocks of 2^depth tokens around their middle; of one token nothing is left
        same = r >> depth == j >> depth
        weights.append(same * torch.where(j <= r, 0.5, -0.5) * (depth > 0))
        masks.append(same)
    for depth in range(DEPTH):  # joins of two such blocks
        same = r >> depth == j >> depth
        right = (r >> depth) % 2 == 1
        weights.append(same & torch.where(right, j <= r, j > r))
        masks.append(right & (j >> depth == (r >> depth) - 1))
    return torch.stack([x.to(dtype) for x in (j <= r, j > r, j >= r, *weights, *masks)])
