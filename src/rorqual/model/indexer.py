"""The lightning indexer: cheap low-precision scores that choose which entries a query attends to.

Report 2.3.1, eq. 14-17. Shares the query latent of the attention layer; has its own compressor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels import dispatch, reference
from rorqual.model.compressor import Compressor
from rorqual.model.config import ModelConfig
from rorqual.model.linear import Linear
from rorqual.model.rope import Rotation

# Products of heads, queries and entries held at once, in elements (64 MiB of float32).
_SCORE_LIMIT = 1 << 24


class Indexer(nn.Module):
    """Scores compressed entries for CSA layers."""

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.official = config.numerics == "official"
        self.topk = config.index_topk
        self.wq_b = Linear(
            config.q_lora_rank,
            self.num_heads * self.head_dim,
            weight_format=config.linear_dtype,
            quantize_input=self.official,
        )
        self.weights_proj = Linear(config.hidden_size, self.num_heads)
        self.compressor = Compressor(config, ratio, self.head_dim, rotated=True)

    def queries(self, latent: Tensor, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Indexer queries [..., H, C] and signed head weights [..., H].

        Args:
            latent: normalised query latent [..., q_lora_rank]; x: normalised layer input [..., D].
        """
        q = self.wq_b(latent).unflatten(-1, (self.num_heads, self.head_dim))
        q = reference.rotate(q, *rotation.per_head())
        if self.official:
            q = reference.round_index(q)
        weight = self.weights_proj(x) * (self.head_dim**-0.5 * self.num_heads**-0.5)
        return q, weight

    def select(
        self, q_THC: Tensor, weight_TH: Tensor, keys_SC: Tensor, visible_T: Tensor
    ) -> Tensor:
        """Entry indices [T, <= topk], -1 where masked.

        Queries are scored in blocks, so that memory does not grow with chunk times context.
        """
        if keys_SC.shape[0] <= self.topk:  # everything visible is selected: no need to score
            return reference.visible_entries(keys_SC.shape[0], visible_T)
        kernels = dispatch.kernels_for(q_THC)
        step = max(1, _SCORE_LIMIT // (self.num_heads * keys_SC.shape[0]))
        blocks = zip(q_THC.split(step), weight_TH.split(step), visible_T.split(step), strict=True)
        return torch.cat(
            [
                reference.select_entries(
                    kernels.indexer_scores(q, weight, keys_SC), visible, self.topk
                )
                for q, weight, visible in blocks
            ]
        )
