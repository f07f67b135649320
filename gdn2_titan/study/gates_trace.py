"""What the gates of a model's GDN-2 layers do over a text, read off with hooks while the model reads it."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.models.layer import SLOWEST_DECAY
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.gates import activate

from .gates_memory import follow_memory

__all__ = ["Channels", "LayerTrace", "trace_gates"]


@dataclass(frozen=True)
class Channels:
    """The gates of one value head and of the key head that it reads: [T, channels], one channel where it is scalar."""

    erase: np.ndarray
    write: np.ndarray
    half_life: np.ndarray


@dataclass(frozen=True)
class LayerTrace:
    """One layer over T tokens, fp64. H key heads, HV value heads; half-lives in tokens, norms are Frobenius norms."""

    layer: int  # its number in the model
    erase_scale: float  # of the erase gate's range, [0, 1] or [0, 2]
    erase: np.ndarray  # [H, T], mean over key channels
    write: np.ndarray  # [HV, T], mean over value channels
    half_life: np.ndarray  # [H, T], median over key channels
    half_lives: np.ndarray  # [H, channels], of the mean decay over the text, as in training's telemetry
    decayed: np.ndarray  # [HV, T], the norms of gates_memory.Memory
    erased: np.ndarray  # [HV, T]
    written: np.ndarray  # [HV, T]
    state: np.ndarray  # [HV, T]
    deviation: float  # of the recurrence's outputs from those of the layer's own op, relative to the largest
    channels: Channels | None  # of the head that was asked for


class _Captured:
    """Keeps what passes through a layer's submodules during one forward."""

    INPUTS = ("q_conv1d", "k_conv1d", "v_conv1d", "decay_proj", "erase_proj", "write_proj")

    def __init__(self, mixer, done):
        self.handles, self.kept = [], {}
        for name in self.INPUTS:
            module = getattr(mixer, name)
            if module is not None:  # tied gates have one projection
                self.handles.append(module.register_forward_hook(self._keep_output(name)))
        self.handles.append(mixer.o_norm.register_forward_pre_hook(self._keep_o))
        self.handles.append(mixer.register_forward_hook(lambda mixer, *_: done(mixer, self._taken())))

    def _keep_output(self, name):
        def keep(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output  # a convolution gives its state too
            self.kept[name] = output[0].double().cpu()

        return keep

    def _keep_o(self, module, inputs):
        self.kept["o"] = inputs[0][0].double().cpu()

    def _taken(self):
        taken, self.kept = self.kept, {}
        return taken

    def remove(self):
        for handle in self.handles:
            handle.remove()


def _half_life(g):
    return math.log(2) / (-g).clamp_min(SLOWEST_DECAY)


def _trace(index, mixer, kept, head):
    """The LayerTrace of what one forward left; head: the value head to keep the channels of, or None."""
    K, V = mixer.head_dim, mixer.head_v_dim
    q, k, v = (kept[f"{name}_conv1d"].unflatten(-1, (-1, size)) for name, size in (("q", K), ("k", K), ("v", V)))
    H, HV = q.shape[1], v.shape[1]
    g, erase = (kept[name].unflatten(-1, (H, -1)) for name in ("decay_proj", "erase_proj"))
    if mixer.tied_gates:
        write = erase.repeat_interleave(HV // H, dim=1)
    else:
        write = kept["write_proj"].unflatten(-1, (HV, -1))
    sizes = erase.shape[-1], write.shape[-1], g.shape[-1]  # 1 where a gate is one scalar per head
    raw = q, k, v, g.expand(q.shape), erase.expand(q.shape), write.expand(v.shape)
    inputs = GDN2Inputs(*(x[None] for x in raw), mixer.decay.A_log.cpu(), mixer.decay.dt_bias.cpu().expand(H, K))
    options = GDN2Options(None, l2norm=True, gate=True, sigmoid=True, erase_scale=mixer.erase_scale)
    q, k, _, g, b, w = (x[0] for x in activate(inputs, options))
    memory = follow_memory(q, k, g, b, v, w)
    erase, write, g = (x[..., :size] for x, size in zip((b, w, g), sizes, strict=True))
    half_life = _half_life(g)
    o = kept["o"]
    numbers = dict(
        erase=erase.mean(-1).T,
        write=write.mean(-1).T,
        half_life=torch.from_numpy(np.median(half_life.numpy(), -1)).T,
        half_lives=_half_life(g.mean(0)),
        **{name: getattr(memory, name).T for name in ("decayed", "erased", "written", "state")},
    )
    channels = None
    if head is not None:
        of_head = erase[:, head // (HV // H)], write[:, head], half_life[:, head // (HV // H)]
        channels = Channels(*(x.numpy() for x in of_head))
    deviation = float((memory.o - o).abs().max() / o.abs().max().clamp_min(1e-300))
    if not math.isfinite(deviation) or not all(x.isfinite().all() for x in numbers.values()):
        raise ConvertError(f"layer {index} gives numbers that are not finite; the model must not have diverged")
    numbers = {name: np.ascontiguousarray(x.numpy()) for name, x in numbers.items()}
    return LayerTrace(index, mixer.erase_scale, **numbers, deviation=deviation, channels=channels)


@torch.no_grad()
def trace_gates(model, ids, layer, head, progress=lambda: None):
    """[LayerTrace] of every GDN-2 layer of a GDN2ForCausalLM that reads ids [1, T].

    A layer's activations are let go before the next layer runs. layer, head: the GDN-2 layer and its value head to keep
    the channels of. progress: called after each layer.

    Raises:
        ConvertError: what a layer computes is not finite.
    """
    traces, captured = [], []

    def done(index):
        def of(mixer, kept):
            traces.append(_trace(index, mixer, kept, head if index == layer else None))
            progress()

        return of

    try:
        for index, block in enumerate(model.model.layers):
            if block.kind == "gdn2":
                captured.append(_Captured(block.mixer, done(index)))
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for one in captured:
            one.remove()
    return traces
