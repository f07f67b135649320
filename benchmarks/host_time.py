"""Host time of the public functions and of the bare operators: python benchmarks/host_time.py

The kernels are replaced by ones that compute nothing, so that only the host's own work is left. A call: the public
function, its tensors requiring gradients. Bare: the operator on the same tensors without gradients.
"""

import time
from collections.abc import Callable
from unittest import mock

import torch
from calls import conv_inputs, gdn2_inputs

from gdn2_titan.ops import causal_conv1d, chunk_gdn2, recurrent_gdn2_
from gdn2_titan.ops.gdn2 import chunked, reference
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.short_conv import windowed

__all__ = ["microseconds"]

OPS = torch.ops.gdn2_titan


def microseconds(*calls: Callable, repeats: int = 50, rounds: int = 60) -> list[float]:
    """Of one run of each call, the best of many rounds, in which the calls take turns: what else the machine does then
    slows all of them or none, and most of the rounds do not count."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            best[i] = min(best[i], time.perf_counter() - start)
    return [seconds / repeats * 1e6 for seconds in best]


def _cases():
    """name: (the public function, the bare operator, whether there is a backward)."""
    given = gdn2_inputs("fp32", 1, 4, 1, 16, 16)
    tensors = GDN2Inputs(**{name: given.get(name) for name in GDN2Inputs._fields})
    learned = {name: x.clone().requires_grad_() for name, x in given.items()}
    options = GDN2Options(0.25)
    state = torch.zeros(1, 1, 16, 16)
    conv = conv_inputs("fp32", 1, 4, 16)
    learned_conv = {name: x.clone().requires_grad_() for name, x in conv.items() if isinstance(x, torch.Tensor)}
    x, weight = conv["x"], conv["weight"]
    pool = tensors._replace(initial_state=state)
    return {
        "chunk_gdn2": (lambda: chunk_gdn2(**learned)[0], lambda: OPS.chunk_gdn2(*tensors, *options), True),
        "recurrent_gdn2_": (
            lambda: recurrent_gdn2_(**given, state=state), lambda: OPS.recurrent_gdn2_(*pool, *options), False
        ),
        "causal_conv1d": (
            lambda: causal_conv1d(**learned_conv)[0],
            lambda: OPS.causal_conv1d(x, weight, None, False, None, None, None, "auto"),
            True,
        ),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    o, state, y = torch.zeros(1, 4, 1, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1, 4, 16)
    kernels = (
        (chunked, "chunk_forward", lambda *args: (o.detach(), state.detach())),
        (chunked, "chunk_backward", lambda do, dfinal, inputs, options: inputs),
        (reference, "recurrent", lambda *args: (o.detach(), state)),
        (windowed, "forward", lambda *args: (y.detach(), y.detach())),
        (windowed, "backward", lambda dy, dfinal, inputs: (inputs.x.detach(), inputs.weight.detach(), None, None)),
    )
    for module, name, stub in kernels:
        mock.patch.object(module, name, stub).start()
    print("microseconds        call    bare   ratio   call and backward")
    for name, (call, bare, differentiable) in _cases().items():
        calls = [call, bare]
        if differentiable:
            seed = call().detach()
            calls.append(lambda call=call, seed=seed: call().backward(seed))
        public, operator, *both = microseconds(*calls)
        print(f"{name:16} {public:7.1f} {operator:7.1f} {public / operator:7.2f}  ", *(f"{x:8.1f}" for x in both))


if __name__ == "__main__":
    main()
