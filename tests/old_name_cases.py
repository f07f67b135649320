"""The names that checkpoints had before each projection was one linear layer, written out."""

__all__ = ["old_names"]

OLD = {
    "decay_low_proj.weight": "decay_proj.0.weight", "decay_proj.weight": "decay_proj.1.weight",
    "gate_low_proj.weight": "gate_proj.0.weight", "gate_proj.weight": "gate_proj.1.weight",
    "gate_proj.bias": "gate_proj.1.bias",
}  # fmt: skip


def old_names(tensors, scalar_decay=False):
    """The same tensors of layers, decoders or folders, by their old names; an MLP's gate_proj keeps its name."""
    kept = {"decay_proj.weight"} if scalar_decay else set()
    found = {}
    for name, tensor in tensors.items():
        last = ".".join(name.split(".")[-2:])
        if last in OLD and last not in kept and "mlp" not in name:
            name = name.removesuffix(last) + OLD[last]
        found[name] = tensor
    return found
