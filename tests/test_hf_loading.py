"""What loading a transformers model touches: the parameters that no file gave, and nothing else."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, TorchAoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gdn2_titan.convert.hf import GDN2Config, GDN2ForCausalLM
from gdn2_titan.convert.mapping import to_hf_name
from gdn2_titan.models import GatedDeltaNet2, GDN2Model
from gdn2_titan.models.decoder import Block
from tests.hf_cases import GREEDY, HYBRID, config, left_padded, pair
from tests.model_cases import GATES, gate_structures

EIGHT = GREEDY | dict(max_new_tokens=8)


def assert_same_weights(actual, expected):
    expected = expected.state_dict()
    assert actual.state_dict().keys() == expected.keys()
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def empty(make):
    """A model whose parameters are NaN."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    return model


# ------------------------------------------------------------------------------------------------------- fresh models


@gate_structures
def test_a_new_model_has_exactly_the_weights_of_gdn2_model_under_the_same_seed(structure):
    changes = {"num_v_heads": None} | GATES[structure] | {"layer_pattern": HYBRID, "init_std": 0.3, "dt_max": 0.2}
    theirs = empty(lambda: GDN2ForCausalLM(config(**changes)))
    ours = empty(lambda: GDN2Model(config(**changes).model_args()))
    torch.manual_seed(3)
    theirs.init_weights()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    ours.init_weights()
    assert torch.equal(torch.get_rng_state(), after)
    expected = {to_hf_name(name): p for name, p in ours.state_dict().items()}
    for name, p in theirs.state_dict().items():
        assert torch.equal(p, expected[name]), name
    assert not any(module.statistics.any() for module in theirs.modules() if isinstance(module, GatedDeltaNet2))


def test_a_seed_gives_the_model_that_it_has_always_given():
    torch.manual_seed(3)
    theirs = GDN2ForCausalLM(config())
    after = torch.get_rng_state()
    torch.manual_seed(3)
    args = config().model_args()
    embedding = nn.Embedding(args.vocab_size, args.hidden_size)
    blocks = [Block(args, layer) for layer in range(args.n_layers)]
    nn.init.normal_(embedding.weight, std=args.init_std)
    for block in blocks:
        block.init_weights()
    head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
    nn.init.normal_(head.weight, std=args.init_std)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(theirs.model.embed_tokens.weight, embedding.weight)
    assert torch.equal(theirs.lm_head.weight, head.weight)
    for layer, block in zip(theirs.model.layers, blocks, strict=True):
        assert_same_weights(layer, block)


def test_a_model_around_ours_starts_its_parts_as_they_start_themselves():
    class Around(PreTrainedModel):
        config_class = GDN2Config

        def __init__(self, config):
            super().__init__(config)
            self.bridge = nn.Linear(4, 4)
            self.text = AutoModelForCausalLM.from_config(config)
            self.post_init()

    torch.manual_seed(0)
    around = Around(config(mixer_gain=0.01))
    weight = around.text.model.layers[0].mixer.q_proj.weight
    assert weight.abs().max() <= 0.01 * (6 / sum(weight.shape)) ** 0.5
    alone = empty(lambda: Around(config(mixer_gain=0.01)))
    alone.init_weights()
    assert not any(p.isnan().any() for p in alone.parameters())
    assert alone.text.model.layers[0].mixer.q_proj.weight.abs().max() <= 0.01 * (6 / sum(weight.shape)) ** 0.5


def test_one_part_at_a_time_may_be_at_hand_as_under_zero_3():
    model = empty(lambda: GDN2ForCausalLM(config()))
    held = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = torch.empty(0)  # partitioned away
    names = {p: name for name, p in model.named_parameters()}
    torch.manual_seed(3)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for p in own:
            p.data = held[names[p]]
        model._initialize_weights(module)
        for p in own:
            p.data = torch.empty(0)
    whole = empty(lambda: GDN2ForCausalLM(config()))
    torch.manual_seed(3)
    for module in whole.modules():
        whole._initialize_weights(module)
    for name, p in whole.named_parameters():
        assert torch.equal(held[name], p), name


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel], ids=["with head", "decoder"])
def test_a_load_draws_no_random_numbers(tmp_path, cls):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = cls.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(loaded, theirs if cls is AutoModelForCausalLM else theirs.model)
    assert not any(module.statistics.any() for module in loaded.modules() if isinstance(module, GatedDeltaNet2))


def draws(changes):
    """{name: draw} for one tensor of each kind, as the layer and the decoder start it."""
    args = config(**changes).model_args()
    xavier = lambda x: nn.init.xavier_uniform_(x, gain=args.mixer_gain)  # noqa: E731
    normal = lambda x: nn.init.normal_(x, std=args.init_std)  # noqa: E731
    uniform = lambda x, scale=1: nn.init.uniform_(x, -scale * len(x[0]) ** -0.5, scale * len(x[0]) ** -0.5)  # noqa: E731
    depth = (2 * args.n_layers) ** -0.5
    released = {
        "lm_head.weight": uniform,
        "model.layers.0.mixer.o_proj.weight": xavier,
        "model.layers.1.mixer.k_proj.weight": uniform,
        "model.layers.2.mlp.down_proj.weight": lambda x: uniform(x, depth),
    }
    return {
        "model.embed_tokens.weight": normal,
        "lm_head.weight": normal,
        "model.layers.0.mixer.q_proj.weight": xavier,
        "model.layers.0.mixer.o_proj.weight": lambda x: nn.init.xavier_uniform_(x, gain=args.mixer_gain * depth),
        "model.layers.0.mixer.q_conv1d.weight": lambda x: nn.init.uniform_(x, -0.5, 0.5),
        "model.layers.0.mixer.decay.A_log": lambda x: x.uniform_(1, 16).log_(),
        "model.layers.1.mixer.k_proj.weight": normal,
        "model.layers.2.mlp.down_proj.weight": lambda x: nn.init.normal_(x, std=args.init_std * depth),
        "model.layers.1.mixer_norm.weight": nn.init.ones_,
        "model.norm.weight": nn.init.ones_,
    } | (released if args.init == "release" else {})


@pytest.mark.parametrize(
    ("lost", "init"), [*((name, "ours") for name in draws({})), ("lm_head.weight", "release"),
                       ("model.layers.0.mixer.o_proj.weight", "release"),
                       ("model.layers.2.mlp.down_proj.weight", "release")],
)  # fmt: skip
def test_for_a_tensor_that_a_file_lacks_it_is_drawn_as_gdn2_model_draws_it_and_no_more(tmp_path, lost, init):
    theirs, _ = pair(init_std=0.3, init=init)
    weights = theirs.state_dict()
    theirs.save_pretrained(tmp_path, state_dict={k: v for k, v in weights.items() if k != lost})
    torch.manual_seed(5)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    after = torch.get_rng_state()
    assert set(report["missing_keys"]) == {lost}
    torch.manual_seed(5)
    expected = torch.empty_like(weights[lost])
    draws({"init_std": 0.3, "init": init})[lost](expected)
    assert torch.equal(torch.get_rng_state(), after)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected if name == lost else weights[name]), name


def test_tensors_of_another_size_are_drawn_anew_where_that_is_asked_for(tmp_path):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, mlp_size=4096, ignore_mismatched_sizes=True)
    up, down = loaded.model.layers[1].mlp.up_proj.weight, loaded.model.layers[1].mlp.down_proj.weight
    assert up.std().item() == pytest.approx(0.02, rel=0.05) and down.std().item() == pytest.approx(
        0.02 / 6**0.5, rel=0.05
    )
    assert torch.equal(loaded.lm_head.weight, theirs.lm_head.weight)


def test_a_longer_vocabulary_keeps_the_rows_and_the_logits_of_the_old_one():
    theirs, ours = pair()
    ids = torch.arange(20)[None]
    theirs.resize_token_embeddings(64)
    assert theirs.config.vocab_size == theirs.get_output_embeddings().out_features == 64
    torch.testing.assert_close(theirs(ids).logits[..., :50], ours(ids), rtol=0, atol=1e-5)
    assert theirs(torch.tensor([[60, 63]])).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------- quantization


def int8(**changes):
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), **changes)


def assert_near(quantized, theirs, bound=0.1):
    ids, mask, _ = left_padded([33, 7])
    actual, expected = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (quantized, theirs))
    assert 0 < (actual - expected).norm() < bound * expected.norm()
    generated = quantized.generate(ids, attention_mask=mask, **EIGHT)
    again = quantized.generate(ids, attention_mask=mask, use_cache=False, **EIGHT)
    assert generated.shape == (2, 41) and torch.equal(generated, again)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_invariant_model_is_not_quantized(tmp_path):
    pair(backend="batch_invariant")[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backend is 'batch_invariant'; with quantization_config it must be another"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=int8())


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_model_quantized_to_int8_as_it_loads_is_near_the_model_and_comes_back(tmp_path):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=int8())
    assert torch.equal(torch.get_rng_state(), before)
    for name, p in quantized.named_parameters():
        module = quantized.get_submodule(name.rpartition(".")[0])
        packed = isinstance(module, nn.Linear) and name.endswith("weight") and name != "lm_head.weight"
        assert ("Int8" in type(p.data).__name__ + type(p).__name__) == packed, name
        if not packed:
            assert torch.equal(p, theirs.get_parameter(name)), name
    assert_near(quantized, theirs)
    quantized.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, quantized(ids).logits)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_what_a_quantized_load_lacks_is_drawn_and_the_rest_is_quantized(tmp_path):
    theirs, _ = pair()
    lost = {"model.layers.0.mixer.q_proj.weight", "model.layers.0.mixer.decay.dt_bias"}
    theirs.save_pretrained(tmp_path, state_dict={k: v for k, v in theirs.state_dict().items() if k not in lost})
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=int8())
    bound = 2**-2.5 * (6 / 48) ** 0.5
    assert 0.9 * bound < quantized.get_parameter("model.layers.0.mixer.q_proj.weight").abs().max() <= bound
    assert "Int8" in repr(quantized.get_parameter("model.layers.0.mixer.k_proj.weight"))
    rates = nn.functional.softplus(quantized.get_parameter("model.layers.0.mixer.decay.dt_bias"))
    assert 0.999e-3 < rates.min() and rates.max() < 0.101


class Packed(nn.Module):
    """A Linear of whole numbers, as several quantizers put it in a Linear's place."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(linear.weight[:, :1].detach(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Pack(ConversionOps):
    def convert(self, input_dict, full_layer_name=None, missing_keys=None, **kwargs):
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        scale = value.abs().amax(1, keepdim=True) / 127
        packed = nn.Parameter((value / scale).round().to(torch.int8), requires_grad=False)
        missing_keys.discard(full_layer_name.replace("weight", "scale"))
        return {full_layer_name: packed, full_layer_name.replace("weight", "scale"): scale}


@register_quantization_config("packed_for_a_test")
class PackedConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method = "packed_for_a_test"


@register_quantizer("packed_for_a_test")
class PackingQuantizer(HfQuantizer):
    is_trainable = False

    def is_serializable(self, *args):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, Packed(module))

    def param_needs_quantization(self, model, param_name, **kwargs):
        owner, _, key = param_name.rpartition(".")
        return key == "weight" and isinstance(model.get_submodule(owner), Packed)

    def get_quantize_ops(self):
        return Pack()


@torch.no_grad()
def test_a_quantizer_may_put_modules_of_its_own_in_place_of_linears(tmp_path):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PackedConfig())
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(quantized.model.layers[0].mixer.q_proj, Packed)
    assert_near(quantized, theirs)
