"""The operator in a codebase of one's own: a mixer, a model of one layer, and a training loop. Needs torch alone.

python examples/op_alone.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from gdn2_titan.ops import chunk_gdn2, fused_recurrent_gdn2


class Mixer(nn.Module):
    """x [B, T, D] -> [B, T, D] and the memory [B, H, K, K] after the last token."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.g, self.b, self.w = (nn.Linear(dim, dim, bias=False) for _ in range(6))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.full((dim,), -4.0))  # half-lives of 40 tokens
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, resets=None, state=None):
        q, k, v, g, b, w = (
            f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v, self.g, self.b, self.w)
        )
        op = chunk_gdn2 if state is None else fused_recurrent_gdn2
        o, state = op(
            q, k, F.silu(v), g, b, w,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_sigmoid_in_kernel=True,
            resets=resets,
        )  # fmt: skip
        return self.out(o.flatten(2)), state


class Model(nn.Module):
    def __init__(self, symbols=16, dim=64, heads=4):
        super().__init__()
        self.embedding, self.mixer = nn.Embedding(symbols, dim), Mixer(dim, heads)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, symbols)

    def forward(self, tokens, resets=None, state=None):
        h = self.embedding(tokens)
        y, state = self.mixer(h, resets, state)
        return self.head(self.norm(h + y)), state


def batch(generator, sequences=16, length=8):
    """A string of symbols and the string again: the second half cannot be said without a memory of the first."""
    string = torch.randint(0, 16, (sequences, length), generator=generator)
    tokens = torch.cat([string, string], 1)
    return tokens[:, :-1], tokens[:, 1:]


def train(steps=150):
    """Losses over the second half, of a model that is compiled without a graph break."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # "inductor" where there is a C++ compiler
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        tokens, labels = batch(generator)
        logits, _ = compiled(tokens)
        second = labels.shape[1] // 2
        loss = F.cross_entropy(logits[:, second:].flatten(0, 1), labels[:, second:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    _, losses = train()
    print(*(f"step {step:3d}  loss {loss:.3f}" for step, loss in enumerate(losses, 1) if step % 25 in (0, 1)), sep="\n")
