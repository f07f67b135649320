"""Tensor parallelism with sequence parallelism: the heads of every mixer are shared out among ranks.

Between blocks a rank holds hidden states of its part of the sequence [B, T / ranks, D]. A mixer or an MLP gathers the
sequence, works on the rank's heads or hidden channels, and scatters its output along the sequence again.
"""

from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from gdn2_titan.models.args import GDN2ModelArgs
from gdn2_titan.models.attention import Attention
from gdn2_titan.models.layer import GatedDeltaNet2
from gdn2_titan.models.mamba_parts import GatedNorm
from gdn2_titan.ops.elementwise import BATCH_INVARIANT

__all__ = ["apply_mixer_tensor_parallel", "apply_tensor_parallel", "check_tensor_parallel"]

SEQUENCE = Shard(1)


class _NormOfRanks(ParallelStyle):
    """A GatedNorm over channels that ranks share."""

    def _apply(self, module, device_mesh):
        module.group = device_mesh.get_group().group_name
        return _Distributed(Shard(0))._apply(module, device_mesh)


class _Distributed(ParallelStyle):
    """The parameters that a module holds itself, in one layout; what goes in and out is left as it is."""

    def __init__(self, layout):
        self.layout = layout

    def _apply(self, module, device_mesh):
        for name, param in module.named_parameters(recurse=False):
            shards = distribute_tensor(param, device_mesh, [self.layout], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(shards, requires_grad=param.requires_grad))
        return module


def check_tensor_parallel(args: GDN2ModelArgs, degree: int) -> None:
    """Raise ValueError, one sentence, unless ``degree`` ranks can share the model of a ``GDN2ModelArgs``."""
    if args.backend == BATCH_INVARIANT:
        raise ValueError(f"backend is {args.backend!r}; with tensor parallelism it must be another one")
    sides = {"mlp_size": args.mlp_size}
    if "gdn2" in args.mixers():
        sides["num_heads"] = args.num_heads  # value heads stay with their key head
    if args.mixers() & {"mamba2", "mamba3"}:
        sides["mamba_heads"] = args.mamba_heads
    if args.softmax_mixers():
        sides["attn_heads"] = args.attn_heads
        if args.attn_kv_heads is not None:
            sides["attn_kv_heads"] = args.attn_kv_heads
    for field, value in sides.items():
        if value % degree:
            raise ValueError(f"{field} is {value}; the tensor parallel degree {degree} must divide it")


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, loss_parallel: bool = True) -> None:
    """Shard a ``GDN2Model``, or a pipeline stage of one, in place over the 1-D ``mesh``.

    Token ids [B, T] come in whole on every rank; T must be a multiple of the mesh's size. A stage without
    ``tok_embeddings`` takes hidden states [B, T / ranks, D], one without ``lm_head`` returns them. loss_parallel: the
    logits stay a DTensor sharded over the vocabulary, for torch.distributed.tensor.parallel.loss_parallel; else every
    rank gets them whole. ValueError: see ``check_tensor_parallel``.
    """
    check_tensor_parallel(model.args, mesh.size())
    ends = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(
            input_layouts=SEQUENCE, output_layouts=Shard(-1) if loss_parallel else Replicate(),
            use_local_output=not loss_parallel,
        ),
    }  # fmt: skip
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if getattr(model, name) is not None})
    if model.tok_embeddings is not None:
        model.tok_embeddings.register_forward_hook(_waited)
    for block in model.layers.values():
        parallelize_module(block, mesh, _block_plan(block, mesh))
    model.sequence_shards = mesh.size()


def apply_mixer_tensor_parallel(mixer: nn.Module, mesh: DeviceMesh) -> None:
    """Shard one ``GatedDeltaNet2``, ``Mamba2`` or ``Mamba3`` in place over the 1-D ``mesh``, in whatever block it is.

    Hidden states [B, T / ranks, D] come in, as tensors or as DTensors sharded on T, and go out as tensors; resets
    [B, T] come in whole. ValueError: the number of key heads (of Mamba, of heads) is not a multiple of the mesh's
    size.
    """
    of_heads = mixer.q_proj if isinstance(mixer, GatedDeltaNet2) else mixer.x_proj
    heads = of_heads.weight.shape[0] // mixer.head_dim
    if heads % mesh.size():
        raise ValueError(f"num_heads is {heads}; the tensor parallel degree {mesh.size()} must divide it")
    parallelize_module(mixer, mesh, _mixer_plan(mixer, mesh))


def _waited(module, inputs, output):
    """A compiled block cannot take the result of a collective that is still under way for a graph input."""
    return output + 0 if isinstance(output, AsyncCollectiveTensor) else output


def _moves_float8(mesh):
    return mesh.device_type != "cpu"  # gloo has no such numbers: there, what is converted is gathered as it was


def _in_float8(linear, mesh):
    """Whether torchao has converted a layer with one scale per tensor: then shards can travel in float8."""
    if type(linear) is nn.Linear or not _moves_float8(mesh):
        return False
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_linear import Float8Linear

    granularity = ScalingGranularity.TENSORWISE
    return isinstance(linear, Float8Linear) and linear.config.cast_config_input.scaling_granularity is granularity


def _style(plain, in_float8, linears, mesh, **layouts):
    """The ParallelStyle ``plain``, or torchao's called ``in_float8`` where all ``linears`` take shards in float8."""
    if not linears or not all(_in_float8(linear, mesh) for linear in linears):
        return plain(**layouts)
    from torchao.float8 import float8_tensor_parallel

    return getattr(float8_tensor_parallel, in_float8)(**layouts)


def _colwise(linear, mesh):
    return _style(ColwiseParallel, "Float8ColwiseParallel", [linear], mesh)


def _rowwise(linear, mesh):
    return _style(RowwiseParallel, "Float8RowwiseParallel", [linear], mesh, output_layouts=SEQUENCE)


def _gathered(mesh, others, *readers):
    """The first input gathered along the sequence, in float8 if all its ``readers`` are; ``others`` as they come."""
    rest = (None,) * others
    layouts = {"input_layouts": (SEQUENCE, *rest), "desired_input_layouts": (Replicate(), *rest)}
    return _style(PrepareModuleInput, "PrepareFloat8ModuleInput", readers, mesh, **layouts)


def _block_plan(block, mesh):
    mlp = block.mlp
    return {
        "mixer_norm": SequenceParallel(),
        **{f"mixer.{name}" if name else "mixer": style for name, style in _mixer_plan(block.mixer, mesh).items()},
        "mlp_norm": SequenceParallel(),
        "mlp": _gathered(mesh, 0, mlp.gate_proj, mlp.up_proj),
        "mlp.gate_proj": _colwise(mlp.gate_proj, mesh),
        "mlp.up_proj": _colwise(mlp.up_proj, mesh),
        "mlp.down_proj": _rowwise(mlp.down_proj, mesh),
    }


def _mixer_plan(mixer, mesh):
    """Of a mixer and its parts, by their names."""
    if isinstance(mixer, Attention):
        plan = {"": _gathered(mesh, 2, mixer.q_proj, mixer.k_proj, mixer.v_proj)}  # besides: angles and mask
    else:
        plan = {"": _gathered(mesh, 1)}  # besides: resets; in high precision, which the low-rank projections read
    for name, part in mixer.named_children():
        if isinstance(part, GatedNorm):
            style = _NormOfRanks()
        elif name == "o_norm":
            style = SequenceParallel(sequence_dim=2, use_local_output=True)  # [B, T, heads, V], by heads
        elif name == "o_proj":
            style = _rowwise(part, mesh)
        elif name.endswith("_low_proj") or name in getattr(mixer, "OF_ALL_HEADS", ()):
            # On every rank: the outputs are small, and their gradients are summed with those of the mixer's input.
            style = _Distributed(Replicate())
        elif name.endswith("_proj"):
            style = _colwise(part, mesh)
        else:  # convolutions, the decay, and what Mamba's heads have for themselves
            style = _Distributed(Shard(0))
        plan[name] = style
    return plan
