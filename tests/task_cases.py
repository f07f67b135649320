"""Sequences of the recall tasks, a reader for each, and the configs that train on one."""

import dataclasses

from gdn2_titan.titan.tasks import TASKS, TaskDataset
from gdn2_titan.titan.tasks.state_tracking import ELEMENTS
from tests.data_cases import TOKENIZER

__all__ = ["READERS", "RECALL", "VALIDATED", "dataset", "fields_of", "read_mqar"]

RECALL = {"model.flavor": "recall", "training.dataset": "mqar", "training.seq_len": 128}
VALIDATED = RECALL | {
    "validation.enable": True, "validation.dataset": "mqar", "validation.seq_len": 128, "validation.steps": 2,
}  # fmt: skip


def dataset(name, length=128, seed=0, held_out=False, **settings):
    task = TASKS[name](**{field: value for field, value in settings.items() if field in fields_of(name)})
    task.check(264)
    task.prepare(TOKENIZER, held_out)
    loader = {field: value for field, value in settings.items() if field not in fields_of(name)}
    return TaskDataset(task, length, seed, held_out=held_out, **loader)


def fields_of(name):
    return {field.name for field in dataclasses.fields(TASKS[name])}


# ---------------------------------------------------------------------------------------------------------- readers
# Each reads a sequence from left to right as its description says, with nothing of the code that wrote it, and gives
# {position: answer} and what was to be remembered.


def read_pairs(tokens, keys, values, command=None):
    """Of mqar, overwrite and selective erase. The first key without a value after it begins the questions."""
    none = values + keys + 2
    memory, first, last, history, answers, i = {}, {}, {}, [], {}, 0
    while i < len(tokens):
        token, following = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else 0
        if token == 0:
            i += 1
        elif command is not None and token == command:
            memory[following] = none
            i += 2
        elif 1 <= token <= keys and keys < following <= keys + values:
            memory[token] = last[token] = following
            first.setdefault(token, following)
            history.append((token, following))
            i += 2
        else:
            assert 1 <= token <= keys, "not a question"
            answers[i] = memory[token]
            i += 1
    return answers, memory, last, history


def read_mqar(tokens, s):
    answers, memory, last, history = read_pairs(tokens, s.keys, s.values)
    asked = [tokens[i] for i in answers]
    assert len(set(asked)) == len(asked) in s.pairs
    written = [key for key, _ in history]
    assert all(written.count(key) == 1 for key in asked), "an asked key is written twice"
    assert written[: len(asked)] and set(written[: len(asked)]) == set(asked), "others come before the pairs"
    return answers, sorted((key, last[key]) for key in asked)


def read_overwrite(tokens, s):
    answers, memory, last, history = read_pairs(tokens, s.keys, s.values)
    assert len(answers) in s.pairs and {tokens[i] for i in answers} == set(memory)
    for key in memory:
        values = [value for other, value in history if other == key]
        assert len(values) == s.writes and all(a != b for a, b in zip(values, values[1:]))
    return answers, sorted(last.items())


def read_selective_erase(tokens, s):
    command = s.keys + s.values + 1
    answers, memory, last, _ = read_pairs(tokens, s.keys, s.values, command)
    assert len(answers) in s.pairs and {tokens[i] for i in answers} == set(memory)
    assert list(memory.values()).count(command + 1) == tokens.count(command) == round(s.erased * len(memory))
    return answers, sorted(last.items())


def read_histories(tokens, s, command=None, width=1):
    """Of tasks whose keys have histories: {key: [(what, symbol)]} in order, what being "value", "name" or "command",
    and [(position, question symbols)]. A key has a value after it, a command or a name a key; all else asks."""
    keys, values = range(1, s.keys + 1), range(s.keys + 1, s.keys + s.values + 1)
    histories, questions, i = {}, [], 0
    while i < len(tokens):
        token, following = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else 0
        if token == 0:
            i += 1
        elif not questions and token in keys and following in values:
            histories.setdefault(token, []).append(("value", following))
            i += 2
        elif not questions and width == 1 and token not in keys and following in keys and command in (token, None):
            histories.setdefault(following, []).append(("command" if command else "name", token))
            i += 2
        else:
            questions.append((i + width - 1, tokens[i : i + width]))
            i += width
    asked = [question[-1] for _, question in questions]
    assert len(set(asked)) == len(asked) == len(histories) in s.pairs
    return histories, questions


def _answers(histories, questions, right):
    return {i: right[question[-1]] for i, question in questions}, sorted(right.items())


def _values(events, writes):
    values = [symbol for what, symbol in events if what == "value"]
    assert len(set(values)) == writes, "a key is written so many times, each time with another value"
    return values


def read_stale(tokens, s):
    histories, questions = read_histories(tokens, s)
    right = {}
    for key, events in histories.items():
        values = _values(events, s.writes)
        # What is new when it is said; all that comes after the last of these is old.
        right[key] = max(set(values), key=values.index)
        assert values.index(right[key]) == s.writes - 1 and len(values) - s.writes in (1, 2)
    return _answers(histories, questions, right)


def read_rejected(tokens, s):
    histories, questions = read_histories(tokens, s, s.keys + s.values + 1)
    right = {}
    for key, events in histories.items():
        standing = []
        for what, symbol in events:
            if what == "value":
                standing.append(symbol)
            else:
                standing.pop()
        assert len(_values(events, s.writes)) == s.writes > len(standing)
        right[key] = standing[-1]
    return _answers(histories, questions, right)


def read_locked(tokens, s):
    histories, questions = read_histories(tokens, s, s.keys + s.values + 1)
    right = {}
    for key, events in histories.items():
        assert len(_values(events, s.writes)) == s.writes == len(events) - 1
        lock = [what for what, _ in events].index("command")
        assert 0 < lock < len(events) - 1
        right[key] = events[lock - 1][1]
    return _answers(histories, questions, right)


def read_version(tokens, s):
    histories, questions = read_histories(tokens, s, width=2)
    numbers = {key: number - s.keys - s.values for _, (number, key) in questions}
    assert all(1 <= number < s.writes for number in numbers.values())
    right = {key: _values(events, s.writes)[numbers[key] - 1] for key, events in histories.items()}
    return _answers(histories, questions, right)


def read_alias(tokens, s):
    histories, questions = read_histories(tokens, s)
    named, right = {}, {}
    for key, events in histories.items():
        [name] = [symbol for what, symbol in events if what == "name"]
        [right[key]] = [symbol for what, symbol in events if what == "value"]
        assert s.keys + s.values < name <= 2 * s.keys + s.values and name not in named
        named[name] = right[key]
    return {i: named[name] for i, [name] in questions}, sorted(right.items())


def read_parity(tokens, s):
    assert tokens[0] == 2 and set(tokens[1:]) <= {0, 1}
    return {i: tokens[1 : i + 1].count(1) % 2 for i in range(1, len(tokens))}, tokens[1:]


def read_permutations(tokens, s):
    assert tokens[:5] == [120, 121, 122, 123, 124]
    state, answers = list("abcde"), {}
    for i, token in enumerate(tokens[5:], 5):
        permutation = ELEMENTS[token]
        if s.generators == "swaps":
            assert sum(a != b for a, b in enumerate(permutation)) == 2
        moved = [None] * 5
        for place, thing in enumerate(state):
            moved[permutation[place]] = thing
        state = moved
        whole = tuple(state.index(thing) for thing in "abcde")
        answers[i] = ELEMENTS.index(whole)
    return answers, tokens[5:]


def read_copying(tokens, s):
    separator = tokens.index(s.alphabet + 1)
    string = [token for token in tokens[:separator] if token]
    begin = tokens.index(string[0])
    assert tokens[begin : begin + len(string)] == string and len(string) in s.symbols
    assert tokens[separator + 1 :] == string[:-1]
    return dict(enumerate(string, separator)), string


def read_needle(tokens, s):
    text = bytes(tokens).decode("utf-8", "replace")
    assert text.startswith("A code is told somewhere below.")
    *_, question = text.splitlines()
    key = question.split("The code of the ")[1].split(" is ")[0]
    [code] = [line for line in text.splitlines()[:-1] if line.startswith(f"The code of the {key} is ")]
    code = code.removesuffix(".").split(" is ")[1]
    assert (len(code), code.count("-")) == ((36, 4) if s.variant == "s3" else (7, 0))
    assert text.count("The code of the ") - 1 == (s.needles or (4 if s.variant == "mk1" else 1))
    # The last digit is only an answer; what stands before the first one is the input at its place.
    return dict(enumerate(code.encode(), len(tokens) - len(code))), [key, code]


READERS = {
    "mqar": read_mqar, "overwrite": read_overwrite, "selective_erase": read_selective_erase, "parity": read_parity,
    "stale": read_stale, "rejected": read_rejected, "locked": read_locked, "version": read_version, "alias": read_alias,
    "permutations": read_permutations, "copying": read_copying, "needle": read_needle,
}  # fmt: skip
