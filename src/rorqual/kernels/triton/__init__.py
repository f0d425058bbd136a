"""Kernels for accelerators in Triton, with the signatures of ``reference``.

Needs the optional package ``triton`` (on Ascend ``triton-ascend``, which installs under the same
name). The device is that of the tensors; nothing here names a vendor. ``dispatch`` chooses between
these functions and the reference. Inference only: no gradients, no float64.

Tested in Triton's interpreter; docs/kernels.md says what has run on a device. Block sizes are
chosen by register and memory arithmetic and are not tuned.
"""

from rorqual.kernels.triton.attention import sparse_attention
from rorqual.kernels.triton.compressor import pool_group
from rorqual.kernels.triton.hyper_connection import read_streams, stream_mixing, write_streams
from rorqual.kernels.triton.indexer import indexer_scores
from rorqual.kernels.triton.linear import WeightTable, grouped_linear

__all__ = [
    "WeightTable",
    "grouped_linear",
    "indexer_scores",
    "pool_group",
    "read_streams",
    "sparse_attention",
    "stream_mixing",
    "write_streams",
]
