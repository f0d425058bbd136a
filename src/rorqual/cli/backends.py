"""Which engine runs a loaded network: the native one on a CPU, PyTorch everywhere else."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.engine.backend import Backend
from rorqual.engine.cache.config import CacheConfig
from rorqual.engine.native_backend import NativeBackend, fingerprint_of
from rorqual.engine.torch_backend import TorchBackend
from rorqual.errors import ConfigError
from rorqual.kernels.cpu import NativeMissingError
from rorqual.model.native import NativeNetwork, NativeWeightFormat
from rorqual.model.transformer import Transformer

_log = logging.getLogger(__name__)
_SHARE_OF_MEMORY = 8
"""The cache takes up to this fraction of the machine's memory unless told otherwise."""

EngineName = Literal["auto", "native", "torch"]


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What the command's options say about how a network is run."""

    engine: EngineName = "auto"
    threads: int | None = None
    """None: one per core this process may use."""
    weights: NativeWeightFormat = "as stored"
    precision: Literal["full", "compact"] = "full"
    """Of the cache. ``full``: float32 entries, int8 indexer keys; ``compact``: the released
    models' own records, FP8 with BF16 rotated dims and FP4 keys."""
    cache_memory_mib: int | None = None
    """None: an eighth of the machine's memory."""
    cache_dir: Path | None = None
    """Where the cache survives a restart."""


def make_backend(
    network: Transformer, device: str, max_running: int, options: BackendOptions
) -> Backend:
    """The engine for ``network``, whose weights a native one copies.

    Raises:
        ConfigError: the options do not fit the device or each other, or ``engine`` is ``native``
            and the kernels were not built.
    """
    if options.engine == "native" and device != "cpu":
        raise ConfigError(f"--engine native runs on a CPU, not on {device}")
    if options.engine == "torch" or device != "cpu":
        return _torch(network, device, options)
    try:
        return _native(network, max_running, options)
    except NativeMissingError as error:
        if options.engine == "native":
            raise ConfigError(f"--engine native: {error}") from None
        _log.warning("%s: running on PyTorch, which decodes an order of magnitude slower", error)
        return _torch(network, device, options)


def _torch(network: Transformer, device: str, options: BackendOptions) -> Backend:
    if options.cache_dir is not None:
        raise ConfigError("--cache-dir needs the native engine: PyTorch reuses no prompt")
    return TorchBackend(network, device, options.threads)


def _native(network: Transformer, max_running: int, options: BackendOptions) -> Backend:
    compact = options.precision == "compact"
    native = NativeNetwork(
        network,
        entry_format="record" if compact else "fp32",
        key_format="fp4" if compact else "int8",
        weight_format=options.weights,
        num_threads=options.threads or len(os.sched_getaffinity(0)),
    )
    if options.cache_memory_mib is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE_OF_MEMORY
    else:
        memory = options.cache_memory_mib << 20
    cache = CacheConfig(memory_bytes=memory, max_sequences=max_running, directory=options.cache_dir)
    fingerprint = fingerprint_of(network) if options.cache_dir is not None else b""
    backend = NativeBackend(native, cache, fingerprint=fingerprint)
    if backend.max_context_tokens < network.config.max_position_embeddings:
        _log.warning(
            "a cache of %d MiB holds %d of the model's %d tokens of context",
            memory >> 20,
            backend.max_context_tokens,
            network.config.max_position_embeddings,
        )
    return backend
