"""Muon for the models' matrices, whole or sharded.

An update of Muon is the momentum with its singular values made nearly alike (Newton-Schulz). That is a function of a
whole matrix: which matrix a weight is, or how many, and on which ranks its parts lie, decides what comes out.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gdn2_titan.models.attention import Attention
from gdn2_titan.models.decoder import SwiGLU
from gdn2_titan.models.layer import GatedDeltaNet2
from gdn2_titan.models.mamba2 import Mamba2
from gdn2_titan.models.mamba3 import Mamba3

__all__ = ["Muon", "muon_matrices", "orthogonalised"]

# Of the odd polynomial a s + b s^3 + c s^5 that is applied to all singular values s again and again.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon_matrices(model: nn.Module) -> dict[nn.Parameter, int | None]:
    """{weight: the rows of one head, or None where all of it is one matrix} of what Muon is meant for in the mixers and
    MLPs of this package, in anybody's model.

    Projections to heads are one matrix for each head: heads are normalised and used apart, so the size of an update is
    that of its largest head, and no head's should depend on the others. What the heads go into is one matrix, as the
    matrices of an MLP are. Low-rank factors, projections to one number a head, convolutions, vectors, embeddings and
    output head are not among them.
    """
    found: dict[nn.Parameter, int | None] = {}
    for module in model.modules():
        if isinstance(module, SwiGLU):
            found |= {part.weight: None for part in (module.gate_proj, module.up_proj, module.down_proj)}
        elif isinstance(module, Attention):
            found |= {part.weight: module.head_dim for part in (module.q_proj, module.k_proj, module.v_proj)}
            found[module.o_proj.weight] = None
        elif isinstance(module, GatedDeltaNet2):
            found |= _of_gdn2(module)
        elif isinstance(module, (Mamba2, Mamba3)):
            found |= {part.weight: module.head_dim for part in (module.z_proj, module.x_proj)}
            found |= {module.bc_proj.weight: module.state_size, module.o_proj.weight: None}
    return found


def _of_gdn2(layer):
    found = {layer.o_proj.weight: None}
    of_keys = [layer.q_proj, layer.k_proj, layer.erase_proj]
    of_values = [layer.v_proj, layer.write_proj]
    if layer.decay_low_proj is None:
        of_keys.append(layer.decay_proj)
    if layer.gate_low_proj is None:
        of_values.append(layer.gate_proj)
    for parts, size in ((of_keys, layer.head_dim), (of_values, layer.head_v_dim)):
        channels = parts[0].weight.shape[0]
        # A gate or a decay with one number a head has fewer rows.
        found |= {part.weight: size for part in parts if part is not None and part.weight.shape[0] == channels}
    return found


class Muon(torch.optim.Muon):
    """``torch.optim.Muon``, also of DTensors, and of weights that are several matrices.

    A group's ``head_rows`` says how many rows [head_rows, in] of its weights [out, in] are one matrix; None: all of
    them. Momentum, Nesterov's step, weight decay and ``adjust_lr_fn`` are torch's, the last by the shape of one matrix.
    The iteration runs in bfloat16, as torch's, but on a CPU in the weights' dtype. Of a sharded weight the whole
    matrices are brought together on ranks that share the work among them, where its shards are not whole heads anyway.

    Raises:
        ValueError: as torch's; a weight's rows are no multiple of ``head_rows``.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            rows = group.setdefault("head_rows", None)
            for p in group["params"]:
                if rows is not None and p.shape[0] % rows:
                    raise ValueError(f"head_rows is {rows}; it must divide the {p.shape[0]} rows of every weight")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. closure: evaluates the model again and returns the loss, as torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, rows = group["lr"], group["momentum"], group["head_rows"]
            found: tuple[list[Tensor], ...] = ([], [], [])
            self._init_group(group, *found)
            for some in _chunks(zip(*found, strict=True)):
                updates = []
                for _, grad, buffer in some:
                    buffer.lerp_(grad, 1 - momentum)
                    updates.append(grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
                for (p, *_), update in zip(some, orthogonalised(updates, rows, group["ns_steps"]), strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * _ratio(group["adjust_lr_fn"], rows or p.shape[0], p.shape[1]))
        return loss


def _ratio(adjust_lr_fn, rows, columns):
    """To the rate of a matrix. An orthogonal one of these sides has entries of mean square 1 / max(sides)."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _layout(x):
    return (x.shape, x.device_mesh, tuple(x.placements)) if isinstance(x, DTensor) else None


def _chunks(triples) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """(weight, gradient, buffer) of weights that lie alike, at most as many at a time as ranks can share out."""
    waiting: dict[Any, list] = {}
    for triple in triples:
        layout = _layout(triple[1])
        some = waiting.setdefault(layout, [])
        some.append(triple)
        if layout is None or len(some) == layout[1].size():
            yield waiting.pop(layout)
    yield from waiting.values()


def orthogonalised(updates: list[Tensor], head_rows: int | None = None, steps: int = 5) -> list[Tensor]:
    """Matrices [out, in] of one layout with singular values near 1, every ``head_rows`` rows by themselves; DTensors
    come out sharded as they came in."""
    first = updates[0]
    dtype = first.dtype if first.device.type == "cpu" else torch.bfloat16
    if not isinstance(first, DTensor):
        return [_newton_schulz(x.to(dtype), head_rows, steps) for x in updates]
    mesh, placements = first.device_mesh, first.placements
    ways = [(mesh.size(i), p) for i, p in enumerate(placements) if not p.is_replicate()]
    shards = math.prod(size for size, _ in ways)
    if not ways or (head_rows and first.shape[0] % (shards * head_rows) == 0 and all(_by_rows(p) for _, p in ways)):
        local = [_newton_schulz(x.to_local().to(dtype), head_rows, steps) for x in updates]
    elif len(ways) == 1 and isinstance(ways[0][1], Shard):
        local = _shared_out([x.to_local().to(dtype) for x in updates], first, head_rows, steps)
    else:
        whole = [_newton_schulz(x.to(dtype).full_tensor(), head_rows, steps) for x in updates]
        return [distribute_tensor(x, mesh, placements, src_data_rank=None) for x in whole]
    found = [torch.empty_like(x, dtype=dtype) for x in updates]
    for x, part in zip(found, local, strict=True):
        x.to_local().copy_(part)
    return found


def _by_rows(placement):
    return getattr(placement, "dim", None) == 0  # also the shards that FSDP makes of tensor parallelism's


def _shared_out(shards, like, head_rows, steps):
    """Of the shards of n weights, sharded in one way, orthogonalised: each rank of those that hold the shards gets the
    whole of some of the weights."""
    mesh, n = like.device_mesh, len(shards)
    shape = torch.Size((n, *like.shape))
    border = dict(run_check=False, shape=shape, stride=(shape[1] * shape[2], shape[2], 1))
    by_parts = [p if p.is_replicate() else Shard(p.dim + 1) for p in like.placements]
    by_weights = [Replicate() if p.is_replicate() else Shard(0) for p in like.placements]
    stack = DTensor.from_local(torch.stack(shards), mesh, by_parts, **border)
    own = stack.redistribute(placements=by_weights).to_local()
    own = torch.stack([_newton_schulz(x, head_rows, steps) for x in own]) if len(own) else own
    return DTensor.from_local(own, mesh, by_weights, **border).redistribute(placements=by_parts).to_local().unbind()


def _newton_schulz(update, head_rows, steps):
    """update [out, in], a plain tensor -> the same shape."""
    x = update[None] if head_rows is None else update.unflatten(0, (-1, head_rows))  # [matrices, rows, in]
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).flatten(0, 1)
