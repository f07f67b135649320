"""A model saved with its code loads where this package is not, and beside it where it is."""

import ast
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from gdn2_titan.convert.__main__ import main as convert
from gdn2_titan.convert.hf import save_code
from gdn2_titan.convert.hf.code import flattened
from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from tests.convert_cases import save_step
from tests.hf_cases import GREEDY, left_padded, pair
from tests.model_cases import SMALL

GENERATE = GREEDY | dict(max_new_tokens=20)

ALONE = """
import sys
sys.modules["gdn2_titan"] = None  # importing it now raises ModuleNotFoundError
import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
folder, again, given, found = sys.argv[1:]
inputs = torch.load(given)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
outputs = model(inputs["ids"], attention_mask=inputs["mask"], labels=inputs["ids"])
outputs.loss.backward()
gradients = {name: p.grad for name, p in model.named_parameters()}
generated = model.generate(inputs["ids"], attention_mask=inputs["mask"], **inputs["options"])
torch.save({"logits": outputs.logits.detach(), "gradients": gradients, "generated": generated}, found)
model.save_pretrained(again)
assert not any(module for name, module in sys.modules.items() if name.split(".")[0] == "gdn2_titan")
assert not hasattr(torch.ops.gdn2_titan, "chunk_gdn2")
"""


def run_alone(folder, again):
    """What a process finds that has torch and transformers, the folder, and nothing of this package."""
    here = folder.parent
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"HF_HOME": str(here / "home"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", ALONE, folder, again, here / "given.pt", here / "found.pt"]
    run = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(here / "found.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder of what a process alone has saved again, what it found, what one with this package holds of it)."""
    here = tmp_path_factory.mktemp("alone")
    theirs, ours = pair()
    ids, mask, rows = left_padded([20, 7])
    torch.save({"ids": ids, "mask": mask, "options": GENERATE}, here / "given.pt")
    theirs.save_pretrained(here / "model")
    save_code(here / "model")
    expected = theirs.generate(ids, attention_mask=mask, **GENERATE)
    theirs(ids, attention_mask=mask, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    logits = [ours(text[None])[0].detach() for text in rows]
    return here / "again", run_alone(here / "model", here / "again"), (logits, expected, gradients)


def assert_the_same(found, expected):
    logits, generated, gradients = expected
    for row, of_row in enumerate(logits):
        torch.testing.assert_close(found["logits"][row, -len(of_row) :], of_row, rtol=0, atol=1e-5)
    assert torch.equal(found["generated"], generated)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_saved_with_its_code_needs_torch_and_transformers_alone(alone):
    _, found, expected = alone
    assert_the_same(found, expected)


@pytest.mark.slow
def test_so_does_what_such_a_process_has_saved_again(alone):
    again, _, expected = alone
    assert_the_same(run_alone(again, again.parent / "third"), expected)


def test_two_copies_of_the_code_and_the_package_live_in_one_process(tmp_path, monkeypatch):
    theirs, ours = pair()
    ids = torch.arange(10)[None]
    expected = ours(ids)
    models = [theirs]
    for name in ("one", "two"):
        theirs.save_pretrained(tmp_path / name)
        save_code(tmp_path / name)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        copied = get_class_from_dynamic_module("modeling_gdn2.GDN2ForCausalLM", str(tmp_path / name))
        assert copied.__module__.startswith("transformers_modules.")
        models.append(copied.from_pretrained(tmp_path / name))
    assert len({type(model) for model in models}) == 3
    namespaces = set()
    for model in models:
        with torch.profiler.profile() as profile:
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
            model(ids, labels=ids).loss.backward()
        keys = [event.key.split("::") for event in profile.key_averages()]
        used = {key[0] for key in keys if key[-1] == "chunk_gdn2"}
        assert len(used) == 1 and used == {key[0] for key in keys if key[-1] == "chunk_gdn2_backward"}
        namespaces |= used
    assert len(namespaces) == 3 and "gdn2_titan" in namespaces
    torch.testing.assert_close(ours(ids), expected)
    for model in models[1:]:
        package = type(model).__module__.rpartition(".")[0]
        dispatch = sys.modules[f"{package}.gdn2_ops_dispatch"]
        on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
        assert not dispatch.use_triton("q", on_gpu, "auto")
        with pytest.raises(ValueError, match="q is on cuda; this copy of gdn2_titan has no Triton kernels"):
            dispatch.use_triton("q", on_gpu, "triton")


def test_the_code_is_flat_parses_and_names_no_other_module_of_this_package(tmp_path):
    theirs, _ = pair()
    theirs.save_pretrained(tmp_path)
    save_code(tmp_path)
    heads = ("QuestionAnswering", "SequenceClassification", "TokenClassification")
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_gdn2.GDN2Config", "AutoModel": "modeling_gdn2.GDN2Decoder",
        "AutoModelForCausalLM": "modeling_gdn2.GDN2ForCausalLM",
        **{f"AutoModelFor{head}": f"classification_gdn2.GDN2For{head}" for head in heads},
    }  # fmt: skip
    files = {path.stem: ast.parse(path.read_text()) for path in tmp_path.glob("*.py")}
    assert {"configuration_gdn2", "modeling_gdn2", "gdn2_ops_gdn2_chunked", "gdn2_models_layer"} <= set(files)
    assert not any("triton" in name for name in files)
    for name, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert node.level == 1 and set(names) <= set(files), (name, names)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any(imported.split(".")[0] in ("gdn2_titan", "triton") for imported in names), (name, names)


def test_the_converter_puts_the_code_beside_the_model_where_it_is_asked_to(tmp_path):
    args = GDN2ModelArgs(**SMALL)
    save_step(tmp_path / "step-1", GDN2Model(args).state_dict(), args)
    for out, options in (("without", []), ("with", ["--with-code"])):
        assert convert(["to-hf", str(tmp_path / "step-1"), str(tmp_path / out), *options]) == 0
    code = {path.stem for path in (tmp_path / "with").glob("*.py")}
    assert code == set(flattened()) and not list((tmp_path / "without").glob("*.py"))
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("without", "with")]
    assert configs[1].pop("auto_map")["AutoModelForCausalLM"] == "modeling_gdn2.GDN2ForCausalLM"
    assert configs[0] == configs[1]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama"}'], ids=str)
def test_code_is_put_beside_a_model_of_ours_only(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json .*; (it must be the config|its model_type must be 'gdn2')"):
        save_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json"}
