"""Checkpoints for the tests of gdn2_titan.convert."""

import dataclasses
import re
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from gdn2_titan.convert.__main__ import main
from gdn2_titan.convert.checkpoint_info import CheckpointInfo, write_info
from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.parallel import apply_fsdp, apply_tensor_parallel
from tests.model_cases import sharpened

TOKENIZER = Path(__file__).parents[1] / "gdn2_titan" / "titan" / "assets" / "byte_tokenizer"
HYBRID = GDN2ModelArgs(
    vocab_size=264, hidden_size=32, n_layers=2, mlp_size=48, num_heads=2, head_dim=16, num_v_heads=4, attn_heads=4,
    attn_kv_heads=2, window=8, layer_pattern=("gdn2", "swa"),
)  # fmt: skip
JOB = {"model": {"hf_assets_path": str(TOKENIZER)}}
VARIANTS = {
    "hybrid-grouped": HYBRID,
    "recurrent": dataclasses.replace(HYBRID, layer_pattern=("gdn2",), num_v_heads=None),
    "tied-scalar-decay": dataclasses.replace(HYBRID, tied_gates=True, decay="scalar", layer_pattern=("gdn2",)),
    "mean-gates-other-ranks-bounded": dataclasses.replace(
        HYBRID, erase_gate="mean", write_gate="mean", decay_rank="full", gate_rank=3, lower_bound=-5.0
    ),
    "scalar-gates-sigmoid": dataclasses.replace(
        HYBRID, erase_gate="scalar", write_gate="scalar", output_gate="sigmoid", layer_pattern=("attention", "gdn2")
    ),
}


def weights(args, seed=0):
    """{name: tensor}, every value random, the norms' too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = GDN2Model(args).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}


def save_step(folder, tensors, args, job_config=None):
    """A checkpoint as TorchTitan leaves one: the model's tensors beside other states, gdn2.json around it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    others = {"optimizer": {"state.norm.weight.step": torch.ones(())}, "train_state": {"step": 7}}
    dcp.save(tensors | others, checkpoint_id=folder, no_dist=True)
    if args is not None:
        write_info(folder.parent, CheckpointInfo(args, job_config))
    return folder


def hybrid():
    """A decoder whose every weight shows in its logits."""
    torch.manual_seed(0)
    return sharpened(GDN2Model(HYBRID)).eval()


def save_run(folder, decoder):
    """A run's checkpoints, the latest of them the hybrid's, and a Hugging Face folder of it beside."""
    save_step(folder / "checkpoint" / "step-7", decoder.state_dict(), HYBRID, JOB)
    assert main(["to-hf", str(folder / "checkpoint"), str(folder / "hf")]) == 0


def load_step(folder, args):
    """{name: tensor} by PyTorch's own reader."""
    tensors = {name: torch.full(t.shape, torch.nan, dtype=t.dtype) for name, t in weights(args).items()}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def load_safetensors(folder):
    """{name: tensor} by safetensors' own reader."""
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def convert(capsys, *arguments):
    """Exit status and the one line on stderr of the command line."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


def assert_one_sentence(capsys, main, arguments, sentence):
    """A command answers what is wrong by one sentence, which ends stderr, and prints nothing else."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    printed = capsys.readouterr()
    assert status in (1, 2) and not printed.out
    assert re.fullmatch(rf".*rror: {sentence}", printed.err.strip().splitlines()[-1]), printed.err
    assert "Traceback" not in printed.err


def hashes(folder):
    """{relative path: bytes} of every file, to see that nothing changed."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def save_sharded(rank, folder, world, tensor_parallel, args):
    """A process of ``world`` that saves its part of one model under FSDP2 and tensor parallelism; rank 0 leaves the
    whole tensors beside it."""
    mesh = init_device_mesh("cpu", (world // tensor_parallel, tensor_parallel), mesh_dim_names=("fsdp", "tp"))
    with torch.device("meta"):
        model = GDN2Model(args)
    if tensor_parallel > 1:
        apply_tensor_parallel(model, mesh["tp"])
    if world // tensor_parallel > 1:
        apply_fsdp(model, mesh["fsdp"], torch.float32, torch.float32)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    tensors = get_model_state_dict(model)
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in tensors.items()}
    dcp.save(tensors | {"train_state": {"step": 3}}, checkpoint_id=folder / "step-3")
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
        write_info(folder, CheckpointInfo(args))
