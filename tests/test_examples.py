"""The examples run, and docs/forks.md quotes them. Run it in an environment of each generation of TorchTitan."""

import inspect
import json
import math
import random
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchtitan")

from tests.gdn2_cases import slowly
from tests.generations import IS_V02, only_functions, only_toml
from tests.training import GRAD_NORM, LOSS, ROOT, environment, launch, scalars

PAGE = (ROOT / "docs" / "forks.md").read_text()

# What a command says, in the words of the generation that is installed.
if IS_V02:
    LLAMA3 = ["--job.config_file=examples/llama3_gdn2/debug.toml"]
    FOLDER, NO_VALIDATION = "--job.dump_folder", []
    SAME = ["--optimizer.eps=1e-4", "--training.dataset=files", "--training.dataset_path"]
    BY_OP = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
else:
    LLAMA3 = ["--module=examples.llama3_gdn2", "--config=llama3_gdn2_debug"]
    FOLDER, NO_VALIDATION = "--dump_folder", ["--validator.no-enable"]
    SAME = ["--dataloader.dataset_path"]
    BY_OP = []  # which this config has
SHORT = ["--training.seq_len=64", "--metrics.log_freq=1", "--metrics.enable_tensorboard", *NO_VALIDATION]
COMPILED = ["--compile.enable", "--compile.components=model", "--compile.backend=aot_eager"]
LAYOUTS = {
    "FSDP2=2": (2, ["--training.local_batch_size=2"]),
    "TP=2": (2, ["--training.local_batch_size=4", "--parallelism.tensor_parallel_degree=2"]),
    "compiled, checkpointed by op": (1, ["--training.local_batch_size=4", *COMPILED, *BY_OP]),
}


def train(processes, folder, *arguments):
    """As the page says it; returns {step: loss} and {step: gradient norm}."""
    folder.mkdir(exist_ok=True)
    code, printed = launch(
        processes, "torchtitan.train", folder, f"{FOLDER}={folder}", *SHORT, *arguments, cwd=ROOT
    )  # fmt: skip
    assert code == 0, printed[-4000:]
    return scalars(folder, LOSS), scalars(folder, GRAD_NORM)


def _write_documents(path, order):
    """Windows of 64 tokens, two documents in each, so that a split of the documents is a split of the windows."""
    with open(path, "w") as file:
        for window in order:
            draw = random.Random(window)
            first = draw.randint(10, 52)
            for length in (first, 62 - first):  # bos and the text are inputs
                file.write(json.dumps({"text": "".join(draw.choices("etaoinsh ", k=length))}) + "\n")


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """The losses and gradient norms of one process, and how to begin where it began."""
    folder = tmp_path_factory.mktemp("llama3")
    seed = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    train(1, folder / "seed", *LLAMA3, *seed)
    windows = range(64)
    # TorchTitan 0.3's loader gives each rank an unbroken part of the documents.
    halves = [w for i in range(0, 32, 2) for w in (i, i + 1, i + 32, i + 33)]
    _write_documents(folder / "split.jsonl", windows)
    _write_documents(folder / "whole.jsonl", windows if IS_V02 else halves)

    def begin(processes, name, *arguments):
        documents = folder / ("whole.jsonl" if processes == 1 or "TP" in name else "split.jsonl")
        start = ["--checkpoint.enable", f"--checkpoint.initial_load_path={folder / 'seed' / 'checkpoint' / 'step-0'}"]
        data = [*SAME[:-1], f"{SAME[-1]}={documents}"]
        return train(processes, folder / name, *LLAMA3, "--training.steps=8", *start, *data, *arguments)

    return begin, begin(1, "one", "--training.local_batch_size=4")


def test_llama3_with_gdn2_in_every_second_layer_learns(llama3):
    losses = list(llama3[1][0].values())
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("layout", ["FSDP2=2", *slowly("compiled, checkpointed by op", "TP=2")])
def test_llama3_with_gdn2_has_the_losses_of_one_process(llama3, layout):
    begin, (losses, norms) = llama3
    processes, arguments = LAYOUTS[layout]
    found_losses, found_norms = begin(processes, layout.replace(" ", ""), *arguments)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_norms == pytest.approx(norms, rel=1e-4)


@torch.no_grad()
def _block():
    """A GDN-2 layer of the example, and what it is called with for resets [1, T] beside x."""
    torch.manual_seed(0)
    if IS_V02:
        from torchtitan.models.llama3 import TransformerModelArgs

        from examples.llama3_gdn2.v02 import GDN2Block

        block = GDN2Block(1, TransformerModelArgs(dim=64, n_heads=4, n_layers=2))
        block.init_weights()
        return block, lambda resets: (None, resets)
    from examples.llama3_gdn2.v03 import model_spec

    block = model_spec("debugmodel").model.layers[1].build()
    block.init_states()

    def positions(resets):
        """As TorchTitan's loader gives them: they begin again in each document."""
        place = torch.arange(resets.shape[1])
        return place - (place * resets).cummax(1).values

    return block, lambda resets: (None, positions(resets))


def test_a_document_knows_nothing_of_the_one_before_in_a_gdn2_layer_of_llama3():
    block, rest = _block()
    dim = block.attention_norm.weight.shape[0]
    x, resets = torch.randn(1, 20, dim), torch.zeros(1, 20, dtype=torch.bool)
    resets[:, [0, 12]] = True
    other = torch.cat([torch.randn(1, 12, dim), x[:, 12:]], 1)
    assert torch.equal(block(x, *rest(resets))[:, 12:], block(other, *rest(resets))[:, 12:])
    resets[:, 12] = False
    assert not torch.allclose(block(x, *rest(resets))[:, 12:], block(other, *rest(resets))[:, 12:], atol=1e-4)


@only_toml
@torch.no_grad()
def test_resets_of_the_loader_reach_the_gdn2_layers_of_llama3():
    from torchtitan.models.llama3 import TransformerModelArgs

    from examples.llama3_gdn2.v02 import Llama3GDN2

    torch.manual_seed(0)
    model = Llama3GDN2(TransformerModelArgs(dim=64, n_heads=4, n_layers=2, vocab_size=32, max_seq_len=20))
    model.init_weights()
    seen = []
    model.layers["1"].mixer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    resets = torch.zeros(1, 20, dtype=torch.bool)
    model(torch.zeros(1, 20, dtype=torch.int64), resets=resets)
    assert seen[0] is resets


def test_llama3_with_gdn2_refuses_context_parallelism_in_one_sentence():
    settings = SimpleNamespace(context_parallel_degree=2, spmd_backend="partial_dtensor")
    with pytest.raises(SystemExit, match="parallelism.context_parallel_degree is 2; with llama3_gdn2 it must be 1"):
        if IS_V02:
            from examples.llama3_gdn2.v02 import parallelize

            parallelize(None, None, SimpleNamespace(parallelism=settings))
        else:
            from examples.llama3_gdn2.v03 import parallelize

            parallelize(None, parallel_dims=None, training=None, parallelism=settings)


FORKS = (
    {
        "registered": ["--job.config_file=examples/fork/registered.toml"],
        "job config": ["--job.config_file=examples/fork/job_config.toml"],
    }
    if IS_V02
    else {"config function": ["--module=examples.fork", "--config=gdn2_of_the_fork"]}
)


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_trains_the_model(fork, tmp_path):
    losses, _ = train(1, tmp_path, *FORKS[fork], "--training.steps=4", "--training.local_batch_size=2")
    assert len(losses) == 4 and all(map(math.isfinite, losses.values()))
    assert losses[4] < losses[1]


@only_toml
def test_without_our_job_config_its_sections_are_unknown(tmp_path):
    from torchtitan.config import ConfigManager

    toml = (ROOT / "examples" / "fork" / "registered.toml").read_text()
    (tmp_path / "x.toml").write_text(toml + "[gdn2]\nwindow = 64\n")
    with pytest.raises(ValueError, match="Invalid field names.*gdn2"):
        ConfigManager().parse_args([f"--job.config_file={tmp_path / 'x.toml'}"])


@only_toml
def test_the_forks_job_config_has_its_own_section_and_ours(monkeypatch):
    from torchtitan.config import ConfigManager

    monkeypatch.chdir(ROOT)
    config = ConfigManager().parse_args(["--job.config_file=examples/fork/job_config.toml"])
    found = config.fork.team, config.gdn2.window, config.gdn2.document_resets, config.model.name
    assert found == ("recurrent", 64, False, "gdn2")
    assert config.model.hf_assets_path.endswith("byte_tokenizer")


@only_functions
def test_the_forks_config_function_changes_what_it_says_and_no_more():
    from examples.fork.config_registry import gdn2_of_the_fork
    from gdn2_titan.titan.config_registry import gdn2_debug_hybrid

    mine, ours = gdn2_of_the_fork(), gdn2_debug_hybrid()
    assert (mine.gdn2.window, mine.gdn2.document_resets, mine.optimizer.lr) == (64, False, 1e-3)
    assert mine.model_spec.flavor == ours.model_spec.flavor and mine.training.seq_len == ours.training.seq_len


@pytest.mark.slow
def test_the_op_trains_alone_compiled_without_a_graph_break_and_with_torch_only():
    others = ["torchtitan", "torchao", "transformers", "datasets", "tokenizers", "triton"]
    program = f"""
        import json, sys
        sys.modules.update(dict.fromkeys({others}))  # an import of one fails as if it were not installed
        from examples.op_alone import train
        print(json.dumps(train(100)[1]))
    """
    run = [sys.executable, "-c", textwrap.dedent(program)]
    losses = json.loads(subprocess.run(run, env=environment(), cwd=ROOT, check=True, capture_output=True).stdout)
    assert losses[-1] < losses[0] - 0.5 and losses[-1] < 2.5  # below that of a guess among 16, ln 16 = 2.77


def test_the_op_alone_decodes_token_by_token_what_it_computes_at_once():
    from examples.op_alone import Model

    torch.manual_seed(0)
    model, tokens = Model(), torch.randint(0, 16, (2, 9))
    at_once, _ = model(tokens)
    step, state = model(tokens[:, :4])
    steps = [step]
    for t in range(4, 9):
        step, state = model(tokens[:, t : t + 1], state=state)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), at_once)


# --- the page itself


def _fences():
    """(words after the fence, text) of all fenced blocks."""
    return re.findall(r"^```(.*)\n((?:.*\n)*?)^```$", PAGE, re.MULTILINE)


def test_the_page_quotes_the_examples_as_they_are_and_its_own_code_runs():
    quoted = 0
    for words, text in _fences():
        language, *path = words.split()
        if path:
            assert text in (ROOT / path[0]).read_text(), f"{path[0]} does not contain:\n{text}"
            quoted += 1
        else:
            assert language == "python"
            exec(compile(text, "docs/forks.md", "exec"), {})
    assert quoted >= 7


def test_every_example_that_the_page_names_is_there():
    named = set(re.findall(r"examples/[\w/]+\.(?:py|toml)", PAGE))
    assert named and all((ROOT / name).is_file() for name in named)
    modules = set(re.findall(r"--module (\S+)", PAGE))
    assert modules == {"gdn2_titan.titan", "examples.fork", "examples.llama3_gdn2"}


def _table(heading):
    rows = PAGE.split(f"\n{heading}\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_arguments_in_the_pages_tables_are_those_of_our_op():
    from gdn2_titan.ops import chunk_gdn2, fused_recurrent_gdn2

    ours = set(inspect.signature(chunk_gdn2).parameters)
    same = [name for theirs, here in _table("| flash-linear-attention | here |") if here.startswith("same")
            for name in re.findall(r"`(\w+)`", theirs)]  # fmt: skip
    only = [name for names, _ in _table("| only here | |") for name in re.findall(r"`(\w+)`", names)]
    assert set(same) | set(only) == ours and not set(same) & set(only)
    gone = [name for theirs, here in _table("| flash-linear-attention | here |") if not here.startswith("same")
            for name in re.findall(r"`(\w+)(?:=True)?`", theirs)]  # fmt: skip
    assert gone and not set(gone) & ours
    assert set(inspect.signature(fused_recurrent_gdn2).parameters) == ours - {"num_segments"}
