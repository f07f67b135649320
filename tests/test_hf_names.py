"""What transformers and the libraries around it find by a name or in a signature."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from gdn2_titan.convert.hf import GDN2Config, GDN2ForSequenceClassification
from gdn2_titan.models import GDN2ModelArgs
from tests.hf_cases import GREEDY, HYBRID, RECURRENT, config, left_padded, pair, tokens

EIGHT = GREEDY | dict(max_new_tokens=8)
OTHER_NAMES = {
    "num_hidden_layers": ("n_layers", 5),
    "intermediate_size": ("mlp_size", 40),
    "num_attention_heads": ("attn_heads", 8),
    "num_key_value_heads": ("attn_kv_heads", 1),
    "sliding_window": ("window", 7),
    "rms_norm_eps": ("norm_eps", 1e-3),
    "initializer_range": ("init_std", 0.5),
}


# --------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_field_is_given_read_and_set_by_the_name_that_others_have_for_it(tmp_path, name):
    field, value = OTHER_NAMES[name]
    given = GDN2Config(hidden_size=32, **{name: value})
    assert getattr(given, name) == getattr(given, field) == getattr(given.model_args(), field) == value
    assert given.model_args() == GDN2Config(hidden_size=32, **{field: value}).model_args()
    later = GDN2Config(hidden_size=32)
    setattr(later, name, value)
    assert later.model_args() == given.model_args()
    given.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[field] == value
    assert AutoConfig.from_pretrained(tmp_path).model_args() == given.model_args()
    again = AutoConfig.from_pretrained(tmp_path, **{name: 2 * value})
    assert getattr(again.model_args(), field) == 2 * value
    assert GDN2Config(hidden_size=32, **{name: value, field: value}).model_args() == given.model_args()
    with pytest.raises(ValueError, match=f"{field} is {2 * value} and {name} is {value}; .* must be left out"):
        GDN2Config(hidden_size=32, **{name: value, field: 2 * value})
    with pytest.raises(ValueError, match=f"{field} is {2 * value} and {name} is {value}; .* must be left out"):
        AutoConfig.from_pretrained(tmp_path, **{name: value, field: 2 * value})


def test_the_number_of_key_value_heads_is_a_number_also_where_an_older_file_has_null(tmp_path):
    fields = json.loads(GDN2Config(attn_heads=6, layer_pattern=["swa"]).to_json_string())
    assert fields["attn_kv_heads"] is None and "num_key_value_heads" not in fields
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.num_key_value_heads == 6
    assert loaded.model_args() == GDN2ModelArgs(attn_heads=6, layer_pattern=("swa",))
    assert json.loads(loaded.to_json_string()) == fields


def test_what_follows_from_the_fields_is_read_under_its_usual_name_and_taken_where_it_agrees():
    made = config(layer_pattern=["gdn2", "swa", "attention"], n_layers=4, rope_theta=500.0)
    types = ["linear_attention", "sliding_attention", "full_attention", "linear_attention"]
    derived = {
        "layer_types": types, "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    assert {name: getattr(made, name) for name in derived} == derived
    assert GDN2Config(**json.loads(made.to_json_string()) | derived).model_args() == made.model_args()
    assert GDN2Config(rope_parameters={"rope_theta": 7.0}).model_args() == GDN2ModelArgs(rope_theta=7.0)
    with pytest.raises(ValueError, match="rope_theta is -1; it must be a finite number greater than 0"):
        GDN2Config(layer_pattern=["swa"], rope_parameters={"rope_theta": -1})
    assert GDN2Config(rope_scaling=None, layer_types=None).model_args() == GDN2ModelArgs()
    assert made.get_text_config() is made and made.tie_word_embeddings is False


WRONG = [
    (dict(erase_gate="chanel"), r"erase_gate is 'chanel'; it must be 'channel', 'scalar' or 'mean'"),
    (dict(decay=None), "decay is None"),
    (dict(expand_v=1.3), r"expand_v is 1\.3; times head_dim = 128"),
    (dict(expand_v=0), "expand_v is 0"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings is True; it must be false"),
    (dict(layer_pattern=["swa"], window=0), "window is 0"),
    (dict(layer_pattern=["mamba"]), r"layer_pattern is \['mamba'\]"),
    (dict(num_heads=0), "num_heads is 0; it must be a whole number"),
    (dict(num_heads=True), "num_heads is True; it must be a whole number"),
    (dict(num_hidden_layers="3"), "n_layers is '3'; it must be a whole number"),
    (dict(num_v_heads=24), "num_v_heads is 24; it must be a multiple"),
    (dict(conv_size=5), "conv_size is 5; it must be 2, 3 or 4"),
    (dict(layer_pattern="gdn2,swa"), "layer_pattern is 'gdn2,swa'; it must be a non-empty list of: gdn2"),
    (dict(layer_pattern=None), "layer_pattern is None; it must be a non-empty list of: gdn2"),
    (dict(layer_pattern=["swa"], num_key_value_heads=4), "attn_kv_heads is 4; it must divide attn_heads = 18"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'; it must be 'silu'"),
    (dict(layer_types=["full_attention"]), "layer_types is .* must be left out"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_parameters is .* it must have rope_type 'default'"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope_parameters is .* it must have rope_type 'default'"),
    (dict(rope_theta=5.0, rope_parameters={"rope_theta": 7.0}), r"rope_theta is 5\.0 and in rope_parameters 7\.0"),
]
SLIPS = {
    "erase_gates": "erase_gate", "n_layer": "n_layers", "num_layers": "n_layers", "hidden_dim": "hidden_size",
    "num_kv_heads": "num_v_heads", "norm_epsilon": "norm_eps", "layer_patterns": "layer_pattern", "expandv": "expand_v",
    "num_key_value_head": "num_key_value_heads", "layer_type": "layer_types",
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_in_one_sentence_at_the_config_and_at_the_folder(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        GDN2Config(**fields)
    assert "\n" not in str(caught.value)
    if not {"rope_scaling", "rope_theta"} & fields.keys():  # the one a deprecated setter, the other no contradiction
        GDN2Config().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path, **fields)


def test_a_field_that_was_set_to_a_wrong_value_is_found_when_the_model_is_built():
    made = config()
    made.erase_gate = "chanel"
    with pytest.raises(ValueError, match="erase_gate is 'chanel'"):
        AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize(("name", "meant"), SLIPS.items())
def test_a_name_that_looks_like_a_field_is_refused(tmp_path, name, meant):
    with pytest.raises(ValueError, match=f"^{name} is no field of GDN2Config; it must be left out, or .* is meant$"):
        GDN2Config(**{name: 3})
    GDN2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{name} is no field of GDN2Config; .* {meant} is meant$"):
        AutoConfig.from_pretrained(tmp_path, **{name: 3})


def test_other_names_are_kept_as_by_every_config_and_loading_options_pass(tmp_path):
    extra = {"max_position_embeddings": 4096, "unsloth_version": "1", "attention_dropout": 0.0, "num_labels": 5}
    made = GDN2Config(num_beams=1, torch_dtype="bfloat16", **extra)
    assert all(getattr(made, name) == value for name, value in extra.items()) and made.dtype == torch.bfloat16
    made.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, padding_side="left", tp_size=1, trust_remote_code=False)
    assert loaded.max_position_embeddings == 4096 and loaded.num_labels == 5


# --------------------------------------------------------------------------------------------- embeddings in generate


@pytest.mark.parametrize("pattern", [RECURRENT, HYBRID], ids="+".join)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_embeddings_start_a_generation_as_their_ids_do(pattern, options):
    theirs, _ = pair(layer_pattern=pattern)
    ids, mask, _ = left_padded([9, 4, 1])
    embeddings = theirs.get_input_embeddings()(ids)
    options = dict(attention_mask=mask, **options, **EIGHT)
    expected = theirs.generate(ids, **options)
    assert torch.equal(theirs.generate(inputs_embeds=embeddings, **options), expected[:, 9:])
    assert torch.equal(theirs.generate(ids, inputs_embeds=embeddings, **options), expected)


def test_ids_follow_embeddings_in_one_cache():
    theirs, _ = pair()
    ids, more = tokens(2, 9), tokens(2, 4, seed=1)
    first = theirs.generate(inputs_embeds=theirs.get_input_embeddings()(ids), return_dict_in_generate=True, **EIGHT)
    turn = torch.cat((first.sequences[:, -1:], more), 1)
    mask = torch.ones(2, 9 + 8 + 4, dtype=torch.long)
    continued = theirs.generate(turn, attention_mask=mask, past_key_values=first.past_key_values, **EIGHT)
    whole = theirs.generate(torch.cat((ids, first.sequences, more), 1), **EIGHT)
    assert torch.equal(continued[:, -8:], whole[:, -8:])


def test_embeddings_in_pieces_are_refused():
    theirs, _ = pair()
    with pytest.raises(ValueError, match="prefill_chunk_size is 2; it must be left out where inputs_embeds is given"):
        theirs.generate(inputs_embeds=torch.zeros(1, 5, 32), prefill_chunk_size=2, **EIGHT)


@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_of_peft_train_and_generate():
    theirs, ours = pair()
    ids = tokens(2, 6)
    tuned = peft.get_peft_model(theirs, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    prompt = tuned.prompt_encoder["default"].embedding.weight
    assert prompt.grad.abs().sum() > 0 and theirs.lm_head.weight.grad is None
    generated = tuned.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **EIGHT)[:, 6:]
    ours.tok_embeddings, embed = None, ours.tok_embeddings
    text, expected = torch.cat((prompt.expand(2, -1, -1), embed(ids)), 1), []
    for _ in range(8):
        expected.append(ours(text)[:, -1].argmax(-1))
        text = torch.cat((text, embed(expected[-1])[:, None]), 1)
    assert torch.equal(generated, torch.stack(expected, 1))


def test_a_prefix_of_keys_and_values_is_refused_since_states_are_no_keys():
    theirs, _ = pair()
    tuned = peft.get_peft_model(theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache; it must be a GDN2Cache"):
        tuned(input_ids=tokens(1, 4))


@pytest.mark.parametrize("pattern", [RECURRENT, ("attention",)], ids="+".join)
def test_pages_of_keys_and_values_are_refused(pattern):
    theirs, _ = pair(layer_pattern=pattern)
    with pytest.raises(ValueError, match="generate_batch keeps keys and values in pages"):
        theirs.generate_batch([[1, 2, 3]], max_new_tokens=2)


# ---------------------------------------------------------------------------------------------- names of the modules


def test_the_modules_are_found_by_the_names_that_tools_ask_for():
    theirs, _ = pair()
    assert theirs.main_input_name == "input_ids" and theirs.can_generate()
    assert theirs.get_decoder() is theirs.base_model is theirs.model
    assert theirs.get_input_embeddings() is theirs.model.embed_tokens is theirs.model.get_input_embeddings()
    assert theirs.get_output_embeddings() is theirs.lm_head
    assert theirs.num_parameters() == sum(p.numel() for p in theirs.parameters())
    assert theirs.num_parameters(exclude_embeddings=True) == theirs.num_parameters() - 50 * 32
    assert theirs.dtype == torch.float32 and theirs.supports_gradient_checkpointing
    head = torch.nn.Linear(32, 50, bias=False)
    theirs.set_output_embeddings(head)
    assert theirs.lm_head is head


# ------------------------------------------------------------------------------------------------- labels and answers


def rows_padded(rows, side):
    """(ids, mask) of rows padded on a side with ids that are text elsewhere."""
    ids, mask = tokens(len(rows), max(map(len, rows)), seed=9), torch.zeros(len(rows), max(map(len, rows))).long()
    for place, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[place, where], mask[place, where] = row, 1
    return ids, mask


def saved(tmp_path, **changes):
    """A folder of a model with a vocabulary's head, and the GDN2Model of its weights without that head."""
    theirs, ours = pair(**changes)
    theirs.save_pretrained(tmp_path)
    ours.lm_head = None
    return tmp_path, ours


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_texts_label_is_read_at_its_last_token_on_whatever_side_the_padding_is(tmp_path, side, mode):
    folder, ours = saved(tmp_path)
    model = getattr(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3), mode)()
    assert isinstance(model, GDN2ForSequenceClassification) and not model.can_generate()
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.3)
    rows = [tokens(1, length, seed=length)[0] for length in (9, 1, 4)]
    ids, mask = rows_padded(rows, side)
    expected = torch.stack([model.score(ours(row[None])[0, -1]) for row in rows])
    embeddings = model.get_input_embeddings()(ids)
    labels = torch.tensor([2, 0, 1])
    for given in (dict(input_ids=ids), dict(inputs_embeds=embeddings)):
        outputs = model(attention_mask=mask, labels=labels, **given)
        torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(expected, labels), rtol=0, atol=1e-5)
    assert model(ids, attention_mask=mask, return_dict=False)[0].shape == (3, 3)


def test_without_a_mask_the_padding_id_tells_where_a_text_ends_and_without_both_one_text_only(tmp_path):
    folder, ours = saved(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=0).eval()
    ids = 1 + tokens(2, 6) % 49
    ids[1, 4:] = 0
    expected = torch.stack([model.score(ours(row[None])[0, -1]) for row in (ids[0], ids[1, :4])])
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    model.config.pad_token_id = None
    torch.testing.assert_close(model(ids[:1]).logits, expected[:1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask is None in a batch of 2"):
        model(ids)


@pytest.mark.parametrize(
    ("labels", "problem", "loss"),
    [
        (torch.tensor([[1.0, 0, 1], [0, 1, 1]]), None, F.binary_cross_entropy_with_logits),
        (torch.tensor([[0.5, 2, 1], [3, 1, 1]]), "regression", F.mse_loss),
    ],
    ids=["several labels", "regression"],
)
def test_labels_of_other_kinds_have_their_losses(tmp_path, labels, problem, loss):
    folder, _ = saved(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, problem_type=problem)
    outputs = model(tokens(2, 5), attention_mask=torch.ones(2, 5), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_head_learns_with_an_adapter_and_comes_back(tmp_path, task):
    folder, ours = saved(tmp_path / "model")
    ids, mask = rows_padded([tokens(1, length, seed=length)[0] for length in (7, 3)], "right")
    auto, labels = {
        "SEQ_CLS": (AutoModelForSequenceClassification, dict(labels=torch.tensor([1, 0]))),
        "TOKEN_CLS": (AutoModelForTokenClassification, dict(labels=(ids % 2).masked_fill(mask == 0, -100))),
        "QUESTION_ANS": (
            AutoModelForQuestionAnswering,
            dict(start_positions=torch.tensor([1, 0]), end_positions=torch.tensor([4, 2])),
        ),
    }[task]
    model = auto.from_pretrained(folder)
    assert torch.equal(model.model.embed_tokens.weight, ours.tok_embeddings.weight)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj", "o_proj"]))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(tuned(input_ids=ids, attention_mask=mask, **labels).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(auto.from_pretrained(folder), tmp_path / "adapter").eval()
    for actual, expected in zip(
        again(input_ids=ids, attention_mask=mask).to_tuple(), tuned(input_ids=ids, attention_mask=mask).to_tuple()
    ):
        torch.testing.assert_close(actual, expected)


def test_labels_of_tokens_and_answers_are_read_from_the_text_alone(tmp_path):
    folder, ours = saved(tmp_path)
    rows = [tokens(1, length, seed=length)[0] for length in (7, 3)]
    ids, mask = rows_padded(rows, "right")
    of_tokens = AutoModelForTokenClassification.from_pretrained(folder, num_labels=4).eval()
    answers = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    labels, found = of_tokens(ids, attention_mask=mask).logits, answers(ids, attention_mask=mask)
    for place, row in enumerate(rows):
        hidden = ours(row[None])[0]
        torch.testing.assert_close(labels[place, : len(row)], of_tokens.score(hidden), rtol=0, atol=1e-5)
        both = torch.stack((found.start_logits, found.end_logits), -1)[place, : len(row)]
        torch.testing.assert_close(both, answers.qa_outputs(hidden), rtol=0, atol=1e-5)
    positions = torch.tensor([1, 0]), torch.tensor([4, 2])
    loss = answers(ids, attention_mask=mask, start_positions=positions[0], end_positions=positions[1]).loss
    expected = (F.cross_entropy(found.start_logits, positions[0]) + F.cross_entropy(found.end_logits, positions[1])) / 2
    torch.testing.assert_close(loss, expected)
    loss = of_tokens(ids, attention_mask=mask, labels=ids % 4).loss
    torch.testing.assert_close(loss, F.cross_entropy(labels.flatten(0, 1), ids.flatten() % 4))
