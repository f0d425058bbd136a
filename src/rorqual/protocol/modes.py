"""Reasoning modes, what each means to each checkpoint generation, and a model's card.

A mode is named by what it is: ``non-think``, ``think``, ``think-max``. On the wire clients write
DeepSeek's effort words instead, and the checkpoints' releases moved those words: what the April
preview called "high" the later releases call "low". ``EFFORTS`` is the one place that knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from rorqual.errors import ConfigError

Mode = Literal["non-think", "think", "think-max"]
Generation = Literal["preview", "ga", "v4.1"]
"""``preview``: the April checkpoints and the nano models. ``ga``: V4-Flash-0731 and V4-Pro-0813.
``v4.1``: V4.1-Flash, which also has its own prompt layout."""
PromptEffort = Literal["low", "high", "max"]
"""deepseek-recipe's names of the texts an effort puts in front of the prompt."""

MODES: tuple[Mode, ...] = get_args(Mode)


class Level(NamedTuple):
    """What one effort word means to a checkpoint."""

    mode: Mode
    prompt_effort: PromptEffort | None
    """Which effort text the prompt carries; None with thinking off."""


_OFF = Level("non-think", None)
_PLAIN = Level("think", "low")  # V4: no effort text at all
_GA = MappingProxyType(
    {
        "none": _OFF,
        "minimal": _PLAIN,
        "low": _PLAIN,
        "medium": Level("think", "high"),
        "high": Level("think", "high"),
        "xhigh": Level("think", "high"),
        "max": Level("think-max", "max"),
        "ultra": Level("think-max", "max"),
    }
)
EFFORTS: Mapping[Generation, Mapping[str, Level]] = MappingProxyType(
    {
        # The preview has two thinking levels; its API sent low and medium to the lower of them and
        # xhigh to the higher. Its "max" text is the one later releases use for "high".
        "preview": MappingProxyType(
            {
                "none": _OFF,
                "minimal": _PLAIN,
                "low": _PLAIN,
                "medium": _PLAIN,
                "high": _PLAIN,
                "xhigh": Level("think-max", "high"),
                "max": Level("think-max", "high"),
                "ultra": Level("think-max", "high"),
            }
        ),
        # Later releases have three; the lightest is reachable by its word only.
        "ga": _GA,
        "v4.1": _GA,
    }
)
"""Effort word of the API -> level, per generation."""

_MODE_EFFORT: Mapping[Mode, str] = MappingProxyType(
    {"non-think": "none", "think": "high", "think-max": "max"}
)


def level_of_mode(generation: Generation, mode: Mode) -> Level:
    """The level ``mode`` stands for on a checkpoint of ``generation``."""
    return EFFORTS[generation][_MODE_EFFORT[mode]]


def request_fields(mode: Mode) -> dict[str, Any]:
    """The Chat Completions fields that ask any server for ``mode``, whatever its checkpoint."""
    if mode == "non-think":
        return {"thinking": {"type": "disabled"}}
    return {"thinking": {"type": "enabled"}, "reasoning_effort": _MODE_EFFORT[mode]}


def requested_level(
    generation: Generation, default: Mode, thinking: object, effort: object
) -> Level | None:
    """The level a request's ``thinking`` and ``reasoning_effort`` ask for, as the hosted API reads
    them: ``thinking`` decides whether, ``reasoning_effort`` how hard, ``default`` fills the gaps.

    Returns None if a value is malformed; validation of the whole body says how.
    """
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind == "disabled":
        return _OFF
    if effort is None:
        forced = kind is not None and default == "non-think"
        return level_of_mode(generation, "think" if forced else default)
    if not isinstance(effort, str):
        return None
    if effort == "none" and kind is not None:
        return level_of_mode(generation, "think")
    return EFFORTS[generation].get(effort)


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model's author recommends where the client says nothing."""

    temperature: float = 1.0
    """In [0, 2]; 0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature must be in [0, 2], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``card.json``, beside ``config.json``: how a checkpoint is to be addressed and prompted.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str
    """Model name on the wire."""
    generation: Generation
    context_length: int
    """Tokens of prompt and answer together; an engine that takes fewer lowers it."""
    aliases: tuple[str, ...] = ()
    """Further names clients may use."""
    description: str = ""
    default_mode: Mode = "think"
    """Mode of requests that name none."""
    default_max_tokens: int | None = None
    """Answer length of requests that name none; None takes DeepSeek's default for the mode. Either
    is lowered to what the context has left."""
    sampling: SamplingDefaults | None = None
    """None: sampling as DeepSeek's hosted API resolves it, which ignores the client's temperature
    while thinking. Set: the client's values count in every mode, and these fill the gaps."""
    example: str = ""
    """A user message this model answers well; the server's start-up message shows it."""

    def __post_init__(self) -> None:
        if not self.name or any(not name for name in self.aliases):
            raise ConfigError("name and aliases must not be empty")
        if self.context_length < 2:
            raise ConfigError(f"context_length must be >= 2 tokens, got {self.context_length}")
        if self.default_max_tokens is not None and self.default_max_tokens < 1:
            raise ConfigError(f"default_max_tokens must be >= 1, got {self.default_max_tokens}")

    @classmethod
    def from_dir(cls, path: Path) -> ModelCard:
        """Read ``path/card.json``. Raises ConfigError naming the file and the field."""
        file = path / "card.json"
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(f"{file}: {error}") from None
