"""What the gates of a model's GDN-2 layers do over a text, read off with hooks while the model reads it, and what each
token erases from the memory and writes to it, by the recurrence itself."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.models.layer import SLOWEST_DECAY
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.gdn2.gates import activate

__all__ = ["QUANTITIES", "Channels", "LayerTrace", "Quantity", "colours_of", "follow_memory", "trace_gates"]


class Quantity(NamedTuple):
    title: str
    meaning: str
    scale: str  # "gate": from 0 to what the gate reaches; "log"; "norm": from 0 to the largest


QUANTITIES = {
    "erase": Quantity("erase gate", "b, mean over key channels", "gate"),
    "write": Quantity("write gate", "w, mean over value channels", "gate"),
    "half_life": Quantity("half-life", "tokens until a channel has decayed by half, median over key channels", "log"),
    "erased": Quantity("erased norm", "Frobenius norm of k (b * k)ᵀ Diag(exp g) S, which this token takes out", "norm"),
    "written": Quantity("written norm", "Frobenius norm of k (w * v)ᵀ, which this token puts in", "norm"),
    "decayed": Quantity(
        "decayed", "what the decay takes of the memory's Frobenius norm before this token edits it", "norm"
    ),
    "state": Quantity("state norm", "Frobenius norm of the memory S after this token", "norm"),
}


def colours_of(scale: str, reach: float = 1.0) -> str:
    """The name of matplotlib's colour map. reach: what the gate reaches; from 0 to 2, colours part at 1."""
    if scale == "gate" and reach > 1:
        return "PuOr"
    return "magma" if scale == "norm" else "viridis"


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
    decayed: np.ndarray  # [HV, T], the norms of Memory
    erased: np.ndarray  # [HV, T]
    written: np.ndarray  # [HV, T]
    state: np.ndarray  # [HV, T]
    deviation: float  # of the recurrence's outputs from those of the layer's own op, relative to the largest
    channels: Channels | None  # of the head that was asked for


class Memory(NamedTuple):
    """Frobenius norms [T, HV] per token and value head, and what shows that it is the same memory: o and the state."""

    decayed: Tensor  # ||S_{t-1}|| - ||D||, where D = Diag(exp(g_t)) S_{t-1}
    erased: Tensor  # ||k_t (b_t * k_t)^T D||
    written: Tensor  # ||k_t (w_t * v_t)^T||
    state: Tensor  # ||S_t||
    o: Tensor  # [T, HV, V]
    final_state: Tensor  # [HV, K, V]


def follow_memory(q: Tensor, k: Tensor, g: Tensor, b: Tensor, v: Tensor, w: Tensor) -> Memory:
    """A Memory of one sequence that starts with an empty state. Holds one state at a time.

    Args: q, k, g, b [T, H, K]; v, w [T, HV, V], of one dtype, every gate applied, q and k normalised.
    """
    T, H, K = q.shape
    HV, V = v.shape[1:]
    S = q.new_zeros(HV, K, V)
    norms = q.new_empty(4, T, HV)
    o = torch.empty_like(v)
    for t in range(T):
        # Value head j reads key head j // (HV // H).
        query, key, decay, erase = (x[t].repeat_interleave(HV // H, 0) for x in (q, k, g.exp(), b))
        before = S.norm(dim=(1, 2))
        S = decay[:, :, None] * S
        read, written = torch.einsum("hk,hkv->hv", erase * key, S), w[t] * v[t]
        # What is erased and what is written are products of a column and a row: so are their norms.
        length = key.norm(dim=1)
        norms[0, t], norms[1, t] = before - S.norm(dim=(1, 2)), length * read.norm(dim=1)
        S = S + key[:, :, None] * (written - read)[:, None, :]
        norms[2, t], norms[3, t] = length * written.norm(dim=1), S.norm(dim=(1, 2))
        o[t] = K**-0.5 * torch.einsum("hk,hkv->hv", query, S)
    return Memory(*norms, o, S)


# What comes out of these submodules of a layer is kept while the layer runs; of q, k and v what their convolutions,
# which the layer runs as one, make of it.
CAPTURED = ("q_proj", "k_proj", "v_proj", "decay_proj", "erase_proj", "write_proj")
CONVOLUTIONS = {"q_proj": "q_conv1d", "k_proj": "k_conv1d", "v_proj": "v_conv1d"}


def _capture(mixer: Any, done: Callable[[Any, dict[str, Tensor]], None]) -> list[Any]:
    """Hooks that call ``done(mixer, what was kept)`` after each forward of the layer."""
    kept = {}

    def keep(name, module, inputs, output):
        if name in CONVOLUTIONS:
            output = getattr(mixer, CONVOLUTIONS[name])(output)
        kept[name] = output[0].double().cpu()

    def finish(mixer, *_):
        done(mixer, kept)
        kept.clear()

    modules = {name: getattr(mixer, name) for name in CAPTURED}  # tied gates have one projection
    hooks = [m.register_forward_hook(functools.partial(keep, name)) for name, m in modules.items() if m is not None]
    keep_o = mixer.o_norm.register_forward_pre_hook(lambda module, inputs: keep("o", module, (), inputs))
    return [*hooks, keep_o, mixer.register_forward_hook(finish)]


def _half_life(g):
    return math.log(2) / (-g).clamp_min(SLOWEST_DECAY)


def _trace(index, mixer, kept, head):
    """The LayerTrace of what one forward left; head: the value head to keep the channels of, or None."""
    K, V = mixer.head_dim, mixer.head_v_dim
    q, k, v = (kept[f"{name}_proj"].unflatten(-1, (-1, size)) for name, size in (("q", K), ("k", K), ("v", V)))
    H, HV = q.shape[1], v.shape[1]
    erase, decay = kept["erase_proj"].unflatten(-1, (H, -1)), mixer.decay
    g = erase.new_zeros(()).expand(len(q), H, 1) if decay is None else kept["decay_proj"].unflatten(-1, (H, -1))
    tied = mixer.tied_gates
    write = erase.repeat_interleave(HV // H, dim=1) if tied else kept["write_proj"].unflatten(-1, (HV, -1))
    sizes = erase.shape[-1], write.shape[-1], g.shape[-1]  # 1 where a gate is one scalar per head
    raw = q, k, v, g.expand(q.shape), erase.expand(q.shape), write.expand(v.shape)
    parameters = () if decay is None else (decay.A_log.cpu(), decay.dt_bias.cpu().expand(H, K))
    inputs = GDN2Inputs(*(x[None] for x in raw), *parameters)
    options = GDN2Options(None, True, decay is not None, True, mixer.erase_scale, lower_bound=mixer.lower_bound)
    q, k, _, g, b, w = (x[0] for x in activate(inputs, options))
    b, w = (x.mean(-1, keepdim=True) if mean else x for x, mean in zip((b, w), mixer.mean_gates, strict=True))
    sizes = *(1 if mean else size for mean, size in zip(mixer.mean_gates, sizes, strict=False)), sizes[2]
    b, w = b.expand(k.shape), w.expand(v.shape)
    memory = follow_memory(q, k, g, b, v, w)
    erase, write, g = (x[..., :size] for x, size in zip((b, w, g), sizes, strict=True))
    half_life = _half_life(g)
    numbers = dict(
        erase=erase.mean(-1).T, write=write.mean(-1).T, half_life=torch.from_numpy(np.median(half_life, -1)).T,
        half_lives=_half_life(g.mean(0)), decayed=memory.decayed.T, erased=memory.erased.T, written=memory.written.T,
        state=memory.state.T,
    )  # fmt: skip
    deviation = float((memory.o - kept["o"]).abs().max() / kept["o"].abs().max().clamp_min(1e-300))
    if not math.isfinite(deviation) or not all(x.isfinite().all() for x in numbers.values()):
        raise ConvertError(f"layer {index} gives numbers that are not finite; the model must not have diverged")
    numbers = {name: np.ascontiguousarray(x) for name, x in numbers.items()}
    channels = None
    if head is not None:
        key_head = head // (HV // H)
        channels = Channels(erase[:, key_head].numpy(), write[:, head].numpy(), half_life[:, key_head].numpy())
    return LayerTrace(index, mixer.erase_scale, **numbers, deviation=deviation, channels=channels)


@torch.no_grad()
def trace_gates(
    model: Any, ids: Tensor, layer: int, head: int, progress: Callable[[], Any] = lambda: None
) -> list[LayerTrace]:
    """[LayerTrace] of every GDN-2 layer of a GDN2ForCausalLM that reads ids [1, T].

    A layer's activations are let go before the next layer runs. layer, head: the GDN-2 layer and its value head to keep
    the channels of. progress: called after each layer.

    Raises:
        ConvertError: what a layer computes is not finite.
    """
    traces, hooks = [], []

    def done(index, mixer, kept):
        traces.append(_trace(index, mixer, kept, head if index == layer else None))
        progress()

    try:
        for index, block in enumerate(model.model.layers):
            if block.kind == "gdn2":
                hooks += _capture(block.mixer, functools.partial(done, index))
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return traces
