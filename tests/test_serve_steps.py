"""The way of a layer through the steps of an engine, told by a fake of vLLM's metadata: it needs no vLLM."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gdn2_titan.models import GatedDeltaNet2
from gdn2_titan.serve.steps import Pools, mix

BLOCKS, HIDDEN = 9, 24
VARIANTS = {
    "grouped-heads-K!=V": {"num_v_heads": 4, "expand_v": 1.5},
    "KDA": {"tied_gates": True, "num_v_heads": 4, "conv_size": 3},
    "GDN": {"tied_gates": True, "decay": "scalar", "conv_size": 2},
    "DeltaNet": {"tied_gates": True, "decay": "none"},
    "scalar-gates": {"erase_gate": "scalar", "write_gate": "scalar", "allow_neg_eigval": True},
    "mean-gates-ranks-bounded": {"erase_gate": "mean", "decay_rank": "full", "gate_rank": None, "lower_bound": -5.0},
}


def layer(**options):
    torch.manual_seed(0)
    made = GatedDeltaNet2(HIDDEN, num_heads=2, head_dim=8, **options)
    for name, p in made.named_parameters():
        if "decay." not in name:
            torch.nn.init.normal_(p, std=0.5)
    return made.requires_grad_(False)


def pools(made):
    """Blocks that hold no numbers, each with its four states one after the other, as vLLM lays them."""
    K, V, tail = made.head_dim, made.head_v_dim, made.q_conv1d.weight.shape[1] - 1
    v_heads = made.v_proj.out_features // V
    channels = [conv1d.weight.shape[0] for conv1d in (made.q_conv1d, made.k_conv1d, made.v_conv1d)]
    shapes = [(v_heads, K, V), *((count, tail) for count in channels)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    pages = torch.full((BLOCKS, sum(sizes) + 8), torch.nan)
    states = pages[:, : sum(sizes)].split(sizes, 1)
    return Pools(*(state.unflatten(1, shape) for state, shape in zip(states, shapes, strict=True)))


def step(decodes=(), prefills=(), fresh=()):
    """decodes: blocks; prefills: [(block, tokens)]; fresh: for each of these whether its prompt begins."""
    bounds = torch.tensor([0, *(tokens for _, tokens in prefills)]).cumsum(0)
    return SimpleNamespace(
        num_decodes=len(decodes), num_prefills=len(prefills), num_prefill_tokens=int(bounds[-1]),
        state_indices_tensor_d=torch.tensor(decodes, dtype=torch.int32)[:, None],
        state_indices_tensor_p=torch.tensor([block for block, _ in prefills], dtype=torch.int32),
        has_initial_states_p=~torch.tensor(fresh, dtype=torch.bool), query_start_loc_p=bounds.int(),
    )  # fmt: skip


def run(made, x, states, said):
    """x [n, D] -> [n, D]"""
    q, k, v = made.q_proj(x), made.k_proj(x), made.v_proj(x)
    v_heads = v.shape[1] // made.head_v_dim
    gates = made.gate_inputs(x, q.shape[1] // made.head_dim, v_heads)
    out = torch.zeros(len(x), v_heads, made.head_v_dim)
    mix(made, q, k, v, *gates, states, said, out)
    gate = made.gate_proj(x if made.gate_low_proj is None else made.gate_low_proj(x))
    return made.output(out, gate)


def alone(made, x):
    """What the layer says of a text [T, D] without steps, token by token, in float64."""
    options = {"backend": "reference"}
    reference = layer(**made.made_with, **options).double()
    reference.load_state_dict(made.state_dict())
    return reference(x[None].double())[0].float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_cut_into_any_steps_say_what_each_says_alone(variant):
    made = layer(**VARIANTS[variant])
    made.made_with = VARIANTS[variant]
    draw, states = random.Random(0), pools(made)
    texts = [torch.randn(length, HIDDEN) for length in (1, 2, 3, 5, 70, 40)]
    blocks, seen = draw.sample(range(1, BLOCKS), len(texts)), [0] * len(texts)
    said = [[] for _ in texts]
    while waiting := [i for i, text in enumerate(texts) if seen[i] < len(text)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        pieces = {i: min(draw.choice([1, 1, 2, 3, 33]), len(texts[i]) - seen[i]) for i in chosen}
        decodes = [i for i in chosen if pieces[i] == 1 and seen[i]]
        prefills = [i for i in chosen if i not in decodes]
        told = step([blocks[i] for i in decodes], [(blocks[i], pieces[i]) for i in prefills],
                    [seen[i] == 0 for i in prefills])  # fmt: skip
        order = [*decodes, *prefills]
        x = torch.cat([*(texts[i][seen[i] : seen[i] + pieces[i]] for i in order), torch.randn(3, HIDDEN)])
        y = run(made, x, states, told)
        for i in order:
            answer, y = y.split([pieces[i], len(y) - pieces[i]])
            said[i].append(answer)
            seen[i] += pieces[i]
    for text, pieces in zip(texts, said, strict=True):
        torch.testing.assert_close(torch.cat(pieces), alone(made, text), rtol=1e-4, atol=1e-4)
    others = [block for block in range(BLOCKS) if block not in blocks]
    assert all(state[others].isnan().all() for state in states)


def test_rows_that_pad_a_batch_of_decodes_touch_no_block():
    made = layer()
    states = pools(made)
    x = torch.randn(4, HIDDEN)
    run(made, x[:2], states, step(prefills=[(3, 1), (5, 1)], fresh=[True, True]))
    before = [state.clone() for state in states]
    y = run(made, x, states, step(decodes=[5, -1, 3, -1]))
    assert y.isfinite().all()
    for state, was in zip(states, before, strict=True):
        assert {block for block in range(BLOCKS) if not torch.equal(state[block].nan_to_num(), was[block].nan_to_num())
                } == {3, 5}  # fmt: skip


def test_a_step_of_decoding_reads_no_value_on_the_host():
    made = layer()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        states = Pools(*(mode.from_tensor(state) for state in pools(made)))
        said = step(decodes=[5, 1, 3])
        said.state_indices_tensor_d = mode.from_tensor(torch.zeros(3, 1, dtype=torch.int32))
        assert run(made, torch.randn(3, HIDDEN), states, said).shape == (3, HIDDEN)


def test_without_a_step_all_tokens_are_one_sequence_and_no_state_is_read():
    made = layer()
    made.made_with = {}
    x = torch.randn(20, HIDDEN)
    torch.testing.assert_close(run(made, x, None, None), alone(made, x), rtol=1e-4, atol=1e-4)
