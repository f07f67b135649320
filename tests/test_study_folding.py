"""Many models through one call of an operator: the same as a call for each."""

import warnings

import pytest
import torch
from torch.func import grad, vmap

pytest.importorskip("torchtitan")
from gdn2_titan.ops import causal_conv1d_qkv, chunk_gdn2
from gdn2_titan.study.folding import fold_models
from tests.gdn2_cases import make
from tests.test_func_transforms import CASES, batch, case, close, ordinary

fold_models()


def qkv(tensors):
    q, k, v, states = causal_conv1d_qkv(
        *(tensors[n] for n in ("q", "k", "v", "wq", "wk", "wv")), "silu", output_final_state=True
    )
    return sum(y.sin().sum() for y in (q, k, v, *states))


def qkv_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 7, 3), "k": (2, 7, 3), "v": (2, 7, 5), "wq": (3, 4), "wk": (3, 4), "wv": (5, 4)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def check_folded(loss, given):
    rows = batch(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where it loops
        got = vmap(grad(loss))(rows)
    for i in range(3):
        close({n: x[i] for n, x in got.items()}, ordinary(loss, {n: x[i] for n, x in rows.items()}))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("recurrent")])
def test_gradients_of_models_side_by_side_are_those_of_each_and_nothing_loops(name):
    check_folded(*case(name))


def test_gradients_of_the_three_convolutions_of_models_side_by_side_are_those_of_each():
    check_folded(qkv, qkv_inputs())


def test_what_is_another_one_for_each_model_but_must_be_shared_is_refused():
    inputs = make(T=5, resets=[0, 1, 0, 0, 0])
    resets = torch.stack([inputs.pop("resets")] * 2)
    with pytest.raises(NotImplementedError, match="resets is another one for each model; it must be the same for all"):
        vmap(lambda x: chunk_gdn2(**inputs, resets=x)[0])(resets)
