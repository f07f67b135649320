"""torch.compile for the decoder, block by block, so that equal blocks share one compilation, or as a whole."""

import torch
from torch import nn

__all__ = ["apply_compile"]

# Graphs that one kind of block may come to need: with gradients and without, with documents and without, and for each
# the first shapes, other batches, other lengths, a batch of one.
GRAPHS_PER_KIND = 16
# The axes of batch and length in the arguments of a block: hidden states, resets, angles, mask.
AXES = ((0, 1), (0, 1), (1,), (0, 2, 3))


def apply_compile(model: nn.Module, backend: str = "inductor", whole: bool = False, dynamic: bool = False) -> None:
    """Compile a ``GDN2Model`` in place, without a graph break; state-dict keys stay as they are.

    Blocks of one kind share one compilation per set of shapes. As it is, the first shapes get graphs of their own, and
    graphs for any size of what has changed since follow when something changes.

    Args:
        backend: of ``torch.compile``.
        whole: the model as one graph instead of a graph per block: longer to compile, more to optimise. Not for a model
            that is sharded by ``apply_fsdp``, whose hooks between blocks are no part of a graph.
        dynamic: mark batch and length, so that the first compilation serves all sizes of at least 2; a batch or a
            length of 1 is always compiled by itself.
    """
    config = torch._dynamo.config
    kinds = {model.args.mixer(int(name)) for name in model.layers}
    # The limit is that of one function, and all blocks have the same one.
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_KIND * len(kinds))
    # Under tensor parallelism every size gets a graph of its own: DTensor's graphs for any size fail in torch 2.13.
    sizes = False if model.sequence_shards > 1 else None
    for part in [model] if whole else model.layers.values():
        if dynamic:
            part.register_forward_pre_hook(_mark_dynamic)
        part.compile(backend=backend, fullgraph=True, dynamic=sizes)


@torch.compiler.disable
def _mark_dynamic(module, args):
    """Also for the model as a whole, whose arguments are tokens or hidden states, and resets."""
    for x, axes in zip(args, AXES, strict=False):
        if isinstance(x, torch.Tensor):
            # An axis of one is a batch of one, or a mask for all of the batch.
            torch._dynamo.mark_dynamic(x, [axis for axis in axes if x.shape[axis] > 1])
