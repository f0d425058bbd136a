"""Which kernels serve a tensor: Triton's on an accelerator, the reference everywhere else.

The choice is by device, made at every call from the tensor alone. Training does not come here: the
Triton kernels have no gradients.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from rorqual.kernels import reference
from rorqual.kernels.reference import StreamMixing

TRITON_DEVICES = ("cuda", "npu")
"""Device types that Triton compiles for: NVIDIA and AMD, Ascend."""


class Kernels(Protocol):
    """The functions both sides have; see ``reference`` for each."""

    def sparse_attention(
        self, q_THC: Tensor, kv_SC: Tensor, sink_H: Tensor, index_TK: Tensor, scale: float, /
    ) -> Tensor: ...

    def indexer_scores(self, q_THC: Tensor, weight_TH: Tensor, key_SC: Tensor, /) -> Tensor: ...

    def pool_group(self, values_GPC: Tensor, scores_GPC: Tensor, /) -> Tensor: ...

    def stream_mixing(
        self,
        streams_NMD: Tensor,
        fn: Tensor,
        scale: Tensor,
        base: Tensor,
        /,
        *,
        iterations: int,
        eps: float,
        norm_eps: float,
    ) -> StreamMixing: ...

    def read_streams(self, streams_NMD: Tensor, pre_NM: Tensor, /) -> Tensor: ...

    def write_streams(
        self, output_ND: Tensor, streams_NMD: Tensor, mixing: StreamMixing, /
    ) -> Tensor: ...


def kernels_for(x: Tensor) -> Kernels:
    """The kernels for tensors like ``x``; float64 is the reference's alone."""
    if not on_triton(x):
        return reference
    from rorqual.kernels import triton

    return triton


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve tensors like ``x``: on their devices, without gradients."""
    return (
        x.device.type in TRITON_DEVICES
        and x.dtype != torch.float64
        and not x.requires_grad
        and _triton_is_installed()
    )


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
