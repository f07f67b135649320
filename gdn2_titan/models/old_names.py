"""Names of parameters in checkpoints written while the layer's low-rank projections were each one module of two."""

import re
from typing import Any

__all__ = ["OLD_NAMES", "current_name", "rename_old"]

# Parts of names: of the two factors, D to rank and rank to heads, of the decay and of the output gate.
OLD_NAMES = {
    "decay_proj.0.": "decay_low_proj.",
    "decay_proj.1.": "decay_proj.",
    "gate_proj.0.": "gate_low_proj.",
    "gate_proj.1.": "gate_proj.",
}
_OLD = re.compile(r"(?<![^.])(?:" + "|".join(map(re.escape, OLD_NAMES)) + ")")


def current_name(name: str) -> str:
    """The name today of what a checkpoint calls ``name``: a parameter, or a part of an optimizer's state of one."""
    return _OLD.sub(lambda found: OLD_NAMES[found.group()], name)


def rename_old(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a layer loads its part of a state dict: old names in it become today's."""
    for old, new in OLD_NAMES.items():
        for name in [name for name in state_dict if name.startswith(prefix + old)]:
            state_dict[prefix + new + name.removeprefix(prefix + old)] = state_dict.pop(name)
