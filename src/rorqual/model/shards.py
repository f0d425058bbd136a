"""Directories of safetensors files: one file, or shards with ``model.safetensors.index.json``.

Reading maps files into memory and copies nothing. Writing streams tensors to disk in pieces, so a
tensor larger than memory can be written, and commits at the end: until the last rename a reader
finds the previous checkpoint or none at all. This module knows files and bytes; which tensors a
model needs is in ``layout``, and checking them against it in ``checkpoint``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.model.layout import StoredTensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DEFAULT_MAX_SHARD_BYTES = 4 * 2**30

Progress = Callable[[int, int], None]
"""Called as ``progress(bytes_done, bytes_total)``."""

DTYPE_CODES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}
_PARTIAL = ".partial"
_CACHE_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a stored tensor lies and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardReader:
    """The tensors of one directory, read lazily.

    Opening reads headers only. Every listed file must exist and be whole, and the index must agree
    with the files.

    Raises:
        CheckpointError: no checkpoint, broken index, missing or truncated file; the message names
            the file and, where one is concerned, the tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        listed = _listed_tensors(directory)
        for file in sorted(set(listed.values())) if listed is not None else [SINGLE_FILE]:
            self._open(file, listed)
        for name, file in (listed or {}).items():
            if name not in self.entries:
                raise CheckpointError(
                    f"{directory / file}: tensor {name!r}, listed in {INDEX_FILE}, is missing"
                )

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` as a memory-mapped view; writing to it does not reach the file."""
        tensor: Tensor = self._files[self.entries[name].file].get_tensor(name)
        return tensor

    def path_of(self, name: str) -> Path:
        """The file that holds ``name``, for messages."""
        return self.directory / self.entries[name].file

    @property
    def num_files(self) -> int:
        """Number of safetensors files."""
        return len(self._files)

    def _open(self, file: str, listed: Mapping[str, str] | None) -> None:
        path = self.directory / file
        try:
            handle: Any = safe_open(path, framework="pt")
        except FileNotFoundError:
            names = [name for name, where in (listed or {}).items() if where == file]
            raise CheckpointError(
                f"{path}: shard is missing; it holds {len(names)} tensors, {names[0]!r} first"
            ) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {_diagnosis(path) or error}") from None
        self._files[file] = handle
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            if listed is not None and listed.get(name) != file:
                raise CheckpointError(f"{path}: tensor {name!r} is not listed in {INDEX_FILE}")
            view = handle.get_slice(name)
            code = view.get_dtype()
            if code not in DTYPE_CODES:
                raise CheckpointError(f"{path}: tensor {name!r} has unsupported dtype {code}")
            self.entries[name] = Entry(file, tuple(view.get_shape()), DTYPE_CODES[code])


def _listed_tensors(directory: Path) -> dict[str, str] | None:
    """The index's tensor -> file map, or None for a single-file checkpoint."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if not index.exists():
        if not single.exists():
            raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is here")
        return None
    if single.exists():
        raise CheckpointError(f"{directory}: has both {SINGLE_FILE} and {INDEX_FILE}; remove one")
    try:
        raw = json.loads(index.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a JSON file: {error}") from None
    listed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index}: 'weight_map' must be a non-empty object")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: tensor {name!r} names {file!r}, not a file beside it")
    return listed


def _diagnosis(path: Path) -> str | None:
    """Which tensor a truncated file cuts off, or None if it is damaged in another way."""
    if not path.is_file():
        return "not a file"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            return f"truncated in its header ({size} bytes)"
        try:
            header = json.loads(file.read(length))
            ends = sorted(
                (int(v["data_offsets"][1]), k) for k, v in header.items() if k != "__metadata__"
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            return None
        except RecursionError:
            return "its header is nested too deeply"
    for end, name in ends:
        if 8 + length + end > size:
            return f"truncated: tensor {name!r} ends at byte {8 + length + end} of {size}"
    return None


# ---- writing ------------------------------------------------------------------------------------


def write_shards(
    directory: Path,
    tensors: Sequence[StoredTensor],
    pieces: Callable[[StoredTensor], Iterable[Tensor]],
    *,
    config: Mapping[str, Any],
    companions: Sequence[Path] = (),
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Write ``tensors`` and ``config.json`` to ``directory``, replacing a checkpoint there.

    All data is first written to ``*.partial`` files and flushed to the device. Only then is the
    old entry point (index or single file) removed, the new files renamed into place, and the new
    entry point renamed last. A process killed at any moment leaves the old checkpoint, the new
    one, or a directory that opens as neither. Other files in the directory are left alone.

    Args:
        pieces: yields the values of one tensor, in row-major order, in its dtype; called once per
            tensor. At most one piece is held at a time.
        companions: files copied beside the weights and committed with them.
        max_shard_bytes: a larger tensor gets a shard of its own.

    Returns:
        Tensor bytes written.

    Raises:
        CheckpointError: the disk failed, or a tensor's pieces do not add up to it.
    """
    shards = _plan(tensors, max_shard_bytes)
    files = (
        [SINGLE_FILE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    pending: dict[str, Path] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_stale_partials(directory)
        for file, shard in zip(files, shards, strict=True):
            pending[file] = directory / (file + _PARTIAL)
            with pending[file].open("wb") as out:
                _write_file(out, shard, pieces, advance)
                _flush(out)
        for source in companions:
            pending[source.name] = directory / (source.name + _PARTIAL)
            with source.open("rb") as text, pending[source.name].open("wb") as out:
                shutil.copyfileobj(text, out)
                _flush(out)
        pending[CONFIG_FILE] = _write_json(directory, CONFIG_FILE, config)
        if len(shards) > 1:
            weight_map = {
                t.name: file for file, shard in zip(files, shards, strict=True) for t in shard
            }
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            pending[INDEX_FILE] = _write_json(directory, INDEX_FILE, index)
        _commit(directory, pending)
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: {error.strerror or error}") from None
    finally:
        for path in pending.values():
            path.unlink(missing_ok=True)
    return total


def _plan(tensors: Sequence[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    """Consecutive tensors per shard, ordered inside it so that all of them lie aligned.

    First those that fill whole cache lines, which therefore start on one, then the others, wide
    dtypes first.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be >= 1, got {max_shard_bytes}")
    shards: list[list[StoredTensor]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes

    def order(tensor: StoredTensor) -> tuple[bool, int]:
        return tensor.nbytes % _CACHE_LINE_BYTES != 0, -tensor.dtype.itemsize

    return [sorted(shard, key=order) for shard in shards]


def _write_file(
    out: BinaryIO,
    tensors: Sequence[StoredTensor],
    pieces: Callable[[StoredTensor], Iterable[Tensor]],
    advance: Callable[[int], None],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _CACHE_LINE_BYTES)
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        written = 0
        for piece in pieces(tensor):
            if piece.dtype != tensor.dtype:
                raise CheckpointError(
                    f"tensor {tensor.name!r} must be {tensor.dtype}, got {piece.dtype}"
                )
            data = piece.detach().cpu().contiguous().view(torch.uint8).reshape(-1)
            out.write(data.numpy().data)
            written += data.numel()
        if written != tensor.nbytes:
            raise CheckpointError(
                f"tensor {tensor.name!r} of shape {tensor.shape} takes {tensor.nbytes} bytes, "
                f"got {written}"
            )
        advance(written)


def _write_json(directory: Path, file: str, value: Mapping[str, Any]) -> Path:
    path = directory / (file + _PARTIAL)
    with path.open("wb") as out:
        out.write((json.dumps(value, indent=2) + "\n").encode())
        _flush(out)
    return path


def _commit(directory: Path, pending: Mapping[str, Path]) -> None:
    """Swap the finished files in; the entry point disappears first and appears last."""
    entry = INDEX_FILE if INDEX_FILE in pending else SINGLE_FILE
    for old in (INDEX_FILE, SINGLE_FILE):
        (directory / old).unlink(missing_ok=True)
    _sync_directory(directory)
    for old_shard in directory.glob("model-*-of-*.safetensors"):
        old_shard.unlink()
    for file, path in pending.items():
        if file != entry:
            path.rename(directory / file)
    _sync_directory(directory)
    pending[entry].rename(directory / entry)
    _sync_directory(directory)


def _remove_stale_partials(directory: Path) -> None:
    for path in directory.glob(f"*{_PARTIAL}"):
        path.unlink()


def _flush(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
