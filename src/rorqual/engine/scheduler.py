"""Which sequences run in the next step, and how many tokens of each: plain data in, plan out.

Every running sequence has tokens the model has not seen yet: the rest of its prompt, or the one
token drawn last. A step feeds at most ``max_step_tokens`` of them. Decoding sequences go first,
one token each, so that an answer never waits for somebody's prompt; what is left of the budget is
shared evenly between prompts (max-min fair: a short prompt gets all it needs, long ones split the
rest), so that a long prompt delays a short one by at most a factor, never by its length.

Knows no model, no clock and no thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """The bounds of one step.

    Raises:
        ConfigError: a bound is out of range.
    """

    max_running: int = 8
    """Sequences that hold a cache at the same time."""
    max_step_tokens: int = 512
    """Tokens fed to the model in one step; more than ``max_running``, or prompts would starve."""
    min_chunk_tokens: int = 64
    """Prompts share a step only while each gets at least this many tokens (or all it needs)."""

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ConfigError(f"max_running must be >= 1, got {self.max_running}")
        if self.max_step_tokens <= self.max_running:
            raise ConfigError(
                f"max_step_tokens must be > max_running {self.max_running}, "
                f"got {self.max_step_tokens}"
            )
        if self.min_chunk_tokens < 1:
            raise ConfigError(f"min_chunk_tokens must be >= 1, got {self.min_chunk_tokens}")


@dataclass(frozen=True, kw_only=True)
class SequenceView:
    """What the scheduler may know of one running sequence."""

    key: int
    """Unique; smaller arrived earlier."""
    pending_tokens: int
    """Tokens the model has not seen, >= 1."""
    is_decoding: bool
    """The prompt has been read; the pending token is the one drawn last."""
    last_step: int
    """Step that last ran this sequence, -1 for never."""


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """Feed the next ``num_tokens`` pending tokens of sequence ``key``."""

    key: int
    num_tokens: int


def num_admissible(num_waiting: int, num_running: int, limits: SchedulerLimits) -> int:
    """How many waiting sequences, first come first served, may start running now."""
    return max(0, min(num_waiting, limits.max_running - num_running))


def schedule(running: Sequence[SequenceView], limits: SchedulerLimits) -> list[Scheduled]:
    """The next step's work, at most ``limits.max_step_tokens`` tokens, each key at most once.

    Sequences compete by how long ago they last ran, then by arrival, so none starves.
    """
    by_need = sorted(running, key=lambda view: (view.last_step, view.key))
    decoding = [view for view in by_need if view.is_decoding][: limits.max_step_tokens]
    plan = [Scheduled(key=view.key, num_tokens=1) for view in decoding]
    prefilling = [view for view in by_need if not view.is_decoding]
    shares = _fair_shares(
        [view.pending_tokens for view in prefilling],
        limits.max_step_tokens - len(decoding),
        limits.min_chunk_tokens,
    )
    for view, share in zip(prefilling, shares, strict=True):
        if share:
            plan.append(Scheduled(key=view.key, num_tokens=share))
    return plan


def _fair_shares(needs: Sequence[int], budget: int, minimum: int) -> list[int]:
    """Max-min fair split of ``budget`` over ``needs``; later entries get 0 where a share would
    fall below ``minimum``."""
    shares = [0] * len(needs)
    chosen: list[int] = []
    reserved = 0
    for i, need in enumerate(needs):
        claim = min(need, minimum)
        if reserved and reserved + claim > budget:
            break
        chosen.append(i)
        reserved += claim
    remaining = budget
    for rank, i in enumerate(sorted(chosen, key=lambda i: needs[i])):
        shares[i] = min(needs[i], remaining // (len(chosen) - rank))
        remaining -= shares[i]
    return shares
