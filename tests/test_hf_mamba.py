"""Models with Mamba layers under transformers: logits, padding, documents, generation, starting values, folders."""

import pytest
import torch
import torch.nn.functional as F

from gdn2_titan.convert.checkpoint_info import args_to_fields
from gdn2_titan.convert.hf import GDN2Cache, GDN2Config, GDN2ForCausalLM
from tests.convert_cases import convert, save_step, weights
from tests.hf_cases import GREEDY, assert_equal, assert_greedy, config, left_padded, pair, tokens

SIZES = dict(mamba_heads=4, mamba_head_dim=6, mamba_state=8, mamba_rank=2)
PATTERNS = [("mamba2",), ("mamba2", "swa", "gdn2"), ("mamba3", "mamba2")]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)


@patterns
@torch.no_grad()
def test_logits_are_those_of_gdn2_model(pattern):
    theirs, ours = pair(layer_pattern=pattern, **SIZES)
    ids = tokens(2, 70)
    for use_cache in (False, True):
        assert_equal(theirs(ids, use_cache=use_cache).logits, ours(ids))


@patterns
@torch.no_grad()
def test_padding_changes_no_logit_of_the_text_in_one_call_or_two(pattern):
    theirs, ours = pair(layer_pattern=pattern, **SIZES)
    ids, mask, rows = left_padded([23, 14])
    whole = theirs(ids, attention_mask=mask).logits
    cache = theirs(ids[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
    rest = theirs(ids[:, 12:], attention_mask=mask, past_key_values=cache).logits
    for row, text in enumerate(rows):
        assert_equal(whole[row, -len(text) :], ours(text[None])[0])
        assert_equal(rest[row], ours(text[None])[0, -11:])


@patterns
@torch.no_grad()
def test_packed_documents_know_nothing_of_each_other(pattern):
    theirs, ours = pair(layer_pattern=pattern, **SIZES)
    ids = tokens(1, 30)
    logits = theirs(ids, position_ids=torch.cat((torch.arange(13), torch.arange(17)))[None]).logits
    assert_equal(logits, torch.cat((ours(ids[:, :13]), ours(ids[:, 13:])), 1))


@patterns
def test_generation_goes_on_from_the_text_of_each_row(pattern):
    theirs, ours = pair(layer_pattern=pattern, **SIZES)
    ids, mask, rows = left_padded([9, 5])
    generated = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    for row, text in enumerate(rows):
        assert_greedy(ours, text, generated[row, ids.shape[1] :])


def test_a_model_made_from_a_config_starts_as_the_decoder_does():
    torch.manual_seed(0)
    built = GDN2ForCausalLM(config(layer_pattern=PATTERNS[2], **SIZES))
    heads, mixer = (layer.mixer for layer in built.model.layers[:2])
    assert (heads.heads.bc_bias == 1).all() and (heads.heads.in_scale == 0.5).all() and heads.decay.dt_bias.max() < 0
    assert (mixer.skip.weight == 1).all() and (mixer.o_norm.weight == 1).all()
    assert 1e-3 <= F.softplus(mixer.decay.dt_bias).min() and mixer.decay.A_log.max() < 2.78
    assert built.config.layer_types[0] == "linear_attention"


@patterns
def test_a_checkpoint_becomes_a_folder_and_the_folder_the_checkpoint(tmp_path, capsys, pattern):
    args = config(layer_pattern=pattern, **SIZES).model_args()
    step = save_step(tmp_path / "checkpoint" / "step-7", weights(args), args)
    assert convert(capsys, "to-hf", step, tmp_path / "hf") == (0, "")
    loaded = GDN2ForCausalLM.from_pretrained(tmp_path / "hf")
    assert GDN2Config.from_pretrained(tmp_path / "hf").model_args() == args
    for name, tensor in weights(args).items():
        found = loaded.state_dict()[{"tok_embeddings.weight": "model.embed_tokens.weight"}.get(
            name, name if name.startswith("lm_head") else f"model.{name}")]  # fmt: skip
        assert torch.equal(found, tensor), name


def test_exporting_to_layouts_that_have_no_such_layer_is_refused(tmp_path, capsys):
    args = config(layer_pattern=("mamba2", "swa"), **SIZES).model_args()
    step = save_step(tmp_path / "checkpoint" / "step-7", weights(args), args)
    assert args_to_fields(args)["mamba_heads"] == 4
    for command in ("to-fla", "to-nvlabs"):
        status, said = convert(capsys, command, step, tmp_path / command)
        assert status != 0 and "layer_pattern has 'mamba2'" in said


@patterns
@torch.no_grad()
def test_a_cache_that_went_back_goes_on_as_if_it_had_read_no_further(pattern):
    theirs, ours = (model.double() for model in pair(layer_pattern=pattern, **SIZES))
    ids, cache = tokens(2, 30), GDN2Cache(3)
    theirs(ids[:, :20], past_key_values=cache)
    cache.activate_past_recording()
    theirs(torch.cat((ids[:, 20:25], tokens(2, 4, 1)), 1), past_key_values=cache)
    cache.crop(-4)
    assert_equal(theirs(ids[:, 25:], past_key_values=cache).logits, ours(ids)[:, 25:])
