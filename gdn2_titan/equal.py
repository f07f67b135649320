"""Widths of models that are compared under equal conditions: ``python -m gdn2_titan.equal --like 1.3B --mixer mamba2``.

Prints [gdn2] of a TOML file: what makes a flavor a model of another mixer with as many numbers of state in each
recurrent layer, and as many parameters in its blocks, embeddings and head left out.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gdn2_titan.convert.empty_model import empty_model
from gdn2_titan.convert.errors import ConvertError, exit_status
from gdn2_titan.model_options import number
from gdn2_titan.models import GDN2ModelArgs, flavors
from gdn2_titan.models.checks import value_head_dim

__all__ = ["MIXERS", "block_parameters", "equal_args", "main", "mamba_heads", "state_size", "with_mlp"]

_GATES = {
    "erase_gate": "channel", "write_gate": "channel", "tied_gates": False, "decay": "channel", "content_gate": False,
}  # fmt: skip
# What stands in place of the GDN-2 layers of a flavor, and the fields that make it what it is.
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gdn2": ("gdn2", _GATES),
    "kda": ("gdn2", _GATES | {"tied_gates": True}),
    "gdn": ("gdn2", _GATES | {"tied_gates": True, "decay": "scalar"}),
    "deltanet": ("gdn2", _GATES | {"tied_gates": True, "decay": "none"}),
    "mamba2": ("mamba2", {}),
    "mamba3": ("mamba3", {"mamba_rank": 1}),
    "mamba3_mimo": ("mamba3", {"mamba_rank": 4}),
    "attention": ("attention", {}),
}
# Of mlp_size: a multiple of the first, which kernels like and ranks of tensor parallelism divide, unless the model is
# so small that a finer one is needed.
STEPS = (16, 8, 4, 2, 1)
CLOSE = 0.003  # of the parameters


def block_parameters(args: GDN2ModelArgs) -> int:
    """Parameters of all blocks."""
    return sum(p.numel() for p in empty_model(args).layers.parameters())


def state_size(args: GDN2ModelArgs, kind: str) -> int:
    """Numbers of the memory of one layer of a mixer; 0 for softmax attention, whose state grows."""
    if kind == "gdn2":
        value_heads = args.num_v_heads or args.num_heads
        return value_heads * args.head_dim * value_head_dim(args.head_dim, args.expand_v)
    if kind in ("mamba2", "mamba3"):
        return args.mamba_heads * args.mamba_head_dim * args.mamba_state
    return 0


def with_mlp(
    args: GDN2ModelArgs, parameters: int, count: Callable[[GDN2ModelArgs], int] = block_parameters
) -> GDN2ModelArgs:
    """``args`` with the ``mlp_size`` for which ``count`` gives that many parameters.

    Raises:
        ValueError: no ``mlp_size`` comes within 0.3% of it.
    """
    width = 3 * args.n_layers * args.hidden_size  # parameters for each channel of the MLPs
    others = count(dataclasses.replace(args, mlp_size=1)) - width
    for step in STEPS:
        size = step * round((parameters - others) / (width * step))
        if size > 0 and abs(others + size * width - parameters) <= CLOSE * parameters:
            return dataclasses.replace(args, mlp_size=size)
    raise ValueError(
        f"parameters is {parameters:,}; without MLPs there are {others:,}, and {width:,} more for each channel "
        "of mlp_size, which must come within 0.3% of it"
    )


def mamba_heads(args: GDN2ModelArgs) -> int:
    """Heads of a Mamba layer whose memory has as many numbers as that of a GDN-2 layer of ``args``.

    Raises:
        ValueError: it is no multiple of a Mamba head's.
    """
    state, of_head = state_size(args, "gdn2"), args.mamba_head_dim * args.mamba_state
    if state % of_head:
        raise ValueError(
            f"mamba_head_dim times mamba_state is {of_head}; it must divide the {state} numbers of a GDN-2 layer's "
            "state"
        )
    return state // of_head


def equal_args(args: GDN2ModelArgs, mixer: str, parameters: int | None = None) -> GDN2ModelArgs:
    """``args`` with a mixer of MIXERS in place of GDN-2, whose layers have as large a state as GDN-2's, and with the
    ``mlp_size`` that gives its blocks as many parameters.

    Heads of GDN-2 and its gate structures stay as they are; of Mamba layers the number of heads follows from the state.
    parameters: of all blocks; those of ``args`` if None.

    Raises:
        ValueError: see ``mamba_heads`` and ``with_mlp``.
    """
    kind, fields = MIXERS[mixer]
    if kind in ("mamba2", "mamba3"):
        fields = fields | {"mamba_heads": mamba_heads(args)}
    pattern = tuple(kind if name == "gdn2" else name for name in args.layer_pattern)
    found = dataclasses.replace(args, layer_pattern=pattern, **fields)
    return with_mlp(found, block_parameters(args) if parameters is None else parameters)


def _table(args, like):
    """The lines of [gdn2] that make a model of ``args`` of the flavor ``like``."""
    lines = ["[gdn2]"]
    for field in dataclasses.fields(GDN2ModelArgs):
        value = getattr(args, field.name)
        if value != getattr(like, field.name):
            lines.append(f"{field.name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return lines


def _run(options):
    like = flavors[options.like]
    try:
        args = equal_args(like, options.mixer, options.parameters)
    except ValueError as error:
        raise ConvertError(str(error)) from error
    kind = MIXERS[options.mixer][0]
    state = f"{state_size(args, kind):,} numbers of state a layer" if state_size(args, kind) else "no fixed state"
    print(f"# {block_parameters(args):,} parameters in the blocks, {state}; flavor {options.like}")
    print("\n".join(_table(args, like)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser("python -m gdn2_titan.equal", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--like", required=True, choices=flavors, help="the flavor whose size it is")
    add("--mixer", required=True, choices=MIXERS, help="what stands in place of its GDN-2 layers")
    count = number(int, "a whole number of at least 1", lambda x: x >= 1)
    add("--parameters", type=count, metavar="N", help="of all blocks (default: the flavor's)")
    options = parser.parse_args(arguments)
    return exit_status(_run, options)


if __name__ == "__main__":
    sys.exit(main())
