"""Load and save whole models: official or transformers layout, lazily and checked.

Opening a checkpoint reads headers only and compares every tensor with ``layout.tensor_table``;
loading maps the files into memory, so a model starts in seconds and its pages are read when first
used. What the files look like is in ``shards``; the two layouts are in ``layout`` and
``transformers_layout``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rorqual.errors import CheckpointError, ConfigError
from rorqual.model.config import ModelConfig, Numerics
from rorqual.model.layout import (
    Layout,
    StoredTensor,
    TensorSpec,
    official_tensors,
    tensor_table,
)
from rorqual.model.shards import (
    CONFIG_FILE,
    DEFAULT_MAX_SHARD_BYTES,
    Progress,
    ShardReader,
    write_shards,
)
from rorqual.model.transformer import Transformer
from rorqual.model.transformers_layout import (
    from_transformers_config,
    is_transformers_config,
    transformers_tensors,
)

LAYOUTS: dict[Layout, Callable[[Iterable[TensorSpec]], tuple[StoredTensor, ...]]] = {
    "official": official_tensors,
    "transformers": transformers_tensors,
}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What a file may hold for each dtype of the table; the first column is what it is read as.
_ACCEPTED: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float8_e4m3fn: (torch.float8_e4m3fn,),
    torch.float8_e8m0fnu: (torch.float8_e8m0fnu, torch.uint8, torch.float32),
    torch.int8: (torch.int8, torch.uint8),
    torch.int64: (torch.int64, torch.int32),
}


class Checkpoint:
    """An opened checkpoint directory: its config and its tensors under their official names.

    Attributes:
        config: as ``config.json`` says, in either project's spelling; without MTP blocks where
            transformers, which has none, dropped them when it saved the model.
        layout: how the files name and stack tensors.
        specs: every official tensor in order, with the dtype actually stored.
        shards: the files.

    Raises:
        CheckpointError: unreadable files, or a tensor that is missing, unexpected, misshapen or
            of the wrong dtype; the message names file and tensor.
        ConfigError: ``config.json`` is missing or wrong.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory / CONFIG_FILE)
        self.shards = ShardReader(directory)
        names = self.shards.entries
        self.layout: Layout = (
            "transformers" if any(name.startswith("model.") for name in names) else "official"
        )
        if self.layout == "transformers" and not any(name.startswith("mtp.") for name in names):
            self.config = _without_mtp(self.config)
        canonical = {_canonical(name): name for name in names}
        stored: list[StoredTensor] = []
        table = tensor_table(self.config)
        for tensor in LAYOUTS[self.layout](table):
            source = canonical.pop(tensor.name, None)
            if source is None:
                raise CheckpointError(f"{directory}: tensor {tensor.name!r} is missing")
            stored.append(self._checked(tensor, source))
        for name, source in canonical.items():
            if not _is_shared_copy(name):
                raise CheckpointError(
                    f"{self.shards.path_of(source)}: unexpected tensor {source!r}; "
                    f"{CONFIG_FILE} describes no such part"
                )
        self._source = {
            part.name: (tensor.name, start, part)
            for tensor in stored
            for start, part in _offsets(tensor)
        }
        self.specs = tuple(self._source[spec.name][2] for spec in table)

    def read(self, name: str) -> Tensor:
        """The official tensor ``name``; a view of the mapped file wherever the bytes allow it.

        Raises CheckpointError for scales stored as FP32 that are not powers of two.
        """
        source, start, spec = self._source[name]
        tensor = self.shards.read(source)
        if tensor.shape != spec.shape:
            size = math.prod(spec.shape)
            tensor = tensor.flatten()[start : start + size].view(spec.shape)
        if tensor.dtype == spec.dtype:
            return tensor
        if spec.dtype == torch.int64:
            return tensor.long()
        if tensor.dtype != torch.float32:
            return tensor.view(spec.dtype)
        scale = tensor.to(spec.dtype)
        if not torch.equal(scale.float(), tensor):
            raise CheckpointError(
                f"{self.shards.path_of(source)}: scale {source!r} is not a power of two everywhere"
            )
        return scale

    def _checked(self, tensor: StoredTensor, source: str) -> StoredTensor:
        """``tensor`` under its stored name, its parts in the dtype ``read`` gives."""
        entry = self.shards.entries[source]
        where = f"{self.shards.path_of(source)}: tensor {source!r}"
        if entry.shape != tensor.shape:
            raise CheckpointError(f"{where} has shape {entry.shape}, expected {tensor.shape}")
        accepted = _ACCEPTED.get(tensor.dtype, _FLOATS)
        if entry.dtype not in accepted:
            raise CheckpointError(f"{where} has dtype {entry.dtype}, expected {tensor.dtype}")
        dtype = entry.dtype if accepted is _FLOATS else accepted[0]
        parts = tuple(dataclasses.replace(part, dtype=dtype) for part in tensor.parts)
        return StoredTensor(source, tensor.shape, dtype, parts)


def read_config(path: Path) -> ModelConfig:
    """The ``config.json`` at ``path``, in the official or the transformers spelling.

    Raises:
        ConfigError: missing, not JSON, or wrong; the message names the file.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return ModelConfig.from_json(path)
    if not isinstance(raw, dict) or not is_transformers_config(raw):
        return ModelConfig.from_json(path)
    try:
        return from_transformers_config(cast("dict[str, Any]", raw))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_model(
    path: Path,
    *,
    progress: Progress | None = None,
    numerics: Numerics | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model stored in directory ``path``, its parameters mapped from the files.

    Args:
        progress: called with bytes handled so far and in total.
        numerics: run in this mode instead of the one ``config.json`` names.
        dtype: cast the plain floating-point tensors, which copies them; None keeps them mapped.

    Raises:
        CheckpointError, ConfigError: as ``Checkpoint``; also a hash table that names an expert
            there is not.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    if numerics is not None:
        config = config.replace(numerics=numerics)
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(spec.nbytes for spec in checkpoint.specs)
    state: dict[str, Tensor] = {}
    done = 0
    for spec in checkpoint.specs:
        tensor = checkpoint.read(spec.name)
        if tensor.dtype == torch.int64:
            _check_experts(tensor, spec.name, config, path)
        if dtype is not None and tensor.dtype in _FLOATS:
            tensor = tensor.to(dtype)
        state[spec.name] = tensor
        done += spec.nbytes
        if progress is not None:
            progress(done, total)
    model.load_state_dict(state, assign=True)
    return model


def save_model(
    model: Transformer,
    path: Path,
    *,
    float_dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Write ``model`` to directory ``path`` in the official layout, replacing what is there.

    The replacement is all or nothing (see ``shards.write_shards``); other files stay.

    Args:
        float_dtype: store the tensors that official checkpoints keep in BF16 in this dtype;
            None keeps the dtype each has in memory.

    Returns:
        Tensor bytes written.

    Raises:
        CheckpointError: the disk failed.
    """
    state = cast("dict[str, Tensor]", model.state_dict())
    specs = []
    for spec in tensor_table(model.config, float_dtype=float_dtype or torch.bfloat16):
        tensor = state[spec.name]
        assert tensor.shape == spec.shape, f"{spec.name}: {tuple(tensor.shape)} != {spec.shape}"
        keep = float_dtype is None or spec.dtype not in _FLOATS
        specs.append(dataclasses.replace(spec, dtype=tensor.dtype) if keep else spec)
    assert len(specs) == len(state), f"not in the layout: {state.keys() - {s.name for s in specs}}"

    def pieces(stored: StoredTensor) -> Iterator[Tensor]:
        for part in stored.parts:
            yield state[part.name].to(part.dtype)

    return write_shards(
        path,
        official_tensors(specs),
        pieces,
        config=model.config.to_dict(),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _check_experts(table: Tensor, name: str, config: ModelConfig, directory: Path) -> None:
    """The hash-routing tables are the only integers stored as such; each names experts."""
    low, high = (int(bound) for bound in table.aminmax())
    if low < 0 or high >= config.n_routed_experts:
        raise CheckpointError(
            f"{directory}: tensor {name!r} names experts {low} to {high}, there are "
            f"{config.n_routed_experts}"
        )


def _offsets(tensor: StoredTensor) -> Iterator[tuple[int, TensorSpec]]:
    """Each part with its first element's index in the flattened stored tensor."""
    start = 0
    for part in tensor.parts:
        yield start, part
        start += math.prod(part.shape)


def _canonical(name: str) -> str:
    """``name`` with the scale spelling of older checkpoints replaced by the current one."""
    is_official = name.startswith(("layers.", "mtp."))
    if is_official and name.endswith(".weight_scale_inv"):
        return name.removesuffix(".weight_scale_inv") + ".scale"
    return name


def _without_mtp(config: ModelConfig) -> ModelConfig:
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return config.replace(num_nextn_predict_layers=0, compress_ratios=ratios)


def _is_shared_copy(name: str) -> bool:
    """Whether it is an MTP block's copy of the embedding or head, which the main model lends it."""
    block, _, copy = name.removeprefix("mtp.").partition(".")
    return name == f"mtp.{block}.{copy}" and copy in ("embed.weight", "head.weight")
