"""Random weights in which every parameter matters, for tests of the network and of checkpoints.

Training starts from ones, zeros and small numbers; with those a formula that forgets a norm weight,
a bias or a sink goes unnoticed. Here each of them is drawn far from its neutral value, while the
activations of a deep network stay of order one. Quantised tensors get random valid codes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rorqual.model.config import ModelConfig
from rorqual.model.layout import TensorSpec, tensor_table
from rorqual.model.linear import FP4_BLOCK, FP8_TILE

_NAN_CODE = 0x7F
_E8M0_BIAS = 127
# Root mean square of a uniformly random code: over all finite e4m3 values, over all e2m1 values.
_FP8_RMS, _FP4_RMS = 111.0, 2.93


def random_state(
    config: ModelConfig, seed: int, *, float_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A value for every tensor of ``config``'s official layout, reproducible from ``seed``."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: random_tensor(spec, config, rng)
        for spec in tensor_table(config, float_dtype=float_dtype)
    }


def random_tensor(spec: TensorSpec, config: ModelConfig, rng: np.random.Generator) -> Tensor:
    """A random value for one tensor, of its shape and dtype."""
    match spec.dtype:
        case torch.int64:
            return _hash_table(spec, config.n_routed_experts, rng)
        case torch.int8:
            return _random_bytes(spec, rng).view(torch.int8)
        case torch.float8_e4m3fn:
            codes = _random_bytes(spec, rng)
            codes[codes & _NAN_CODE == _NAN_CODE] ^= 1
            return codes.view(torch.float8_e4m3fn)
        case torch.float8_e8m0fnu:
            return _scales(spec, config, rng)
    values = torch.from_numpy(rng.standard_normal(spec.shape, dtype=np.float32))
    leaf = spec.name.removesuffix(".weight").rsplit(".", 1)[-1]
    if spec.role == "norm":
        values = 1 + 0.25 * values
    elif leaf.endswith("_scale"):
        values = 1 + 0.25 * values.clamp(-2, 2)
    elif leaf == "bias":
        values *= 0.2
    elif len(spec.shape) == 2 and leaf not in ("embed", "ape"):
        values /= math.sqrt(spec.shape[1])
    return values.to(spec.dtype)


def _random_bytes(spec: TensorSpec, rng: np.random.Generator) -> Tensor:
    data = np.frombuffer(bytearray(rng.bytes(math.prod(spec.shape))), dtype=np.uint8)
    return torch.from_numpy(data).view(spec.shape)


def _scales(spec: TensorSpec, config: ModelConfig, rng: np.random.Generator) -> Tensor:
    """Scales that bring the weights near variance 1/inputs, each off by up to a factor of two."""
    fmt = config.expert_dtype if spec.role == "routed_expert" else config.linear_dtype
    block, rms = (FP4_BLOCK, _FP4_RMS) if fmt == "fp4" else (FP8_TILE, _FP8_RMS)
    exponent = round(-math.log2(rms * math.sqrt(spec.shape[1] * block)))
    codes = rng.integers(-1, 2, size=spec.shape) + (_E8M0_BIAS + exponent)
    return torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e8m0fnu)


def _hash_table(spec: TensorSpec, experts: int, rng: np.random.Generator) -> Tensor:
    """Distinct experts in each row: one random pattern, shifted by a random amount per token."""
    vocab, topk = spec.shape
    pattern = rng.choice(experts, size=topk, replace=False)
    return torch.from_numpy((rng.integers(experts, size=(vocab, 1)) + pattern) % experts)
