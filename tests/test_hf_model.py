"""The transformers model against GDN2Model, and what is carried from token to token against computing all of it again.

The oracle of every comparison is GDN2Model on whole rows without padding, which knows no cache and no padding.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from gdn2_titan.convert.hf import GDN2Cache, GDN2Config, GDN2ForCausalLM, GDN2ForSequenceClassification
from gdn2_titan.convert.hf.cache_gdn2 import CACHE, CACHE_NAMES
from gdn2_titan.models import GDN2ModelArgs
from tests.hf_cases import (
    GREEDY,
    HYBRID,
    RECURRENT,
    WINDOWED,
    assert_equal,
    assert_greedy,
    config,
    left_padded,
    pair,
    storages,
    tokens,
)
from tests.model_cases import GATES, gate_structures

patterns = pytest.mark.parametrize("pattern", [RECURRENT, WINDOWED, HYBRID], ids="+".join)

# ------------------------------------------------------------------------------------------------------------ forward


@patterns
@gate_structures
@torch.no_grad()
def test_logits_are_those_of_gdn2_model(structure, pattern):
    theirs, ours = pair(**{"num_v_heads": None} | GATES[structure], layer_pattern=pattern)
    ids = tokens(2, 70)
    assert_equal(theirs(ids, use_cache=False).logits, ours(ids))
    assert_equal(theirs(ids, use_cache=True).logits, ours(ids))


def test_the_loss_is_the_cross_entropy_of_the_next_tokens_that_have_a_label():
    theirs, ours = pair()
    ids = tokens(2, 20)
    labels = ids.clone()
    labels[:, :7] = -100
    expected = F.cross_entropy(ours(ids)[:, 6:-1].flatten(0, 1), ids[:, 7:].flatten())
    assert_equal(theirs(ids, labels=labels).loss, expected)
    # As a trainer asks for it that accumulates gradients over batches of 100 labels.
    assert_equal(theirs(ids, labels=labels, num_items_in_batch=100).loss, expected * 26 / 100)


@torch.no_grad()
def test_embeddings_in_place_of_ids_and_the_last_logits_only():
    theirs, ours = pair()
    ids = tokens(2, 20)
    outputs = theirs(inputs_embeds=ours.tok_embeddings(ids), logits_to_keep=3, output_hidden_states=True)
    assert_equal(outputs.logits, ours(ids)[:, -3:])
    assert len(outputs.hidden_states) == 4
    assert_equal(ours.lm_head(outputs.hidden_states[-1]), ours(ids))


def test_checkpointed_gradients_are_the_gradients():
    theirs, _ = pair()
    ids, mask, _ = left_padded([20, 9])
    gradients = []
    theirs.train()
    for checkpointing in (False, True):
        if checkpointing:
            theirs.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in theirs.model.layers)
        theirs.zero_grad()
        outputs = theirs(ids, attention_mask=mask, labels=ids, use_cache=checkpointing)
        assert outputs.past_key_values is None
        outputs.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in theirs.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# ---------------------------------------------------------------------------------------------------------- the cache


@patterns
@torch.no_grad()
def test_a_prompt_in_uneven_pieces_gives_the_logits_of_one_piece(pattern):
    theirs, ours = (model.double() for model in pair(layer_pattern=pattern))
    ids, mask, rows = left_padded([150, 149, 31, 90])
    cache, logits, end = GDN2Cache(3), [], 0
    for length in (1, 7, 64, 1, 65, 2, 1, 9):
        piece, end = ids[:, end : end + length], end + length
        logits.append(theirs(piece, attention_mask=mask[:, :end], past_key_values=cache).logits)
    assert end == 150 and cache.get_seq_length() == 150
    logits = torch.cat(logits, 1)
    for row, text in enumerate(rows):
        assert_equal(logits[row, -len(text) :], ours(text[None])[0])


@pytest.mark.parametrize("window", [1, 2, 5], ids="window of {}".format)
@torch.no_grad()
def test_a_window_of_any_size_continues(window):
    theirs, ours = pair(layer_pattern=WINDOWED, window=window)
    ids, cache, logits = tokens(2, 12), GDN2Cache(3), []
    for piece in ids.split([3, 1, 1, 4, 1, 1, 1], dim=1):
        logits.append(theirs(piece, past_key_values=cache).logits)
    assert_equal(torch.cat(logits, 1), ours(ids))


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_a_cache_is_given_by_either_name_that_transformers_has_for_it(name):
    theirs, ours = pair()
    classes = GDN2ForSequenceClassification(theirs.config).eval()
    ids, caches = tokens(1, 12), [GDN2Cache(3) for _ in range(3)]
    for model, cache in zip((theirs, theirs.model, classes), caches, strict=True):
        model(ids[:, :5], **{name: cache})
        outputs = model(ids[:, 5:], **{name: cache})
        assert outputs[CACHE] is cache and cache.seen == 12
        if model is theirs:
            assert_equal(outputs.logits, ours(ids)[:, 5:])


def cached(theirs, length, piece=1000):
    """Bytes of the cache after ``length`` tokens in pieces, and after one more token."""
    cache = GDN2Cache(theirs.config.n_layers)
    for ids in tokens(1, length).split(piece, dim=1):
        theirs(ids, past_key_values=cache)
    prefilled = storages(cache)
    theirs(tokens(1, 1), past_key_values=cache)
    return prefilled, storages(cache)


# Of each layer: 3 inputs of convolutions over 16 + 16 + 32 channels, and a memory of 4 heads of 8 x 8.
GDN2_LAYER = 4 * (3 * 64 + 4 * 8 * 8)


@torch.no_grad()
def test_the_cache_of_10000_tokens_takes_the_bytes_of_100():
    recurrent, _ = pair(layer_pattern=RECURRENT)
    assert cached(recurrent, 100) == cached(recurrent, 10_000) == (3 * GDN2_LAYER, 3 * GDN2_LAYER)


@torch.no_grad()
def test_the_cache_of_windowed_layers_is_bounded_by_the_window():
    windowed, _ = pair(layer_pattern=WINDOWED, window=32)
    token = 4 * 2 * 2 * 8  # key and value of 2 heads of 8
    bound = 2 * GDN2_LAYER + 31 * token, 2 * GDN2_LAYER + 32 * token
    assert cached(windowed, 100) == cached(windowed, 10_000) == bound
    full, _ = pair(layer_pattern=HYBRID)
    assert cached(full, 1100)[1] - cached(full, 100)[1] == 1000 * token


# ------------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("pattern", [RECURRENT, HYBRID], ids="+".join)
def test_300_greedy_tokens_from_the_cache_are_those_of_full_recomputation(pattern):
    theirs, ours = pair(layer_pattern=pattern)
    ids, mask, rows = left_padded([17, 1, 12, 5])
    options = dict(attention_mask=mask, max_new_tokens=300, **GREEDY)
    found = theirs.generate(ids, **options)
    assert min(len(row[17:].unique()) for row in found) > 5  # no row has run into one token that any state would give
    for row, text in zip(found, rows, strict=True):
        assert_greedy(ours, text, row[17:])
    options["max_new_tokens"] = 20
    assert torch.equal(theirs.generate(ids, prefill_chunk_size=4, **options), found[:, :37])


@patterns
def test_beams_from_the_cache_are_those_of_full_recomputation(pattern):
    theirs, _ = pair(layer_pattern=pattern)
    ids, mask, _ = left_padded([11, 3, 8, 5])
    options = dict(attention_mask=mask, max_new_tokens=15, num_beams=4, num_return_sequences=2, **GREEDY)
    again = theirs.generate(ids, use_cache=False, **options)
    assert torch.equal(theirs.generate(ids, **options), again)
    assert not torch.equal(
        again[::2, 11:], theirs.generate(ids, attention_mask=mask, max_new_tokens=15, **GREEDY)[:, 11:]
    )


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generation_continues_from_a_returned_cache(name):
    theirs, ours = pair()
    text = tokens(1, 9)
    options = dict(max_new_tokens=20, **GREEDY)
    first = theirs.generate(text, attention_mask=torch.ones_like(text), return_dict_in_generate=True, **options)
    mask = torch.ones_like(first.sequences)
    more = theirs.generate(first.sequences, attention_mask=mask, **{name: first[CACHE]}, **options)
    assert more.shape == (1, 49) and first[CACHE].seen == 48
    assert_greedy(ours, text[0], more[0, 9:])


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_selected_and_reset():
    theirs, _ = pair()
    ids, mask, _ = left_padded([8, 5])
    cache = GDN2Cache(3)
    theirs(ids, attention_mask=mask, past_key_values=cache)
    rows = copy.deepcopy(cache)
    rows.batch_repeat_interleave(2)
    assert rows.batch_size == 4
    rows.batch_select_indices(torch.tensor([3, 0]))
    next_mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    expected = theirs(ids[:, :1], attention_mask=next_mask, past_key_values=cache).logits
    swapped = theirs(ids[:, :1].flip(0), attention_mask=next_mask.flip(0), past_key_values=rows).logits
    assert_equal(swapped.flip(0), expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_equal(theirs(ids, past_key_values=cache).logits, theirs(ids).logits)


# ------------------------------------------------------------------------------------------------------ save and load


def test_the_config_names_the_fields_of_gdn2_model_args_and_comes_back(tmp_path):
    saved = config(tied_gates=True, bos_token_id=3, eos_token_id=4, pad_token_id=5)
    saved.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GDN2Config)
    expected = GDN2ModelArgs(
        vocab_size=50, hidden_size=32, n_layers=3, mlp_size=48, num_heads=2, head_dim=8, attn_heads=4, window=4,
        layer_pattern=HYBRID, num_v_heads=4, attn_kv_heads=2, tied_gates=True,
    )  # fmt: skip
    assert loaded.model_args() == saved.model_args() == expected
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (3, 4, 5)
    assert loaded.num_hidden_layers == 3 and loaded.use_cache is True
    assert GDN2Config().model_args() == GDN2ModelArgs()


def test_a_saved_model_loads_bit_for_bit_from_safetensors_in_shards(tmp_path):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in names and not any(name.endswith((".bin", ".pt")) for name in names)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, GDN2ForCausalLM)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for (name, expected), actual in zip(theirs.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
    ids = tokens(2, 20)
    assert_equal(loaded(ids).logits, ours(ids))


def test_decays_stay_in_fp32_in_a_model_loaded_in_bf16(tmp_path):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in loaded.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name
    ids, mask, _ = left_padded([9, 4])
    generated = loaded.generate(ids, attention_mask=mask, max_new_tokens=5, **GREEDY)
    again = loaded.generate(ids, attention_mask=mask, max_new_tokens=5, use_cache=False, **GREEDY)
    assert generated.shape == again.shape == (2, 14)


def test_layers_on_disk_give_the_same_logits_and_tokens(tmp_path):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[0].mixer.decay.A_log.is_meta
    ids = tokens(1, 20)
    assert_equal(loaded(ids).logits, ours(ids))
    assert_greedy(ours, ids[0], loaded.generate(ids, max_new_tokens=8, **GREEDY)[0, 20:])
    assert loaded.model.layers[0].mixer.decay.A_log.is_meta  # put aside again


# ------------------------------------------------------------------------------------------------------ at the door


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        (dict(past_key_values=DynamicCache()), TypeError, "past_key_values is a DynamicCache"),
        (dict(cache=DynamicCache()), TypeError, "cache is a DynamicCache"),
        (dict(cache=GDN2Cache(2), past_key_values=GDN2Cache(2)), ValueError, "are two caches; they must be one"),
        (dict(inputs_embeds=torch.zeros(2, 4, 32)), ValueError, "both of input_ids and inputs_embeds"),
        (dict(input_ids=None), ValueError, "neither of input_ids and inputs_embeds"),
    ],
    ids=lambda value: "" if isinstance(value, (dict, type)) else value[:40],
)
def test_inputs_that_the_model_could_not_be_right_on_are_refused(inputs, error, message):
    theirs, _ = pair()
    with pytest.raises(error, match=message):
        theirs(**{"input_ids": tokens(2, 4), "use_cache": True} | inputs)


def test_caches_of_other_kinds_are_refused():
    theirs, _ = pair()
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        theirs.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static", **GREEDY)
