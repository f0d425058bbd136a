"""Products with packed FP8 and FP4 matrices, one matrix per group of rows (an expert's tokens).

Weights are expanded in registers, tile by tile, and never stored expanded. Codes are decoded with
integer operations and half-precision floats only, so that no hardware FP8 type is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.triton.launch import (
    MIN_DOT,
    ceil_div,
    must_widen,
    on_device_of,
    power_of_two,
    tile_product,
)

_MAX_ROWS = 64
_OUTPUTS = 64
_DEPTH = 64


@dataclass(frozen=True)
class WeightTable:
    """Where the matrices of all groups lie; the tensors must outlive it and not move."""

    weight_at: Tensor
    """int64 [E], addresses of e4m3 [O, I] or packed e2m1 [O, I/2] bytes."""
    scale_at: Tensor
    """int64 [E], addresses of e8m0 [ceil(O/128), ceil(I/128)] or [O, ceil(I/32)] bytes."""
    out_features: int
    in_features: int
    kind: Literal["fp8", "fp4"]

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], scales: Sequence[Tensor], kind: Literal["fp8", "fp4"]
    ) -> WeightTable:
        """A table of equally shaped, contiguous matrices on one device.

        Raises:
            ValueError: shapes, devices or layouts differ.
        """
        first = weights[0]
        out_features, columns = first.shape
        in_features = columns if kind == "fp8" else 2 * columns
        tiles = (ceil_div(out_features, 128), ceil_div(in_features, 128))
        scale_shape = tiles if kind == "fp8" else (out_features, ceil_div(in_features, 32))
        for weight, scale in zip(weights, scales, strict=True):
            if weight.shape != first.shape or tuple(scale.shape) != scale_shape:
                raise ValueError(f"{kind} matrices differ: {weight.shape} and {scale.shape}")
            if not (weight.is_contiguous() and scale.is_contiguous()):
                raise ValueError("packed matrices must be contiguous")
            if weight.device != first.device or scale.device != first.device:
                raise ValueError(f"packed matrices on {weight.device} and {scale.device}")

        def addresses(tensors: Sequence[Tensor]) -> Tensor:
            found = [tensor.data_ptr() for tensor in tensors]
            return torch.tensor(found, dtype=torch.int64, device=first.device)

        return cls(addresses(weights), addresses(scales), out_features, in_features, kind)


@triton.jit
def _e4m3(code):
    """float32 of e4m3 bytes: shifted into a half, whose exponent bias is 8 larger."""
    bits = ((code & 0x80).to(tl.int16) << 8) | ((code & 0x7F).to(tl.int16) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _e2m1(code):
    """float32 of e2m1 codes 0..15: shifted into a half, whose exponent bias is 14 larger."""
    bits = ((code & 8).to(tl.int16) << 12) | ((code & 7).to(tl.int16) << 9)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _e8m0(code):
    """float32 2 ** (code - 127): the code is the exponent field; 0 is a subnormal."""
    bits = code.to(tl.int32)
    bits = tl.where(bits == 0, 0x00400000, bits << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _grouped_linear(
    x,
    weight_at,
    scale_at,
    starts,
    ends,
    tile_ends,
    out,
    num_groups,
    outputs,
    inputs,
    IS_FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    # The group of a tile: how many groups' tiles end at or before it.
    before = (tl.load(tile_ends + e, mask=e < num_groups, other=2147483647) <= tile).to(tl.int32)
    group = tl.sum(before, axis=0)
    if group < num_groups:
        first_tile = tl.load(tile_ends + group - 1, mask=group > 0, other=0)
        row = tl.load(starts + group) + (tile - first_tile) * BLOCK_N
        n = row.to(tl.int64) + tl.arange(0, BLOCK_N)
        inside_N = n < tl.load(ends + group)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        inside_O = o < outputs
        weight = tl.load(weight_at + group).to(tl.pointer_type(tl.uint8))
        scale = tl.load(scale_at + group).to(tl.pointer_type(tl.uint8))
        sum_NO = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        for start in range(0, inputs, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            inside_I = i < inputs
            inside_OI = inside_O[:, None] & inside_I[None, :]
            inside_NI = inside_N[:, None] & inside_I[None, :]
            x_NI = tl.load(x + n[:, None] * inputs + i[None, :], mask=inside_NI, other=0.0)
            if IS_FP8:
                place = o[:, None].to(tl.int64) * inputs + i[None, :]
                value_OI = _e4m3(tl.load(weight + place, mask=inside_OI, other=0))
                at = (o // 128)[:, None] * tl.cdiv(inputs, 128) + (i // 128)[None, :]
            else:
                place = o[:, None].to(tl.int64) * (inputs // 2) + (i // 2)[None, :]
                pair = tl.load(weight + place, mask=inside_OI, other=0)
                value_OI = _e2m1(tl.where((i % 2)[None, :] == 0, pair & 15, pair >> 4))
                at = o[:, None].to(tl.int64) * tl.cdiv(inputs, 32) + (i // 32)[None, :]
            weight_OI = value_OI * _e8m0(tl.load(scale + at, mask=inside_OI, other=0))
            weight_OI = tl.where(inside_OI, weight_OI, 0.0).to(x_NI.dtype)
            sum_NO += tile_product(x_NI, tl.trans(weight_OI), WIDEN)
        place_NO = n[:, None] * outputs + o[None, :]
        inside_NO = inside_N[:, None] & inside_O[None, :]
        tl.store(out + place_NO, sum_NO.to(out.dtype.element_ty), mask=inside_NO)


def grouped_linear(x_NI: Tensor, ends_E: Tensor, table: WeightTable) -> Tensor:
    """y = x W_e^T for the rows of each group e; rows are sorted by group.

    Weights take the dtype of ``x_NI`` before the product (exact in bfloat16, whose exponent range
    is that of the scales), accumulation is float32. Nothing is read back from the device: as many
    programs start as any division of the rows could need.

    Args:
        x_NI: [N, I], rounded by the caller where the numerics ask for it.
        ends_E: int64 [E], row after the last of each group; ``ends_E[-1]`` is N.

    Returns:
        [N, O] in the dtype of ``x_NI``.
    """
    num_rows, num_groups = x_NI.shape[0], ends_E.shape[0]
    out = x_NI.new_empty(num_rows, table.out_features)
    if num_rows == 0:
        return out
    mean = ceil_div(num_rows, num_groups)
    block_n = min(power_of_two(mean, MIN_DOT), _MAX_ROWS)
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    tile_ends_E = ((ends_E - starts_E + block_n - 1) // block_n).cumsum(0)
    # Each group that has rows wastes less than one tile.
    most_tiles = num_rows // block_n + min(num_groups, num_rows)
    with on_device_of(x_NI):
        _grouped_linear[(most_tiles, ceil_div(table.out_features, _OUTPUTS))](
            x_NI.contiguous(),
            table.weight_at,
            table.scale_at,
            starts_E,
            ends_E,
            tile_ends_E,
            out,
            num_groups,
            table.out_features,
            table.in_features,
            IS_FP8=table.kind == "fp8",
            BLOCK_N=block_n,
            BLOCK_O=_OUTPUTS,
            BLOCK_I=_DEPTH,
            BLOCK_E=power_of_two(num_groups),
            WIDEN=must_widen(x_NI),
        )
    return out
