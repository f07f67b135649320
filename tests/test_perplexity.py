"""End to end: TorchTitan trains, the converter converts, and held-out text is as likely there as it was here."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from gdn2_titan.convert.__main__ import main as convert
from gdn2_titan.titan.stdlib import stdlib_documents
from tests.training import scalars, train

STEPS, LENGTH, WINDOWS = 300, 128, 40
# One held-out document for lm-eval: its perplexity per byte, which is the byte tokenizer's token.
TASK = """
task: held_out
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with held_out.jsonl and the Hugging Face folder hf, TorchTitan's validation loss at the last step)."""
    folder = tmp_path_factory.mktemp("trained")
    text = "".join(stdlib_documents(held_out=True).values()).encode("ascii", "ignore").decode()
    text = text[20_000 : 20_000 + WINDOWS * LENGTH]
    (folder / "held_out.jsonl").write_text(json.dumps({"text": text}) + "\n")
    train(
        1, folder, f"--training.steps={STEPS}", f"--training.seq_len={LENGTH}", "--training.local_batch_size=4",
        "--validation.dataset=files", f"--validation.dataset_path={folder / 'held_out.jsonl'}",
        f"--validation.freq={STEPS}", f"--validation.seq_len={LENGTH}", "--validation.local_batch_size=4",
        f"--validation.steps={WINDOWS // 4}", f"--checkpoint.interval={STEPS}",
    )  # fmt: skip
    assert convert(["to-hf", str(folder / "checkpoint"), str(folder / "hf"), "--with-code"]) == 0
    loss = scalars(folder, "validation_metrics/loss")[STEPS]
    assert loss < 3  # it has learned something: a uniform guess costs 5.6
    return folder, loss


@torch.no_grad()
def test_the_converted_model_has_the_validators_loss_on_held_out_text(trained):
    folder, loss = trained
    model, tokenizer = (auto.from_pretrained(folder / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    text = json.loads((folder / "held_out.jsonl").read_text())["text"]
    tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    assert len(tokens) == WINDOWS * LENGTH + 1
    logits = model(tokens[:-1].view(WINDOWS, LENGTH)).logits
    assert abs(F.cross_entropy(logits.flatten(0, 1), tokens[1:]).item() - loss) < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, which brings many packages")
def test_lm_evals_hf_backend_finds_the_validators_perplexity_from_the_folder_alone(trained):
    folder, loss = trained
    (folder / "tasks").mkdir()
    (folder / "tasks" / "held_out.yaml").write_text(TASK.format(file=folder / "held_out.jsonl"))
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = f"pretrained={folder / 'hf'},trust_remote_code=True,dtype=float32,max_length={LENGTH}"
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "held_out",
        "--include_path", folder / "tasks", "--device", "cpu", "--batch_size", "8", "--output_path", folder / "results",
    ]  # fmt: skip
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    (file,) = (folder / "results").rglob("results_*.json")
    bits = json.loads(file.read_text())["results"]["held_out"]["bits_per_byte,none"]
    assert abs(bits * math.log(2) - loss) < 1e-4
