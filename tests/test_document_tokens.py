"""Windows of documents under tokenizers of every make: the same under every TorchTitan, written out by hand."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors

pytest.importorskip("torchtitan")

from gdn2_titan.titan.packing import PackedText
from tests.generations import byte_tokenizer

WORDS = {"a": 0, "b": 1, "c": 2, "<s>": 3, "</s>": 4, "<|end|>": 5, "<x>": 6}
S, E, END, X = 3, 4, 5, 6


def write(folder, config, post=None, **tokenizer):
    made = Tokenizer(models.WordLevel(WORDS, unk_token="c"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if post:
        made.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[(word, WORDS[word]) for word in post.split() if word != "$A"]
        )
    if "truncate" in tokenizer:
        made.enable_truncation(2)
        made.enable_padding(length=4, pad_id=0, pad_token="a")
    made.add_special_tokens([word for word in WORDS if word.startswith("<")])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


BOTH, SAME = {"bos_token": "<s>", "eos_token": "</s>"}, {"bos_token": "<|end|>", "eos_token": "<|end|>"}
# (tokenizer_config.json, template of the post-processor, what is before and after each document)
ORDER = [0, 1, 0, 1, 1, 0]  # of two documents in three epochs with seed 1
MAKES = {
    "bos and eos": (BOTH, None, [S], [E]),
    "bos is eos": (SAME, None, [END], [END]),
    "bos is eos, as a dictionary": (
        {name: {"__type": "AddedToken", "content": "<|end|>"} for name in SAME}, None, [END], [END],
    ),
    "only eos": ({"eos_token": "</s>"}, None, [], [E]),
    "only bos": ({"bos_token": "<s>"}, None, [S], []),
    "neither": ({}, None, [], []),
    "no config": (None, None, [], []),
    "post-processor adds bos": (BOTH, "<s> $A", [S], [E]),
    "post-processor adds eos": (BOTH, "$A </s>", [S], [E]),
    "post-processor adds both": (BOTH, "<s> $A </s>", [S], [E]),
    "post-processor adds the one before": (SAME, "<|end|> $A", [END], [END]),
    "post-processor adds the one after": (SAME, "$A <|end|>", [END], [END]),
    "post-processor adds the one twice": (SAME, "<|end|> $A <|end|>", [END], [END]),
    "post-processor adds another": (BOTH, "<x> $A", [S, X], [E]),
    "cut and filled up": (BOTH, None, [S], [E]),
}  # fmt: skip


ADDED = [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": False}, {"add_eos_token": True}]


@pytest.mark.parametrize("add", ADDED, ids=lambda add: ",".join(map(str, add.items())) or "unsaid")
@pytest.mark.parametrize("make", MAKES)
def test_every_document_stands_between_bos_and_eos(tmp_path, make, add):
    config, post, before, after = MAKES[make]
    config = config if config is None else config | add
    path = write(tmp_path / "t", config, post, **{"truncate": True} if make == "cut and filled up" else {})
    texts, ids = ["a b a b", "b"], [[0, 1, 0, 1], [1]]
    packed = PackedText(Dataset.from_dict({"text": texts}), byte_tokenizer(path), 3, infinite=True, shuffle_seed=1)
    tokens, begins = [], []
    for index in ORDER:
        document = [*before, *ids[index], *after]
        tokens += document
        begins += [True] + [False] * (len(document) - 1)
    for start, (inputs, labels) in zip(range(0, len(tokens) - 3, 3), packed):
        assert inputs["input"].tolist() == tokens[start : start + 3]
        assert labels.tolist() == tokens[start + 1 : start + 4]
        assert inputs["resets"].tolist() == begins[start : start + 3]


@pytest.mark.parametrize("make", [make for make in MAKES if make != "no config"])
def test_a_prompt_begins_as_a_document_does(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    from gdn2_titan.convert.tokenizer import document_ids, encode

    config, post, before, _ = MAKES[make]
    path = write(tmp_path / "t", config | {"tokenizer_class": "PreTrainedTokenizerFast"}, post)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    assert document_ids(tokenizer, encode(tokenizer, "a b")["input_ids"], 7).tolist() == [[*before, 0, 1]]
