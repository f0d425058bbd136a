"""A bias-free linear layer over any stored weight format.

Formats: plain floating point; FP8 e4m3 with one e8m0 scale per 128 x 128 tile; packed FP4 e2m1
with one e8m0 scale per 32 inputs. Quantised weights stay packed and are expanded on use. In the
``official`` numerics the input of a quantised layer is rounded to FP8 per 128 inputs first, as the
official GEMMs do (docs/design/numerics.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from rorqual.kernels import dispatch, reference

if TYPE_CHECKING:  # needs the optional triton
    from rorqual.kernels.triton import WeightTable

WeightFormat = Literal["plain", "fp8", "fp4"]
FP8_TILE = 128
FP4_BLOCK = 32


class Linear(nn.Module):
    """y = x W^T. ``weight`` [out, in] (FP4: [out, in/2] bytes); ``scale`` when quantised."""

    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_format: WeightFormat = "plain",
        quantize_input: bool = False,
    ) -> None:
        """quantize_input: round inputs to FP8 (only where the weight is quantised)."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = weight_format
        self.quantize_input = quantize_input and weight_format != "plain"
        weight, scale = empty_weight(out_features, in_features, weight_format)
        self.weight = nn.Parameter(weight, requires_grad=weight_format == "plain")
        self.register_buffer("scale", scale)
        self._product = PackedProduct()

    def dequantized(self) -> Tensor:
        """The weight as floating point [out, in]; the stored tensor itself when it is plain."""
        if self.scale is None:
            return self.weight
        if self.weight_format == "fp8":
            return reference.dequantize_fp8(self.weight, self.scale, block=FP8_TILE)
        return reference.dequantize_fp4(self.weight, self.scale, block=FP4_BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of ``x``."""
        if self.weight_format == "plain":
            return nn.functional.linear(x, self.weight.to(x.dtype))
        if dispatch.on_triton(x):
            rows = x.reshape(-1, self.in_features)
            end = torch.full((1,), rows.shape[0], device=x.device)
            out: Tensor = self._product([self], rows, end).unflatten(0, x.shape[:-1])
            return out
        if self.quantize_input:
            x_q = self.rounded(x)
            return nn.functional.linear(x_q.float(), self.dequantized()).to(x.dtype)
        return nn.functional.linear(x, self.dequantized().to(x.dtype))

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the product takes it, in the dtype of ``x``."""
        return reference.simulate_fp8(x, FP8_TILE) if self.quantize_input else x


class PackedProduct:
    """Applies quantised linears of one shape and format together, by the Triton kernels.

    Keeps the table of where their weights lie; always to be called with the same linears.
    """

    def __init__(self) -> None:
        self._table: WeightTable | None = None
        self._built_for = 0

    def __call__(self, linears: Sequence[Linear], x_NI: Tensor, ends_E: Tensor) -> Tensor:
        """[N, in] -> [N, out]: rows up to ``ends_E[e]`` from the previous end by linear ``e``."""
        from rorqual.kernels import triton

        first = linears[0]
        if self._table is None or self._built_for != first.weight.data_ptr():  # moved or reloaded
            kind = first.weight_format
            assert kind != "plain"
            scales = [linear.scale for linear in linears if linear.scale is not None]
            self._table = triton.WeightTable.of([linear.weight for linear in linears], scales, kind)
            self._built_for = first.weight.data_ptr()
        return triton.grouped_linear(first.rounded(x_NI), ends_E, self._table)


def empty_weight(
    out_features: int, in_features: int, weight_format: WeightFormat
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised (weight, scale) in the official storage layout; scale is None when plain."""
    if weight_format == "plain":
        return torch.empty(out_features, in_features), None
    if weight_format == "fp8":
        weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        tiles = (-(-out_features // FP8_TILE), -(-in_features // FP8_TILE))
        return weight, torch.empty(tiles, dtype=torch.float8_e8m0fnu)
    weight = torch.empty(out_features, in_features // 2, dtype=torch.int8)
    scale = torch.empty(out_features, -(-in_features // FP4_BLOCK), dtype=torch.float8_e8m0fnu)
    return weight, scale
