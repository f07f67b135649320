"""What TorchTitan hands to a context-parallel rank is what the shards of the ops say it has."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gdn2_titan.ops.context_parallel.layout import SequenceShards
from gdn2_titan.titan.job_config import JobConfig
from gdn2_titan.titan.parallelize import layout_of

from .generations import IS_V02, dealt_out
from .processes import run


def _dealt_out(rank, with_resets):
    if IS_V02:
        from gdn2_titan.titan import register

        register()  # again: what was dealt out once must not be dealt out again
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    tokens = torch.randint(9, (3, 24))
    labels, resets = torch.randint(9, (3, 24)), torch.rand(3, 24) < 0.3
    parallelism = JobConfig().parallelism
    for balancer, layout in (("headtail", "head_tail"), ("none", "contiguous"), (None, "contiguous")):
        parallelism.context_parallel_load_balancer = balancer
        assert layout_of(parallelism) == layout
        mine = SequenceShards.of(mesh, layout).positions(24 // dist.get_world_size())
        found = dealt_out(tokens, labels, resets if with_resets else None, mesh, balancer)
        torch.testing.assert_close(found[0], tokens[:, mine])
        torch.testing.assert_close(found[1], labels[:, mine])
        if with_resets:
            torch.testing.assert_close(found[2], resets[:, mine])
        else:
            assert found[2] is None


@pytest.mark.parametrize("with_resets", [True, False], ids=["resets", "no resets"])
def test_tokens_labels_and_resets_are_dealt_out_alike(tmp_path, with_resets):
    run(_dealt_out, 3, tmp_path / "store", with_resets)
