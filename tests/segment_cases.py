"""A segment of a sequence as a map of the state it is entered with: the op's, and the definition's in fp64."""

import functools

import torch

from gdn2_titan.ops import naive_recurrent_gdn2
from tests.gdn2_cases import leaves, op_arguments

RESULTS = ("o", "read", "transition", "contribution")


def segment(inputs, backend="triton"):
    """RESULTS of the op. inputs: of ``make``, whose initial state it does not take."""
    q, k, v, g, b, w, A_log, dt_bias, _, _, *rest = op_arguments(inputs)
    results = torch.ops.gdn2_titan.segment_gdn2(q, k, v, g, b, w, A_log, dt_bias, *rest, backend)
    return dict(zip(RESULTS, results, strict=True))


def segment_by_definition(inputs):
    """The same token by token in fp64: from a state of zeros, and without values from the identity."""
    inputs = inputs | {name: x.double() for name, x in leaves(inputs).items()} | {"initial_state": None}
    B, _, H, K = inputs["q"].shape
    run = functools.partial(naive_recurrent_gdn2, output_final_state=True)
    o, contribution = run(**inputs)
    nothing = torch.zeros_like(inputs["q"])
    identity = torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    read, transition = run(**inputs | {"v": nothing, "w": nothing, "initial_state": identity})
    return dict(zip(RESULTS, (o, read, transition, contribution), strict=True))


def composed(first, second):
    """The map of two segments in a row from theirs."""
    groups = first["contribution"].shape[1] // first["transition"].shape[1]
    transition, read = (
        second[name].repeat_interleave(groups, heads) for name, heads in (("transition", 1), ("read", 2))
    )
    return {
        "o": torch.cat([first["o"], second["o"] + torch.einsum("bthk,bhkv->bthv", read, first["contribution"])], 1),
        "read": torch.cat([first["read"], torch.einsum("bthk,bhkj->bthj", second["read"], first["transition"])], 1),
        "transition": second["transition"] @ first["transition"],
        "contribution": transition @ first["contribution"] + second["contribution"],
    }


def part(inputs, start, end):
    """Tokens [start, end)."""
    names = ("q", "k", "v", "g", "b", "w", "resets")
    return inputs | {name: inputs[name][:, start:end] for name in names if inputs[name] is not None}


def without_gradients(inputs):
    return inputs | {name: x.detach() for name, x in leaves(inputs).items()}
