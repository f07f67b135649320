"""Host time of the public functions and of the bare operators.

    python benchmarks/host_time.py

The kernels are replaced by ones that compute nothing, so that only the host's own work is left. A call: the public
function, its tensors requiring gradients. Bare: the operator on the same tensors without gradients.
"""

from unittest import mock

import torch
from calls import conv_inputs, gdn2_inputs
from tables import table
from torch.utils.benchmark import Timer

from gdn2_titan.ops import causal_conv1d, chunk_gdn2, recurrent_gdn2_
from gdn2_titan.ops.gdn2 import chunked, reference
from gdn2_titan.ops.gdn2.arguments import GDN2Inputs, GDN2Options
from gdn2_titan.ops.short_conv import windowed

OPS = torch.ops.gdn2_titan


def _microseconds(call):
    return f"{1e6 * Timer('call()', globals={'call': call}).blocked_autorange(min_run_time=0.5).median:.1f}"


def _cases():
    """(name, the public function, the bare operator); there is no backward where tensors require no gradients."""
    given, conv = gdn2_inputs("fp32", 1, 4, 1, 16, 16), conv_inputs("fp32", 1, 4, 16)
    learned = {name: x.clone().requires_grad_() for name, x in given.items()}
    learned_conv = {name: conv[name].clone().requires_grad_() for name in ("x", "weight")}
    tensors = GDN2Inputs(**{name: given.get(name) for name in GDN2Inputs._fields})
    options, state = GDN2Options(0.25), torch.zeros(1, 1, 16, 16)
    pool = tensors._replace(initial_state=state)
    bare_conv = (conv["x"], conv["weight"], None, False, None, None, None, "auto")
    yield "chunk_gdn2", lambda: chunk_gdn2(**learned)[0], lambda: OPS.chunk_gdn2(*tensors, *options)
    yield "recurrent_gdn2_", lambda: recurrent_gdn2_(**given, state=state), lambda: OPS.recurrent_gdn2_(*pool, *options)
    yield "causal_conv1d", lambda: causal_conv1d(**learned_conv)[0], lambda: OPS.causal_conv1d(*bare_conv)


def main():
    torch.set_num_threads(1)
    o, state, y = torch.zeros(1, 4, 1, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1, 4, 16)
    kernels = (
        (chunked, "chunk_forward", lambda *args: (o.detach(), state.detach())),
        (chunked, "chunk_backward", lambda do, dfinal, inputs, options: inputs),
        (reference, "recurrent", lambda *args: (o.detach(), state)),
        (windowed, "forward", lambda *args: (y.detach(), y.detach())),
        (windowed, "backward", lambda dy, dfinal, x, weight, *rest: (x.detach(), weight.detach(), None, None)),
    )
    for module, name, stub in kernels:
        mock.patch.object(module, name, stub).start()
    rows = []
    for name, call, bare in _cases():
        rows.append([name, _microseconds(call), _microseconds(bare), "-"])
        result = call()
        if isinstance(result, torch.Tensor) and result.requires_grad:
            rows[-1][-1] = _microseconds(lambda call=call, seed=result.detach(): call().backward(seed))
    print(table(["microseconds", "call", "bare", "call and backward"], rows))


if __name__ == "__main__":
    main()
