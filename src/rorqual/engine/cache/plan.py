"""Where a sequence restarts and where it stops for a checkpoint: pure functions over numbers.

Report 3.5.2. Compressed entries of a known prefix are reused as they are; the windows are not kept
everywhere, and what lies between the last place they are known and the end of the reused entries
is *replayed*: computed again to fill the windows, without writing entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rorqual.errors import ConfigError
from rorqual.kernels.layout import BLOCK_TOKENS

PolicyKind = Literal["full", "periodic", "zero"]


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """At which block boundaries windows are kept.

    Raises:
        ConfigError: a period is not a positive multiple of ``BLOCK_TOKENS``.
    """

    kind: PolicyKind = "periodic"
    """``full``: every boundary; a prompt is then fed one block at a time. ``periodic``: every
    ``period_tokens``. ``zero``: none."""
    period_tokens: int = 2048
    dense_tokens: int | None = 256
    """``periodic`` only: in memory, not on disk, also every so many, while there is room for them
    (``CacheConfig.dense_share``). What goes first is every other one, then every other one of the
    rest. None: not."""
    at_ends: bool = True
    """Also at the last whole block of a prompt, of an answer, and of a prefix that two prompts
    turned out to share. The report's zero policy is ``zero`` without this."""

    def __post_init__(self) -> None:
        if self.kind not in ("full", "periodic", "zero"):
            raise ConfigError(f"checkpoint policy must be full, periodic or zero, got {self.kind}")
        for name in ("period_tokens", "dense_tokens"):
            period = getattr(self, name)
            if period is not None and (period < 1 or period % BLOCK_TOKENS):
                raise ConfigError(
                    f"{name} must be a positive multiple of {BLOCK_TOKENS}, got {period}"
                )


@dataclass(frozen=True, kw_only=True)
class ReusePlan:
    """What a prompt can take over. Positions count tokens from the start."""

    prompt_tokens: int
    matched_tokens: int
    """Whole blocks whose entries are reused; the sequence shares these blocks."""
    restart: int
    """First token to compute, <= ``matched_tokens`` < ``prompt_tokens``."""
    from_checkpoint: bool
    """A checkpoint at ``restart`` must be imported; otherwise the state starts zeroed."""

    @property
    def cached_tokens(self) -> int:
        """Tokens that need no computation at all."""
        return self.restart

    @property
    def replayed_tokens(self) -> int:
        """Tokens whose entries are reused but which fill windows again: feed with REPLAY."""
        return self.matched_tokens - self.restart

    @property
    def missed_tokens(self) -> int:
        """Tokens seen for the first time."""
        return self.prompt_tokens - self.matched_tokens

    @property
    def exact_from(self) -> int:
        """From here on the windows are what they would be without the cache."""
        is_exact = self.from_checkpoint or self.restart == 0
        return self.restart if is_exact else self.matched_tokens


def last_boundary(num_tokens: int) -> int:
    """The last block boundary that leaves at least one of ``num_tokens`` to compute, >= 1.

    The last token is always computed: its logits are what the prompt was sent for.
    """
    return (num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def plan_reuse(
    *, prompt_tokens: int, matched_tokens: int, checkpoint: int, replay_tokens: int
) -> ReusePlan:
    """The restart that computes least.

    matched_tokens: longest known prefix in whole blocks, at most ``last_boundary``.
    checkpoint: deepest boundary <= ``matched_tokens`` with a checkpoint, 0 if none.
    replay_tokens: tokens after which windows that began empty are exact: each layer's entries need
        exact outputs of the layer below over its own window, so window x layers.
    """
    assert matched_tokens <= last_boundary(prompt_tokens), "nothing would be left to compute"
    rebuilt = max(0, matched_tokens - replay_tokens)
    return ReusePlan(
        prompt_tokens=prompt_tokens,
        matched_tokens=matched_tokens,
        restart=max(checkpoint, rebuilt),
        from_checkpoint=checkpoint > 0 and checkpoint >= rebuilt,
    )


def checkpoint_share(policy: CheckpointPolicy, plan: ReusePlan, boundary: int) -> float:
    """What the block boundary's checkpoint counts for: 1 if it is kept for good, 0 if not at all.

    Between them it is a dense one: kept in memory while there is room, and worth half as much as
    those twice as far apart.
    """
    if policy.kind == "full":
        return 1.0
    if policy.kind == "periodic" and boundary % policy.period_tokens == 0:
        return 1.0
    ends = (plan.matched_tokens, last_boundary(plan.prompt_tokens))
    if policy.at_ends and boundary in ends:
        return 1.0
    dense = policy.dense_tokens
    if policy.kind != "periodic" or dense is None or boundary % dense:
        return 0.0
    spacing = dense * _largest_power_of_2_in(boundary // dense)
    return min(0.5, spacing / policy.period_tokens)


def _largest_power_of_2_in(number: int) -> int:
    """The largest that divides ``number`` >= 1."""
    return number & -number


def next_stop(policy: CheckpointPolicy, plan: ReusePlan, position: int) -> int | None:
    """The next boundary after ``position`` at which a step must end so that a checkpoint can be
    taken; None if the rest may be fed in one piece.

    In an answer that is every boundary: which one is its last is not known before it ends.
    """
    position = max(position, plan.exact_from - 1)
    block = position // BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS
    if policy.kind == "full":
        return block
    stops: list[int] = []
    if policy.kind == "periodic":
        for period in (policy.period_tokens, policy.dense_tokens):
            if period is not None:
                stops.append(position // period * period + period)
    if policy.at_ends:
        end = last_boundary(plan.prompt_tokens)
        stops += [stop for stop in (plan.matched_tokens, end) if stop > position]
        if position >= end:
            stops.append(block)
    return min(stops, default=None)
