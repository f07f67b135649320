"""The layout of the authors' release, against checkpoints made from its names and shapes (see nvlabs_cases)."""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import save_file

from gdn2_titan.convert import nvlabs_model
from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.convert.mapping import Renamed, check_fits, from_hf_name
from gdn2_titan.convert.nvlabs import check_layout, from_nvlabs_mapping, layout
from gdn2_titan.convert.nvlabs_model import args_of
from gdn2_titan.models import GDN2Model, flavors
from tests.convert_cases import HYBRID, TOKENIZER, assert_equal, convert, load_safetensors, save_step, weights
from tests.nvlabs_cases import release_checkpoint, release_forward, release_shapes

PUBLISHED = {
    "1.3B": (399, dict(D=2304, mlp=6208, layers=18)),
    "1.3B_hybrid": (264, dict(D=2304, mlp=6784, layers=18, per_layer=2, n_head=18)),
    "370M": (355, dict(D=1024, mlp=2048, layers=16)),
    "370M_hybrid": (235, dict(D=1024, mlp=3520, layers=16, per_layer=2, n_head=8)),
}
SMALL = dict(D=32, mlp=48, layers=3, heads=2, K=16, vocab=264)
MIXED = SMALL | dict(per_layer=2, n_head=4, groups=2)
HPARAMS = {
    "n_layer": 3, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "local_window": 5, "gdn2_per_layer": 2,
    "intermediate_size": 48, "vocab_size": 260, "padded_vocab_size": 264, "norm_eps": 1e-5, "learning_rate": 4e-4,
}  # fmt: skip
NO_FLAVOR = "fits no flavor; its tensors make it 3 layers, hidden_size 32, mlp_size 48\n"


def of_shapes(shapes):
    """A checkpoint of which there are shapes only."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return SimpleNamespace(path="FILE", tensors=tensors)


def file_of(path, tensors, hparams=None):
    """A file as the release leaves it."""
    states = {n: {"exp_avg": torch.zeros_like(t), "step": torch.tensor(1.0)} for n, t in enumerate(tensors.values())}
    optimizer = {"state": states, "param_groups": [{"lr": 4e-4, "params": list(states)}]}
    content = {"model": tensors, "optimizer": optimizer, "hparams": hparams or {}, "iter_num": 80, "step_count": 20}
    torch.save(content, path)
    return path


def ours(folder):
    return {from_hf_name(name): tensor for name, tensor in load_safetensors(folder).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def refusal(capsys, path, *flags):
    """The sentence with which a file is refused."""
    status, error = convert(capsys, "from-nvlabs", path, path.parent / "hf", *flags)
    assert status == 1 and error.count("\n") == 1 and not (path.parent / "hf").exists(), error
    return error


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_every_tensor_of_a_published_file_is_named_and_the_flavor_is_told_from_the_shapes(flavor):
    count, sizes = PUBLISHED[flavor]
    shapes, args = release_shapes(**sizes), flavors[flavor]
    assert len(shapes) == count
    assert {name: tuple(tensor.shape) for name, tensor in layout(args).items()} == shapes
    source = of_shapes(shapes)
    assert args_of(source, {}) == (args, flavor)
    check_layout(source, args)
    check_fits(Renamed(source, from_nvlabs_mapping(args)), args)


def test_the_370m_flavor_has_as_many_parameters_as_the_public_weights_and_its_hybrid_nearly():
    counts = {name: sum(math.prod(t.shape) for t in layout(flavors[name]).values()) for name in ("370M", "370M_hybrid")}
    assert counts["370M"] == 380_603_648
    sizes = PUBLISHED["370M_hybrid"][1]
    off = {
        mlp: abs(sum(map(math.prod, release_shapes(**sizes | {"mlp": mlp}).values())) - counts["370M"])
        for mlp in range(2048, 4096, 64)
    }
    assert flavors["370M_hybrid"].mlp_size == min(off, key=off.get)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [SMALL, MIXED], ids=["recurrent", "hybrid"])
def test_a_converted_model_computes_what_the_files_names_say(tmp_path, capsys, sizes, dtype):
    theirs = release_checkpoint(release_shapes(**sizes), dtype)
    path = file_of(tmp_path / "ckpt.pth", theirs, HPARAMS | {"gdn2_per_layer": sizes.get("per_layer", 1)})
    status, error = convert(capsys, "from-nvlabs", path, tmp_path / "hf")
    assert status == 0 and error.endswith(NO_FLAVOR)
    config, tensors = config_of(tmp_path / "hf"), ours(tmp_path / "hf")
    assert config["dtype"] == str(dtype).removeprefix("torch.") and {t.dtype for t in tensors.values()} == {dtype}
    assert "Step: 20" in (tmp_path / "hf" / "README.md").read_text()
    fields = {f.name for f in dataclasses.fields(HYBRID)}
    model = GDN2Model(dataclasses.replace(HYBRID, **{n: v for n, v in config.items() if n in fields})).double()
    model.load_state_dict(tensors, strict=True)
    tokens = torch.randint(264, (13,), generator=torch.Generator().manual_seed(1))
    expected = release_forward(theirs, tokens, n_head=4, groups=2, window=5)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [SMALL, MIXED], ids=["recurrent", "hybrid"])
def test_what_came_from_the_layout_goes_back_bit_for_bit(tmp_path, capsys, sizes):
    theirs = release_checkpoint(release_shapes(**sizes), torch.bfloat16)
    hparams = HPARAMS | {"gdn2_per_layer": sizes.get("per_layer", 1)}
    path = file_of(tmp_path / "ckpt.pth", theirs, hparams)
    assert convert(capsys, "from-nvlabs", path, tmp_path / "step-20")[0] == 0
    assert convert(capsys, "to-nvlabs", tmp_path / "step-20", tmp_path / "back.pth") == (0, "")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_equal(back["model"], theirs)
    known = {"n_layer", "n_embd", "intermediate_size", "padded_vocab_size", "gdn2_per_layer", "norm_eps"}
    known |= {"n_head", "n_query_groups", "local_window"} if sizes is MIXED else set()
    assert {n: back["hparams"][n] for n in known} == {n: hparams[n] for n in known}
    assert (back["iter_num"], back["step_count"]) == (20, 20)
    assert convert(capsys, "from-nvlabs", tmp_path / "back.pth", tmp_path / "again")[0] == 0
    assert_equal(ours(tmp_path / "again"), ours(tmp_path / "step-20"))
    assert config_of(tmp_path / "again") == config_of(tmp_path / "step-20")


def test_grouped_rows_are_the_queries_key_and_value_of_each_key_value_head(tmp_path, capsys):
    theirs = release_checkpoint(release_shapes(**MIXED))
    assert convert(capsys, "from-nvlabs", file_of(tmp_path / "x.pth", theirs, HPARAMS), tmp_path / "hf")[0] == 0
    found, rows = ours(tmp_path / "hf"), theirs["transformer.h.1.attn.attn.weight"].split(8)  # heads of 8
    for projection, heads in {"q": (0, 1, 4, 5), "k": (2, 6), "v": (3, 7)}.items():
        expected = torch.cat([rows[head] for head in heads])
        assert torch.equal(found[f"layers.1.mixer.{projection}_proj.weight"], expected)


def sharded(folder, tensors):
    folder.mkdir()
    names, files = sorted(tensors), {}
    for number, part in enumerate((names[:20], names[20:])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
        files |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def bare(path, tensors):
    torch.save(tensors, path)
    return path


def one_file(path, tensors):
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_forward_module._orig_mod."])
@pytest.mark.parametrize(
    ("save", "name"),
    [(file_of, "x.pth"), (bare, "x.bin"), (one_file, "x.safetensors"), (sharded, "folder")],
    ids=["release", "bare", "safetensors", "shards"],
)
def test_every_kind_of_file_and_prefix_reads_alike(tmp_path, capsys, save, name, prefix):
    theirs = release_checkpoint(release_shapes(**SMALL))
    path = save(tmp_path / name, {prefix + name: tensor for name, tensor in theirs.items()})
    assert convert(capsys, "from-nvlabs", path, tmp_path / "hf", "--shard-size", "40KB")[0] == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert convert(capsys, "to-nvlabs", tmp_path / "hf", tmp_path / "back.pth") == (0, "")
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True)["model"], theirs)


FLAVORED = dict(D=128, mlp=352, layers=4, heads=2, K=64, n_head=4, groups=2, vocab=264)  # debug, and debug_hybrid


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("transformer.h.0.attn.eta_proj.weight", lambda t: torch.zeros(2, 128), "has no place for"),
        ("transformer.h.1.attn.attn.bias", lambda t: torch.zeros(256), "has no place for"),
        ("transformer.h.0.mlp.w1.weight", lambda t: torch.zeros(352, 128), "has no place for"),
        ("transformer.h.4.norm_1.weight", lambda t: torch.ones(128), "has hparams n_layer 4; its tensors make it 5"),
        ("transformer.h.1.attn.proj.weight", lambda t: None, "has no tensor"),
        ("transformer.h.0.mlp.swiglu.w1.weight", lambda t: None, "has no tensor"),
        ("transformer.h.2.attn.A_log", lambda t: None, "has no tensor"),
        ("lm_head.weight", lambda t: None, "has no tensor"),
        ("transformer.wte.weight", lambda t: None, "has no tensor"),
        ("transformer.h.3.attn.attn.weight", lambda t: t[:-8], "of shape [248, 128]; its model makes it [256, 128]"),
        ("transformer.h.0.mlp.swiglu.w3.weight", lambda t: t.T, "of shape [352, 128]; its model makes it [128, 352]"),
        ("transformer.h.2.attn.v_conv1d.weight", lambda t: t[:, 0], "of shape [128, 4]; its model makes it [128, 1"),
        ("transformer.h.2.attn.dt_bias", lambda t: t.view(2, 64), "of shape [2, 64]; its model makes it [128]"),
        ("lm_head.weight", lambda t: t[1:], "of shape [263, 128]; its model makes it [264, 128]"),
        ("lm_head.weight", lambda t: t.to(torch.int8), "of torch.int8; it must be of floating point"),
        ("transformer.h.2.attn.b_proj.weight", lambda t: [1.0], "of type list; it must be a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_an_unknown_missing_or_misshapen_tensor_is_refused_by_name(tmp_path, capsys, name, change, words):
    theirs = release_checkpoint(release_shapes(**FLAVORED, per_layer=2))
    changed = change(theirs.get(name))
    tensors = {n: t for n, t in theirs.items() if n != name} | ({} if changed is None else {name: changed})
    error = refusal(capsys, bare(tmp_path / "x.pth", {"model": tensors, "hparams": {"n_layer": 4}}))
    assert words in error and (f"{name!r}" in error or "n_layer" in words), error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 4}, "hparams n_layer 4; its tensors make it 3"),
        ({"n_embd": 64}, "hparams n_embd 64; its tensors make it 32"),
        ({"intermediate_size": "48"}, "hparams intermediate_size '48'; its tensors make it 48"),
        ({"vocab_size": 300}, "hparams vocab_size 300; its embedding has 264 rows"),
        ({"gdn2_per_layer": 1}, "hparams gdn2_per_layer 1; its tensors have GDN-2 in layers [0, 2]"),
        ({"n_head": 3}, "attn_heads is 3"),
        ({"n_head": 8}, "its model makes it"),
        ({"n_head": None}, "no hparams n_head"),
        ({"local_window": "all"}, "window is 'all'"),
        ({"nope": True}, "hparams nope True; it must be False"),
        ({"rotary_percentage": 0.25}, "hparams rotary_percentage 0.25; it must be 1.0"),
        ({"parallel_residual": True}, "hparams parallel_residual True; it must be False"),
        ({"norm_eps": 0}, "norm_eps is 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_hparams_that_no_model_here_can_honour_are_refused_by_name(tmp_path, capsys, changes, words):
    theirs = release_checkpoint(release_shapes(**MIXED))
    assert words in refusal(capsys, file_of(tmp_path / "x.pth", theirs, HPARAMS | changes))


@pytest.mark.parametrize(
    ("sizes", "hparams", "expected"),
    [
        (FLAVORED | {"per_layer": 2}, {}, {"window": 128, "attn_heads": 4, "attn_kv_heads": 2}),
        (FLAVORED | {"per_layer": 2}, {"local_window": 64, "norm_eps": 1e-6}, {"window": 64, "norm_eps": 1e-6}),
        (FLAVORED | {"per_layer": 2}, {"n_head": 8, "n_query_groups": 4, "rope_base": 500_000},
         {"attn_heads": 8, "attn_kv_heads": 4, "rope_theta": 500_000}),
        (FLAVORED | {"per_layer": 2}, {"local_window": None}, {"layer_pattern": ["gdn2", "attention"]}),
        (FLAVORED | {"per_layer": 2}, {"local_window": -1}, {"layer_pattern": ["gdn2", "attention"]}),
        (FLAVORED, {"n_head": 3, "local_window": 7, "gdn2_per_layer": 1}, {"window": 128, "layer_pattern": ["gdn2"]}),
        (MIXED, HPARAMS, {"n_layers": 3, "layer_pattern": ["gdn2", "swa"], "window": 5, "num_heads": 2}),
        (MIXED, {"n_head": 8, "local_window": 9}, {"attn_heads": 8, "attn_kv_heads": 4}),
        (MIXED | {"per_layer": 3}, {"n_head": 4, "local_window": 9}, {"layer_pattern": ["gdn2", "swa", "swa"]}),
    ],
)  # fmt: skip
def test_hparams_say_what_shapes_do_not(sizes, hparams, expected):
    args, _ = args_of(of_shapes(release_shapes(**sizes)), hparams)
    found = dataclasses.asdict(args) | {"layer_pattern": list(args.layer_pattern)}
    assert {name: found[name] for name in expected} == expected


def test_a_named_model_is_taken_instead_of_what_hparams_and_flavors_say(tmp_path, capsys):
    theirs = release_checkpoint(release_shapes(**MIXED))
    path = file_of(tmp_path / "x.pth", theirs, {"local_window": 99})
    assert "no hparams n_head" in refusal(capsys, path)
    sizes = "n_layers = 3\nhidden_size = 32\nmlp_size = 48\nnum_heads = 2\nhead_dim = 16\nwindow = 7"
    (tmp_path / "x.toml").write_text(f'[model]\nflavor = "debug_hybrid"\n[gdn2]\n{sizes}\n')
    assert convert(capsys, "from-nvlabs", path, tmp_path / "hf", "--config", tmp_path / "x.toml") == (0, "")
    assert config_of(tmp_path / "hf")["window"] == 7
    (tmp_path / "other").mkdir()
    path = file_of(tmp_path / "other" / "x.pth", theirs)
    assert "has no tensor 'transformer.h.3.norm_1.weight'" in refusal(capsys, path, "--flavor", "debug_hybrid")


def test_a_folder_says_hparams_in_its_config(tmp_path, capsys):
    folder = sharded(tmp_path / "folder", release_checkpoint(release_shapes(**MIXED)))
    (folder / "config.json").write_text(json.dumps(HPARAMS | {"model_type": "gdn2", "local_window": 6}))
    assert convert(capsys, "from-nvlabs", folder, tmp_path / "hf")[0] == 0
    assert config_of(tmp_path / "hf")["window"] == 6
    assert "none.safetensors is not there" in refusal(capsys, tmp_path / "other" / "none.safetensors")


def test_flavors_that_shapes_do_not_tell_apart_are_named(monkeypatch):
    twin = dataclasses.replace(flavors["debug_hybrid"], attn_heads=8, attn_kv_heads=4)
    monkeypatch.setitem(nvlabs_model.flavors, "twin", twin)
    source = of_shapes(release_shapes(**FLAVORED, per_layer=2))
    with pytest.raises(ConvertError, match="fits the flavors debug_hybrid, twin; name its model with --config or"):
        args_of(source, {})
    assert args_of(source, {"n_head": 4, "n_query_groups": 2})[0] == flavors["debug_hybrid"]


class Attack:
    """Unpickled by a trusting reader, it copies a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return shutil.copy, (__file__, str(self.mark))


def test_types_in_hparams_that_loading_would_run_code_for_are_named_and_left(tmp_path, capsys):
    theirs = release_checkpoint(release_shapes(**FLAVORED))
    odd = {
        "args": argparse.Namespace(out=pathlib.Path("x")), "attack": Attack(tmp_path / "mark"), "norm_eps": 1e-6,
        "counts": collections.defaultdict(list, {"a": [1]}), "n_layer": numpy.int64(3), "seen": {1}, "raw": b"x",
    }  # fmt: skip
    path = file_of(tmp_path / "x.pth", theirs, odd)
    status, error = convert(capsys, "from-nvlabs", path, tmp_path / "hf")
    assert status == 0 and error.count("\n") == 1 and "argparse.Namespace" in error and "shutil.copy" in error
    assert "defaultdict" in error and "set" not in error and "encode" not in error
    assert not (tmp_path / "mark").exists()
    assert config_of(tmp_path / "hf")["norm_eps"] == 1e-6
    path = file_of(tmp_path / "y.pth", theirs, argparse.Namespace(n_head=3))
    assert convert(capsys, "from-nvlabs", path, tmp_path / "other")[0] == 0


def test_a_tokenizer_is_taken_from_a_folder_only(tmp_path, capsys):
    path = file_of(tmp_path / "x.pth", release_checkpoint(release_shapes(**FLAVORED)))
    assert "--tokenizer is" in refusal(capsys, path, "--tokenizer", tmp_path / "none")
    assert convert(capsys, "from-nvlabs", path, tmp_path / "hf", "--tokenizer", TOKENIZER) == (0, "")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"output_gate": "sigmoid"}, {"erase_gate": "scalar"}, {"tied_gates": True, "decay": "scalar"},
        {"allow_neg_eigval": True}, {"layer_pattern": ("swa", "gdn2")},
        {"layer_pattern": ("gdn2", "swa", "attention"), "n_layers": 3},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)  # fmt: skip
def test_a_model_that_the_layout_cannot_say_is_refused_by_name(tmp_path, capsys, changes):
    args = dataclasses.replace(HYBRID, num_v_heads=None, **changes)
    step = save_step(tmp_path / "run" / "step-7", weights(args), args)
    status, error = convert(capsys, "to-nvlabs", step, tmp_path / "back.pth")
    assert status == 1 and error.count("\n") == 1 and not (tmp_path / "back.pth").exists()
    assert any(f"{name} is" in error for name in changes), error


def watched(*arguments):
    """(output, seconds, peak GB of a process's own memory, peak GB together with the files that it maps)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    command, begin = [sys.executable, *map(str, arguments)], time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    own = both = 0
    while process.poll() is None:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        own, both = (
            max(most, *map(int, re.findall(rf"{name}:\s+(\d+) kB", status)), 0)
            for most, name in ((own, "RssAnon"), (both, "VmHWM"))
        )
        time.sleep(0.01)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output, time.perf_counter() - begin, own * 1024 / 1e9, both * 1024 / 1e9


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads a process's memory from /proc")
def test_a_370m_file_with_its_optimizer_converts_in_little_memory_and_generates(tmp_path):
    making = (
        "import sys, torch\n"
        "from tests.nvlabs_cases import release_checkpoint, release_shapes\n"
        f"made = release_checkpoint(release_shapes(**{PUBLISHED['370M'][1]}))\n"
        "zeros = lambda t: {m: torch.zeros_like(t) for m in ('exp_avg', 'exp_avg_sq')}\n"
        "moments = {n: zeros(t) for n, t in enumerate(made.values())}\n"
        "content = {'model': made, 'optimizer': {'state': moments, 'param_groups': []}, 'hparams': {}}\n"
        "torch.save(content | {'iter_num': 80, 'step_count': 20}, sys.argv[1])\n"
    )
    path, out = tmp_path / "ckpt.pth", tmp_path / "hf"
    watched("-c", making, path)
    assert path.stat().st_size > 4.5e9
    convert = ("-m", "gdn2_titan.convert", "from-nvlabs", path, out, "--tokenizer", TOKENIZER)
    _, seconds, own, both = watched(*convert)
    print(
        f"{path.stat().st_size / 1e9:.2f} GB in {seconds:.1f} s, {own:.2f} GB of its own, {both:.2f} with mapped files"
    )
    path.unlink()
    assert own < 0.5 and both < 1.5
    generate = ("-m", "gdn2_titan.generate", "--model", out, "--prompt", "x", "--max-tokens", 4, "--greedy")
    output, seconds, own, both = watched(*generate)
    print(
        f"generate: {seconds:.1f} s, {own:.2f} GB of its own, {both:.2f} with mapped files; {output.splitlines()[-1]}"
    )
    assert "4 tokens in" in output
