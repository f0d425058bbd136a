"""Models side by side: operations, cache and weight reads per token at any context, as data.

Pure formulas of ``flops``, ``cost`` and ``v32``; ``rorqual cost`` prints what is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.model import flops, v32
from rorqual.model.checkpoint import read_config
from rorqual.model.config import PRESETS
from rorqual.model.cost import CacheCost, WeightReads, model_cost
from rorqual.model.flops import Span, TokenFlops
from rorqual.model.shards import CONFIG_FILE

BASELINE = "v3.2"
MAX_CONTEXT = 10**12
"""Tokens; far beyond any model, so that a mistyped number is an error and floats stay exact."""


@dataclass(frozen=True)
class Economics:
    """What one model costs."""

    name: str
    """As it was asked for: preset, baseline or path."""
    cache: CacheCost
    weights: WeightReads
    operations: Callable[[Span], TokenFlops]
    """Mean per token of a span."""


@dataclass(frozen=True)
class Point:
    """One model at one context."""

    name: str
    context: int
    """Tokens."""
    decode: TokenFlops
    """The token that completes the context."""
    prefill: TokenFlops
    """Mean per token of a prompt as long as the context."""
    cache_bytes: float
    """Keys and values of the whole context: compressed entries, index keys and the window."""


def economics(source: str) -> Economics:
    """Costs of ``v3.2``, of a preset, of a ``config.json`` or of a checkpoint directory.

    A path that exists wins over a preset of the same name.

    Raises:
        ConfigError: no such model; or its config is wrong.
    """
    path = Path(source)
    if path.exists():
        config = read_config(path / CONFIG_FILE if path.is_dir() else path)
    elif source == BASELINE:
        return Economics(
            source,
            v32.cache_cost(v32.V3_2),
            v32.weight_reads(v32.V3_2),
            partial(v32.token_flops, v32.V3_2),
        )
    elif source in PRESETS:
        config = PRESETS[source]
    else:
        known = ", ".join((BASELINE, *PRESETS))
        raise ConfigError(f"no model {source!r}: neither a file or directory nor one of {known}")
    cost = model_cost(config)
    return Economics(source, cost.cache, cost.reads, partial(flops.token_flops, config))


def point(model: Economics, context: int) -> Point:
    """``model`` at ``context`` tokens.

    Raises:
        ConfigError: the context is not between 1 and ``MAX_CONTEXT``.
    """
    if not 1 <= context <= MAX_CONTEXT:
        raise ConfigError(f"context must be 1 to {MAX_CONTEXT:,} tokens, got {context:,}")
    return Point(
        name=model.name,
        context=context,
        decode=model.operations(Span.decode(context)),
        prefill=model.operations(Span.prefill(context)),
        cache_bytes=model.cache.entries(context),
    )
