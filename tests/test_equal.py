"""Equal conditions: models of other mixers with as many parameters and as much state, and the files that train them."""

import dataclasses
import functools
import tomllib
from pathlib import Path

import pytest
import torch

from gdn2_titan.equal import MIXERS, block_parameters, equal_args, main, state_size
from gdn2_titan.models import GDN2Model, GDN2ModelArgs, flavors
from gdn2_titan.models.decoding import Decoding
from gdn2_titan.models.flavors import ModelOverrides, model_args_of

PAPER = Path(__file__).parents[1] / "train_configs" / "paper"
FILES = sorted(PAPER.glob("*_*.toml"))
RECURRENT = [name for name in MIXERS if name != "attention"]
SMALL = GDN2ModelArgs(
    vocab_size=50, hidden_size=64, n_layers=3, mlp_size=160, layer_pattern=("gdn2", "swa"), num_heads=2, head_dim=16,
    mamba_head_dim=8, mamba_state=16, attn_heads=4,
)  # fmt: skip


@functools.cache
def budget(flavor):
    return block_parameters(flavors[flavor])


def said_by(path):
    """(flavor, the GDN2ModelArgs) of a TOML file."""
    said = tomllib.loads(path.read_text())
    names = {field.name for field in dataclasses.fields(ModelOverrides)}
    overrides = ModelOverrides(**{name: value for name, value in said["gdn2"].items() if name in names})
    return said["model"]["flavor"], model_args_of(said["model"]["flavor"], overrides)


def counted(args):
    """Parameters of the blocks and numbers of the memories, of a model that is there."""
    model = GDN2Model(args)
    reader = Decoding(model)
    reader(torch.zeros(1, 3, dtype=torch.long))
    memories = [state.memory for state in reader._states if hasattr(state, "memory")]
    return sum(p.numel() for p in model.layers.parameters()), [memory.numel() for memory in memories]


@pytest.mark.parametrize("mixer", RECURRENT)
def test_a_model_of_another_mixer_has_as_many_parameters_and_as_much_state(mixer):
    parameters, state = counted(SMALL)
    args = equal_args(SMALL, mixer)
    found, memory = counted(args)
    assert abs(found - parameters) <= 0.003 * parameters
    assert memory == state and block_parameters(args) == found
    assert state_size(args, MIXERS[mixer][0]) == memory[0]
    assert args.layer_pattern == (MIXERS[mixer][0], "swa")


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "1.3B_hybrid"], ids=lambda path: path.stem)
def test_a_shipped_file_says_what_is_solved_for_and_is_equal_to_a_third_of_a_percent(path):
    flavor, args = said_by(path)
    assert path.stem.startswith(f"{flavor}_")
    mixer = path.stem.removeprefix(f"{flavor}_")
    expected = dataclasses.replace(equal_args(flavors[flavor], mixer, budget(flavor)), init="release")
    assert args == expected
    assert abs(block_parameters(args) / budget(flavor) - 1) <= 0.003
    if mixer != "attention":
        assert state_size(args, MIXERS[mixer][0]) == state_size(flavors[flavor], "gdn2")


def test_every_row_and_every_step_of_the_ladder_has_a_file():
    rows = {f"{like}_{mixer}" for like in ("1.3B", "1.3B_hybrid") for mixer in ("mamba2", "gdn", "kda")}
    rows |= {f"{like}_mamba3{form}" for like in ("1.3B", "1.3B_hybrid") for form in ("", "_mimo")}
    ladder = {f"150M_{mixer}" for mixer in MIXERS} | {f"150M_hybrid_{mixer}" for mixer in RECURRENT}
    assert {path.stem for path in FILES} == rows | ladder | {"1.3B_hybrid", "1.3B_attention"}


def test_files_of_a_size_differ_in_the_model_alone():
    def rest(path):
        said = tomllib.loads(path.read_text())
        recipe = {name: said["gdn2"][name] for name in ("init", "document_resets")}
        others = {name: section for name, section in said.items() if name not in ("job", "model", "gdn2")}
        return others | {"recipe": recipe}

    for size in ("1.3B", "150M"):
        found = [rest(path) for path in PAPER.glob(f"{size}*.toml")]
        assert all(one == found[0] for one in found[1:])


def test_the_two_models_of_150_million_are_equal():
    assert abs(budget("150M_hybrid") / budget("150M") - 1) <= 0.003


def test_the_command_prints_a_table_that_makes_the_model(capsys, tmp_path):
    assert main(["--like", "150M", "--mixer", "mamba3_mimo"]) == 0
    path = tmp_path / "x.toml"
    path.write_text('[model]\nflavor = "150M"\n' + (said := capsys.readouterr().out))
    assert said.startswith(
        "# 104,124,480 parameters in the blocks, 98,304 numbers of state a layer; flavor 150M\n[gdn2]\n"
    )
    assert said_by(path)[1] == equal_args(flavors["150M"], "mamba3_mimo")


def test_what_cannot_be_equal_is_refused_in_a_sentence(capsys):
    with pytest.raises(
        ValueError, match=r"^mamba_head_dim times mamba_state is 112; it must divide the 512 numbers of "
    ):
        equal_args(dataclasses.replace(SMALL, mamba_head_dim=7), "mamba2")
    assert main(["--like", "debug", "--mixer", "mamba2", "--parameters", "10"]) == 1
    assert capsys.readouterr().err.startswith("Error: parameters is 10; without MLPs there are ")
