"""What every launch shares: the device of the tensors, block sizes, and the product of tiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_DOT = 16
"""Least rows, columns and depth of a product of tiles."""


@triton.jit
def tile_product(a, b, WIDEN: tl.constexpr):
    """a b with float32 sums, no operand rounded to less than it is."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


def must_widen(x: Tensor) -> bool:
    """Whether tiles of ``x`` have to be float32 in products.

    The interpreter, which is what runs on a CPU, multiplies the bit patterns of bfloat16.
    """
    return x.device.type == "cpu"


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current, as launches need where a machine has several."""
    if x.device.type == "cpu":  # the interpreter
        return nullcontext()
    device: AbstractContextManager[object] = torch.get_device_module(x.device).device(x.device)
    return device


def ceil_div(value: int, block: int) -> int:
    """Blocks that cover ``value``."""
    return -(-value // block)


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two >= ``value`` and ``least``: a tile's extent."""
    return max(least, 1 << (value - 1).bit_length())
