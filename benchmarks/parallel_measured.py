"""What training steps of a small model really hold and send, in processes over gloo, and what its blocks save for
backward, beside the formulas.

Needs the plug's requirements: activation checkpointing is TorchTitan's.
"""

import contextlib
import dataclasses
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_costs import CHECKPOINTING, Costs, Layout
from processes import Collectives, run
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.models.attention import rotary_angles
from gdn2_titan.parallel import SAVED_OPS, apply_fsdp, apply_tensor_parallel, sum_gradients

__all__ = ["LAYOUTS", "check"]

DIMENSIONS = ("pp", "replicate", "shard", "tp")  # TorchTitan's order, outermost first

# The heads can be shared by two ranks; sides are no powers of two, so that FSDP has to pad.
SMALL = GDN2ModelArgs(
    vocab_size=50, hidden_size=36, n_layers=4, mlp_size=90, num_heads=2, num_v_heads=4, head_dim=10, expand_v=2.0,
    attn_heads=6, attn_kv_heads=2, layer_pattern=("gdn2", "attention"),
)  # fmt: skip
LENGTH = 64
BLOCKS = {"a block": Layout(sequences=2), "a block, TP 2": Layout(tp=2, sequences=2)}
STEPS = {
    "FSDP 2": Layout(shard=2),
    "FSDP 2, 2 accumulated": Layout(shard=2, microbatches=2),
    "HSDP 2 x 2": Layout(replicate=2, shard=2),
    "TP 2": Layout(tp=2, sequences=2),
    "FSDP 2 x TP 2": Layout(shard=2, tp=2),
    "PP 2": Layout(pp=2, sequences=2, microbatches=3),
    "FSDP 2 x PP 2": Layout(shard=2, pp=2, microbatches=3),
    "FSDP 2 x TP 2 x PP 2": Layout(shard=2, tp=2, pp=2, microbatches=3),
}
LAYOUTS = BLOCKS | STEPS

# Collective and group of an operator, and the bytes of what the whole group holds or adds up. What a rank of a group
# of g sends of it is (g - 1) / g of these bytes, twice that in an all-reduce, all of them in a send.
COLLECTIVES = {
    "c10d._allgather_base_": lambda out, x, group, *_: (("all-gather", _name(group)), out.nbytes),
    "c10d._reduce_scatter_base_": lambda out, x, group, *_: (("reduce-scatter", _name(group)), x.nbytes),
    "c10d.allreduce_": lambda xs, group, *_: (("all-reduce", _name(group)), sum(x.nbytes for x in xs)),
    "c10d.send": lambda xs, group, *_: (("send", _name(group)), sum(x.nbytes for x in xs)),
    "_c10d_functional.all_gather_into_tensor": lambda x, size, group: (("all-gather", group), x.nbytes * size),
    "_c10d_functional.reduce_scatter_tensor": lambda x, op, size, group: (("reduce-scatter", group), x.nbytes),
    "_c10d_functional.all_reduce": lambda x, op, group: (("all-reduce", group), x.nbytes),
}


def _name(group):
    return dist.ProcessGroup.unbox(group).group_name


def check(name):
    """[(layout, quantity, formula, measured)], of a step for each rank, of a block for the first."""
    layout = LAYOUTS[name]
    world = math.prod(getattr(layout, dimension) for dimension in DIMENSIONS)
    ranks = [_blocks(layout)] if name in BLOCKS else run(_step, world, layout)
    return [(name, *row) for rows in ranks for row in rows]


def _local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def _mesh(layout):
    return init_device_mesh("cpu", [getattr(layout, name) for name in DIMENSIONS], mesh_dim_names=DIMENSIONS)


def _step(layout):
    """What this rank holds after two training steps, and sends in the second."""
    costs, mesh = Costs(SMALL, LENGTH), _mesh(layout)
    units = costs.stages(layout.pp)[mesh.get_local_rank("pp")]
    with torch.device("meta"):
        model = GDN2Model(SMALL)
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
    tokens = torch.randint(SMALL.vocab_size, (layout.microbatches * layout.sequences, LENGTH))
    if layout.pp > 1:
        at, group = mesh.get_local_rank("pp"), mesh.get_group("pp")
        stage = PipelineStage(model, at, layout.pp, torch.device("cpu"), group=group)
        schedule = Schedule1F1B(stage, layout.microbatches, loss_fn=_loss, scale_grads=False)
    traffic = Collectives(COLLECTIVES)
    for mode in (contextlib.nullcontext(), traffic):  # the first step also sets up
        with mode, loss_parallel() if layout.tp > 1 else contextlib.nullcontext():
            if layout.pp > 1:
                schedule.step(*([tokens] if stage.is_first else []), target=tokens if stage.is_last else None)
            else:
                for some in tokens.split(layout.sequences):
                    _loss(model(some), some).backward()
            optimizer.step()
            optimizer.zero_grad()
    states = [_local(x) for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    held = sum(costs.held(layout, units, mesh.get_local_rank("shard"), mesh.get_local_rank("tp")))
    formula = costs.sent(layout, units)
    groups = {mesh.get_group(name).group_name: name for name in DIMENSIONS}
    sent = {(groups[group], kind): n for (kind, group), n in traffic.bytes.items()}
    sent = {key: n for key, n in sent.items() if getattr(layout, key[0]) > 1}
    return [
        ("parameters", held, sum(_local(p).numel() for p in model.parameters())),
        ("optimizer bytes", 8 * held, sum(x.nbytes for x in states)),
        *((" ".join(x), formula.get(x, 0), sent.get(x, 0)) for x in sorted(formula.keys() | sent.keys())),
    ]


def _loss(logits, tokens):
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="sum")


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
            # Two wrappers hold no memory themselves; DTensor finds shapes with fake tensors.
            if isinstance(x, torch.Tensor) and not isinstance(x, (AsyncCollectiveTensor, FakeTensor)):
                storage = x.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, beside):
        """Bytes, without the tensors ``beside``."""
        others = {x.untyped_storage().data_ptr() for x in beside}
        return sum(n for at, (ref, n) in self.storages.items() if at not in others and not ref.expired())


def _blocks(layout):
    """What a block of each kind keeps from forward for backward, in bf16, under TorchTitan's checkpointing."""
    # A group that sends nothing: sizes are as they would be. Gloo's threads hold the tensors of an all-gather for a
    # moment after its end, and they would count as saved.
    dist.init_process_group("fake", rank=0, world_size=layout.tp, store=FakeStore())
    try:
        return _saved(layout)
    finally:
        dist.destroy_process_group()


def _saved(layout):
    from torchtitan.config.job_config import ActivationCheckpoint
    from torchtitan.distributed.activation_checkpoint import apply_ac

    costs = Costs(SMALL, LENGTH)
    angles = rotary_angles(torch.arange(LENGTH), SMALL.hidden_size // SMALL.attn_heads, SMALL.rope_theta)
    shape = (layout.sequences, LENGTH // layout.tp, SMALL.hidden_size)
    rows = []
    for checkpointing in CHECKPOINTING:
        model = GDN2Model(SMALL).bfloat16()
        if layout.tp > 1:
            apply_tensor_parallel(model, _mesh(layout)["tp"])
        if checkpointing != "none":
            config = ActivationCheckpoint(mode=checkpointing, selective_ac_option="op")
            apply_ac(model, config, model_compile_enabled=False, op_sac_save_list=SAVED_OPS)
        for unit in ("0", "1"):
            leaf = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
            with Made() as made:
                x = leaf + 0
                y = model.layers[unit](x, None, angles, None)
                del x
            formula = costs.saved(unit, dataclasses.replace(layout, checkpointing=checkpointing), on_gpu=False)
            kept = made.alive([_local(t) for t in (y, angles, *model.parameters())])
            rows.append((f"saved by {SMALL.mixer(int(unit))}, checkpointing {checkpointing}", formula, kept))
    return rows
