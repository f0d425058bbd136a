"""The schedule as pure functions of progress."""

from __future__ import annotations

from typing import Any

import pytest

from rorqual.errors import ConfigError
from rorqual.train.schedule import (
    DEFAULT_STAGES,
    Stage,
    TrainConfig,
    learning_rate,
    loss_weights,
    progress_at,
    stage_index,
)

from .conftest import EASY, HARD

CONFIG = TrainConfig(minutes=10, max_steps=100, warmup_steps=4)


def test_progress_is_the_larger_of_steps_and_time() -> None:
    assert progress_at(CONFIG, 0, 0.0) == 0.0
    assert progress_at(CONFIG, 50, 60.0) == 0.5
    assert progress_at(CONFIG, 10, 450.0) == 0.75
    assert progress_at(CONFIG, 100, 0.0) == 1.0
    assert progress_at(CONFIG, 10, 6000.0) == 1.0
    assert progress_at(TrainConfig(minutes=None, max_steps=10), 5, 1e9) == 0.5
    assert progress_at(TrainConfig(minutes=10), 10**9, 300.0) == 0.5


def test_learning_rate_warms_up_holds_and_decays_to_its_end() -> None:
    rates = [learning_rate(CONFIG, 0.0, step) / CONFIG.lr_peak for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert learning_rate(CONFIG, CONFIG.decay_start, 60) == CONFIG.lr_peak
    middle = learning_rate(CONFIG, (1 + CONFIG.decay_start) / 2, 80)
    assert middle == pytest.approx((CONFIG.lr_peak + CONFIG.lr_end) / 2)
    assert learning_rate(CONFIG, 1.0, 100) == pytest.approx(CONFIG.lr_end)
    falling = [learning_rate(CONFIG, p / 100, 99) for p in range(60, 101)]
    assert falling == sorted(falling, reverse=True)
    constant = TrainConfig(minutes=10, decay_start=1.0)
    assert learning_rate(constant, 1.0, 100) == constant.lr_peak


def test_auxiliary_losses_start_at_their_progress() -> None:
    config = TrainConfig(
        minutes=1, mtp_start=0.6, mtp_weight=0.2, indexer_start=0.5, indexer_weight=0.7
    )
    weights = {p: loss_weights(config, p) for p in (0.0, 0.49, 0.5, 0.59, 0.6, 1.0)}
    assert [w.mtp for w in weights.values()] == [0, 0, 0, 0, 0.2, 0.2]
    assert [w.indexer for w in weights.values()] == [0, 0, 0.7, 0.7, 0.7, 0.7]
    assert {w.balance for w in weights.values()} == {config.balance_weight}


def test_stages_follow_progress() -> None:
    config = TrainConfig(
        minutes=1,
        stages=(Stage(until=0.3, difficulty=EASY), Stage(until=1.0, difficulty=HARD)),
    )
    assert [stage_index(config, p) for p in (0.0, 0.29, 0.3, 0.9, 1.0)] == [0, 0, 1, 1, 1]


def test_the_default_curriculum_ends_at_full_document_length() -> None:
    longest = [stage.difficulty.max_document_tokens for stage in DEFAULT_STAGES]
    assert longest == sorted(longest)
    assert longest[-1] == 4096


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minutes": None}, "never end"),
        ({"minutes": 0.0}, "minutes must be > 0"),
        ({"max_steps": 0}, "max_steps must be >= 1"),
        ({"stages": ()}, "stages must have growing ends"),
        ({"stages": (Stage(until=0.9, difficulty=EASY),)}, "stages must have growing ends"),
        ({"tokens_per_step": 1280}, "at most tokens_per_step = 1280, got 5120"),
        ({"mtp_start": 1.5}, r"mtp_start must be in \[0, 1\], got 1.5"),
        ({"indexer_start": -0.1}, r"indexer_start must be in \[0, 1\]"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
    ],
)
def test_settings_that_disagree_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**fields)


def test_continued_training_meets_long_documents_early_and_keeps_what_is_asked_for() -> None:
    config = TrainConfig.continued(minutes=7, lr_peak=1e-3)
    assert (config.minutes, config.lr_peak) == (7, 1e-3)
    halfway = stage_index(config, 0.56)
    longest = config.stages[halfway].difficulty.max_document_tokens
    assert longest > 3000
    assert loss_weights(config, 0.56).indexer > 0
