"""What a training run does when: learning rate, curriculum and loss weights as pure functions.

Everything depends on ``progress`` in [0, 1], the larger of steps done / max_steps and time spent /
time budget. A run with a time budget therefore always ends annealed and at full document length.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from rorqual.errors import ConfigError
from rorqual.model.packed import ALIGNMENT
from rorqual.train.data import Difficulty
from rorqual.train.losses import LossWeights
from rorqual.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of the curriculum."""

    until: float
    """Progress at which the stage ends; the last stage ends at 1."""
    difficulty: Difficulty


def _stage(
    until: float, document_tokens: tuple[int, int], row: int, tool_share: float, copy_share: float
) -> Stage:
    low, high = document_tokens
    difficulty = Difficulty(
        min_document_tokens=low,
        max_document_tokens=high,
        max_sample_tokens=row,
        tool_share=tool_share,
        copy_share=copy_share,
    )
    return Stage(until=until, difficulty=difficulty)


# Looking things up is learned on short rows, where a step is cheap; tools and length come after.
DEFAULT_STAGES = (
    _stage(0.3, (40, 200), 640, 0.0, 0.5),
    _stage(0.55, (40, 400), 1280, 0.2, 0.2),
    _stage(0.8, (60, 1000), 1280, 0.2, 0.1),
    _stage(1.0, (60, 4096), 5120, 0.2, 0.05),
)

# For weights that already look things up: length soon, so that the indexers see documents longer
# than what every query attends to.
CONTINUED_STAGES = (
    _stage(0.2, (40, 500), 1280, 0.25, 0.15),
    _stage(0.55, (60, 1200), 1664, 0.25, 0.1),
    _stage(1.0, (60, 3700), 5120, 0.25, 0.05),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One pre-training run. Raises ConfigError on construction where fields disagree."""

    seed: int = 0
    max_steps: int | None = None
    minutes: float | None = 100.0
    """Time budget in minutes of training, evaluation and checkpoints included."""
    tokens_per_step: int = 5120
    """Places per step, padding included; each stage uses as many rows as fit, and at least one
    for each process."""
    stages: tuple[Stage, ...] = DEFAULT_STAGES
    lr_peak: float = 4e-3
    lr_end: float = 2.5e-4
    warmup_steps: int = 60
    decay_start: float = 0.6
    """Progress at which the cosine decay starts; 1 for none."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    balance_weight: float = 1e-4
    mtp_weight: float = 0.2
    mtp_start: float = 0.8
    """Progress from which the MTP block is trained. It costs a quarter of a step and matters only
    once the trunk works."""
    indexer_weight: float = 1.0
    indexer_start: float = 0.75
    """Progress from which the indexers learn to rank what the attention uses."""
    bias_speed: float = 1e-3
    """Step of the routing bias against the load, per update."""
    bf16: bool = True
    """bfloat16 autocast and Newton-Schulz; master weights stay float32."""
    compile: bool = True
    """Fuse the stream mixing with torch.compile where that works here."""
    num_processes: int = 1
    """CPU processes that share each batch by rows, with one thread each where above 1."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    eval_minutes: float = 5.0
    """Time between held-out evaluations; 0 turns them off."""
    checkpoint_minutes: float = 5.0
    """Time between checkpoints; one is always written at the end."""
    max_bad_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""

    def __post_init__(self) -> None:
        if self.max_steps is None and self.minutes is None:
            raise ConfigError("max_steps and minutes are both unset: the run would never end")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be >= 1, got {self.max_steps}")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes must be > 0, got {self.minutes}")
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(ends) or ends[-1] != 1.0:
            raise ConfigError(f"stages must have growing ends, the last 1.0, got {ends}")
        for name in ("decay_start", "mtp_start", "indexer_start"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.num_processes < 1:
            raise ConfigError(f"num_processes must be >= 1, got {self.num_processes}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads must be >= 1, got {self.num_threads}")
        for stage in self.stages:
            row = stage.difficulty.max_sample_tokens
            if row % ALIGNMENT or row > self.tokens_per_step:
                raise ConfigError(
                    f"max_sample_tokens must be a multiple of {ALIGNMENT} and at most "
                    f"tokens_per_step = {self.tokens_per_step}, got {row}"
                )

    @classmethod
    def continued(cls, **fields: Any) -> TrainConfig:
        """Settings for weights that were trained before; ``fields`` override."""
        base: dict[str, Any] = {
            "stages": CONTINUED_STAGES,
            "lr_peak": 3e-3,
            "warmup_steps": 40,
            "decay_start": 0.35,
            "indexer_start": 0.45,
        }
        return cls(**{**base, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, for checkpoints and the model card."""
        return dataclasses.asdict(self)


def progress_at(config: TrainConfig, steps_done: int, elapsed_s: float) -> float:
    """Share of the run that is done, in [0, 1]."""
    by_steps = steps_done / config.max_steps if config.max_steps else 0.0
    by_time = elapsed_s / (60.0 * config.minutes) if config.minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def learning_rate(config: TrainConfig, progress: float, step: int) -> float:
    """Linear warm-up over steps (from 0), constant, then cosine to ``lr_end``."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if progress <= config.decay_start:
        return config.lr_peak * warm
    done = (progress - config.decay_start) / (1.0 - config.decay_start)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return warm * (config.lr_end + (config.lr_peak - config.lr_end) * cosine)


def stage_index(config: TrainConfig, progress: float) -> int:
    """Number of the curriculum stage at ``progress``."""
    for index, stage in enumerate(config.stages):
        if progress < stage.until:
            return index
    return len(config.stages) - 1


def loss_weights(config: TrainConfig, progress: float) -> LossWeights:
    """Weights of the auxiliary losses; 0 before a loss's start."""
    return LossWeights(
        mtp=config.mtp_weight if progress >= config.mtp_start else 0.0,
        balance=config.balance_weight,
        indexer=config.indexer_weight if progress >= config.indexer_start else 0.0,
    )
