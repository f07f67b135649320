"""Maps of segments in a row, and the states between them, in fp64."""

import torch


def maps(B=2, count=3, H=2, groups=2, K=20, V=18, state=True, D=True):
    """M [B, count, H, K, K] that keeps the size of a state, D and an entering state, or None; fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, count, H, K, K), (B, count, H * groups, K, V), (B, H * groups, K, V)
    M, contributions, S = (torch.randn(shape, generator=generator) for shape in shapes)
    return M * K**-0.5, contributions if D else None, S if state else None


def folded_by_hand(M, D, state, transposed):
    """One value head after the other, in fp64."""
    M, count = M.double(), M.shape[1]
    D = state.new_zeros(1).expand(len(state), count, *state.shape[1:]) if D is None else D
    left, entered = torch.zeros_like(D[:, 0].double()) if state is None else state.double(), [None] * count
    for c in reversed(range(count)) if transposed else range(count):
        entered[c] = left
        matrices = [M[:, c, hv // (D.shape[2] // M.shape[2])] for hv in range(D.shape[2])]
        products = [(m.mT if transposed else m) @ left[:, hv] for hv, m in enumerate(matrices)]
        left = torch.stack(products, 1) + D[:, c]
    return {"entered": torch.stack(entered, 1), "left": left}
