"""Activation checkpointing as [activation_checkpoint] of a TOML file names it, in the classes of TorchTitan 0.3."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, MemoryBudgetAC, SelectiveAC

from gdn2_titan.parallel import SAVED_OPS

__all__ = ["EveryAC", "Policy", "SavedOpsAC", "fields_of_policy", "policy_of_fields"]


class SavedOpsAC(SelectiveAC):
    """Mode "selective" with option "op"."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> Any:
        return SAVED_OPS


class EveryAC(ActivationCheckpointing):
    """Mode "selective" with a number: of so many blocks in a row the last keeps its input alone."""

    @dataclass(kw_only=True, slots=True)
    class Config(ActivationCheckpointing.Config):
        every: int = 2

    def __init__(self, config, dump_folder=""):
        super().__init__(config, dump_folder)
        self._blocks = 0

    def _wrap_block(self, module, *, base_fqn=None):
        self._blocks += 1
        if self._blocks % self.config.every:
            return module
        return checkpoint_wrapper(
            module, preserve_rng_state=self.config.preserve_rng_state, determinism_check=self.config.determinism_check,
            early_stop=False, debug=self.config.debug,
        )  # fmt: skip


Policy = (
    Annotated[SavedOpsAC.Config, tyro.conf.subcommand("selective")]
    | Annotated[EveryAC.Config, tyro.conf.subcommand("every")]
    | Annotated[FullAC.Config, tyro.conf.subcommand("full")]
    | Annotated[MemoryBudgetAC.Config, tyro.conf.subcommand("memory-budget")]
    | Annotated[None, tyro.conf.subcommand("none")]
)

COMMON = ("preserve_rng_state", "determinism_check", "debug")
BUDGET = ("memory_budget", "visualize_memory_budget_pareto")


def policy_of_fields(section: Any) -> ActivationCheckpointing.Config | None:
    """The policy's config, or None, of [activation_checkpoint]."""
    common = {name: getattr(section, name) for name in COMMON}
    if section.mode == "none":
        return None
    if section.mode == "full":
        return FullAC.Config(**common)
    if section.mode == "memory_budget":
        return MemoryBudgetAC.Config(**common, **{name: getattr(section, name) for name in BUDGET})
    if section.selective_ac_option == "op":
        fqns = section.per_op_sac_force_recompute_mm_shapes_by_fqns
        return SavedOpsAC.Config(**common, force_recompute_mm_shapes_by_fqns=fqns)
    return EveryAC.Config(**common, every=int(section.selective_ac_option))


def fields_of_policy(config: ActivationCheckpointing.Config | None) -> dict[str, Any]:
    """{field: value} of [activation_checkpoint] of a policy's config; what it does not say is left out."""
    if config is None:
        return {"mode": "none"}
    found = {name: getattr(config, name) for name in COMMON}
    if isinstance(config, MemoryBudgetAC.Config):
        return found | {"mode": "memory_budget"} | {name: getattr(config, name) for name in BUDGET}
    if isinstance(config, SelectiveAC.Config):
        fqns = config.force_recompute_mm_shapes_by_fqns
        named = {"per_op_sac_force_recompute_mm_shapes_by_fqns": fqns, "selective_ac_option": "op"}
        return found | {"mode": "selective"} | named
    if isinstance(config, EveryAC.Config):
        return found | {"mode": "selective", "selective_ac_option": str(config.every)}
    return found | {"mode": "full"}
