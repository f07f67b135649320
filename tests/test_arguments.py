"""What no model can be built from is refused in one sentence: by the layer, its parts and a model's arguments alike."""

import math

import numpy as np
import pytest
import torch

from gdn2_titan.models import GatedDeltaNet2, GDN2Model, GDN2ModelArgs
from gdn2_titan.models.attention import Attention
from gdn2_titan.models.decay import DecayParameters
from gdn2_titan.models.decoder import SwiGLU
from gdn2_titan.models.flops import mixing_flops, state_bytes
from gdn2_titan.models.layer import ShortConvolution
from gdn2_titan.ops import causal_conv1d, chunk_gdn2, naive_recurrent_gdn2, recurrent_gdn2, segment_summary
from tests.gdn2_cases import make
from tests.model_cases import SMALL

NAN = float("nan")
NO_COUNT = (0, -1, 2.0, 2.5, "2", True, NAN, None, [2])
NO_NUMBER = (0, 0.0, -1.0, NAN, math.inf, "1e-5", True, None)
NO_FLAG = ("yes", "false", 0, 1, None, 1.0)
NO_NAME = ("chanel", "", "Channel", None, True, 1, ["channel"])
WHOLE, POSITIVE = "it must be a whole number of at least 1", "it must be a finite number greater than 0"
STRUCTURE, FLAG = "it must be 'channel', 'scalar' or 'none'", "it must be true or false"
GATE, RANK = "it must be 'channel', 'scalar' or 'mean'", "it must be a whole number of at least 1, 'head' or 'full'"

# Of the layer and of a model's arguments: field, values, what is allowed.
SHARED = [
    ("num_heads", NO_COUNT, WHOLE),
    ("head_dim", NO_COUNT, WHOLE),
    ("hidden_size", NO_COUNT, WHOLE),
    ("num_v_heads", [value for value in NO_COUNT if value is not None], WHOLE),
    ("num_v_heads", [1, 3], "it must be a multiple of num_heads = 2"),
    ("expand_v", NO_NUMBER, POSITIVE),
    ("expand_v", [1.3, 0.05, 1 / 3], "times head_dim = 8 it must be a whole number of at least 1"),
    ("conv_size", (0, 1, 5, -4, 3.0, "4", True, NAN, None), "it must be 2, 3 or 4"),
    ("erase_gate", NO_NAME, GATE),
    ("write_gate", NO_NAME, GATE),
    ("decay", NO_NAME, STRUCTURE),
    ("output_gate", ("slu", "SiLU", "swish", None, True), "it must be 'silu' or 'sigmoid'"),
    (
        "backend",
        ("tritn", "cuda", None, True),
        "it must be 'auto', 'triton', 'torch', 'reference' or 'batch_invariant'",
    ),
    ("tied_gates", NO_FLAG, FLAG),
    ("allow_neg_eigval", NO_FLAG, FLAG),
    ("content_gate", NO_FLAG, FLAG),
    ("norm_eps", NO_NUMBER, POSITIVE),
    ("lower_bound", (0, 0.0, 5.0, NAN, -math.inf, "-5", True), "it must be a finite number less than 0"),
    ("decay_rank", (0, -1, 2.5, "half", True), RANK),
    ("gate_rank", (0, -1, 2.5, "half", True), RANK),
]
OF_A_MODEL = [
    ("vocab_size", NO_COUNT, WHOLE),
    ("n_layers", NO_COUNT, WHOLE),
    ("mlp_size", NO_COUNT, WHOLE),
    ("attn_heads", NO_COUNT, WHOLE),
    ("attn_kv_heads", [value for value in NO_COUNT if value is not None], WHOLE),
    ("window", NO_COUNT, WHOLE),
    ("init", ("theirs", "Release", None, True), "it must be 'ours' or 'release'"),
    ("init_std", NO_NUMBER, POSITIVE),
    ("mixer_gain", NO_NUMBER, POSITIVE),
    ("dt_min", NO_NUMBER, POSITIVE),
    ("dt_max", NO_NUMBER, POSITIVE),
    ("dt_max", [1e-4], "it must be at least dt_min = 0.001"),
    ("rope_theta", NO_NUMBER, POSITIVE),
    ("layer_pattern", ("gdn2", (), None, 3, ("gdn3",), [None], {"gdn2"}), "it must be a non-empty list of: gdn2, swa,"),
]


fields = pytest.mark.parametrize("field, values, allowed", SHARED, ids=lambda x: x if isinstance(x, str) else "")
all_fields = pytest.mark.parametrize(
    "field, values, allowed", SHARED + OF_A_MODEL, ids=lambda x: x if isinstance(x, str) else ""
)


def assert_refused(build, field, allowed, value=None):
    with pytest.raises(ValueError) as error:
        build()
        pytest.fail(f"{field} = {value!r} is not refused")
    text = str(error.value)
    assert text.startswith(f"{field} is ") and allowed in text and "\n" not in text, text


@fields
def test_the_layer_refuses_it(field, values, allowed):
    for value in values:
        given = {"hidden_size": 32, "num_heads": 2, "head_dim": 8} | {field: value}
        assert_refused(lambda given=given: GatedDeltaNet2(**given), field, allowed, value)


@all_fields
@pytest.mark.parametrize("pattern", [("gdn2",), ("swa",)], ids=["recurrent", "softmax"])
def test_a_models_arguments_refuse_it_whatever_its_layers_are(field, values, allowed, pattern):
    for value in values:
        args = GDN2ModelArgs(**SMALL | {"layer_pattern": pattern, field: value})
        for build in (args.validate, lambda args=args: GDN2Model(args)):
            assert_refused(build, field, allowed, value)


@pytest.mark.parametrize(
    "field, values, allowed",
    [
        ("attn_heads", [5, 32], "it must divide hidden_size = 32 into heads of even size"),
        ("attn_kv_heads", [3], "it must divide attn_heads = 4"),
    ],
)
def test_settings_of_softmax_layers_are_refused_where_there_are_some(field, values, allowed):
    for value in values:
        GDN2ModelArgs(**SMALL | {"layer_pattern": ("gdn2",), field: value}).validate()
        args = GDN2ModelArgs(**SMALL | {"layer_pattern": ("gdn2", "swa"), field: value})
        for build in (args.validate, lambda args=args: GDN2Model(args)):
            assert_refused(build, field, allowed, value)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Attention(32, 0), "num_heads"),
        (lambda: Attention(32, 3), "num_heads"),
        (lambda: Attention(36, 4), "num_heads"),  # heads of 9
        (lambda: Attention(32, 4, 0), "num_kv_heads"),
        (lambda: Attention(32, 4, 3), "num_kv_heads"),
        (lambda: Attention(32, 4, 2.0), "num_kv_heads"),
        (lambda: Attention(32.0, 4), "hidden_size"),
        (lambda: Attention(32, 4, window=0), "window"),
        (lambda: Attention(32, 4, window="8"), "window"),
        (lambda: ShortConvolution(0, 4), "channels"),
        (lambda: ShortConvolution("8", 4), "channels"),
        (lambda: ShortConvolution(8, 5), "width"),
        (lambda: ShortConvolution(8, 4.0), "width"),
        (lambda: ShortConvolution(8, 4, "trion"), "backend"),
        (lambda: SwiGLU(0, 8), "hidden_size"),
        (lambda: SwiGLU(8, -8), "size"),
        (lambda: SwiGLU(8, 2.5), "size"),
        (lambda: DecayParameters(0, 8), "num_heads"),
        (lambda: DecayParameters(2, True), "channels"),
    ],
)
def test_the_parts_refuse_what_would_be_another_part(build, field):
    assert_refused(build, field, "it must ")


@pytest.mark.parametrize(
    ("head_dim", "expand_v", "expected"),
    [(100, 1.1, 110), (100, 0.29, 29), (100, 1.15, 115), (8, 1, 8), (8, 0.5, 4), (96, 1 / 3, 32), (128, 2.0, 256)],
)
def test_a_value_size_that_is_whole_but_for_rounding_is_that_size_everywhere(head_dim, expand_v, expected):
    layer = GatedDeltaNet2(16, 1, head_dim, expand_v=expand_v)
    assert layer.head_v_dim == expected and layer.v_proj.weight.shape == (expected, 16)
    fields = {"num_heads": 1, "head_dim": head_dim, "layer_pattern": ("gdn2",), "n_layers": 1}
    args, same = (GDN2ModelArgs(**SMALL | fields | {"expand_v": e}) for e in (expand_v, expected / head_dim))
    args.validate()
    assert mixing_flops(args, 0, 64) == mixing_flops(same, 0, 64)
    assert state_bytes(args, 10) == state_bytes(same, 10) >= 4 * head_dim * expected


def test_numbers_of_numpy_are_numbers_and_become_pythons_in_a_models_arguments():
    assert GatedDeltaNet2(np.int64(32), np.int32(2), np.int64(8), expand_v=np.float32(0.5)).head_v_dim == 4
    args = GDN2ModelArgs(**SMALL | {"num_heads": np.int64(2), "norm_eps": np.float32(1e-5), "expand_v": np.float64(2)})
    GDN2Model(args)
    assert type(args.num_heads) is int and type(args.norm_eps) is float and args.expand_v == 2.0


@pytest.mark.parametrize("op", [chunk_gdn2, recurrent_gdn2, naive_recurrent_gdn2])
@pytest.mark.parametrize("scale", [np.float32(0.25), np.float64(0.25), np.int64(1), 1, 0.25], ids=repr)
def test_any_real_number_is_a_scale(op, scale):
    inputs = make()
    got, _ = op(**inputs | {"scale": scale})
    want, _ = naive_recurrent_gdn2(**inputs | {"scale": float(scale)})
    torch.testing.assert_close(got, want)


def test_a_scale_of_numpy_compiles_into_one_graph():
    inputs = make()
    got, _ = torch.compile(lambda: chunk_gdn2(**inputs | {"scale": 0.5}), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, naive_recurrent_gdn2(**inputs | {"scale": 0.5})[0])


@pytest.mark.parametrize("scale", [NAN, math.inf, "0.1", True, torch.tensor(0.1), 1j], ids=repr)
def test_all_else_is_none(scale):
    with pytest.raises(ValueError, match="^scale is .*; it must be a finite number or None"):
        chunk_gdn2(**make() | {"scale": scale})


def test_a_number_of_segments_of_numpy_is_one():
    inputs = make(T=260)
    got, _ = chunk_gdn2(**inputs, num_segments=np.int64(2))
    torch.testing.assert_close(got, naive_recurrent_gdn2(**inputs)[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("op", [chunk_gdn2, recurrent_gdn2])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "flag", ["output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_sigmoid_in_kernel"]
)
def test_an_option_that_is_on_or_off_is_no_text(op, backend, flag):
    with pytest.raises(ValueError, match=f"^{flag} is 'no'; it must be True or False$"):
        op(**make() | {flag: "no", "backend": backend})


def test_so_it_is_for_the_other_ops():
    with pytest.raises(ValueError, match="^output_final_state is 1; it must be True or False$"):
        causal_conv1d(torch.randn(1, 3, 4), torch.randn(4, 4), output_final_state=1)
    inputs = {name: make()[name] for name in ("k", "v", "g", "b", "w")}
    with pytest.raises(ValueError, match="^use_qk_l2norm_in_kernel is None; it must be True or False$"):
        segment_summary(**inputs, use_qk_l2norm_in_kernel=None)
