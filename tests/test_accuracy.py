"""The validator's accuracy: shares of answers and of sequences, condition by condition."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("torchtitan")
from torchtitan.components.loss import cross_entropy_loss

from gdn2_titan.titan.job_config import JobConfig
from gdn2_titan.titan.tasks import TASKS
from gdn2_titan.titan.validation import Accuracy
from tests.config_cases import check, write_toml
from tests.generations import IS_V02, loss_of, validator_of
from tests.task_cases import VALIDATED, read_mqar

IGNORED = -100


def logits_for(symbols, vocabulary=10):
    """Logits whose greatest is at the symbols [B, T]."""
    torch.manual_seed(0)
    logits = torch.rand(*symbols.shape, vocabulary)
    return logits.scatter(-1, symbols.unsqueeze(-1), 2.0)


def test_only_answers_count_and_a_sequence_is_right_if_all_its_answers_are():
    labels = torch.tensor([[1, IGNORED, 2, 3], [IGNORED, IGNORED, 4, 5], [6, 6, 6, 6], [IGNORED, 9, IGNORED, IGNORED]])
    said = torch.tensor([[1, 0, 2, 3], [4, 5, 4, 6], [6, 6, 6, 0], [9, 9, 0, 0]])
    accuracy = Accuracy(None, None)
    accuracy(logits_for(said)[:3], labels[:3])
    accuracy(logits_for(said)[3:], labels[3:])  # another batch
    assert accuracy.shares() == {"accuracy": 8 / 10, "exact": 2 / 4}


def test_a_symbol_apart_has_an_accuracy_of_its_own():
    labels = torch.tensor([[1, IGNORED, 9, 3], [9, 9, 4, IGNORED]])
    said = torch.tensor([[1, 9, 9, 3], [0, 9, 4, 9]])
    accuracy = Accuracy(None, None, (9, "forgotten", "kept"))
    accuracy(logits_for(said), labels)
    assert accuracy.shares() == {"accuracy": 5 / 6, "exact": 1 / 2, "forgotten": 2 / 3, "kept": 1.0}


def test_a_rank_that_saw_no_logits_has_no_shares():
    assert Accuracy(None, None).shares() is None


# One process, as far as a loss and a validator ask.
ALONE = SimpleNamespace(
    dp_enabled=False, dp_cp_enabled=False, cp_enabled=False, pp_enabled=False, tp_enabled=False,
    get_optional_mesh=lambda name: None,
)  # fmt: skip


def test_a_watched_loss_is_the_loss_and_shows_what_it_was_given_only_while_it_is_watched():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, IGNORED], [0, IGNORED, 4]])
    loss, seen = loss_of(JobConfig(), ALONE), []

    def is_the_loss():
        found = loss(logits, labels)
        return (found if IS_V02 else found[0]) == cross_entropy_loss(logits, labels)

    assert is_the_loss()
    loss.watcher = lambda *given: seen.append(given)
    assert is_the_loss()
    loss.watcher = None
    assert is_the_loss()
    assert len(seen) == 1 and seen[0][0] is logits and seen[0][1] is labels


class Reader(nn.Module):
    """A model that reads the sequence, and does not know the value of every third key."""

    def get_attention_masks(self, tokens, tokenizer, extra_inputs):
        assert not extra_inputs
        return None

    def forward(self, tokens, attention_masks=None):
        assert not self.training
        said = torch.zeros_like(tokens)
        for row, line in zip(said, tokens.tolist()):
            for i, answer in read_mqar(line, TASKS["mqar"](pairs=[2, 5]))[0].items():
                row[i] = answer if line[i] % 3 else 0
        return logits_for(said, 264)


class Processor:
    ntokens_since_last_log = 0

    def log_validation(self, loss, step, extra_metrics=None):
        self.loss, self.step, self.metrics = loss, step, extra_metrics


@pytest.mark.parametrize("compiled", [False, True])
def test_results_are_those_of_the_models_answers_under_each_condition(tmp_path, compiled):
    changes = {
        "task.validation_pairs": [2, 5], "task.validation_lengths": [32, 64], "validation.local_batch_size": 4,
        "validation.steps": 5, "compile.enable": compiled, "compile.components": ["loss"],
        "compile.backend": "aot_eager",
    }  # fmt: skip
    validator = validator_of(check(write_toml(tmp_path / "x.toml", VALIDATED | changes)), ALONE, Processor())
    expected, tokens = [], 0
    for pairs in (2, 5):
        for length in (32, 64):
            right = []
            for loader in [loader for condition, loader in validator._conditions if condition.length == length]:
                for inputs, _ in [batch for _, batch in zip(range(5), loader)]:
                    rows = [read_mqar(line, TASKS["mqar"](pairs=[2, 5]))[0] for line in inputs["input"].tolist()]
                    rows = [[line[i] % 3 > 0 for i in row] for row, line in zip(rows, inputs["input"].tolist())]
                    right += [row for row in rows if len(row) == pairs]
            assert len(right) == 20
            tokens += 20 * length
            answers = [one for row in right for one in row]
            expected.append(
                {"pairs": pairs, "length": length, "accuracy": sum(answers) / len(answers),
                 "exact": sum(map(all, right)) / 20}
            )  # fmt: skip
    for step in (7, 8):  # the second time the same sequences
        model = Reader()
        validator.validate([model], step)
        assert model.training and validator.loss_fn.watcher is None
        found = [{name: value for name, value in result.items() if name != "loss"} for result in validator.results]
        assert found == expected
        processor = validator.metrics_processor
        assert processor.step == step and processor.ntokens_since_last_log == tokens * (step - 6)
        losses = [result["loss"] for result in validator.results]
        assert processor.loss == pytest.approx(sum(losses) / 4) and min(losses) > 1
        means = {"validation_metrics/accuracy": sum(result["accuracy"] for result in expected) / 4}
        for result in validator.results:
            for name in ("accuracy", "exact", "loss"):
                tag = f"validation_metrics/{name}/pairs={result['pairs']},length={result['length']}"
                means[tag] = result[name]
        assert processor.metrics == means
    assert 0 < expected[0]["exact"] < expected[0]["accuracy"] < 1


def test_text_is_validated_as_before_without_accuracy(tmp_path):
    changes = {
        "validation.enable": True,
        "validation.dataset": "stdlib",
        "validation.seq_len": 16,
        "validation.steps": 2,
    }
    validator = validator_of(check(write_toml(tmp_path / "x.toml", changes)), ALONE, Processor())

    class Uniform(nn.Module):
        def get_attention_masks(self, tokens, tokenizer, extra_inputs):
            return extra_inputs.pop("resets")

        def forward(self, tokens, attention_masks=None, resets=None):
            return torch.zeros(*tokens.shape, 264)

    validator.validate([Uniform()], 3)
    assert validator.results == [] and validator.metrics_processor.metrics is None
    assert validator.metrics_processor.loss == pytest.approx(5.5759, abs=1e-3)
