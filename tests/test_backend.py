"""Which kernels serve the layer, the convolution and the model: what "auto", "triton" and "torch" mean where Triton
cannot serve. There is no GPU here: what the code knows of one is made up, and Triton's interpreter is the GPU."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs, masks
from gdn2_titan.models.layer import ShortConvolution
from gdn2_titan.ops import causal_conv1d, chunk_gdn2, dispatch, recurrent_gdn2, recurrent_gdn2_
from gdn2_titan.ops.context_parallel.layout import SequenceShards
from gdn2_titan.ops.gdn2 import chunked, segmented
from gdn2_titan.ops.gdn2.triton import chunk, recurrent
from gdn2_titan.ops.short_conv.triton import launches as triton_conv
from gdn2_titan.ops.triton import target
from tests.gdn2_cases import make
from tests.model_cases import SMALL, by_hand, layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="facts of a GPU are made up, and there is one")
FP32, FP64 = torch.float32, torch.float64
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Tensors on the CPU count as on a GPU, which Triton interprets; nothing has been logged yet."""
    monkeypatch.setattr(dispatch, "_on_gpu", lambda device: True)
    monkeypatch.setattr(dispatch, "_said", set())
    facts = SimpleNamespace(major=9, minor=0, multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


@pytest.fixture
def served(monkeypatch):
    """The names of the kernels that ran, in order."""
    names = []

    def watch(module, function, name):
        kernel = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, **kwargs: names.append(name) or kernel(*args, **kwargs))

    for function in ("chunk_forward", "chunk_backward"):
        watch(chunked, function, "torch")
        watch(chunk, function, "triton")
    watch(recurrent, "recurrent_forward", "triton")
    watch(triton_conv, "forward", "triton conv")
    watch(triton_conv, "backward", "triton conv")
    return names


def old_gpu(monkeypatch):
    monkeypatch.setattr(target, "capability", lambda device: (7, 5))


def without_triton(monkeypatch):
    monkeypatch.setattr(target, "INSTALLED", False)


REASONS = {
    "sm_75": (old_gpu, FP32, 8, "is on a GPU of sm_75; it must be sm_80 or newer"),
    "not installed": (without_triton, FP32, 8, "is on cpu; the package triton must be installed"),
    "float64": (lambda monkeypatch: None, FP64, 8, "has dtype torch.float64; for the Triton kernels it must be"),
    "head size": (lambda monkeypatch: None, FP32, 264, "has head size 264; for the Triton kernels it must be at most"),
}
reasons = pytest.mark.parametrize("reason", REASONS)


def inputs(dtype, head):
    x = torch.randn(1, 5, 16, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    return x, GatedDeltaNet2(16, 1, head).to(dtype)


def stepped(built, x):
    """The layer's outputs of all tokens but the last, then of that one by its state, and the gradient of x."""
    o, state = built(x[:, :-1], return_state=True)
    last, _ = built(x[:, -1:], state=state, return_state=True)
    o = torch.cat((o, last), 1)
    (gradient,) = torch.autograd.grad(o.square().sum(), x)
    return o, gradient


@reasons
def test_auto_takes_pytorchs_kernels_where_triton_cannot_serve_and_says_so_once(
    reason, gpu, served, monkeypatch, caplog
):
    arrange, dtype, head, said = REASONS[reason]
    x, built = inputs(dtype, head)
    built.backend = built.q_conv1d.backend = built.k_conv1d.backend = built.v_conv1d.backend = "torch"
    want = stepped(built, x)
    arrange(monkeypatch)
    served.clear()
    x_, automatic = inputs(dtype, head)
    with caplog.at_level(logging.WARNING):
        got = stepped(automatic.train(), x.detach().requires_grad_())
        automatic(x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert served and not {"triton"} & set(served)
    lines = [record for record in caplog.records if record.name == dispatch.__name__]
    assert len(lines) == 1 and said in lines[0].getMessage(), [record.getMessage() for record in lines]
    assert lines[0].levelno == logging.WARNING


@reasons
def test_triton_insists(reason, gpu, monkeypatch):
    arrange, dtype, head, said = REASONS[reason]
    arrange(monkeypatch)
    x = torch.randn(1, 5, 16, dtype=dtype)
    torch.manual_seed(0)
    built = GatedDeltaNet2(16, 1, head, backend="triton").to(dtype)
    with pytest.raises(ValueError) as error:
        built(x)
    if reason != "head size":  # a convolution has no heads: it is served, and the op is not
        assert "q " in str(error.value) or "weight " in str(error.value)
    assert said in str(error.value) and str(error.value).endswith("use backend='torch'")


def test_auto_takes_tritons_kernels_where_they_serve(gpu, served, caplog):
    x, built = inputs(FP32, 8)
    with caplog.at_level(logging.WARNING):
        stepped(built, x)
    assert set(served) == {"triton", "triton conv"}
    assert not [record for record in caplog.records if record.name == dispatch.__name__]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_on_a_cpu_auto_is_pytorchs_kernels_and_says_nothing(backend, served, caplog):
    x, built = inputs(FP32, 8)
    built.backend = backend
    with caplog.at_level(logging.DEBUG):
        stepped(built, x)
    assert set(served) == {"torch"}
    assert not [record for record in caplog.records if record.name == dispatch.__name__]


def test_torch_takes_pytorchs_kernels_where_triton_could_serve(gpu, served, caplog):
    torch.manual_seed(0)
    built = GatedDeltaNet2(16, 1, 8, backend="torch")
    with caplog.at_level(logging.WARNING):
        stepped(built, torch.randn(1, 5, 16, requires_grad=True))
    assert set(served) == {"torch"} and not caplog.records


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_a_layer_of_either_backend_equals_its_formulas_in_fp64(backend, gpu):
    built = layer(dtype=FP32)
    for module in (built, built.q_conv1d, built.k_conv1d, built.v_conv1d):
        module.backend = backend
    x = torch.randn(2, 21, 32)
    resets = torch.rand(2, 21) < 0.1
    want = by_hand(layer(), x.double(), resets)
    assert (built(x, resets).double() - want).norm() < 1e-4 * want.norm()


def test_a_layer_that_is_built_for_the_reference_runs_it_token_by_token(served):
    torch.manual_seed(0)
    built = GatedDeltaNet2(32, 2, 8, backend="reference")
    x, resets = torch.randn(2, 21, 32), torch.rand(2, 21) < 0.1
    got = built(x, resets)
    assert not served  # no chunked kernel
    torch.testing.assert_close(got.double(), by_hand(built.double(), x.double(), resets), rtol=0, atol=1e-5)


def test_a_model_hands_its_backend_to_every_layer_and_convolution(served):
    torch.manual_seed(0)
    model = GDN2Model(GDN2ModelArgs(**SMALL | {"layer_pattern": ("gdn2", "swa"), "backend": "triton"}))
    found = [m.backend for m in model.modules() if isinstance(m, (GatedDeltaNet2, ShortConvolution))]
    assert found == ["triton"] * 4 * sum(kind == "gdn2" for kind in map(model.args.mixer, range(model.args.n_layers)))
    model(torch.zeros(1, 9, dtype=torch.long))
    assert set(served) == {"triton", "triton conv"}


def test_the_ops_fall_back_alike(gpu, served, monkeypatch):
    old_gpu(monkeypatch)
    options = make(B=1, T=3, H=1, K=8, V=8, dtype=FP32)
    state = torch.zeros(1, options["v"].shape[2], 8, 8)
    chunk_gdn2(**options)
    recurrent_gdn2(**options)
    with torch.no_grad():
        recurrent_gdn2_(**{k: v for k, v in options.items() if k not in ("initial_state", "output_final_state")},
                        state=state)  # fmt: skip
    causal_conv1d(torch.randn(1, 3, 4), torch.randn(4, 4))
    assert served == ["torch"]


def test_a_compiled_layer_that_falls_back_is_one_graph(gpu, monkeypatch, caplog):
    old_gpu(monkeypatch)
    x, built = inputs(FP32, 8)
    with caplog.at_level(logging.WARNING):
        got = torch.compile(built, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, built(x), rtol=1e-5, atol=1e-6)
    assert len([record for record in caplog.records if record.name == dispatch.__name__]) == 1


def of_gpu(major, minor, dtype=FP32, head=64):
    """What a call on a GPU shows of q and v: one long sequence of few heads."""
    return SimpleNamespace(device=CUDA, dtype=dtype, shape=(1, 2**17, 2, head))


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "backend", "many"),
    [
        ((9, 0), FP32, 64, "auto", True), ((9, 0), FP32, 64, "triton", True), ((9, 0), FP32, 64, "torch", False),
        ((7, 5), FP32, 64, "auto", False), ((9, 0), FP64, 64, "auto", False), ((9, 0), FP32, 320, "auto", False),
    ],
)  # fmt: skip
def test_auto_cuts_a_sequence_into_segments_only_for_the_kernels_that_gain_by_it(
    capability, dtype, head, backend, many, monkeypatch
):
    facts = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    q = of_gpu(*capability, dtype, head)
    assert (segmented.segments_of(q, q, "auto", backend) > 1) == many
    assert segmented.segments_of(q, q, 3, backend) == 3


@pytest.mark.parametrize("way", ["one device", "shared"])
@pytest.mark.parametrize(
    ("arrange", "backend", "dense"),
    [(None, "auto", False), (None, "torch", True), (old_gpu, "auto", True), (without_triton, "auto", True)],
)
def test_softmax_layers_do_without_flex_attention_where_the_others_do(arrange, backend, dense, way, monkeypatch):
    monkeypatch.setattr(target, "capability", lambda device: (9, 0))
    if arrange is not None:
        arrange(monkeypatch)
    made = []
    for name in ("_block_mask", "_dense_mask_of_rows", "_block_mask_of_rows", "_context_rows"):
        monkeypatch.setattr(masks, name, lambda *args, name=name: made.append(name) or ())
    monkeypatch.setattr(torch, "arange", lambda *args, **options: torch.empty(0))  # there need be no GPU
    if way == "shared":
        masks.context_mask(1, 8, 4, None, SequenceShards("", 0, 2, 1), CUDA, backend)
    else:
        masks.attention_mask(1, 8, 4, None, CUDA, backend)
    assert ("_dense_mask" in made[-1]) == dense


BLOCKED = """
import json, logging, sys, torch
sys.modules["triton"] = None
from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.ops import dispatch
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("gdn2_titan").addHandler(handler)
dispatch._on_gpu = lambda device: True
fields = dict(vocab_size=16, hidden_size=16, n_layers=2, mlp_size=16, num_heads=1, head_dim=8)
losses = []
for backend in ("auto", "torch", "triton"):
    torch.manual_seed(0)
    model = GDN2Model(GDN2ModelArgs(**fields, backend=backend))
    model.init_weights()
    try:
        loss = model(torch.arange(8)[None]).square().sum()
        loss.backward()
        losses.append(loss.item())
    except ValueError as error:
        losses.append(str(error))
print(json.dumps([losses, lines]))
"""


def test_where_triton_cannot_be_imported_a_model_trains_all_the_same():
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    (automatic, plain, refused), lines = json.loads(run.stdout.splitlines()[-1])
    assert automatic == plain
    assert refused == "backend is 'triton' and q is on cpu; the package triton must be installed, use backend='torch'"
    assert len(lines) == 1 and "the package triton must be installed" in lines[0]
