"""lm-eval's tasks in ``python -m gdn2_titan.evaluate``: from files of one's own, without a network."""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval comes with the extra 'eval'")

from gdn2_titan.evaluate import __main__ as command
from tests.convert_cases import HYBRID, JOB, assert_one_sentence, hybrid, save_step

BOS = 256
ACCURACIES = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
DOCUMENTS = [
    {
        "text": "The tide comes in and the tide goes out",
        "question": "The sky is",
        "choices": ["blue", "a brick"],
        "y": 0,
    },
    {"text": "Gulls wait on the wall<|eos|> é", "question": "Two and two are", "choices": ["nine", "four"], "y": 1},
    {"text": "Nothing else happens here", "question": "Water is", "choices": ["wet", "of wood"], "y": 0},
]
TASKS = {
    "multiple_choice": {
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "y",
        "metric_list": ACCURACIES,
    },
    "loglikelihood": {
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ACCURACIES[0],
        ],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "generate_until": {
        "doc_to_text": "{{question}}", "doc_to_target": "{{choices[y]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    return hybrid()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, decoder):
    """A run, and a folder of tasks: one of each kind, two of them by the names of lm-eval's tasks, and one whose data
    are on a hub that is not asked."""
    folder = tmp_path_factory.mktemp("run")
    save_step(folder / "step-7", decoder.state_dict(), HYBRID, JOB)
    (folder / "tasks").mkdir()
    data = folder / "documents.json"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    names = {"multiple_choice": "piqa", "loglikelihood": "lambada_openai"}
    for kind, task in TASKS.items():
        name = names.get(kind, kind)
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        task = {"task": name, "output_type": kind} | source | task
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # YAML has JSON in it
    far = {"task": "hellaswag", "output_type": "generate_until", "dataset_path": "nobody/nothing", "test_split": "test"}
    (folder / "tasks" / "far.yaml").write_text(json.dumps(far | TASKS["generate_until"]))
    return folder


def run(folder, capsys, tasks, *others):
    out = folder / "results.json"
    line = ["--model", folder, "--tasks", tasks, "--include-path", folder / "tasks", "--output", out, *others]
    capsys.readouterr()
    assert command.main([str(word) for word in line]) == 0
    printed = capsys.readouterr().out
    return printed, {(r["task"], r["metric"]): r for r in json.loads(out.read_text())["results"]}


@torch.no_grad()
def log_likelihood(decoder, context, continuation):
    """Of the continuation's bytes, in a document of bos, context and continuation: (sum, whether all are greedy)."""
    ids = torch.tensor([[BOS, *context.encode(), *continuation.encode()]])
    logits = decoder(ids)[0, :-1].double().log_softmax(-1)
    count = len(continuation.encode())
    each = logits.gather(1, ids[0, 1:, None])[-count:]
    return each.sum().item(), bool((logits.argmax(-1)[-count:] == ids[0, -count:]).all())


def standard_error(values):
    return torch.tensor(values, dtype=torch.double).std().item() / len(values) ** 0.5


def test_every_kind_of_task_has_the_figures_of_the_decoder_with_bos_once_before_each_document(folder, decoder, capsys):
    tasks = "piqa,lambada_openai,loglikelihood_rolling,generate_until"
    printed, results = run(folder, capsys, tasks, "--batch-size", 2)

    right, right_norm = [], []
    for document in DOCUMENTS:
        each = [log_likelihood(decoder, document["question"], f" {choice}")[0] for choice in document["choices"]]
        lengths = [len(choice) for choice in document["choices"]]
        right.append(float(each.index(max(each)) == document["y"]))
        each = [value / length for value, length in zip(each, lengths, strict=True)]
        right_norm.append(float(each.index(max(each)) == document["y"]))
    for metric, values in (("acc", right), ("acc_norm", right_norm)):
        assert results["piqa", metric]["value"] == pytest.approx(100 * sum(values) / 3)
        assert results["piqa", metric]["stderr"] == pytest.approx(100 * standard_error(values))
        assert results["piqa", metric]["n"] == 3

    last = [log_likelihood(decoder, *split_last(document["text"])) for document in DOCUMENTS]
    perplexity = math.exp(-sum(value for value, _ in last) / 3)
    assert results["lambada_openai", "perplexity"]["value"] == pytest.approx(perplexity, rel=1e-4)
    assert results["lambada_openai", "acc"]["value"] == pytest.approx(100 * sum(greedy for _, greedy in last) / 3)

    rolling = results["loglikelihood_rolling", "byte_perplexity"]["value"]
    whole = sum(log_likelihood(decoder, "", document["text"])[0] for document in DOCUMENTS)
    count = sum(len(document["text"].encode()) for document in DOCUMENTS)
    assert rolling == pytest.approx(math.exp(-whole / count), rel=1e-4)

    assert results["generate_until", "exact_match"]["value"] == 0
    assert "Table 2" in printed and "LMB ppl" in printed and "PIQA" in printed and "Wiki" not in printed
    assert "generate_until" in printed.split("Other figures")[1]


def split_last(text):
    context, _, last = text.rpartition(" ")
    return context, f" {last}"


def test_a_task_whose_data_are_not_here_is_left_out_with_its_reason_and_the_rest_runs(folder, capsys):
    printed, results = run(folder, capsys, "hellaswag,piqa", "--limit", 2)
    assert {task for task, _ in results} == {"piqa"} and results["piqa", "acc"]["n"] == 2
    assert "Hella" not in printed
    [sentence] = [line for line in printed.splitlines() if line.startswith("hellaswag")]
    assert (
        sentence.startswith("hellaswag is left out: the data cannot be loaded here: ") and "nobody/nothing" in sentence
    )


@pytest.mark.slow
def test_a_name_that_nobody_knows_is_refused_before_anything_runs(folder, capsys):
    arguments = ["--model", folder, "--tasks", "s-niah-1,s-niah-4"]
    sentence = r"--tasks has s-niah-4; it must be 'paper', s-niah-1, .* or a task of lm-eval's"
    assert_one_sentence(capsys, command.main, arguments, sentence)
