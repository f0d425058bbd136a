"""Our engine under measurement: which network, how it is run, and prompts for it.

A ``Setup`` is plain data, so that a measurement can be handed to a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rorqual.engine.cache.config import CacheConfig
from rorqual.engine.cache.plan import CheckpointPolicy
from rorqual.engine.engine import Engine, EngineConfig
from rorqual.engine.native_backend import NativeBackend, fingerprint_of
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.errors import ConfigError
from rorqual.kernels import cpu
from rorqual.kernels.layout import EntryFormat, KeyFormat, entry_nbytes, key_nbytes
from rorqual.model.checkpoint import load_model, read_config
from rorqual.model.config import TINY, ModelConfig, is_overlapping
from rorqual.model.native import NativeNetwork, NativeWeightFormat
from rorqual.model.transformer import Transformer

PREFILL_CHUNK_TOKENS = 512
"""Every engine reads prompts in steps of this many tokens."""
_SEED = 20_261_123


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A network and how the native engine runs it."""

    model: Path | None = None
    """A checkpoint directory; None: the ``tiny`` config with random float32 weights."""
    threads: int = 1
    weights: NativeWeightFormat = "fp32"
    entries: EntryFormat = "fp32"
    keys: KeyFormat = "int8"
    memory_bytes: int = 1 << 30
    max_running: int = 1
    speculate: bool = False
    policy: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    """Where windows are kept, to restart from."""
    directory: Path | None = None
    """Where the cache is kept on disk."""
    isa: str | None = None
    """Instructions the kernels of the whole process use from then on; None: the best there are."""

    @property
    def config(self) -> ModelConfig:
        """Of the network."""
        return TINY if self.model is None else read_config(self.model / "config.json")

    @property
    def bytes_per_token(self) -> float:
        """The formula: sum over CSA layers of (entry + key) / 4, over HCA layers of entry / m."""
        config = self.config
        entry = entry_nbytes(config.head_dim, config.qk_rope_head_dim, self.entries)
        key = key_nbytes(config.index_head_dim, self.keys)
        return sum(
            (entry + key * is_overlapping(ratio)) / ratio
            for ratio in config.compress_ratios[: config.num_hidden_layers]
            if ratio
        )

    def network(self) -> Transformer:
        """The weights."""
        return tiny_network() if self.model is None else load_model(self.model)

    def open(self) -> Engine:
        """A running engine; close it, or use it as a context manager.

        Raises:
            ConfigError: this machine lacks the instructions asked for.
            NativeMissingError: the kernels were not built.
        """
        if self.isa is not None and not cpu.native().set_isa(self.isa):
            raise ConfigError(f"this machine has no {self.isa}")
        network = self.network()
        native = NativeNetwork(
            network,
            entry_format=self.entries,
            key_format=self.keys,
            weight_format=self.weights,
            num_threads=self.threads,
        )
        cache = CacheConfig(
            memory_bytes=self.memory_bytes,
            max_sequences=self.max_running,
            policy=self.policy,
            directory=self.directory,
        )
        backend = NativeBackend(
            native,
            cache,
            fingerprint=fingerprint_of(network) if self.directory is not None else b"",
            drafts=self.speculate,
        )
        limits = SchedulerLimits(max_running=self.max_running, max_step_tokens=PREFILL_CHUNK_TOKENS)
        return Engine(backend, EngineConfig(limits=limits, speculate=self.speculate))


def tiny_network(seed: int = _SEED) -> Transformer:
    """The ``tiny`` network with random float32 weights."""
    model = Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def random_prompt(config: ModelConfig, length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids that have no prefix in common with those of another seed.

    A tuple: a request keeps it as it is, where a list of a million would be there twice.
    """
    generator = torch.Generator().manual_seed(_SEED + seed)
    ids: Sequence[int] = range(config.vocab_size)  # one object per token id, as in a tokenizer
    shared = list(ids)
    drawn = torch.randint(config.vocab_size, (length,), generator=generator)
    return tuple(shared[i] for i in drawn.tolist())
