"""Small transformers models with weights that matter, beside the GDN2Model of the same weights."""

import torch

from gdn2_titan.convert.hf import GDN2Config, GDN2ForCausalLM
from gdn2_titan.models import GDN2Model
from tests.model_cases import SMALL, sharpened

RECURRENT, WINDOWED, HYBRID = ("gdn2",), ("gdn2", "swa"), ("gdn2", "swa", "attention")
VOCABULARY = SMALL["vocab_size"]
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def config(**changes):
    fields = SMALL | {"n_layers": 3, "layer_pattern": HYBRID, "num_v_heads": 4, "attn_kv_heads": 2} | changes
    return GDN2Config(**fields | {"layer_pattern": list(fields["layer_pattern"])})


def pair(**changes):
    """(GDN2ForCausalLM, GDN2Model) of the same weights, both in eval mode."""
    torch.manual_seed(0)
    ours = sharpened(GDN2Model(config(**changes).model_args())).eval()
    theirs = GDN2ForCausalLM(config(**changes)).eval()
    names = {"model.embed_tokens.weight": "tok_embeddings.weight", "lm_head.weight": "lm_head.weight"}
    weights = ours.state_dict()
    theirs.load_state_dict(
        {name: weights[names.get(name, name.removeprefix("model."))] for name in theirs.state_dict()}, strict=True
    )
    return theirs, ours


def tokens(batch, length, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths, seed=0):
    """(ids [B, T] with arbitrary ids for padding, mask [B, T], the rows without padding)."""
    total = max(lengths)
    ids, mask = tokens(len(lengths), total, seed), torch.ones(len(lengths), total, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : total - length] = 0
    return ids, mask, [ids[row, total - length :] for row, length in enumerate(lengths)]


def assert_equal(actual, expected):
    """In all that fp32 can tell of a logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def assert_greedy(ours, text, generated):
    """The tokens that follow a text [T] are those that a model without a cache says after all before each of them."""
    said = ours(torch.cat((text, generated))[None])[0, len(text) - 1 : -1].argmax(-1)
    assert torch.equal(generated, said)


def storages(cache):
    """Bytes that the states of a cache keep in memory, views counted as what they are views of."""
    tensors = [tensor for state in cache.states for tensor in state]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
