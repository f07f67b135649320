"""Needles in a haystack: what the prompts of ``gdn2_titan.evaluate`` say, and how answers to them are scored."""

import argparse
import re

import pytest

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.evaluate.needles import NEEDLE_TASKS, NEW_TOKENS, Prompt, contains, needle_prompts
from gdn2_titan.evaluate.run import needle_result

HAYSTACK = "".join(f"Sentence {i} says that {i * i} is a square. Nobody asks why! " for i in range(800))
TOLD = re.compile(r"\nThe code of the (\w+ \w+) is ([0-9a-f-]+)\.\n")
ASKED = re.compile(r"Which code was told\? The code of the (\w+ \w+) is $")
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def as_bytes(text):
    return list(text.encode())


def as_words(text):
    """A vocabulary whose tokens are a word and the space before it, as in many; a number for each string."""
    return [hash(word) for word in re.findall(r"\s?[^\s]+|\s+", text)]


RECORDED = [
    "5569040", "8839167", "8330288", "5503135", "754e3ca1-059d-c841-d417-b4d6caa7caf0",
    "642c3e4f-6223-22d1-1fb8-18d7bc2d6c50", "7261096", "7829095",
]  # fmt: skip


def drawn(task, length=2000, count=12, seed=0, haystack=HAYSTACK, tokens=as_bytes, around=1):
    return list(needle_prompts(task, length, count, seed, haystack, tokens, around))


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_the_code_that_is_asked_for_is_told_once_among_as_many_as_the_task_has(task):
    kind = NEEDLE_TASKS[task]
    for prompt in drawn(task):
        told, [asked] = TOLD.findall(prompt.text), ASKED.findall(prompt.text)
        assert len(told) == len(dict(told)) == kind.keys and dict(told)[asked] == prompt.code
        assert prompt.text.count(prompt.code) == 1
        assert all(re.fullmatch(UUID if kind.uuid else r"[1-9]\d{6}", code) for _, code in told)
        assert bool("The tide comes in" in prompt.text) == kind.noise != ("is a square" in prompt.text)


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_needle_lies_at_the_depth_that_was_drawn_behind_a_sentence(task):
    every = []
    for prompt in drawn(task, length=20_000, count=40):
        [asked] = ASKED.findall(prompt.text)
        needle = next(found for found in TOLD.finditer(prompt.text) if found[1] == asked)
        before, after = TOLD.sub("", prompt.text[: needle.start()]), TOLD.sub("", prompt.text[needle.end() :])
        hay = len(before) + len(after)
        # Introduction and question are less than 150 characters, a sentence less than 60.
        assert abs(len(before) / hay - prompt.depths[0]) * hay < 150 + 60
        assert re.search(r"[.!]\s+$", before)
        every.append(prompt.depths[0])
    assert min(every) < 0.15 and max(every) > 0.85 and 0.35 < sum(every) / len(every) < 0.65


@pytest.mark.parametrize("tokens", [as_bytes, as_words])
@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_bos_prompt_and_answer_have_the_length_that_is_asked_for_or_a_few_tokens_less(task, tokens):
    for length in (1000, 4096):
        for prompt in drawn(task, length, count=4, tokens=tokens):
            assert length - 12 <= 1 + len(prompt.ids) + NEW_TOKENS <= length


def test_a_haystack_that_is_shorter_than_the_prompt_goes_round():
    [prompt] = drawn("s-niah-2", 4000, count=1, haystack="One short text. ")
    assert prompt.text.count("One short text. ") > 200


def test_text_without_spaces_and_of_many_bytes_is_a_haystack_too():
    for prompt in drawn("mk-niah-1", 2000, haystack="潮が満ち潮が引く" * 50):
        assert 2000 - 12 <= 1 + len(prompt.ids) + NEW_TOKENS <= 2000 and len(TOLD.findall(prompt.text)) == 4


def test_prompts_are_the_same_again_and_others_with_another_seed():
    assert drawn("mk-niah-1") == drawn("mk-niah-1") != drawn("mk-niah-1", seed=1)
    assert drawn("mk-niah-1", count=20)[:12] == drawn("mk-niah-1")


def test_keys_codes_and_depths_depend_on_neither_length_nor_tokenizer():
    def questions(**changes):
        return [(prompt.code, prompt.depths, ASKED.findall(prompt.text)) for prompt in drawn("s-niah-3", **changes)]

    assert questions() == questions(length=3000) == questions(tokens=as_words)


def test_prompts_are_the_same_on_every_machine_and_in_every_release():
    codes = [prompt.code for task in NEEDLE_TASKS for prompt in drawn(task, count=2)]
    assert codes == RECORDED


def test_a_prompt_ends_where_the_code_begins_whatever_the_vocabulary():
    [prompt] = drawn("s-niah-1", count=1)
    assert prompt.ids == as_bytes(prompt.text)  # the last byte is the space
    [prompt] = drawn("s-niah-1", count=1, tokens=as_words)
    complete = as_words(prompt.text + prompt.code)
    assert prompt.ids == complete[:-1]  # the space belongs to the code's token


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_length_without_room_for_a_haystack_is_refused_and_the_next_one_is_not(task):
    with pytest.raises(ConvertError, match=r"--lengths has 130; with \S+ and this tokenizer it must be more") as error:
        drawn(task, 130)
    least = int(re.search(r"more than (\d+)", str(error.value))[1])
    with pytest.raises(ConvertError):
        drawn(task, least)
    assert len(drawn(task, least + 1)) == 12


def test_an_answer_is_right_if_the_code_is_in_it_letter_by_letter():
    prompt = Prompt("", [], "1234567", [0.5])
    assert contains(prompt, "1234567") and contains(prompt, " it is 1234567.\nWhich")
    assert not contains(prompt, "123456") and not contains(prompt, "1,234,567") and not contains(prompt, "")


def reader(prompts):
    """A model that looks for the key that is asked for."""
    texts = [bytes(ids[1:]).decode() for ids in prompts]
    return [f"{dict(TOLD.findall(text))[ASKED.findall(text)[0]]}.\n" for text in texts]


def last_told(prompts):
    """A model that says the code that it read last."""
    return [TOLD.findall(bytes(ids[1:]).decode())[-1][1] for ids in prompts]


def result(task, answers, samples=60):
    options = argparse.Namespace(samples=samples, seed=0)
    return needle_result(task, 1500, options, HAYSTACK, as_bytes, [256], answers)


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_who_finds_every_needle_has_100_and_who_finds_none_has_0(task):
    found, none = result(task, reader), result(task, lambda prompts: [""] * len(prompts))
    assert (found.value, found.stderr, found.n) == (100.0, 0.0, 60)
    assert (none.value, none.stderr, none.n) == (0.0, 0.0, 60)


def test_who_says_the_last_code_is_right_where_there_is_one_and_one_time_in_four_where_there_are_four():
    assert result("s-niah-2", last_told).value == 100
    some = result("mk-niah-1", last_told)
    assert 10 < some.value < 40
    share = some.value / 100
    assert some.stderr == pytest.approx(100 * (share * (1 - share) / 59) ** 0.5)
