"""``python -m gdn2_titan.study gates``: its numbers against the recurrence written out, its pictures and its page, and
what it says to wrong input."""

import base64
import dataclasses
import html
import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.image import imread

from gdn2_titan.convert.__main__ import main as convert
from gdn2_titan.convert.checkpoints import open_checkpoint
from gdn2_titan.convert.hf import load_checkpoint
from gdn2_titan.models import GDN2Model
from gdn2_titan.ops import naive_recurrent_gdn2
from gdn2_titan.study import gates, gates_figures
from gdn2_titan.study.__main__ import main
from gdn2_titan.study.gates_page import write_page
from gdn2_titan.study.gates_tokens import Token, tokens_of
from gdn2_titan.study.gates_trace import follow_memory, trace_gates
from tests.convert_cases import HYBRID, TOKENIZER, assert_one_sentence, hashes, save_step
from tests.hf_cases import pair, tokens
from tests.model_cases import sharpened

BOS = 256
JOB = {"model": {"hf_assets_path": str(TOKENIZER)}}
# Quotes, an end of a script, a comment, a placeholder of the template, an emoji of 4 bytes, newlines, a NUL, mathtext.
TEXT = (
    "say \"hi\" & 'bye'\r\n</script><script>alert(1)</script><!-- {{pictures}} \\u003c\n😀 é\t\x00$x_1$ http://a.b/c\n"
)
QUANTITIES = ("erase", "write", "half_life", "erased", "written", "decayed", "state")

STRUCTURES = {
    "per channel": dict(),
    "tied": dict(tied_gates=True),
    "scalar gates": dict(erase_gate="scalar", write_gate="scalar"),
    "Gated DeltaNet": dict(tied_gates=True, decay="scalar", num_v_heads=None),
    "DeltaNet": dict(tied_gates=True, decay="none"),
    "negative eigenvalues, wide values": dict(allow_neg_eigval=True, expand_v=2.0),
    "mean gates, bounded decay, full ranks": dict(
        erase_gate="mean", write_gate="mean", lower_bound=-5.0, decay_rank="full", gate_rank="full"
    ),
    "tied, negative eigenvalues": dict(allow_neg_eigval=True, tied_gates=True),
}
# Which layers mix by GDN-2, of the three that tests.hf_cases builds.
PATTERNS = {("gdn2", "swa", "attention"): [0], ("swa", "gdn2"): [1], ("gdn2",): [0, 1, 2]}


def heads(x, count):
    """[T, count * size] -> [T, count, size]."""
    return x.reshape(len(x), count, -1)


def convolved(x, weight):
    """[T, channels] through the causal convolution [channels, width] and SiLU."""
    padded = torch.cat((x.new_zeros(weight.shape[1] - 1, x.shape[1]), x))
    return F.silu(sum(padded[i : i + len(x)] * weight[:, i] for i in range(weight.shape[1])))


def rates(mixer, x, args):
    """What decays, in nats per token [T, H, channels]."""
    one = args.decay == "scalar" or args.decay_rank == "full"
    g = x
    for linear in [mixer.decay_proj] if one else [mixer.decay_low_proj, mixer.decay_proj]:
        g = g @ linear.weight.T
    z = heads(g, args.num_heads) + mixer.decay.dt_bias
    if args.lower_bound is not None:
        return -args.lower_bound / (1 + (-mixer.decay.A_log.exp()[:, None] * z).exp())
    return mixer.decay.A_log.exp()[:, None] * torch.log1p(z.exp())


def written_out(mixer, x, args):
    """What a trace must say of a layer that reads x [T, D], and its o, token by token, head by head, with matrices."""
    H, HV = args.num_heads, args.num_v_heads or args.num_heads
    K, V = args.head_dim, int(args.head_dim * args.expand_v)
    q, k, v = (convolved(x @ getattr(mixer, f"{n}_proj").weight.T, getattr(mixer, f"{n}_conv1d").weight) for n in "qkv")
    q, k, v = heads(q, H), heads(k, H), heads(v, HV)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    rate = rates(mixer, x, args) if args.decay != "none" else x.new_zeros(len(x), H, 1)
    scale = 2 if args.allow_neg_eigval else 1
    logits = heads(x @ mixer.erase_proj.weight.T, H)
    b = scale / (1 + (-logits).exp())
    if args.tied_gates:
        w = (b / scale)[:, [j // (HV // H) for j in range(HV)]]
    else:
        w = 1 / (1 + (-heads(x @ mixer.write_proj.weight.T, HV)).exp())
    b = b.mean(-1, keepdim=True) if args.erase_gate == "mean" else b
    w = w.mean(-1, keepdim=True) if args.write_gate == "mean" else w
    norms = {name: np.zeros((HV, len(x))) for name in ("decayed", "erased", "written", "state")}
    o = x.new_zeros(len(x), HV, V)
    for j in range(HV):
        i, S = j // (HV // H), x.new_zeros(K, V)
        for t in range(len(x)):
            D = (-rate[t, i]).exp().expand(K).diag() @ S
            erased = torch.outer(k[t, i], b[t, i] * k[t, i]) @ D
            written = torch.outer(k[t, i], w[t, j] * v[t, j])
            norms["decayed"][j, t] = S.norm() - D.norm()
            S = D - erased + written
            norms["erased"][j, t], norms["written"][j, t] = erased.norm(), written.norm()
            norms["state"][j, t] = S.norm()
            o[t, j] = K**-0.5 * S.T @ q[t, i]
    half_life = np.log(2) / rate.clamp_min(1e-6).numpy()
    return norms | {
        "erase": b.mean(-1).T.numpy(),
        "write": w.mean(-1).T.numpy(),
        "half_life": np.median(half_life, -1).T,
        "half_lives": np.log(2) / rate.mean(0).clamp_min(1e-6).numpy(),
        "channels": (b.numpy(), w.numpy(), half_life),
    }, o


@torch.no_grad()
def entering(model, ids):
    """({layer: what enters its mixer [T, D]}, {layer: what leaves its op [T, HV, V]}) of the GDN-2 layers."""
    x, o, handles = {}, {}, []
    for index, block in enumerate(model.model.layers):
        if block.kind == "gdn2":
            keep = lambda into, index: lambda module, inputs: into.update({index: inputs[0][0].clone()})  # noqa: E731
            handles += [block.mixer.register_forward_pre_hook(keep(x, index))]
            handles += [block.mixer.o_norm.register_forward_pre_hook(keep(o, index))]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return x, o


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("pattern", PATTERNS, ids=" ".join)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_number_is_that_of_the_recurrence_written_out_in_matrices(structure, pattern):
    model, _ = pair(layer_pattern=pattern, **STRUCTURES[structure])
    model, ids, args = model.double(), tokens(1, 21), model.model.args
    x, o = entering(model, ids)
    layer, head = PATTERNS[pattern][-1], 1  # of four value heads on two key heads it reads the first
    traces = trace_gates(model, ids, layer, head)
    assert [trace.layer for trace in traces] == PATTERNS[pattern]
    for trace in traces:
        with torch.no_grad():
            expected, own_o = written_out(model.model.layers[trace.layer].mixer, x[trace.layer], args)
        channels = expected.pop("channels")
        for name, values in expected.items():
            found = getattr(trace, name)
            assert found.shape == values.shape, name
            np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-12, err_msg=name)
        torch.testing.assert_close(own_o, o[trace.layer], rtol=1e-9, atol=1e-12)
        assert trace.deviation < 1e-12
        assert trace.erase_scale == (2 if args.allow_neg_eigval else 1)
        if args.tied_gates:
            shared = len(trace.write) // len(trace.erase)
            np.testing.assert_array_equal(trace.erase.repeat(shared, 0), trace.erase_scale * trace.write)
        assert (trace.channels is not None) == (trace.layer == layer)
        if trace.channels is not None:
            key_head = head // (len(trace.write) // len(trace.erase))
            for found, values, of in zip(
                (trace.channels.erase, trace.channels.write, trace.channels.half_life),
                channels,
                (key_head, head, key_head),
                strict=True,
            ):
                np.testing.assert_allclose(found, values[:, of], rtol=1e-9)


@pytest.mark.parametrize("H, HV, K, V", [(2, 2, 8, 8), (2, 6, 4, 8), (1, 1, 16, 4)])
def test_the_memory_that_is_followed_is_the_operators(H, HV, K, V):
    generator = torch.Generator().manual_seed(0)
    q, k, b = (torch.randn(1, 40, H, K, generator=generator, dtype=torch.float64) for _ in range(3))
    v, w = (torch.randn(1, 40, HV, V, generator=generator, dtype=torch.float64) for _ in range(2))
    g = -torch.rand(1, 40, H, K, generator=generator, dtype=torch.float64)
    q, k, b, w = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 2 * b.sigmoid(), w.sigmoid()
    o, state = naive_recurrent_gdn2(q, k, v, g, b, w, output_final_state=True)
    memory = follow_memory(*(x[0] for x in (q, k, g, b, v, w)))
    torch.testing.assert_close(memory.o, o[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(memory.final_state, state[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(memory.state[-1], state[0].flatten(1).norm(dim=1), rtol=1e-12, atol=1e-13)


def test_the_deviation_is_that_of_the_layers_own_operator_at_its_precision():
    model, _ = pair()
    ids = tokens(1, 21)
    (exact,) = trace_gates(model.double(), ids, 0, 0)
    (single,) = trace_gates(model.float(), ids, 0, 0)
    (half,) = trace_gates(model.bfloat16(), ids, 0, 0)
    assert exact.deviation < 1e-12 < single.deviation < 1e-5 < 1e-4 < half.deviation < 0.1


def test_a_trace_leaves_no_hook_behind():
    model, _ = pair()
    trace_gates(model, tokens(1, 5), 0, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ----------------------------------------------------------------------------------------------- the tokens of a text


class Trimming:
    """A tokenizer that leaves spaces out of the words' offsets, and has no bos."""

    bos_token_id = None


def test_the_texts_of_the_tokens_are_the_text_where_offsets_leave_spaces_out():
    encoding = {"input_ids": [5, 6, 7], "offset_mapping": [(0, 2), (3, 5), (6, 7)]}
    found = tokens_of(Trimming, "ab cd\ne f", encoding, [5, 6, 7])
    assert [(t.id, t.text, t.label) for t in found] == [(5, "ab", "ab"), (6, " cd", "·cd"), (7, "\ne", "⏎e")]


def test_a_tokenizer_without_offsets_gives_the_texts_of_its_tokens():
    class Slow:
        bos_token_id, bos_token = 1, "<s>"

        @staticmethod
        def decode(ids):
            return {5: "a", 6: " b", 7: ""}[ids[0]]

    found = tokens_of(Slow, "a b", {"input_ids": [5, 6, 7, 8]}, [1, 5, 6, 7])
    assert [(t.id, t.text, t.label) for t in found] == [(1, "", "<s>"), (5, "a", "a"), (6, " b", "·b"), (7, "", "…")]


# -------------------------------------------------------------------------------------------------- pictures and page


class Page(HTMLParser):
    """The elements of a page: [(tag, attributes)], and the text of each script."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    def content(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's checkpoints and a Hugging Face folder of the same weights, a text, and how it was shown."""
    folder = tmp_path_factory.mktemp("gates")
    torch.manual_seed(0)
    args = dataclasses.replace(HYBRID, n_layers=3, allow_neg_eigval=True)
    save_step(folder / "checkpoint" / "step-7", sharpened(GDN2Model(args)).state_dict(), args, JOB)
    assert convert(["to-hf", str(folder / "checkpoint"), str(folder / "hf")]) == 0
    (folder / "text").write_text(TEXT, encoding="utf-8", newline="")
    return folder


def study(*arguments):
    return main(["gates", *map(str, arguments)])


@pytest.fixture(scope="module")
def shown(folder):
    """The output folder of the command, and [(strip's values, lowest colour, highest, name of colours)] as drawn."""
    drawn, imshow = [], Axes.imshow

    def seen(self, values, **options):
        norm = options["norm"]
        drawn.append((np.array(values), norm.vmin, norm.vmax, options["cmap"]))
        return imshow(self, values, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "imshow", seen)
        patch.setattr(gates_figures, "COLUMNS", 50)
        arguments = ["--model", folder / "checkpoint", "--text", folder / "text", "--out", folder / "out"]
        status = study(*arguments, "--layer", 2, "--head", 3)
    assert status == 0
    return folder / "out", drawn


@pytest.fixture(scope="module")
def traces(folder):
    model = load_checkpoint(open_checkpoint(folder / "hf"))
    ids = torch.tensor([[BOS, *TEXT.encode()]])
    return trace_gates(model, ids, 2, 3)


def test_the_folder_has_the_pictures_and_the_page(shown):
    out, _ = shown
    assert sorted(hashes(out)) == [
        Path(n) for n in ("channels.png", "gates.html", "gates.png", "half_life.png", "memory.png")
    ]
    for name in ("gates", "half_life", "memory", "channels"):
        height, width, _ = imread(out / f"{name}.png").shape
        assert 500 < width < 2000 and height > 300, name
    assert not list(out.parent.glob(".*.part"))


def test_the_page_holds_every_number_of_every_layer_and_head(shown, traces):
    content = Page((shown[0] / "gates.html").read_text(encoding="utf-8")).content()
    assert list(content["quantities"]) == list(QUANTITIES)
    assert [layer["layer"] for layer in content["layers"]] == [0, 2] == [trace.layer for trace in traces]
    assert content["chosen"] == {"layer": 2, "head": 3}
    for layer, trace in zip(content["layers"], traces, strict=True):
        assert layer["reach"] == {"erase": 2, "write": 1}
        for name in QUANTITIES:
            rows = 2 if name in ("erase", "half_life") else 4
            found = np.array(layer["values"][name])
            assert found.shape == (rows, len(TEXT.encode()) + 1)
            np.testing.assert_allclose(found, getattr(trace, name), rtol=6e-4, atol=1e-12, err_msg=name)
        for name, colours in layer["colours"].items():
            assert all(re.fullmatch("#[0-9a-f]{6}", shade) for shade in content["shades"][colours]), name


def test_the_page_has_the_text_token_by_token_whatever_it_says(shown):
    page = (shown[0] / "gates.html").read_text(encoding="utf-8")
    parsed = Page(page)
    assert not parsed.open
    assert len(parsed.scripts) == 2  # the content and the page's own
    found = parsed.content()["tokens"]
    assert "".join(token["text"] for token in found) == TEXT
    assert [token["id"] for token in found] == [BOS, *TEXT.encode()]
    assert all(token["label"] and not re.search(r"\s|\x00", token["label"]) for token in found)
    labels = "".join(token["label"] for token in found)
    assert labels.startswith('<|bos|>say·"hi"·&') and "😀…😀…😀…😀·é…é⇥\\x00$x_1$" in labels and "\\r⏎" in labels


HOSTILE = "</script><script>alert(1)</script><!-- <script> {{pictures}} ]]> &lt; \u2028 \\u003c \\"


def test_no_token_and_no_name_of_a_file_is_read_as_html(traces, tmp_path):
    count = traces[0].erase.shape[1]
    whole = [Token(7, HOSTILE, HOSTILE)] * count  # the bytes of the other tests are never next to each other
    write_page(tmp_path, HOSTILE, whole, traces, 3, [])
    page = (tmp_path / "gates.html").read_text(encoding="utf-8")
    parsed = Page(page)
    assert not parsed.open and len(parsed.scripts) == 2 and page.count("<script") == 2
    content = parsed.content()
    assert content["about"] == HOSTILE and content["tokens"] == [token._asdict() for token in whole]
    assert f"<p>{html.escape(HOSTILE)}</p>" in page


def test_the_page_loads_nothing(shown):
    out, _ = shown
    page = (out / "gates.html").read_text(encoding="utf-8")
    pictures = {}
    for tag, attributes in Page(page).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"href", "srcset", "action", "onload"} & attributes.keys()
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/png;base64,")
            pictures[attributes["alt"]] = base64.b64decode(attributes["src"].partition(",")[2], validate=True)
    assert pictures == {f.name: f.read_bytes() for f in out.glob("*.png")}
    assert not re.search(r"https?://|url\(|@import|\bfetch\b|XMLHttpRequest|\bimport\(|innerHTML|document\.write", page)
    assert "default-src 'none'" in page


def test_pictures_show_every_layer_and_head_from_end_to_end(shown, traces):
    _, drawn = shown
    T = len(TEXT.encode()) + 1
    lines = -(-T // 50)
    assert lines > 1
    both = [(trace.erase, 0, 2, "PuOr") if name == "erase" else (trace.write, 0, 1, "viridis")
             for trace in traces for name in ("erase", "write")]  # fmt: skip
    memory = []
    for trace in traces:
        top = max(trace.erased.max(), trace.written.max(), trace.decayed.max())
        memory += [(getattr(trace, name), 0, top, "magma") for name in ("erased", "written", "decayed")]
        memory += [(trace.state, 0, trace.state.max(), "magma")]
    low, high = (f([f(trace.half_life) for trace in traces]) for f in (np.min, np.max))
    half_life = [(trace.half_life, low, high, "viridis") for trace in traces]
    channels = traces[1].channels
    detail = [(channels.erase.T, 0, 2, "PuOr"), (channels.write.T, 0, 1, "viridis"),
              (channels.half_life.T, channels.half_life.min(), channels.half_life.max(), "viridis")]  # fmt: skip
    drawn = iter(drawn)
    for picture in (both, memory, half_life, detail):
        parts = [[next(drawn) for _ in picture] for _ in range(lines)]
        for strip, (values, lowest, highest, colours) in enumerate(picture):
            np.testing.assert_allclose(np.hstack([line[strip][0] for line in parts]), values, rtol=1e-9)
            for line in parts:
                assert line[strip][3] == colours
                np.testing.assert_allclose(line[strip][1:3], (lowest, highest), rtol=0.06)  # half-lives: a rim around
    assert next(drawn, None) is None


def test_pictures_of_many_layers_are_one_per_layer(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gates_figures, "TALLEST", 3.0)
    assert study("--model", folder / "hf", "--text", folder / "text", "--out", tmp_path / "out", "--tokens", 9) == 0
    names = {f"{what}_layer_{layer}.png" for what in ("gates", "memory", "half_life") for layer in (0, 2)}
    assert {f.name for f in (tmp_path / "out").iterdir()} == {*names, "half_life.png", "channels.png", "gates.html"}


def test_both_kinds_of_folder_and_as_many_tokens_as_asked_for(folder, tmp_path, capsys):
    pages = []
    for kind in ("hf", "checkpoint", "checkpoint/step-7"):
        out = tmp_path / kind.replace("/", "-")
        out.mkdir()  # an empty folder is as good as a new name
        assert study("--model", folder / kind, "--text", folder / "text", "--out", out, "--tokens", 1) == 0
        assert capsys.readouterr().out == f"Wrote {out}\n"
        pages.append(Page((out / "gates.html").read_text(encoding="utf-8")).content())
    assert [token["label"] for token in pages[0]["tokens"]] == ["<|bos|>", "s"]
    assert pages[0]["layers"] == pages[1]["layers"] == pages[2]["layers"]
    assert pages[0]["chosen"] == {"layer": 0, "head": 0}


def test_channels_and_folder_are_the_first_gdn2_layers_and_gates_where_none_is_named(
    folder, tmp_path, monkeypatch, capsys
):
    args = dataclasses.replace(HYBRID, layer_pattern=("swa", "gdn2", "gdn2"), n_layers=3, num_v_heads=None)
    save_step(tmp_path / "checkpoint" / "step-1", GDN2Model(args).state_dict(), args, JOB)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", tmp_path / "checkpoint", "--text", folder / "text", "--dtype", "bfloat16"]
    assert study(*arguments, "--tokens", 3) == 0
    assert capsys.readouterr().out == "Wrote gates\n"
    content = Page((tmp_path / "gates" / "gates.html").read_text(encoding="utf-8")).content()
    assert content["chosen"] == {"layer": 1, "head": 0}
    assert [layer["layer"] for layer in content["layers"]] == [1, 2]


@pytest.mark.slow
def test_the_command_is_the_module(folder, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "gdn2_titan.study", "gates", "--model", folder / "hf", "--text", folder / "text"]
    command += ["--tokens", "5", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"Wrote gates\n" and (tmp_path / "gates" / "gates.html").is_file()


def test_asking_for_help_imports_nothing_heavy():
    code = """
import sys
from gdn2_titan.study.__main__ import main
try:
    main(["gates", "--help"])
except SystemExit:
    print(sorted({"transformers", "matplotlib", "torchtitan", "safetensors"} & sys.modules.keys()))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=300)
    assert done.stdout.endswith(b"[]\n"), done


# ---------------------------------------------------------------------------------------------------- wrong input


WRONG = {
    "--model nowhere": r"nowhere is not there; it must be a folder with a checkpoint",
    "--text nowhere": r"--text is nowhere; it must be a file that can be read: No such file or directory",
    "--text HF": r"--text is \S+/hf; it must be a file that can be read: Is a directory",
    "--text EMPTY": r"--text is \S+/empty, which is empty; it must have at least one character",
    "--text LATIN": r"--text is \S+/latin; it must be UTF-8, which it is not at byte 2",
    "--model SOFTMAX": r"\S+ has no GDN-2 layer, its layers mix by attention, swa; it must have one",
    "--model CONTENT": r"content_gate of \S+ is true; it must be false for pictures of the gates",
    "--model SMALL": r"the tokenizer gives id 256; it must be below the model's vocab_size, 200",
    "--model DIVERGED": r"layer 2 gives numbers that are not finite; the model must not have diverged",
    "--layer 1": r"--layer is 1; it must be a GDN-2 layer of the model: 0, 2",
    "--layer 3": r"--layer is 3; it must be a GDN-2 layer of the model: 0, 2",
    "--layer -1": r"argument --layer: is '-1'; it must be a whole number of at least 0",
    "--head 4": r"--head is 4; it must be a value head of the model, from 0 to 3",
    "--head x": r"argument --head: is 'x'; it must be a whole number of at least 0",
    "--tokens 0": r"argument --tokens: is '0'; it must be a whole number from 1 to 4096",
    "--tokens 4097": r"argument --tokens: is '4097'; it must be a whole number from 1 to 4096",
    "--device abacus": r"--device is 'abacus'; it must be a device that torch has here",
    "--tokenizer nowhere": r"--tokenizer is nowhere; it must be a folder",
    "--flavor x --config y": r"--config and --flavor are both given; it must be one of them",
    "--out HF": r"\S+/hf is a folder that is not empty; it must be a new name, or an empty folder",
    "--out EMPTY": r"\S+/empty exists; it must be a new name, or an empty folder",
    "--out EMPTY/x": r"\S+/empty/x was not written: File exists",
}


@pytest.fixture(scope="module")
def wrong(folder, tmp_path_factory):
    """Places with something wrong, by the words that WRONG has for them."""
    place = tmp_path_factory.mktemp("wrong")
    (place / "empty").write_bytes(b"")
    (place / "latin").write_bytes(b"ab\xe9cd")
    softmax = dataclasses.replace(HYBRID, layer_pattern=("swa", "attention"))
    small = dataclasses.replace(HYBRID, vocab_size=200)
    content, diverged = dataclasses.replace(HYBRID, content_gate=True), dataclasses.replace(HYBRID, n_layers=3)
    for name, args in dict(softmax=softmax, small=small, content=content, diverged=diverged).items():
        weights = GDN2Model(args).state_dict()
        if name == "diverged":
            weights["layers.2.mixer.erase_proj.weight"][0, 0] = torch.nan
        save_step(place / name / "step-1", weights, args, JOB)
    return {"HF": folder / "hf", **{name.upper(): place / name for name in
            ("empty", "latin", "softmax", "small", "content", "diverged")}}  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_answered_by_one_sentence_and_nothing_is_written(line, wrong, folder, tmp_path, capsys):
    def placed(word):
        name, slash, rest = word.partition("/")
        return f"{wrong[name]}{slash}{rest}" if name in wrong else word

    right = {"--model": folder / "hf", "--text": folder / "text", "--out": tmp_path / "out"}
    words = [placed(word) for word in line.split()]
    arguments = [*(str(x) for pair in right.items() for x in pair), *words]  # the last one counts
    before = hashes(folder / "hf")
    assert_one_sentence(capsys, main, ["gates", *arguments], WRONG[line])
    assert not list(tmp_path.iterdir()) and hashes(folder / "hf") == before


def test_a_text_that_gives_no_token_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gates, "encode", lambda *_, **__: {"input_ids": []})
    assert study("--model", folder / "hf", "--text", folder / "text", "--out", tmp_path / "out") == 1
    assert "/text, which the tokenizer makes no token of; it must give one" in capsys.readouterr().err


def test_an_environment_without_the_extra_is_told_of_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdn2_titan.study.gates_figures", None)
    assert study("--model", folder / "hf", "--text", folder / "text", "--out", tmp_path / "out") == 1
    assert "this study needs the extra 'study': pip install 'gdn2_titan[study]'" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from matplotlib.figure import Figure
from gdn2_titan.study.__main__ import main
savefig, count = Figure.savefig, 0
def dying(self, path, **options):
    global count
    count += 1
    savefig(self, path, **options)
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Figure.savefig = dying
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_process_killed_in_the_middle_leaves_no_folder_and_a_second_try_works(folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["gates", "--model", folder / "hf", "--text", folder / "text", "--out", out, "--tokens", 5]
    arguments = [str(argument) for argument in arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert main(arguments) == 0
    assert (out / "gates.html").is_file()


def test_a_disk_that_is_full_is_answered_by_one_sentence_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert study("--model", folder / "hf", "--text", folder / "text", "--out", tmp_path / "out", "--tokens", 5) == 1
    assert f"Error: {tmp_path / 'out'} was not written: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
