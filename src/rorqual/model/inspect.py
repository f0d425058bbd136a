"""What a model is and costs, as data: from a preset, a ``config.json`` or a checkpoint.

A checkpoint's files are checked (headers only, nothing is read into memory), so inspecting one is
also the quickest way to learn that it is whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.model.checkpoint import Checkpoint, read_config
from rorqual.model.config import PRESETS, ModelConfig, is_overlapping
from rorqual.model.cost import ModelCost, model_cost
from rorqual.model.layout import Layout, TensorSpec, tensor_table
from rorqual.model.shards import CONFIG_FILE, DTYPE_CODES

_CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}


@dataclass(frozen=True, kw_only=True)
class DtypeTotal:
    """How much of a checkpoint one storage dtype takes."""

    dtype: str
    """safetensors code, such as BF16."""
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """Consecutive blocks of one kind, or of two kinds in turn."""

    first: int
    last: int
    """Inclusive."""
    attention: tuple[str, ...]
    """``window``, ``CSA 4``, ``HCA 128``; two where they alternate."""
    routing: str
    is_mtp: bool


@dataclass(frozen=True, kw_only=True)
class StoredFiles:
    """The files of a checkpoint."""

    layout: Layout
    num_files: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything there is to say about one model; plain data."""

    name: str
    """Preset name or path."""
    config: ModelConfig
    cost: ModelCost
    schedule: tuple[LayerRun, ...]
    dtypes: tuple[DtypeTotal, ...]
    """Of the files, or of the official layout where there are none; MTP included."""
    files: StoredFiles | None
    """None for a preset or a bare config."""

    @property
    def num_bytes(self) -> int:
        """All tensor bytes, MTP included."""
        return sum(total.num_bytes for total in self.dtypes)

    @property
    def num_tensors(self) -> int:
        """Official tensors, MTP included."""
        return sum(total.num_tensors for total in self.dtypes)


def inspect_model(source: str | Path) -> Inspection:
    """Inspect a preset name, a ``config.json`` path or a checkpoint directory.

    A directory that exists wins over a preset of the same name.

    Raises:
        ConfigError: unknown name, missing or wrong config.
        CheckpointError: the directory's tensors do not match its config; names file and tensor.
    """
    path = Path(source)
    files: StoredFiles | None = None
    if path.is_dir():
        checkpoint = Checkpoint(path)
        config, specs = checkpoint.config, checkpoint.specs
        files = StoredFiles(layout=checkpoint.layout, num_files=checkpoint.shards.num_files)
    elif path.is_file():
        config = read_config(path)
        specs = tensor_table(config)
    elif str(source) in PRESETS:
        config = PRESETS[str(source)]
        specs = tensor_table(config)
    else:
        raise ConfigError(
            f"{source}: neither a checkpoint directory, a {CONFIG_FILE} nor one of the presets "
            f"{', '.join(PRESETS)}"
        )
    return Inspection(
        name=str(source),
        config=config,
        cost=model_cost(config),
        schedule=_schedule(config),
        dtypes=_dtype_totals(specs),
        files=files,
    )


def _schedule(config: ModelConfig) -> tuple[LayerRun, ...]:
    """The blocks in order, repeats and alternations of two kinds folded into one run."""
    kinds = []
    for index, ratio in enumerate(config.compress_ratios):
        attention = (
            "window" if not ratio else f"{'CSA' if is_overlapping(ratio) else 'HCA'} {ratio}"
        )
        routing = "hash" if index < config.num_hash_layers else "score"
        kinds.append((attention, routing, index >= config.num_hidden_layers))

    def end_of_repeat(start: int, period: int) -> int:
        end = min(start + period, len(kinds))
        while end < len(kinds) and kinds[end] == kinds[end - period]:
            end += 1
        return end

    runs, first = [], 0
    while first < len(kinds):
        attention, routing, is_mtp = kinds[first]
        end = end_of_repeat(first, 1)
        pattern: tuple[str, ...] = (attention,)
        if end - first == 1 and (pair_end := end_of_repeat(first, 2)) - first >= 4:
            other, *rest = kinds[first + 1]
            if rest == [routing, is_mtp]:
                end, pattern = pair_end, (attention, other)
        runs.append(
            LayerRun(first=first, last=end - 1, attention=pattern, routing=routing, is_mtp=is_mtp)
        )
        first = end
    return tuple(runs)


def _dtype_totals(specs: tuple[TensorSpec, ...]) -> tuple[DtypeTotal, ...]:
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for spec in specs:
        tensors[_CODE_OF[spec.dtype]] += 1
        sizes[_CODE_OF[spec.dtype]] += spec.nbytes
    return tuple(
        DtypeTotal(dtype=code, num_tensors=tensors[code], num_bytes=size)
        for code, size in sizes.most_common()
    )
