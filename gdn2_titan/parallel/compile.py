"""torch.compile for the decoder: block by block, so that equal blocks share one compilation."""

__all__ = ["apply_compile"]


def apply_compile(model, backend: str = "inductor"):
    """Compile every block of a ``GDN2Model`` in place, without a graph break; state-dict keys stay as they are."""
    for block in model.layers.values():
        block.compile(backend=backend, fullgraph=True, dynamic=False)
