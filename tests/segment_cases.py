"""A segment of a sequence as a map of the state it is entered with: the op's, and the definition's in fp64."""

import functools

import torch

from gdn2_titan.ops import naive_recurrent_gdn2
from tests.gdn2_cases import leaves, op_arguments

RESULTS = ("o", "read", "transition", "contribution")


def segment_arguments(inputs):
    """inputs of ``make`` as the operator takes them, which has no initial state and no packed sequences."""
    q, k, v, g, b, w, A_log, dt_bias, _, _, *rest = op_arguments(inputs)
    return q, k, v, g, b, w, A_log, dt_bias, *rest


def segment(inputs, backend="triton"):
    """RESULTS of the op."""
    results = torch.ops.gdn2_titan.segment_gdn2(*segment_arguments(inputs), backend)
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


def applied(transition, state):
    """transition [B, H, K, K] of a state [B, HV, K, V]: value head j belongs to key head j // (HV // H)."""
    return transition.repeat_interleave(state.shape[1] // transition.shape[1], 1) @ state


def read_by_hand(read, state):
    """What outputs [B, T, HV, V] owe to the state that a segment is entered with. read: [B, T, H, K]."""
    read = read.repeat_interleave(state.shape[1] // read.shape[2], 2)
    return torch.einsum("bthk,bhkv->bthv", read.to(state.dtype), state)


def composed(first, second):
    """The map of two segments in a row from theirs."""
    return {
        "o": torch.cat([first["o"], second["o"] + read_by_hand(second["read"], first["contribution"])], 1),
        "read": torch.cat([first["read"], read_by_hand(second["read"], first["transition"])], 1),
        "transition": second["transition"] @ first["transition"],
        "contribution": applied(second["transition"], first["contribution"]) + second["contribution"],
    }


def part(inputs, start, end):
    """Tokens [start, end)."""
    names = ("q", "k", "v", "g", "b", "w", "resets")
    return inputs | {name: inputs[name][:, start:end] for name in names if inputs[name] is not None}


def without_gradients(inputs):
    return inputs | {name: x.detach() for name, x in leaves(inputs).items()}
