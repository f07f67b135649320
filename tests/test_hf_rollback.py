"""The transformers model's cache goes back to an earlier token, for prompt lookup and assistants; steps are in place.

The oracle is GDN2Model on whole rows without padding, which knows no cache and no going back.
"""

import copy
import itertools

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from gdn2_titan.convert.hf import GDN2Cache
from gdn2_titan.convert.hf.cache_gdn2 import REACH
from gdn2_titan.models import GatedDeltaNet2
from tests.hf_cases import (
    GREEDY,
    HYBRID,
    RECURRENT,
    VOCABULARY,
    WINDOWED,
    assert_equal,
    assert_greedy,
    config,
    left_padded,
    pair,
    storages,
    tokens,
)

patterns = pytest.mark.parametrize("pattern", [RECURRENT, WINDOWED, HYBRID], ids="+".join)
NEW = 24


def repeating(length=20, times=2):
    """A prompt [1, length * times] that says everything again, from which prompt lookup has much to propose."""
    return tokens(1, length, 3).repeat(1, times)


def helper(theirs):
    """A model like ``theirs`` that is often right about what it says next, and often not."""
    other = copy.deepcopy(theirs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            if p.ndim == 2:
                p += 0.2 * p.std() * torch.randn(p.shape, generator=generator)
    return other


def counted(monkeypatch):
    """A list that gets the number of tokens that each crop takes back."""
    taken, crop = [], GDN2Cache.crop
    monkeypatch.setattr(GDN2Cache, "crop", lambda self, n: (taken.append(-n), crop(self, n))[1])
    return taken


def found_in_the_prompt(monkeypatch, said):
    """Let prompt lookup find five tokens each time, of which none, one, two ... all are those of ``said`` [1, T]."""
    turns = itertools.cycle(range(6))

    def get_candidates(self, input_ids):
        next_five = said[:, input_ids.shape[1] :][:, : min(5, self.max_length - input_ids.shape[1] - 1)].clone()
        next_five[:, next(turns) :] += 1
        return torch.cat((input_ids, next_five % VOCABULARY), 1), None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", get_candidates)


# ----------------------------------------------------------------------------------------------------------- generate


@patterns
def test_prompt_lookup_says_the_greedy_tokens(pattern, monkeypatch):
    theirs, ours = pair(layer_pattern=pattern)
    taken, text = counted(monkeypatch), tokens(1, 40)
    options = dict(max_new_tokens=NEW, **GREEDY)
    plain = theirs.generate(text, **options)
    found_in_the_prompt(monkeypatch, plain)
    assert torch.equal(theirs.generate(text, prompt_lookup_num_tokens=5, **options), plain)
    assert taken[:6] == [5, 4, 3, 2, 1, 0] and len(taken) == 8
    assert_greedy(ours, text[0], plain[0, 40:])


@patterns
def test_assisted_generation_says_the_greedy_tokens(pattern, monkeypatch):
    theirs, ours = pair(layer_pattern=pattern)
    assistant, text = helper(theirs), repeating()
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0
    taken = counted(monkeypatch)
    said = theirs.generate(text, max_new_tokens=NEW, assistant_model=assistant, **GREEDY)
    assert said.shape == (1, 40 + NEW) and max(taken) > 1
    assert_greedy(ours, text[0], said[0, 40:])


def test_padding_before_the_prompt_changes_no_token_of_prompt_lookup():
    theirs, ours = pair()
    text = repeating()
    padded, mask = torch.cat((tokens(1, 7), text), 1), torch.ones(1, 47, dtype=torch.long)
    mask[:, :7] = 0
    said = theirs.generate(padded, attention_mask=mask, max_new_tokens=NEW, prompt_lookup_num_tokens=5, **GREEDY)
    assert_greedy(ours, text[0], said[0, 47:])


@torch.no_grad()
def test_sampling_by_prompt_lookup_draws_from_the_logits_of_its_own_text():
    theirs, ours = (model.double() for model in pair())
    text = repeating()
    options = dict(max_new_tokens=NEW, prompt_lookup_num_tokens=5, return_dict_in_generate=True, output_logits=True)
    options |= dict(do_sample=True, temperature=0.5, top_k=0, eos_token_id=None, pad_token_id=0)
    said = []
    for _ in range(2):
        torch.manual_seed(7)
        found = theirs.generate(text, **options)
        assert_equal(torch.cat(found.logits), ours(found.sequences)[0, 39:-1].float())
        said.append(found.sequences)
    assert torch.equal(*said)  # as transformers promises of a seed


def test_generation_goes_on_from_the_cache_of_prompt_lookup():
    theirs, ours = pair()
    text, options = repeating(), dict(max_new_tokens=NEW, **GREEDY)
    first = theirs.generate(text, prompt_lookup_num_tokens=5, return_dict_in_generate=True, **options)
    cache = first.past_key_values
    assert cache.calls is None and cache.get_seq_length() == 39 + NEW
    more = theirs.generate(first.sequences, past_key_values=cache, **options)
    assert_greedy(ours, text[0], more[0, 40:])


# -------------------------------------------------------------------------------------------------------------- crop


@torch.no_grad()
@pytest.mark.parametrize("back", [1, 3, 6, 7, 8, 11, 12])
@patterns
def test_a_cache_that_went_back_goes_on_as_if_it_had_read_no_further(pattern, back):
    theirs, ours = (model.double() for model in pair(layer_pattern=pattern, window=5))
    ids, others, cache = tokens(2, 40), tokens(2, 20, 1), GDN2Cache(3)
    theirs(ids[:, :28], past_key_values=cache)
    cache.activate_past_recording()
    for piece in ids[:, 28:].split([5, 1, 5, 1], dim=1):
        theirs(piece, past_key_values=cache)
    cache.crop(-back)
    assert cache.get_seq_length() == 40 - back
    whole = torch.cat((ids[:, : 40 - back], others), 1)
    logits = [theirs(piece, past_key_values=cache).logits for piece in others.split([1, 1, 18], dim=1)]
    assert_equal(torch.cat(logits, 1), ours(whole)[:, 40 - back :])


@torch.no_grad()
@pytest.mark.parametrize("back", [2, 5, 9, 12, 20, 21])
def test_going_back_over_padding_and_documents(back):
    """Documents begin in the middle of the text, where padding is, and behind it."""
    theirs, ours = (model.double() for model in pair(window=5))
    ids, mask, _ = left_padded([30, 22, 13])
    mask[1, 25:] = 0
    resets = torch.zeros(3, 30, dtype=torch.bool)
    resets[0, [15, 24]] = resets[1, [18, 27]] = resets[2, 3] = True
    cache = GDN2Cache(3)
    theirs(ids[:, :9], attention_mask=mask[:, :9], resets=resets[:, :9], past_key_values=cache)
    cache.activate_past_recording()
    theirs(ids[:, 9:], attention_mask=mask, resets=resets[:, 9:], past_key_values=cache)
    cache.crop(-back)
    kept, others = 30 - back, tokens(3, 6, 1)
    told = torch.cat((mask[:, :kept], torch.ones(3, 6, dtype=torch.long)), 1)
    logits = [theirs(others[:, :1], attention_mask=told[:, : kept + 1], past_key_values=cache).logits]
    logits.append(theirs(others[:, 1:], attention_mask=told, past_key_values=cache).logits)
    for row, found in enumerate(torch.cat(logits, 1)):
        text, begins = ids[row, :kept][mask[row, :kept] > 0], resets[row, :kept].nonzero().flatten()
        last = int(begins[-1]) if len(begins) else 0
        text = text[int(mask[row, :last].sum()) :]
        assert_equal(found, ours(torch.cat((text, others[row]))[None])[0, len(text) :])


@torch.no_grad()
def test_of_a_long_call_the_last_tokens_alone_are_kept():
    theirs, ours = (model.double() for model in pair(layer_pattern=WINDOWED))
    ids, cache = tokens(1, REACH + 60), GDN2Cache(3)
    cache.activate_past_recording()
    outputs = theirs(ids, past_key_values=cache, output_hidden_states=True)
    assert_equal(outputs.logits, ours(ids))
    assert [h.shape[1] for h in outputs.hidden_states] == [REACH + 60] * 4
    with pytest.raises(ValueError, match=f"tokens_to_remove is -{REACH + 1}; it must be from -{REACH} to 0"):
        cache.crop(-REACH - 1)
    cache.crop(-100)
    assert_equal(theirs(ids[:, -100:], past_key_values=cache).logits, ours(ids)[:, -100:])


@torch.no_grad()
def test_copies_of_a_cache_go_back_each_for_itself():
    theirs, ours = pair()
    ids, cache = tokens(1, 20), GDN2Cache(3)
    theirs(ids[:, :10], past_key_values=cache)
    cache.activate_past_recording()
    theirs(ids[:, 10:], past_key_values=cache)
    other = copy.deepcopy(cache)
    for each in (cache, other):
        each.crop(-10)
        each.calls = None  # steps are then in place
        for token in ids[:, 10:].split(1, dim=1):
            logits = theirs(token, past_key_values=each).logits
        assert_equal(logits, ours(ids)[:, -1:])


@torch.no_grad()
def test_the_calls_that_a_cache_can_go_back_to_hold_its_keys_once():
    theirs, _ = pair(layer_pattern=("attention",))
    cache = GDN2Cache(3)
    theirs(tokens(1, 50), past_key_values=cache)
    cache.activate_past_recording()
    for token in tokens(1, 20).split(1, dim=1):
        theirs(token, past_key_values=cache)
    held = copy.copy(cache)
    held.states = cache.states + [state for call in cache.calls for state in call.before.states]
    assert len(cache.calls) == 20 and storages(held) == storages(cache)


# ----------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_step_overwrites_the_states_it_is_given(guard):
    theirs, ours = pair()
    ids, cache = tokens(2, 20), GDN2Cache(3)
    with guard():
        logits = [theirs(ids[:, :12], past_key_values=cache).logits]
        places = [x.data_ptr() for x in cache.states[0]]
        for token in ids[:, 12:].split(1, dim=1):
            logits.append(theirs(token, past_key_values=cache).logits)
            assert [x.data_ptr() for x in cache.states[0]] == places
    assert_equal(torch.cat(logits, 1), ours(ids))


def test_a_step_through_which_a_gradient_flows_overwrites_nothing():
    layer = GatedDeltaNet2(32, 2, 8)
    theirs, _ = pair(layer_pattern=RECURRENT)
    cache, ids = GDN2Cache(3), tokens(1, 5)
    theirs(ids[:, :4], past_key_values=cache)
    theirs(ids[:, 4:], past_key_values=cache).logits.sum().backward()
    assert theirs.model.layers[0].mixer.k_proj.weight.grad.abs().max() > 0
    _, state = layer(torch.randn(1, 4, 32), return_state=True)
    before = state.memory.clone()
    layer(torch.randn(1, 1, 32), state=state, return_state=True)
    assert torch.equal(state.memory, before)


# ------------------------------------------------------------------------------------------------------ at the door


def test_what_cannot_be_taken_back_is_refused():
    theirs, _ = pair()
    cache = GDN2Cache(3)
    with torch.no_grad():
        theirs(tokens(1, 6), past_key_values=cache)
    cache.crop(0)
    for back in (-1, 2):
        with pytest.raises(ValueError, match=f"tokens_to_remove is {back}; it must be from 0 to 0"):
            cache.crop(back)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="seq_idx is given with a cache that records its past"):
        theirs(tokens(1, 3), past_key_values=cache.reset() or cache, seq_idx=torch.tensor([[0, 0, 1]]))
    with pytest.raises(ValueError, match="assistant_early_exit is 2"):
        theirs.generate(tokens(1, 4), assistant_early_exit=2, max_new_tokens=2, **GREEDY)
    assert config().n_layers == 3
