"""Rotary position tables for the two kinds of layer; the rotation itself is in the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rorqual.kernels import reference
from rorqual.model.config import ModelConfig


class Rotation(NamedTuple):
    """cos and sin per token and pair, float32 [..., R/2]."""

    cos: Tensor
    sin: Tensor

    def per_head(self) -> Rotation:
        """With an axis of one in front of the pairs, to broadcast over heads."""
        return Rotation(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2))


class RotaryTable(nn.Module):
    """Frequencies of one kind of layer: plain where nothing is compressed, YaRN elsewhere."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig, *, compressing: bool) -> None:
        super().__init__()
        scaling = config.rope_scaling
        if not compressing or scaling is None:
            theta = config.compress_rope_theta if compressing else config.rope_theta
            frequencies = reference.rotary_frequencies(config.qk_rope_head_dim, theta)
        else:
            frequencies = reference.rotary_frequencies(
                config.qk_rope_head_dim,
                config.compress_rope_theta,
                factor=scaling.factor,
                original_length=scaling.original_max_position_embeddings,
                beta_fast=scaling.beta_fast,
                beta_slow=scaling.beta_slow,
            )
        # A plain attribute would not follow .to(device); a buffer must not enter the state dict.
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """positions: any shape of integer token positions. The product is float32, as released."""
        angle = positions.unsqueeze(-1).float() * self.frequencies
        return Rotation(torch.cos(angle), torch.sin(angle))
