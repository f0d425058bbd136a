"""The scheduler's promises hold for any mix of sequences."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.engine.scheduler import SchedulerLimits, SequenceView, num_admissible, schedule
from rorqual.errors import ConfigError

LIMITS = SchedulerLimits(max_running=8, max_step_tokens=256, min_chunk_tokens=32)


@st.composite
def running_sequences(draw: st.DrawFn) -> list[SequenceView]:
    count = draw(st.integers(0, LIMITS.max_running))
    views = []
    for key in range(count):
        decoding = draw(st.booleans())
        views.append(
            SequenceView(
                key=key,
                pending_tokens=1 if decoding else draw(st.integers(1, 1000)),
                is_decoding=decoding,
                last_step=draw(st.integers(-1, 5)),
            )
        )
    return views


@given(running_sequences())
def test_plan_respects_budget_and_needs_and_wastes_nothing(views: list[SequenceView]) -> None:
    plan = schedule(views, LIMITS)
    granted = {item.key: item.num_tokens for item in plan}
    assert len(granted) == len(plan), "a sequence appears once"
    assert sum(granted.values()) <= LIMITS.max_step_tokens
    for view in views:
        assert 0 <= granted.get(view.key, 0) <= view.pending_tokens
        if view.is_decoding:
            assert granted[view.key] == 1, "decoding never waits"
    needed = sum(view.pending_tokens for view in views)
    waiting = [v for v in views if not v.is_decoding and v.key not in granted]
    if not waiting:
        assert sum(granted.values()) == min(needed, LIMITS.max_step_tokens)


@given(running_sequences())
def test_prompts_in_one_step_share_max_min_fairly(views: list[SequenceView]) -> None:
    granted = {item.key: item.num_tokens for item in schedule(views, LIMITS)}
    chosen = [v for v in views if not v.is_decoding and v.key in granted]
    cut = [v for v in chosen if granted[v.key] < v.pending_tokens]
    for short in cut:
        for other in chosen:
            assert granted[other.key] <= granted[short.key] + 1


@given(running_sequences())
def test_every_sequence_runs_within_two_rounds(views: list[SequenceView]) -> None:
    """Prompts never starve: repeatedly scheduling endless prompts serves each of them."""
    state = {v.key: dataclasses.replace(v, pending_tokens=max(v.pending_tokens, 1)) for v in views}
    served: set[int] = set()
    for step in range(6, 6 + 2 * LIMITS.max_running):
        for item in schedule(list(state.values()), LIMITS):
            served.add(item.key)
            state[item.key] = dataclasses.replace(state[item.key], last_step=step)
    assert served == {v.key for v in views}


def test_a_short_prompt_is_read_whole_beside_a_long_one() -> None:
    long = SequenceView(key=0, pending_tokens=100_000, is_decoding=False, last_step=3)
    short = SequenceView(key=1, pending_tokens=40, is_decoding=False, last_step=-1)
    granted = {item.key: item.num_tokens for item in schedule([long, short], LIMITS)}
    assert granted == {0: 256 - 40, 1: 40}


def test_plan_does_not_depend_on_the_order_of_its_input() -> None:
    views = [
        SequenceView(key=k, pending_tokens=100 * k + 50, is_decoding=False, last_step=k % 3)
        for k in range(8)
    ]
    assert schedule(views, LIMITS) == schedule(views[::-1], LIMITS)


@pytest.mark.parametrize(
    ("waiting", "running", "admitted"), [(0, 0, 0), (3, 0, 3), (20, 0, 8), (5, 7, 1), (5, 8, 0)]
)
def test_admission_fills_the_free_places(waiting: int, running: int, admitted: int) -> None:
    assert num_admissible(waiting, running, LIMITS) == admitted


def test_limits_that_would_starve_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_step_tokens"):
        SchedulerLimits(max_running=8, max_step_tokens=8)
