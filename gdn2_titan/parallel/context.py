"""Context parallelism: sequences that the ranks of a group share, also inside the mixers."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gdn2_titan.ops.checks import check_choice
from gdn2_titan.ops.context_parallel.layout import LAYOUTS, SequenceShards

__all__ = ["apply_context_parallel", "check_context_parallel"]


def check_context_parallel(length: int, degree: int, layout: str = "contiguous") -> None:
    """Raise ValueError, one sentence with both numbers, unless ``degree`` ranks can share sequences of ``length``."""
    check_choice("layout", layout, LAYOUTS)
    segments = degree if layout == "contiguous" else 2 * degree
    if length % segments:
        among = f"with context parallel degree {degree} and layout {layout!r}"
        raise ValueError(f"the sequence length is {length}; {among} it must be a multiple of {segments}")


def apply_context_parallel(model: nn.Module, mesh: DeviceMesh, layout: str = "contiguous") -> None:
    """Let the ranks of the 1-D ``mesh`` share the sequences of a ``GDN2Model``, or a pipeline stage of one, in place.

    Every rank passes its tokens [B, T_local], the same shape on all ranks, and resets [B, T_local] or None, and gets
    its logits [B, T_local, vocab_size]; a stage takes and returns hidden states of these tokens. "contiguous": rank r
    has the r-th part of every sequence. "head_tail": of 2 * ranks parts it has the r-th and the (2 * ranks - 1 - r)-th,
    one after the other. Positions, windows and documents are those of the whole sequence.

    Gradients are those of the sum of all ranks' losses: a parameter's is this rank's share, to be summed over the mesh,
    as FSDP2 does over a mesh that this one is part of. Parameters stay as they are, and so do state-dict keys. Tensor
    parallelism on a mesh of its own divides heads and, between mixers, T_local once more. ValueError: unknown layout,
    or a model with content gates.
    """
    if model.args.content_gate:
        raise ValueError("content_gate is True; with context parallelism it must be false")
    model.shards = SequenceShards.of(mesh, layout)
    for block in model.layers.values():
        block.mixer.shards = model.shards
