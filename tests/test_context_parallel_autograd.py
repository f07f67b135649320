"""Context parallelism and what autograd looks at: no message in flight is a gradient, no rank's loss hangs others."""

import datetime

import pytest
import torch
import torch.distributed as dist

from gdn2_titan.ops import chunk_gdn2, context_parallel_gdn2
from gdn2_titan.ops.context_parallel import exchange as exchanges
from gdn2_titan.ops.context_parallel.layout import SequenceShards
from tests.context_parallel_cases import SEQUENCES, shard
from tests.gdn2_cases import leaves, make
from tests.processes import run as run_processes

DEADLINE = datetime.timedelta(seconds=60)  # of a message: a rank that waits for one for ever fails


def inputs_and_part(rank):
    inputs = make(B=1, T=20, H=2, K=4, V=3)
    positions = SequenceShards("", rank, 2, 1).positions(10)
    return inputs, shard(inputs, positions), positions


class Late:
    """A form of exchange whose messages in flight hold NaN, and have their content once they are received."""

    def __init__(self, form):
        self.form = form

    def __getattr__(self, name):
        return getattr(self.form, name)

    def send_back(self, dD, shards):
        self.message = self.form.send_back(dD, shards)
        self.flying = torch.full_like(self.message, torch.nan)
        return self.flying

    def receive_back(self, pending, dD, kept, shards, backend):
        assert pending is self.flying
        return self.form.receive_back(self.message, dD, kept, shards, backend)


def _flight(rank):
    inputs, local, positions = inputs_and_part(rank)
    want = torch.autograd.grad(chunk_gdn2(**inputs)[0].square().sum(), list(leaves(inputs).values()))
    forms = dict(exchanges.FORMS)
    for exchange, form in forms.items():
        exchanges.FORMS[exchange] = Late(form)
        with torch.autograd.set_detect_anomaly(True):  # raises where a gradient between two nodes is NaN
            o, _ = context_parallel_gdn2(**local, group=dist.group.WORLD, exchange=exchange)
            loss = o.square().sum()
            for _ in range(2):  # the graph may be kept
                got = torch.autograd.grad(loss, list(leaves(local).values()), retain_graph=True)
        for name, a, b in zip(leaves(inputs), got, want, strict=True):
            if name in SEQUENCES:
                torch.testing.assert_close(a, b[:, positions], rtol=0, atol=1e-11, msg=f"{exchange}, d{name}")


def test_no_message_in_flight_is_a_gradient(tmp_path):
    run_processes(_flight, 2, tmp_path / "store")


LOSSES = {
    "the state alone": lambda o, state: state.square().sum(),
    "no token": lambda o, state: o[:, :0].sum(),
    "zero times o": lambda o, state: (0 * o).sum(),
    "one token": lambda o, state: o[:, 3].sum(),
}


def _losses(rank, compiled):
    group = dist.new_group(timeout=DEADLINE)
    names = ("the state alone", "no token") if compiled else LOSSES
    for name in names:
        of_second = LOSSES[name]
        for exchange in ("scan",) if compiled else exchanges.FORMS:
            torch._dynamo.reset()
            inputs, local, positions = inputs_and_part(rank)

            def loss(o, state, rank=rank, of_second=of_second):
                return o.sin().sum() if rank == 0 else of_second(o, state)

            def step(local, exchange=exchange, loss=loss):
                shared = dict(group=group, exchange=exchange, output_final_state=True)
                return loss(*context_parallel_gdn2(**local, **shared))

            if compiled:
                step = torch.compile(step, fullgraph=True, backend="aot_eager")
            # Not all tensors of all ranks need gradients.
            if rank == 1:
                local["q"] = local["q"].detach()
            step(local).backward()
            o, state = chunk_gdn2(**inputs, output_final_state=True)
            whole = o[:, :10].sin().sum() + of_second(o[:, 10:], state)
            want = dict(zip(leaves(inputs), torch.autograd.grad(whole, list(leaves(inputs).values())), strict=True))
            for n in SEQUENCES:
                if local[n].requires_grad:
                    torch.testing.assert_close(
                        local[n].grad, want[n][:, positions], rtol=0, atol=1e-11, msg=f"{name}, {exchange}, d{n}"
                    )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_rank_whose_loss_reads_only_the_state_or_nothing_of_o_leaves_no_other_waiting(compiled, tmp_path):
    run_processes(_losses, 2, tmp_path / "store", compiled)


@pytest.mark.parametrize("rank, size, per_rank, sentence", [
    (0, 1, 8, r"per_rank is 8; it must be 1 \(contiguous\) or 2 \(head_tail\)"),
    (0, 2, 0, "per_rank is 0"), (0, 2, 3, "per_rank is 3"), (0, 2, -1, "per_rank is -1"),
    (2, 2, 1, "rank is 2; with size 2 it must be from 0 to 1"), (-1, 2, 1, "rank is -1"),
    (0, 0, 1, "size is 0; it must be at least 1"), (0, -2, 1, "size is -2"),
])  # fmt: skip
def test_shards_that_no_group_has_are_refused_where_they_are_made(rank, size, per_rank, sentence):
    with pytest.raises(ValueError, match=sentence):
        SequenceShards("", rank, size, per_rank)


@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_shards_are_whole_numbers(value):
    with pytest.raises(TypeError, match="size is .*; it must be a whole number"):
        SequenceShards("", 0, value, 1)
