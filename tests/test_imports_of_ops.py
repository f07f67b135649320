"""``import gdn2_titan.ops`` is light; what needs torch.distributed comes with it all the same, in either order."""

import subprocess
import sys

import pytest

from tests.gdn2_cases import slowly

LIGHT = """
import sys, torch
before = set(sys.modules)
import gdn2_titan.ops as ops
q = torch.rand(1, 3, 1, 2, requires_grad=True)
ops.chunk_gdn2(q, q, q, -q, q, q)[0].sum().backward()
print(*(name for name in set(sys.modules) - before if name.startswith(("torch.distributed", "torch._dynamo"))))
assert {"context_parallel_gdn2", "context_parallel_conv1d"} <= set(dir(ops)) & set(ops.__all__)
assert callable(ops.context_parallel_gdn2) and callable(ops.context_parallel_conv1d)
"""

SHARDED = """
import sys, torch
way, order = sys.argv[1], sys.argv[2:]
for name in order:
    __import__(name)
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
q = distribute_tensor(torch.rand(2, 3, 1, 2), init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
def call(q):
    nothing = [None] * 5
    return torch.ops.gdn2_titan.chunk_gdn2(q, q, q, -q, q, q, *nothing, 1.0, False, False, False, 1.0)[0]
if way == "inference":
    with torch.inference_mode():
        assert isinstance(call(q), DTensor)
else:
    o = (torch.compile(call, fullgraph=True, backend="aot_eager") if way == "compiled" else call)(q)
    o.sum().backward()
    assert isinstance(o, DTensor) and isinstance(q.grad, DTensor)
dist.destroy_process_group()
"""


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_importing_and_calling_an_op_brings_no_module_of_torch_distributed():
    assert run(LIGHT) == []


OPS_FIRST = "gdn2_titan.ops", "torch.distributed.tensor"


@pytest.mark.parametrize(
    "order, way",
    [
        (OPS_FIRST, "compiled"), (OPS_FIRST, "inference"), (OPS_FIRST[::-1], "eager"),
        *slowly((OPS_FIRST, "eager"), (OPS_FIRST[::-1], "compiled"), (OPS_FIRST[::-1], "inference")),
    ],
)  # fmt: skip
def test_a_bare_operator_takes_dtensors_whatever_was_imported_first(order, way):
    run(SHARDED, way, *order)
