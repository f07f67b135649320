"""docs/padding.md row by row: what the transformers model is told of padding and of documents, and what it does then.

The oracle is GDN2Model on each document alone, which knows no padding, no packing and no cache.
"""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from gdn2_titan.convert.hf import GDN2Cache
from tests.hf_cases import GREEDY, RECURRENT, WINDOWED, assert_equal, assert_greedy, pair, tokens

TABLE = Path(__file__).resolve().parents[1] / "docs" / "padding.md"
FULL, MAMBA = ("gdn2", "attention"), ("mamba3", "mamba2")
patterns = pytest.mark.parametrize("pattern", [RECURRENT, WINDOWED, FULL], ids="+".join)
TESTED = set()


def row(said, when=""):
    """Marks the test of a row of the table, by how its cells begin."""

    def mark(test):
        TESTED.add((said, when))
        return test

    return mark


def rows_of_the_table():
    cells = [re.findall(r"\|([^|]*)(?=\|)", line) for line in TABLE.read_text().splitlines() if line.startswith("|")]
    return [(said.strip(), when.strip()) for said, when, _ in cells[2:]]


@functools.cache
def models(pattern=WINDOWED, **changes):
    """(GDN2ForCausalLM, GDN2Model) in fp64, small, of decays so weak that the first token still weighs at the last."""
    sizes = dict(mamba_heads=3, mamba_head_dim=4, mamba_state=8, mamba_rank=2)
    theirs, ours = pair(layer_pattern=pattern, n_layers=2, expand_v=2.0, **sizes, **changes)
    for model in (theirs, ours):
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.data.fill_(-3.0)
    return theirs.double(), ours.double()


def mask_of(*rows):
    return torch.tensor([[int(token) for token in row] for row in rows])


@torch.no_grad()
def assert_text(logits, ids, mask, ours):
    """The logits at text are those of each row's text alone."""
    for found, row, text in zip(logits, ids, mask.bool(), strict=True):
        if text.any():
            assert_equal(found[text], ours(row[text][None])[0])


@torch.no_grad()
def documents_alone(ours, ids, *bounds):
    return torch.cat([ours(ids[:, a:b])[0] for a, b in zip(bounds[:-1], bounds[1:], strict=True)])


def test_every_row_of_the_table_has_a_test_and_every_test_a_row():
    table = rows_of_the_table()
    assert len(table) > 30 and len(set(table)) == len(table)
    for said, when in table:
        assert any(said.startswith(a) and when.startswith(b) for a, b in TESTED), (said, when)
    for a, b in TESTED:
        assert sum(said.startswith(a) and when.startswith(b) for said, when in table) == 1, (a, b)


# ------------------------------------------------------------------------------------------------------------ padding

FIRST = {
    "left": ("00011111", "11111111", "00000001"),
    "right": ("11111000", "11111111", "10000000"),
    "between": ("10110001", "01010101", "11111111"),
    "empty row": ("00000000", "11111111", "00111000"),
}


@row("`attention_mask` [B, T], padding on the left")
@row("`attention_mask` [B, T], padding on the right")
@row("`attention_mask` [B, T], padding between")
@row("`attention_mask`, a row of padding alone")
@patterns
@pytest.mark.parametrize("where", FIRST)
@pytest.mark.parametrize("use_cache", [None, False], ids=["a cache by default", "no cache"])
@torch.no_grad()
def test_padding_anywhere_in_a_first_call_changes_no_logit_of_the_text(where, use_cache, pattern):
    theirs, ours = models(pattern)
    ids, mask = tokens(3, 8), mask_of(*FIRST[where])
    outputs = theirs(ids, attention_mask=mask, use_cache=use_cache)
    assert (outputs.past_key_values is None) == (use_cache is False)
    assert_text(outputs.logits, ids, mask, ours)


@row("`attention_mask` [B, seen + T], padding anywhere")
@row("`attention_mask`, a row of padding alone")
@patterns
@torch.no_grad()
def test_padding_anywhere_in_later_calls_changes_no_logit_of_the_text(pattern):
    theirs, ours = models(pattern)
    mask = mask_of("0011111" "00011" "0000" "1" "0" "11", "1111100" "11100" "1001" "0" "0" "10",
                   "0000000" "11011" "1111" "1" "0" "01", "1111111" "00000" "0000" "0" "0" "11")  # fmt: skip
    ids, cache, logits, end = tokens(*mask.shape), GDN2Cache(2), [], 0
    for length in (7, 5, 4, 1, 1, 2):
        start, end = end, end + length
        logits.append(theirs(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    assert cache.get_seq_length() == end == mask.shape[1]
    assert_text(torch.cat(logits, 1), ids, mask, ours)


@patterns
@torch.no_grad()
def test_a_row_that_only_pads_keeps_its_state_bit_for_bit_and_repeats_its_last_output(pattern):
    theirs, _ = models(pattern)
    cache = GDN2Cache(2)
    first = theirs(tokens(2, 6), past_key_values=cache).logits
    before, mask = copy.deepcopy(cache.states), mask_of("1111110000", "1111111111")
    outputs = theirs(tokens(2, 4, seed=1), attention_mask=mask, past_key_values=cache)
    for old, new in zip(before, cache.states, strict=True):
        for a, b in zip(old, new, strict=True):
            # Keys and values stand at the end of their rows.
            assert torch.equal(a[0], b[0] if a.shape == b.shape else b[0, -len(a[0]) :])
            assert a.shape[1] == 0 or not torch.equal(a[1], b[1, -len(a[1]) :])
    assert torch.equal(outputs.logits[0], first[0, -1:].expand(4, -1))


@row("no `attention_mask`")
@torch.no_grad()
def test_no_mask_says_that_all_new_tokens_are_text_and_forgets_no_padding():
    theirs, ours = models()
    ids, mask, cache = tokens(2, 9), mask_of("110011111", "000111111"), GDN2Cache(2)
    assert_equal(theirs(ids).logits, ours(ids))
    logits = [theirs(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache).logits]
    logits += [theirs(ids[:, 4:8], past_key_values=cache).logits]
    logits += [theirs(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits]
    assert_text(torch.cat(logits, 1), ids, mask, ours)


@row("`attention_mask` of bool, whole numbers or floats")
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_mask_may_have_any_dtype(dtype):
    theirs, ours = models()
    ids, mask = tokens(2, 5), mask_of("00111", "11011")
    assert_text(theirs(ids, attention_mask=mask.to(dtype)).logits, ids, mask, ours)


@pytest.mark.parametrize("checkpointing", [False, True])
@row("`attention_mask`, padding, gradients")
def test_loss_and_gradients_of_padded_texts_are_those_of_the_texts(checkpointing):
    theirs, ours = copy.deepcopy(models(FULL))
    ids, mask = tokens(3, 9), mask_of("001111111", "111110000", "101100110")
    texts = [ids[row, text][None] for row, text in enumerate(mask.bool())]
    losses = [F.cross_entropy(ours(text)[0, :-1], text[0, 1:], reduction="sum") for text in texts]
    expected = sum(losses) / sum(text.shape[1] - 1 for text in texts)
    expected.backward()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2] = -100  # nothing foretells the first token of a text
    theirs.train()
    if checkpointing:
        theirs.gradient_checkpointing_enable()
    outputs = theirs(ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    assert_equal(outputs.loss.double(), expected)  # transformers' loss is fp32
    weights = dict(ours.named_parameters()) | {"model.embed_tokens.weight": ours.tok_embeddings.weight}
    for name, p in theirs.named_parameters():
        again = weights.get(name, weights.get(name.removeprefix("model.")))
        torch.testing.assert_close(p.grad, again.grad, rtol=1e-4, atol=1e-7, msg=name)


@torch.no_grad()
def test_hidden_states_at_text_are_those_of_the_text():
    theirs, _ = models()
    ids, mask = tokens(2, 6), mask_of("011101", "111000")
    found = theirs.model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(found.hidden_states) == 3 and torch.equal(found.hidden_states[-1], found.last_hidden_state)
    for row, text in enumerate(mask.bool()):
        alone = theirs.model(ids[row, text][None], output_hidden_states=True).hidden_states
        for padded, expected in zip(found.hidden_states, alone, strict=True):
            assert padded.shape == (2, 6, 32)
            assert_equal(padded[row, text], expected[0])


@st.composite
def tolds(draw):
    return Told(draw)


class Told:
    """A random text in random pieces: which tokens are text, and where documents begin."""

    def __init__(self, draw):
        batch, self.pieces = draw(st.integers(1, 3)), draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        total = sum(self.pieces)
        flags = st.lists(st.booleans(), min_size=batch * total, max_size=batch * total)
        self.mask = torch.tensor(draw(flags)).view(batch, total)
        if draw(st.booleans()):
            self.mask |= torch.tensor(draw(flags)).view(batch, total)  # less padding
        self.resets = torch.zeros_like(self.mask)
        if draw(st.booleans()):
            self.resets = torch.tensor(draw(flags)).view(batch, total) & torch.tensor(draw(flags)).view(batch, total)
        self.ids = tokens(batch, total, seed=draw(st.integers(0, 99)))

    def documents(self, row):
        """(ids [1, length], where they stand) of each document of a row."""
        number = self.resets[row].long().cumsum(0)
        for document in number.unique():
            at = (self.mask[row] & (number == document)).nonzero()[:, 0]
            if len(at):
                yield self.ids[row, at][None], at


@pytest.mark.parametrize("pattern", [RECURRENT, WINDOWED, FULL, MAMBA], ids="+".join)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(told=tolds())
@torch.no_grad()
def test_random_padding_and_documents_in_random_pieces_give_the_logits_of_each_document(pattern, told):
    theirs, ours = models(pattern)
    cache, end, logits = GDN2Cache(2), 0, []
    for length in told.pieces:
        start, end = end, end + length
        resets = told.resets[:, start:end]
        logits.append(
            theirs(
                told.ids[:, start:end],
                attention_mask=told.mask[:, :end],
                past_key_values=cache,
                resets=resets if told.resets.any() else None,
            ).logits
        )
    logits = torch.cat(logits, 1)
    for row in range(len(told.ids)):
        for document, at in told.documents(row):
            assert_equal(logits[row, at], ours(document)[0])


# ------------------------------------------------------------------------------------------------------------ packing

BOUNDS = (0, 3, 3, 4, 11)
COLLATED = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
    [{"input_ids": [0] * 3}, {"input_ids": [0]}, {"input_ids": [0] * 7}]
)
SAID = {
    "resets": dict(resets=mask_of("10011000000").bool()),
    "position_ids": dict(position_ids=COLLATED["position_ids"]),
    "cu_seqlens": dict(cu_seqlens=torch.tensor(BOUNDS)),
    "transformers' collator": {
        name: COLLATED[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    },
    "seq_idx": dict(seq_idx=COLLATED["seq_idx"]),
}
SAID["all that agree"] = functools.reduce(dict.__or__, SAID.values())


@row("`resets` bool [B, T]")
@row("`position_ids` [B, T], 0 where")
@row("`cu_seqlens` int [N + 1] from 0 to T")
@row("`cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`")
@row("`seq_idx` int [B, T], rising")
@row("several of these that agree")
@row("a cache after documents")
@patterns
@pytest.mark.parametrize("said", SAID)
@torch.no_grad()
def test_packed_documents_get_the_logits_of_each_alone_and_the_last_goes_on(said, pattern):
    theirs, ours = models(pattern)
    ids = tokens(1, 16)
    expected = documents_alone(ours, ids, 0, 3, 4, 16)
    for model in (theirs, theirs.model):
        outputs = model(ids[:, :11], **SAID[said])
        cache, logits = outputs.past_key_values, [outputs[0]]
        logits += [model(ids[:, at : at + 1], past_key_values=cache)[0] for at in range(11, 14)]
        logits += [model(ids[:, 14:], past_key_values=cache, attention_mask=torch.ones(1, 16))[0]]
        logits = torch.cat(logits, 1)
        assert_equal(logits[0] if model is theirs else theirs.lm_head(logits[0]), expected)
    assert_equal(theirs(ids[:, :11], use_cache=False, **SAID[said]).logits[0], expected[:11])


@patterns
@pytest.mark.parametrize("said", ["resets", "position_ids"])
@row("`resets` bool [B, T]")
@row("`position_ids` [B, T], 0 where")
@torch.no_grad()
def test_documents_begin_in_later_calls_in_each_row_at_its_own_place(said, pattern):
    theirs, ours = models(pattern)
    ids, resets = tokens(2, 12), mask_of("000100100100", "000010011001").bool()
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 0]])
    cache, logits = GDN2Cache(2), []
    for piece in (slice(0, 4), slice(4, 9), slice(9, 12)):
        words = dict(resets=resets[:, piece]) if said == "resets" else dict(position_ids=places[:, piece])
        logits.append(theirs(ids[:, piece], past_key_values=cache, **words).logits)
    logits = torch.cat(logits, 1)
    assert_equal(logits[0], documents_alone(ours, ids[:1], 0, 3, 6, 9, 12))
    assert_equal(logits[1], documents_alone(ours, ids[1:], 0, 4, 7, 8, 11, 12))


@row("`position_ids` that go on")
@torch.no_grad()
def test_position_ids_that_go_on_say_nothing():
    theirs, ours = models()
    ids, mask = tokens(2, 9), mask_of("001111101", "111100111")
    of_text = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    for places in (of_text, of_text.int(), torch.arange(9), torch.arange(9)[None]):
        cache = GDN2Cache(2)
        logits = [
            theirs(
                ids[:, piece], attention_mask=mask[:, : piece.stop], position_ids=places[..., piece],
                past_key_values=cache,
            ).logits
            for piece in (slice(0, 6), slice(6, 9))
        ]  # fmt: skip
        assert_text(torch.cat(logits, 1), ids, mask, ours)


@row("documents in rows with padding")
@patterns
@torch.no_grad()
def test_documents_in_padded_rows_get_the_logits_of_each_alone(pattern):
    theirs, ours = models(pattern)
    ids, mask = tokens(2, 10), mask_of("0111011100", "1111110111")
    text, resets = mask.bool(), mask_of("0001100010", "0001001000").bool()  # two of them begin at padding
    places = torch.tensor([[9, 0, 1, 0, 9, 0, 1, 2, 9, 9], [0, 1, 2, 0, 1, 2, 9, 0, 1, 2]])
    numbers = torch.tensor([[-1, 0, 0, 1, -1, 2, 2, 2, -1, -1], [0, 0, 0, 1, 1, 1, -1, 2, 2, 2]])
    for words in (dict(resets=resets), dict(position_ids=places), dict(seq_idx=numbers)):
        logits = theirs(ids, attention_mask=mask, **words).logits
        assert_equal(logits[0, text[0]], documents_alone(ours, ids[:1, text[0]], 0, 2, 3, 6))
        assert_equal(logits[1, text[1]], documents_alone(ours, ids[1:, text[1]], 0, 3, 6, 9))
    bounds = torch.tensor([0, 4, 7, 10])
    logits = theirs(ids[:1], attention_mask=mask[:1], cu_seqlens=bounds).logits
    assert_equal(logits[0, text[0]], documents_alone(ours, ids[:1, text[0]], 0, 3, 5, 6))


@row("documents in rows with padding")
@patterns
@torch.no_grad()
def test_a_document_that_begins_at_padding_after_all_text_begins_in_a_later_call(pattern):
    theirs, ours = models(pattern)
    ids, mask, cache = tokens(2, 9), mask_of("111000111", "110000011"), GDN2Cache(2)
    resets = mask_of("000010", "010001").bool()
    theirs(ids[:, :6], attention_mask=mask[:, :6], resets=resets, past_key_values=cache)
    logits = [theirs(ids[:, 6:7], attention_mask=mask[:, :7], past_key_values=cache).logits]
    logits += [theirs(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits]
    logits = torch.cat(logits, 1)
    assert_equal(logits[0], ours(ids[:1, 6:])[0])
    assert_equal(logits[1, 1:], ours(ids[1:, 7:])[0])


@row("`labels` of packed text")
@row("`num_items_in_batch`, `ignore_index`")
def test_loss_and_gradients_of_documents_collated_by_transformers_are_those_of_each_alone():
    theirs, ours = copy.deepcopy(models(FULL))
    ids = tokens(1, 11)
    features = [{"input_ids": ids[0, a:b].tolist()} for a, b in ((0, 3), (3, 4), (4, 11))]
    losses = [F.cross_entropy(ours(text)[0, :-1], text[0, 1:], reduction="sum") for text in (ids[:, :3], ids[:, 4:])]
    (sum(losses) / 8).backward()
    theirs.train()
    outputs = theirs(**DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features))
    outputs.loss.backward()
    assert_equal(outputs.loss.double(), sum(losses) / 8)
    for p, again in zip(theirs.model.layers.parameters(), ours.layers.parameters(), strict=True):
        torch.testing.assert_close(p.grad, again.grad, rtol=1e-4, atol=1e-7)
    # Labels that nobody has put -100 into: the next document's first token is foretold too.
    logits, shifted = outputs.logits[0, :-1].float(), ids[0, 1:]
    words = dict(cu_seqlens=torch.tensor([0, 3, 4, 11]))
    assert_equal(theirs(ids, labels=ids, **words).loss, F.cross_entropy(logits, shifted))
    assert_equal(theirs(ids, labels=ids, num_items_in_batch=5, **words).loss, F.cross_entropy(logits, shifted) * 2)
    shift = dict(shift_labels=F.pad(ids[:, 1:], (0, 1), value=7), ignore_index=7)
    expected = F.cross_entropy(logits, shifted, ignore_index=7)
    assert_equal(theirs(ids, labels=ids, **shift, **words).loss, expected)
    assert_equal(theirs(ids, **shift, **words).loss, expected)


# ----------------------------------------------------------------------------------------------------------- generate


PROMPTS = {"left": ("000111", "111111", "000001"), "right": ("111000", "111111", "100000"), "both": ("011100",) * 3}


@row("`generate` with padding")
@pytest.mark.parametrize("where", PROMPTS)
@pytest.mark.parametrize("options", [dict(), dict(prefill_chunk_size=4), dict(use_cache=False)], ids=str)
def test_generation_goes_on_from_the_text_of_each_row_wherever_its_padding_is(where, options):
    theirs, ours = models()
    ids, mask = tokens(3, 6), mask_of(*PROMPTS[where])
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=5, **options, **GREEDY)[:, 6:]
    for text, row, generated in zip(mask.bool(), ids, found, strict=True):
        assert_greedy(ours, row[text], generated)


@row("`generate` with padding")
def test_a_second_turn_of_unequal_lengths_goes_on_from_a_returned_cache():
    theirs, ours = models()
    ids, mask = tokens(2, 6), mask_of("001111", "111111")
    first = theirs.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    turns, told = tokens(2, 4, seed=1), mask_of("1111", "1100")
    ids = torch.cat((first.sequences, turns), 1)
    mask = torch.cat((mask, torch.ones(2, 3, dtype=torch.long), told), 1)
    options = dict(attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=3, **GREEDY)
    found = theirs.generate(ids, **options)[:, -3:]
    for row, text in enumerate(mask.bool()):
        assert_greedy(ours, ids[row, text], found[row])


@row("`generate` with padding")
def test_beams_of_padded_rows_are_those_of_full_recomputation():
    theirs, _ = models()
    ids, mask = tokens(2, 6), mask_of("110100", "001111")
    options = dict(attention_mask=mask, max_new_tokens=6, num_beams=3, num_return_sequences=2, **GREEDY)
    assert torch.equal(theirs.generate(ids, **options), theirs.generate(ids, use_cache=False, **options))


@row("`generate` with `position_ids`")
def test_generation_goes_on_with_the_last_document_that_position_ids_tell():
    theirs, ours = models()
    ids = tokens(1, 9)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, **GREEDY)
    for chunk in (None, 4, 5):  # where a piece ends within a document, and where one begins
        places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
        found = theirs.generate(ids, position_ids=places, prefill_chunk_size=chunk, **options)
        assert_greedy(ours, ids[0, 5:], found[0, 9:])


@row("`generate` with any other word")
@pytest.mark.parametrize("said", ["resets", "cu_seqlens", "transformers' collator", "seq_idx"])
def test_words_for_documents_of_a_prompt_are_refused_by_generate(said):
    theirs, _ = models()
    with pytest.raises(ValueError, match=f"{next(iter(SAID[said]))} is given to generate; it must be left out"):
        theirs.generate(tokens(1, 11), max_new_tokens=2, **SAID[said], **GREEDY)


# ------------------------------------------------------------------------------------------------------------ refused


def seen(length=4, batch=1, **words):
    """A cache of so many tokens."""
    cache = GDN2Cache(2)
    models()[0](tokens(batch, length), past_key_values=cache, **words)
    return cache


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


BATCH = dict(input_ids=tokens(2, 3))
LATER = r"is given after 4 tokens that the cache has seen"
REFUSED = {
    ("`attention_mask` of another shape", ""): [
        (dict(attention_mask=ones(1, 3), past_key_values=4), r"attention_mask has shape \[1, 3\]; .* \[batch, 7\]"),
        (BATCH | dict(attention_mask=ones(1, 3)), r"attention_mask has shape \[1, 3\]; .* the batch is 2"),
        (dict(attention_mask=ones(1, 1, 3, 3)), r"attention_mask has shape \[1, 1, 3, 3\]"),
        (dict(attention_mask=ones(3)), r"attention_mask has shape \[3\]"),
        (dict(attention_mask=[[1, 1, 1]]), "attention_mask is a list; it must be a torch.Tensor"),
    ],
    ("`attention_mask` with other values", ""): [
        (dict(attention_mask=torch.tensor([[0, 1, 2]])), "attention_mask has the value 2; it must be 1 .* 0"),
        (dict(attention_mask=torch.tensor([[0.0, -1e9, 1.0]])), r"attention_mask has the value -1000000000\.0"),
        (dict(attention_mask=torch.tensor([[1.0, float("nan"), 1.0]])), "attention_mask has the value nan"),
    ],
    ("`attention_mask` that says other things", ""): [
        (dict(attention_mask=mask_of("0111111"), past_key_values=4), "token 0 of row 0 as padding, .* read it as text"),
        (dict(attention_mask=ones(1, 7), past_key_values="pads"), "token 1 of row 0 as text, .* read it as padding"),
    ],
    ("`position_ids` that do neither", ""): [
        (dict(position_ids=torch.tensor([[0, 1, 3]])), "position_ids has 3 in row 0; it must be 2"),
        (dict(position_ids=torch.tensor([[1, 2, 3]])), "position_ids has 1 in row 0; it must be 0"),
        (dict(position_ids=torch.tensor([[0, 2, 3]]), past_key_values=4), "position_ids has 2 in row 0; it must be 1"),
        (dict(position_ids=torch.tensor([[1, 2, 3]]), past_key_values=4), "position_ids has 1 in row 0; it must be 4"),
    ],
    ("`cu_seqlens`, `cu_seq_lens_q`", "later"): [
        (dict(cu_seqlens=torch.tensor([0, 3]), past_key_values=4), f"cu_seqlens {LATER}"),
        (dict(cu_seq_lens_q=torch.tensor([0, 3]), past_key_values=4), f"cu_seq_lens_q {LATER}"),
        (dict(seq_idx=ones(1, 3), past_key_values=4), f"seq_idx {LATER}"),
    ],
    ("`cu_seqlens` and its like", ""): [
        (BATCH | dict(cu_seqlens=torch.tensor([0, 3])), "cu_seqlens is given for a batch of 2; it must be 1"),
        (dict(cu_seqlens=torch.tensor([1, 3])), "cu_seqlens runs from 1 to 3; it must run from 0 to the 3 tokens"),
        (dict(cu_seq_lens_q=torch.tensor([0, 2])), "cu_seq_lens_q runs from 0 to 2"),
        (dict(cu_seqlens=torch.tensor([0, 2, 1, 3])), "cu_seqlens .* without falling"),
    ],
    ("`max_length_q`, `max_length_k` without", ""): [
        (dict(max_length_q=3), "max_length_q is 3 without cu_seq_lens_q"),
        (dict(cu_seq_lens_q=torch.tensor([0, 1, 3]), max_length_k=1), "max_length_k is 1; it must be at least 2"),
    ],
    ("`seq_idx` that falls", ""): [(dict(seq_idx=torch.tensor([[0, 1, 0]])), "seq_idx falls within a row")],
    ("any of these of another shape", ""): [
        (dict(resets=torch.zeros(1, 4, dtype=torch.bool)), r"resets has shape \[1, 4\]; it must be \[1, 3\]"),
        (dict(resets=ones(1, 3)), "resets has dtype torch.int64; it must be bool"),
        (dict(seq_idx=ones(3)), r"seq_idx has shape \[3\]; it must be \[1, 3\]"),
        (dict(position_ids=torch.zeros(1, 3)), "position_ids has dtype torch.float32; it must be int32 or int64"),
        (dict(position_ids=ones(3, 1, 3)), r"position_ids has shape \[3, 1, 3\]; it must be \[1, 3\]"),
        (dict(position_ids=ones(2, 3)), r"position_ids has shape \[2, 3\]; it must be \[1, 3\]"),
        (dict(cu_seqlens=[0, 3]), "cu_seqlens is a list; it must be a torch.Tensor"),
        (dict(cu_seqlens=torch.tensor([0.0, 3.0])), "cu_seqlens has dtype torch.float32"),
        (dict(cu_seqlens=torch.tensor([[0, 3]])), r"cu_seqlens has shape \[1, 2\]"),
    ],
    ("several of these that do not", ""): [
        (
            dict(cu_seq_lens_q=torch.tensor([0, 1, 3]), cu_seq_lens_k=torch.tensor([0, 2, 3])),
            "cu_seq_lens_k and cu_seq_lens_q tell different documents",
        ),
        (
            dict(cu_seqlens=torch.tensor([0, 1, 3]), position_ids=torch.arange(3)[None]),
            "cu_seqlens and position_ids tell different documents",
        ),
        (dict(resets=mask_of("001").bool(), seq_idx=torch.tensor([[0, 1, 1]])), "seq_idx and resets tell different"),
    ],
    ("a cache of another batch", ""): [
        (BATCH | dict(past_key_values=4), "past_key_values has 1 rows; it must have 2"),
        (dict(past_key_values=GDN2Cache(3)), "past_key_values has 3 layers; it must have 2"),
    ],
    ("`output_attentions=True`", ""): [(dict(output_attentions=True), "output_attentions is True; it must be False")],
    ("an unknown keyword", ""): [
        (dict(seqlens=torch.tensor([0, 3])), "unexpected keyword argument 'seqlens'"),
        (dict(label_smoothing=0.1), "unexpected keyword argument 'label_smoothing'"),
        (
            dict(cache_position=torch.arange(3), past_key_values=4),
            r"cache_position is tensor\(\[0, 1, 2\]\); .* from 4",
        ),
        (dict(token_type_ids=ones(1, 3)), "token_type_ids has other numbers than 0"),
    ],
}
TESTED.update(REFUSED)


@pytest.mark.parametrize("said", REFUSED, ids=lambda said: said[0])
@torch.no_grad()
def test_what_is_not_served_is_refused_by_name(said):
    theirs, _ = models()
    caches = {4: seen(), "pads": seen(attention_mask=mask_of("1011"))}
    for words, message in REFUSED[said]:
        words = dict(input_ids=tokens(1, 3)) | words
        cache = words.get("past_key_values")
        words |= dict(past_key_values=caches.get(cache, cache)) if not isinstance(cache, GDN2Cache) else {}
        for model in (theirs, theirs.model):
            with pytest.raises((ValueError, TypeError), match=message):
                model(**words)
    assert all(cache.get_seq_length() == 4 for cache in caches.values())


@row("`cache_position` and `token_type_ids`")
@torch.no_grad()
def test_words_that_say_what_is_so_anyway_and_none_are_let_pass():
    theirs, ours = models()
    ids, cache = tokens(1, 7), seen()
    words = dict(cache_position=torch.arange(4, 7), token_type_ids=torch.zeros(1, 3), output_attentions=False)
    for model in (theirs, theirs.model):
        found = model(ids[:, 4:], past_key_values=copy.deepcopy(cache), **words, seq_idx=None, task_ids=None)[0]
        assert torch.equal(found, model(ids[:, 4:], past_key_values=copy.deepcopy(cache))[0])


@torch.no_grad()
def test_rows_of_a_cache_are_reordered_with_all_that_they_were_told():
    theirs, ours = models()
    ids, mask = tokens(3, 7), mask_of("0110110", "1111101", "0000011")
    resets = mask_of("00010", "00100", "00001").bool()
    outputs = theirs(ids[:, :5], attention_mask=mask[:, :5], resets=resets)
    cache, order = outputs.past_key_values, torch.tensor([2, 0, 0, 1])
    expected = theirs(ids[:, 5:], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
    cache.reorder_cache(order)
    found = theirs(ids[order, 5:], attention_mask=mask[order], past_key_values=cache).logits
    assert_equal(found, expected[order])
    assert_equal(found[0, 0], ours(ids[2:, 5:6])[0, 0])
    cache.reset()
    assert_equal(theirs(ids, past_key_values=cache).logits, ours(ids))
