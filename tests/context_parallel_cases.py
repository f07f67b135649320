"""What the tests of context parallelism share: a rank's part of a sequence, and the bytes that reach it."""

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gdn2_cases import leaves

SEQUENCES = ("q", "k", "v", "g", "b", "w")


def shard(inputs, positions):
    """This rank's part: leaves that are sequences, or whole."""
    local = {n: (x[:, positions] if n in SEQUENCES else x).detach().clone() for n, x in leaves(inputs).items()}
    rest = {n: x for n, x in inputs.items() if n not in local and n != "cu_seqlens"}
    if inputs["resets"] is not None:
        rest["resets"] = inputs["resets"][:, positions]
    return {n: x.requires_grad_() for n, x in local.items()} | rest


def part(x, shards, dim=1):
    """The tokens of x [B, T, ...] that the rank has, in the order in which it has them."""
    return x.index_select(dim, shards.positions(x.shape[dim] // shards.size, x.device))


def summed(x, group=None):
    """x summed over the ranks of a group, or over all."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


class Received(TorchDispatchMode):
    """Counts the bytes that collectives bring to this rank from others while it is active, backward included."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.bytes, self.calls = rank, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.name()
        if name.startswith("_c10d_functional::") and name != "_c10d_functional::wait_tensor":
            self.calls += 1
            self.bytes += self._arrived(name.removeprefix("_c10d_functional::"), args, out)
        return out

    def _arrived(self, name, args, out):
        if name == "all_to_all_single":
            mine = out.split(args[1])[self.rank]
            return out.nbytes - mine.nbytes
        if name == "all_gather_into_tensor":
            return out.nbytes // args[1] * (args[1] - 1)
        if name == "reduce_scatter_tensor":
            return out.nbytes * (args[2] - 1)
        if name == "_wrap_tensor_autograd":
            self.calls -= 1
            return 0
        raise NotImplementedError(name)
