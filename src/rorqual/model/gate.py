"""Expert choice: by a table over token ids in the first layers, by biased affinity elsewhere.

Report 2.4: affinity sqrt(softplus(logit)), top-k of affinity + bias, weights from the affinities
alone, normalised and scaled. There is no group limit and no epsilon.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels import reference
from rorqual.model.config import ModelConfig


class Gate(nn.Module):
    """``weight`` [E, D] plus ``bias`` [E] (scored) or ``tid2eid`` [vocab, K] (hashed)."""

    def __init__(self, config: ModelConfig, *, hashed: bool) -> None:
        super().__init__()
        experts = config.n_routed_experts
        self.topk = config.num_experts_per_tok
        self.route_scale = config.routed_scaling_factor
        self.hashed = hashed
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.tid2eid: Tensor
        self.bias: Tensor
        if hashed:
            table = torch.zeros(config.vocab_size, self.topk, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        else:
            # Moved by the balance rule, never by a gradient.
            self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [N, K] (float32), expert indices [N, K], affinities [N, E]."""
        x = reference.wide(x_ND)
        with torch.autocast(x.device.type, enabled=False):  # routing is decided in float32
            scores_NE = reference.affinity(nn.functional.linear(x, self.weight.to(x.dtype)))
        if self.hashed:
            index_NK = self.tid2eid[tokens_N].long()
        else:
            index_NK = (scores_NE + self.bias).topk(self.topk, dim=-1).indices
        chosen = scores_NE.gather(-1, index_NK)
        return chosen / chosen.sum(-1, keepdim=True) * self.route_scale, index_NK, scores_NE


def balanced_table(vocab_size: int, experts: int, topk: int, generator: torch.Generator) -> Tensor:
    """A random token-to-experts table without repeats in a row; int64 [vocab, topk].

    The official tables ship in the checkpoint and their generator is not published; this one is for
    models trained from scratch.
    """
    return torch.rand(vocab_size, experts, generator=generator).topk(topk, dim=-1).indices
