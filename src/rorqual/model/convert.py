"""Convert a checkpoint between the official and the transformers layout, tensor by tensor.

Values are untouched with ``dtype="keep"``: packed FP4 codes, FP8 codes and scales are copied bit
for bit, so converting there and back gives the same bytes. ``bf16`` and ``fp32`` expand quantised
weights (both hold every FP8 and FP4 value exactly) and cast plain ones. ``experts="fp8"`` rewrites
FP4 experts as FP8 without loss. At most one tensor of the official layout is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.kernels import reference
from rorqual.model.checkpoint import LAYOUTS, Checkpoint
from rorqual.model.config import ModelConfig
from rorqual.model.layout import (
    Layout,
    StoredTensor,
    TensorSpec,
    tensor_table,
)
from rorqual.model.linear import FP4_BLOCK, FP8_TILE
from rorqual.model.shards import (
    CONFIG_FILE,
    DEFAULT_MAX_SHARD_BYTES,
    INDEX_FILE,
    Progress,
    write_shards,
)
from rorqual.model.transformers_layout import to_transformers_config

Dtype = Literal["keep", "bf16", "fp32"]
Experts = Literal["keep", "fp8"]

_FLOAT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_COMPANION_SUFFIXES = (".json", ".jinja", ".md", ".txt")
_FP8_OVER_FP4 = 2.0**6
"""FP4 codes reach 6, so the largest become 6 * 64 = 384, below FP8's 448."""


def convert_checkpoint(
    src: Path,
    dst: Path,
    *,
    to: Layout,
    dtype: Dtype = "keep",
    experts: Experts = "keep",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Write the checkpoint in directory ``src`` to directory ``dst`` in layout ``to``.

    The source's layout is recognised. Tokenizer, template and text files beside it are copied.
    A checkpoint already in ``dst`` is replaced together with those files, all or nothing.

    Args:
        to: "official" or "transformers".
        dtype: "keep" bit for bit; "bf16" or "fp32" for a plain floating-point checkpoint.
        experts: "fp8" turns packed FP4 experts into FP8 ones with the same values.
        max_shard_bytes: size limit per file in bytes; a larger tensor gets a file of its own.
        progress: called with tensor bytes written so far and in total.

    Returns:
        Tensor bytes written.

    Raises:
        CheckpointError: ``src`` is damaged or has no FP4 experts to convert, ``dst`` is ``src``,
            or the disk failed; the message names the file and tensor.
        ConfigError: ``config.json`` is wrong or cannot be expressed in layout ``to``.
    """
    if dst.resolve() == src.resolve():
        raise CheckpointError(f"{dst}: cannot convert a checkpoint onto itself")
    checkpoint = Checkpoint(src)
    target = _target(checkpoint, dtype, experts)

    def pieces(stored: StoredTensor) -> Iterator[Tensor]:
        for part in stored.parts:
            yield _value(checkpoint, part)

    raw: dict[str, Any] = (
        target.config.to_dict() if to == "official" else to_transformers_config(target.config)
    )
    return write_shards(
        dst,
        LAYOUTS[to](target.specs),
        pieces,
        config=raw,
        companions=_companions(src),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


class QuantizedWeight(NamedTuple):
    """An FP8 matrix: ``weight`` float8_e4m3fn [out, in], ``scale`` float8_e8m0fnu per tile."""

    weight: Tensor
    scale: Tensor


def fp4_to_fp8(packed: Tensor, scale: Tensor) -> QuantizedWeight:
    """The same values in FP8: per 128x128 tile, the largest FP4 scale / 64 becomes the scale.

    Args:
        packed: int8 [out, in/2]; scale: float8_e8m0fnu [out, ceil(in/32)].

    Raises:
        ValueError: scales inside one tile differ by more than 2^14, so FP8 cannot hold them all.
    """
    tile_scale = fp8_scale_of_fp4(scale)
    values = reference.dequantize_fp4(packed, scale, block=FP4_BLOCK)
    rows = tile_scale.float().repeat_interleave(FP8_TILE, 0)[: values.shape[0]]
    exact = values / rows.repeat_interleave(FP8_TILE, 1)[:, : values.shape[1]]
    weight = exact.to(torch.float8_e4m3fn)
    if not torch.equal(weight.float(), exact):
        raise ValueError("FP4 scales differ by more than 2^14 inside one 128x128 tile")
    return QuantizedWeight(weight, tile_scale)


def fp8_scale_of_fp4(scale: Tensor) -> Tensor:
    """The FP8 tile scales that ``fp4_to_fp8`` uses, float8_e8m0fnu [ceil(out/128), ...]."""
    blocks = FP8_TILE // FP4_BLOCK
    rows, columns = scale.shape
    padded = torch.nn.functional.pad(scale.float(), (0, -columns % blocks, 0, -rows % FP8_TILE))
    tiles = padded.view(padded.shape[0] // FP8_TILE, FP8_TILE, -1, blocks).amax((1, 3))
    return (tiles / _FP8_OVER_FP4).clamp_min(2.0**-127).to(torch.float8_e8m0fnu)


class _Target(NamedTuple):
    config: ModelConfig
    specs: tuple[TensorSpec, ...]


def _target(checkpoint: Checkpoint, dtype: Dtype, experts: Experts) -> _Target:
    """The config of the result and its official tensors in the dtypes to be written."""
    config = checkpoint.config
    if dtype != "keep":
        if experts != "keep":
            raise CheckpointError("experts='fp8' needs dtype='keep'; the others expand all weights")
        plain = config.replace(linear_dtype="plain", expert_dtype="plain")
        return _Target(plain, tensor_table(plain, float_dtype=_FLOAT_DTYPES[dtype]))
    if experts == "keep":
        return _Target(config, checkpoint.specs)
    if config.expert_dtype != "fp4":
        raise CheckpointError(
            f"{checkpoint.directory}: experts are {config.expert_dtype}, only fp4 can become fp8"
        )
    stored = {spec.name: spec.dtype for spec in checkpoint.specs}
    config = config.replace(expert_dtype="fp8")
    specs = tuple(
        spec if spec.role == "routed_expert" else dataclasses.replace(spec, dtype=stored[spec.name])
        for spec in tensor_table(config)
    )
    return _Target(config, specs)


def _value(checkpoint: Checkpoint, spec: TensorSpec) -> Tensor:
    """The checkpoint's tensor ``spec.name``, requantised or expanded to ``spec.dtype``."""
    tensor = checkpoint.read(spec.name)
    if spec.role == "routed_expert" and checkpoint.config.expert_dtype == "fp4":
        if spec.name.endswith(".scale") and tensor.shape != spec.shape:
            return fp8_scale_of_fp4(tensor)
        if spec.dtype == torch.float8_e4m3fn:
            try:
                return fp4_to_fp8(tensor, _scale_of(checkpoint, spec)).weight
            except ValueError as error:
                raise CheckpointError(f"{checkpoint.directory}: {spec.name}: {error}") from None
    if tensor.dtype == spec.dtype:
        return tensor
    if tensor.dtype == torch.float8_e4m3fn:
        scale = _scale_of(checkpoint, spec)
        return reference.dequantize_fp8(tensor, scale, block=FP8_TILE).to(spec.dtype)
    if tensor.dtype == torch.int8:
        scale = _scale_of(checkpoint, spec)
        return reference.dequantize_fp4(tensor, scale, block=FP4_BLOCK).to(spec.dtype)
    return tensor.to(spec.dtype)


def _scale_of(checkpoint: Checkpoint, weight: TensorSpec) -> Tensor:
    return checkpoint.read(weight.name.removesuffix(".weight") + ".scale")


def _companions(src: Path) -> tuple[Path, ...]:
    """What is not weights: tokenizer, templates, card, licence."""
    return tuple(
        path
        for path in sorted(src.iterdir())
        if path.is_file()
        and (path.suffix in _COMPANION_SUFFIXES or path.name == "LICENSE")
        and path.name not in (CONFIG_FILE, INDEX_FILE)
    )
