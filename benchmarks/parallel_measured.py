"""What a training step of a small model really holds and sends, in processes over gloo, and what a block saves.

Needs the plug's requirements: activation checkpointing is TorchTitan's.
"""

import collections
import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdn2_titan.models import GDN2Model
from gdn2_titan.models.attention import rotary_angles
from gdn2_titan.parallel import SAVED_OPS, apply_fsdp, apply_tensor_parallel, sum_gradients

__all__ = ["measure_saved", "measure_step"]

DIMENSIONS = ("pp", "replicate", "shard", "tp")  # TorchTitan's order, outermost first

# Which tensor of a collective's arguments is as large as what the whole group holds or adds up. What a rank of a group
# of g sends of it is (g - 1) / g of these bytes, twice that in an all-reduce, all of them in a send.
COLLECTIVES = {  # kind, these tensors, the group
    "c10d._allgather_base_": ("all-gather", lambda a: [a[0]], lambda a: a[2]),
    "c10d._reduce_scatter_base_": ("reduce-scatter", lambda a: [a[1]], lambda a: a[2]),
    "c10d.allreduce_": ("all-reduce", lambda a: a[0], lambda a: a[1]),
    "c10d.send": ("send", lambda a: a[0], lambda a: a[1]),
    "_c10d_functional.all_gather_into_tensor": ("all-gather", lambda a: [a[0]] * a[1], lambda a: a[2]),
    "_c10d_functional.reduce_scatter_tensor": ("reduce-scatter", lambda a: [a[0]], lambda a: a[3]),
    "_c10d_functional.all_reduce": ("all-reduce", lambda a: [a[0]], lambda a: a[2]),
}
# They receive or wait for what is counted where it is sent or started.
SILENT = ("c10d.recv_", "_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """Adds up bytes by (mesh dimension, collective)."""

    def __init__(self, dimensions):
        super().__init__()
        self.dimensions = dimensions  # by group name
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # until it has become operators on this rank's tensors
        name = str(func.overloadpacket)
        if name in COLLECTIVES:
            kind, tensors, group = COLLECTIVES[name]
            group = group(args)
            if isinstance(group, torch.ScriptObject):
                group = dist.ProcessGroup.unbox(group).group_name
            self.bytes[self.dimensions[group], kind] += sum(x.nbytes for x in tensors(args))
        elif func.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            raise NotImplementedError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


def measure_step(costs, layout):
    """Runs two training steps and reports the second: for each rank {"at": its coordinate by mesh dimension,
    "parameters": held, "optimizer": bytes of states, "sent": {(dimension, collective): bytes}}."""
    ranks = _run(_step, costs, layout)
    for found in ranks:
        found["sent"] = {(dimension, kind): n for dimension, kind, n in found["sent"] if getattr(layout, dimension) > 1}
    return ranks


def measure_saved(costs, layout):
    """Bytes that each kind of block keeps from forward for backward, in bf16, under TorchTitan's activation
    checkpointing: {unit: bytes} of rank 0; the layout is one of tensor parallelism alone."""
    return _run(_saved, costs, layout)[0]


def _run(function, costs, layout):
    world = math.prod(getattr(layout, name) for name in DIMENSIONS)
    return run(function, world, costs.args, costs.T, costs.stages(layout.pp), layout)


def _mesh(layout):
    return init_device_mesh("cpu", [getattr(layout, name) for name in DIMENSIONS], mesh_dim_names=DIMENSIONS)


def _step(args, seq_len, stages, layout):
    mesh = _mesh(layout)
    at = dict(zip(DIMENSIONS, mesh.get_coordinate(), strict=True))
    units = stages[at["pp"]]
    with torch.device("meta"):
        model = GDN2Model(args)
    for unit in [name for name in model.layers if name not in units]:
        del model.layers[unit]
    if "tok_embeddings" not in units:
        model.tok_embeddings = None
    if "head" not in units:
        model.norm = model.lm_head = None
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh["tp"])
    if layout.shard > 1:
        sharded = mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
        apply_fsdp(model, sharded, torch.bfloat16, torch.float32, reshard_after_forward=layout.pp == 1)
        sum_gradients(model)
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(args.vocab_size, (layout.microbatches * layout.sequences, seq_len))
    step = _pipelined(model, mesh["pp"], layout) if layout.pp > 1 else _accumulated(model, layout)
    traffic = Traffic({mesh.get_group(name).group_name: name for name in DIMENSIONS})
    for mode in (contextlib.nullcontext(), traffic):  # the first step also sets up
        with mode, loss_parallel() if layout.tp > 1 else contextlib.nullcontext():
            step(tokens)
            optimizer.step()
            optimizer.zero_grad()
    states = [_local(x) for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    return {
        "at": at,
        "parameters": sum(_local(p).numel() for p in model.parameters()),
        "optimizer": sum(x.nbytes for x in states),
        "sent": [[*key, n] for key, n in traffic.bytes.items()],
    }


def _local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def _loss(logits, tokens):
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="sum")


def _accumulated(model, layout):
    def step(tokens):
        for some in tokens.split(layout.sequences):
            _loss(model(some), some).backward()

    return step


def _pipelined(model, mesh, layout):
    stage = PipelineStage(model, mesh.get_local_rank(), layout.pp, torch.device("cpu"), group=mesh.get_group())
    schedule = Schedule1F1B(stage, layout.microbatches, loss_fn=_loss, scale_grads=False)

    def step(tokens):
        inputs = (tokens,) if stage.is_first else ()
        schedule.step(*inputs, target=tokens if stage.is_last else None)

    return step


# They hold no memory themselves; DTensor finds shapes with fake tensors.
WRAPPERS = (AsyncCollectiveTensor, FakeTensor)


class Made(TorchDispatchMode):
    """Remembers every tensor that an operator returns, and knows which are still there."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types or AsyncCollectiveTensor in types:
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, WRAPPERS):
                storage = x.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, beside):
        """Bytes, without the tensors ``beside``."""
        others = {x.untyped_storage().data_ptr() for x in beside}
        return sum(n for at, (ref, n) in self.storages.items() if at not in others and not ref.expired())


def _saved(args, seq_len, stages, layout):
    from torchtitan.config.job_config import ActivationCheckpoint
    from torchtitan.distributed.activation_checkpoint import apply_ac

    model = GDN2Model(args).bfloat16()
    if layout.tp > 1:
        apply_tensor_parallel(model, _mesh(layout)["tp"])
    if layout.checkpointing != "none":
        config = ActivationCheckpoint(mode=layout.checkpointing, selective_ac_option="op")
        apply_ac(model, config, model_compile_enabled=False, op_sac_save_list=SAVED_OPS)
    angles = rotary_angles(torch.arange(seq_len), args.hidden_size // args.attn_heads, args.rope_theta)
    shape = (layout.sequences, seq_len // layout.tp, args.hidden_size)
    found = {}
    for unit in stages[0]:
        if unit.isdigit():
            made = Made()
            leaf = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
            with made:
                x = leaf + 0
                y = model.layers[unit](x, None, angles, None)
                del x
            found[unit] = made.alive([_local(t) for t in (y, angles, *model.parameters())])
    return found
