"""What an engine is asked and what it answers: plain, validated, immutable data.

Token ids only. Nothing here knows text, HTTP or the model; ``engine/engine.py`` does the work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rorqual.errors import RequestError

if TYPE_CHECKING:  # the server has requests but no torch
    from rorqual.engine.grammar import ConstraintSource

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""``stop``: a stop token was drawn, or the constraint's text is complete; ``length``:
``max_tokens``, the context or a bound of the constraint is used up;
``cancelled``: the caller gave up; ``error``: the model failed, see ``TokenOutput.error``."""

MAX_LOGPROBS = 20
"""Most alternatives per token a request may ask for."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are drawn.

    Penalties act on the logits first, then temperature, then top_k, top_p and min_p in that
    order; each filter sees the distribution the one before it left.

    Raises:
        RequestError: a value is out of range; ``param`` names the field.
    """

    max_tokens: int
    """Most tokens to generate, >= 1."""
    temperature: float = 1.0
    """0 is greedy; at most 2."""
    top_p: float = 1.0
    """Smallest set of most likely tokens whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once per time the token was generated before, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer, in (0, 10]."""
    seed: int | None = None
    """Same seed, same random numbers, whatever else is in the batch; None draws a fresh seed.
    Logits are equal up to the rounding of batched products, so almost always tokens are too."""
    logprobs: int | None = None
    """None: no log-probabilities. n: the drawn token's and the n most likely ones', 0..20."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer; they are not emitted."""

    def __post_init__(self) -> None:
        _integer(self, "max_tokens", 1)
        _integer(self, "top_k", 0)
        _number(self, "temperature", 0.0, 2.0)
        _number(self, "top_p", 0.0, 1.0, low_open=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        _number(self, "repetition_penalty", 0.0, 10.0, low_open=True)
        if self.seed is not None:
            _integer(self, "seed", -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _integer(self, "logprobs", 0, MAX_LOGPROBS)
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise RequestError(
                    f"stop_token_ids must be token ids, got {token!r}", param="stop_token_ids"
                )

    def replace(self, **changes: object) -> SamplingParams:
        """A copy with ``changes`` applied and validated."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural-log probabilities of one generated token under the model: before constraints,
    penalties and temperature. A constrained token may therefore be an unlikely one."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token_id, logprob) pairs, best first."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one request, up to and including the output that carries them."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose state was reused rather than computed."""
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """What one engine step added to a request's answer.

    Exactly one output per request carries ``finish_reason``; it is the last and may have no tokens.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token when the request asked for them."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """On the first output, since ``cached_tokens`` is known then, and on the last."""
    error: str | None = None
    """Why, when ``finish_reason`` is ``error``."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue.

    Raises:
        RequestError: the prompt is empty or holds something that is not a token id.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    request_id: str
    """Names the request in logs and errors; unique among the running requests."""
    on_output: Callable[[TokenOutput], None] | None = None
    """Called on the engine's thread for every output; must not block. Without it, iterate the
    handle."""
    constraint: ConstraintSource | None = None
    """What the answer may contain; None: anything."""
    deadline_s: float | None = None
    """Seconds after submission at which the request ends with an error, wherever it is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        if not self.prompt_ids:
            raise RequestError("the prompt is empty", param="prompt_ids")
        # Set and min run at C speed: a prompt may have a million tokens.
        if set(map(type, self.prompt_ids)) != {int} or min(self.prompt_ids) < 0:
            raise RequestError("prompt_ids must be integers >= 0", param="prompt_ids")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise RequestError(f"deadline_s must be > 0, got {self.deadline_s}", param="deadline_s")


def _integer(params: SamplingParams, name: str, low: int, high: int | None = None) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be {span}, got {value}", param=name)


def _number(
    params: SamplingParams, name: str, low: float, high: float, *, low_open: bool = False
) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {value!r}", param=name)
    if not math.isfinite(value) or value > high or value < low or (low_open and value == low):
        opening = "(" if low_open else "["
        raise RequestError(
            f"{name} must be in {opening}{low:g}, {high:g}], got {value}", param=name
        )
