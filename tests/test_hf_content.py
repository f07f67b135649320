"""Models with content gates under transformers: logits, padding, documents, generation, rollback, starts, folders."""

import pytest
import torch

from gdn2_titan.convert.hf import GDN2Cache, GDN2Config, GDN2ForCausalLM, save_code
from gdn2_titan.generate import main as generate
from tests.convert_cases import JOB, convert, load_step, save_step, weights
from tests.convert_cases import assert_equal as assert_equal_tensors
from tests.hf_cases import GREEDY, assert_equal, assert_greedy, config, left_padded, pair, tokens
from tests.test_hf_code import run_alone

CARVE = dict(write_gate="scalar", content_gate=True, layer_pattern=("gdn2", "swa"))


@torch.no_grad()
def test_logits_are_those_of_gdn2_model():
    theirs, ours = pair(**CARVE)
    ids = tokens(2, 150)
    for use_cache in (False, True):
        assert_equal(theirs(ids, use_cache=use_cache).logits, ours(ids))


@torch.no_grad()
def test_padding_changes_no_logit_of_the_text_in_one_call_or_two():
    theirs, ours = pair(**CARVE)
    ids, mask, rows = left_padded([150, 90])
    whole = theirs(ids, attention_mask=mask).logits
    cache = theirs(ids[:, :80], attention_mask=mask[:, :80], use_cache=True).past_key_values
    rest = theirs(ids[:, 80:], attention_mask=mask, past_key_values=cache).logits
    for row, text in enumerate(rows):
        assert_equal(whole[row, -len(text) :], ours(text[None])[0])
        assert_equal(rest[row], ours(text[None])[0, -70:])


@torch.no_grad()
def test_packed_documents_know_nothing_of_each_other():
    theirs, ours = pair(**CARVE)
    ids = tokens(1, 190)
    logits = theirs(ids, position_ids=torch.cat((torch.arange(90), torch.arange(100)))[None]).logits
    assert_equal(logits, torch.cat((ours(ids[:, :90]), ours(ids[:, 90:])), 1))


def test_generation_goes_on_from_the_text_of_each_row():
    theirs, ours = pair(**CARVE)
    ids, mask, rows = left_padded([70, 60])
    generated = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    for row, text in enumerate(rows):
        assert_greedy(ours, text, generated[row, ids.shape[1] :])


@torch.no_grad()
def test_a_cache_that_went_back_goes_on_as_if_it_had_read_no_further():
    theirs, ours = (model.double() for model in pair(**CARVE))
    ids, cache = tokens(2, 150), GDN2Cache(3)
    theirs(ids[:, :60], past_key_values=cache)
    cache.activate_past_recording()
    theirs(torch.cat((ids[:, 60:70], tokens(2, 20, 1)), 1), past_key_values=cache)
    cache.crop(-20)
    assert_equal(theirs(ids[:, 70:], past_key_values=cache).logits, ours(ids)[:, 70:])


def test_a_model_made_from_a_config_starts_as_the_decoder_does():
    built = GDN2ForCausalLM(config(**CARVE))
    content = built.model.layers[0].mixer.content
    assert not content.up.any() and 0 < content.down.abs().max() < 0.2


def test_a_checkpoint_becomes_a_folder_the_folder_the_checkpoint_and_both_say_the_same_text(tmp_path, capsys):
    args = config(**CARVE, vocab_size=264).model_args()
    step = save_step(tmp_path / "checkpoint" / "step-7", weights(args), args, JOB)
    assert convert(capsys, "to-hf", step, tmp_path / "hf") == (0, "")
    assert GDN2Config.from_pretrained(tmp_path / "hf").model_args() == args
    assert convert(capsys, "from-hf", tmp_path / "hf", tmp_path / "back") == (0, "")
    assert_equal_tensors(load_step(tmp_path / "back", args), weights(args))
    said = []
    for folder in (step, tmp_path / "hf"):
        capsys.readouterr()
        options = "--prompt", "abc" * 25, "--max-tokens", "8", "--greedy", "--device", "cpu"
        assert generate(["--model", str(folder), *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 1


@pytest.mark.slow
def test_a_folder_with_code_generates_where_this_package_is_not(tmp_path):
    theirs, _ = pair(**CARVE)
    ids, mask, _ = left_padded([70, 7])
    options = GREEDY | dict(max_new_tokens=5)
    torch.save({"ids": ids, "mask": mask, "options": options}, tmp_path / "given.pt")
    theirs.save_pretrained(tmp_path / "model")
    save_code(tmp_path / "model")
    found = run_alone(tmp_path / "model", tmp_path / "again")
    assert torch.equal(found["generated"], theirs.generate(ids, attention_mask=mask, **options))
    assert found["gradients"]["model.layers.0.mixer.content.up"].any()


@pytest.mark.parametrize("command", ["to-fla", "to-nvlabs"])
def test_layouts_that_have_no_such_gate_refuse_it(tmp_path, capsys, command):
    args = config(content_gate=True, layer_pattern=("gdn2", "swa"), num_v_heads=None,
                  output_gate="sigmoid" if command == "to-fla" else "silu").model_args()  # fmt: skip
    step = save_step(tmp_path / "checkpoint" / "step-7", weights(args), args)
    status, said = convert(capsys, command, step, tmp_path / "out")
    assert status == 1 and "content_gate is True" in said
