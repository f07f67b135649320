"""DTensor: the shardings that the operators accept, and how their results come out.

Sequences have nothing to do with each other, nor have heads or the channels of a convolution. A dimension of the mesh
may split either, and every rank works on its part alone. DTensor redistributes what arrives in any other layout.
"""

import itertools
import math

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

__all__ = ["register"]

QKV_WEIGHTS, QKV_STATES = ("q_weight", "k_weight", "v_weight"), ("q_state", "k_state", "v_state")

WAYS = ("whole", "batch", "heads")  # in which one dimension of the mesh may split the work


def _role(batch, heads):
    return {"whole": Replicate(), "batch": batch, "heads": heads}


ACTIVATION = _role(batch=Shard(0), heads=Shard(2))
STATE = _role(batch=Shard(0), heads=Shard(1))
PARAMETER = _role(batch=Replicate(), heads=Shard(0))
PARAMETER_GRADIENT = _role(batch=Partial(), heads=Shard(0))
RESETS = _role(batch=Shard(0), heads=Replicate())
REPLICATED = _role(batch=Replicate(), heads=Replicate())

ROLES = (
    dict.fromkeys(("q", "k", "v", "g", "b", "w", "do", "x", "dy", "dq", "dk", "dv"), ACTIVATION)
    | dict.fromkeys(("read_rows", "entering", "transitions"), ACTIVATION)  # of segmented_gdn2: tokens or segments
    | dict.fromkeys(("initial_state", "dfinal_state", "A", "A_qk"), STATE)  # A, A_qk: chunks and heads
    | dict.fromkeys((*QKV_STATES, *(f"d{name}" for name in QKV_STATES)), STATE)
    | dict.fromkeys(("A_log", "dt_bias", "weight", "bias", *QKV_WEIGHTS), PARAMETER)
    | {"resets": RESETS, "cu_seqlens": REPLICATED}
)


def _ways(specs):
    """The ways open to a call with these tensors, by name. DTensor chooses one for each dimension of the mesh, those
    that move least, so every combination that it may choose must leave all ranks equal numbers of sequences and heads.
    """
    x = specs["q" if "q" in specs else "x"]
    heads = math.gcd(*(specs[name].shape[2] for name in ("x", "q", "v") if name in specs))
    mesh, sizes = x.mesh, {"whole": 1, "batch": x.shape[0], "heads": heads}

    def as_given(dim):
        fits = (way for way in WAYS if all(spec.placements[dim] == ROLES[name][way] for name, spec in specs.items()))
        return next(fits, None)

    # Tensors that can stay as they are do: the choice is certain.
    given = [as_given(dim) for dim in range(mesh.ndim)]
    parts = {way: math.prod(n for n, found in zip(mesh.shape, given, strict=True) if found == way) for way in WAYS}
    if None not in given and all(sizes[way] % parts[way] == 0 for way in ("batch", "heads")):
        return [way for way in WAYS if way in given]

    dims = range(1, mesh.ndim + 1)
    products = {math.prod(some) for n in dims for some in itertools.combinations(mesh.shape, n)}
    # Larger products do not matter: DTensor splits nothing into more parts than it has elements.
    return [way for way in WAYS if way == "whole" or all(sizes[way] % n == 0 for n in products if n <= sizes[way])]


def _register(op, gradients=(), results=(ACTIVATION, STATE)):
    """gradients: the arguments whose gradients a backward op returns; results: what any other returns."""
    names = [argument.name for argument in op._schema.arguments]

    @register_sharding(op)
    def _(*args):  # less trailing defaults
        specs = {name: x for name, x in zip(names, args, strict=False) if name in ROLES and x is not None}
        outputs = list(results)
        if gradients:
            roles = [ROLES[name] if name in specs else REPLICATED for name in gradients]  # of the absent: empty
            outputs = [PARAMETER_GRADIENT if role is PARAMETER else role for role in roles]
        inputs = [ROLES[name] if name in specs else None for name in names[: len(args)]]
        return [
            ([role[way] for role in outputs], [None if role is None else role[way] for role in inputs])
            for way in _ways(specs)
        ]


def _overwrite(name, *states):
    """Serve the operator ``name`` with an underscore, which overwrites its arguments ``states``, by the one without.

    A sharding rule would not do: DTensor takes an op whose name ends in "_" for one that returns its first argument,
    and what the op writes to a redistributed state would be lost.
    """

    def serve(cls, op, types, args, kwargs):
        given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False))  # less defaults
        if given.pop("state_indices", None) is not None:
            raise ValueError("state_indices is given with DTensors; it must be None, each rank has a pool of its own")
        results = getattr(torch.ops.gdn2_titan, name)(*given.values())
        outputs, final_states = results[: -len(states)], results[-len(states) :]
        for state, final_state in zip(states, final_states, strict=True):
            given[state].copy_(final_state)
        return outputs if len(outputs) > 1 else outputs[0]

    torch.library.register_torch_dispatch("gdn2_titan::" + name + "_", DTensor, serve)


def register() -> None:
    """Tell DTensor of all operators. Once."""
    ops = torch.ops.gdn2_titan
    inputs = "q", "k", "v", "g", "b", "w", "A_log", "dt_bias", "initial_state"
    _register(ops.chunk_gdn2.default)
    _register(ops.chunk_gdn2_saving.default, results=(ACTIVATION, STATE, STATE, STATE))
    _register(ops.recurrent_gdn2.default)
    _register(ops.chunk_gdn2_backward.default, inputs)
    _register(ops.segment_gdn2.default, results=(ACTIVATION, ACTIVATION, STATE, STATE))
    _register(ops.segmented_gdn2.default, results=(ACTIVATION, STATE, ACTIVATION, ACTIVATION, ACTIVATION, STATE, STATE))
    _register(ops.segmented_gdn2_backward.default, inputs)
    _register(ops.causal_conv1d.default)
    _register(ops.causal_conv1d_backward.default, ("x", "weight", "bias", "initial_state"))
    _register(ops.causal_conv1d_qkv.default, results=(ACTIVATION,) * 3 + (STATE,) * 3)
    _register(ops.causal_conv1d_qkv_backward.default, ("q", "k", "v", *QKV_WEIGHTS, *QKV_STATES))
    _overwrite("recurrent_gdn2", "state")
    _overwrite("causal_conv1d", "state")
    _overwrite("causal_conv1d_qkv", *QKV_STATES)
