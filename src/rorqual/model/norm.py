"""RMSNorm with a learned weight kept in float32 at run time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels import reference


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; see ``reference.rms_norm``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)
