"""Exact decays in what TorchTitan 0.2.2 exports."""

import functools

from torchtitan.components.checkpoint import MODEL, CheckpointManager

from ..export import exact_decays

__all__ = ["export_exact_decays"]

STOCK = CheckpointManager.dcp_save


@functools.wraps(STOCK)
def _dcp_save(self, state_dict, *args, **kwargs):
    return STOCK(self, exact_decays(state_dict, self.states[MODEL]), *args, **kwargs)


def export_exact_decays():
    """Let ``checkpoint.export_dtype`` leave A_log and dt_bias as the model has them. Again is harmless."""
    CheckpointManager.dcp_save = _dcp_save
