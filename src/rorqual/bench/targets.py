"""What the engine is held to, and how far a run's rows are from it. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from rorqual.bench.behaviour import BehaviourRow
from rorqual.bench.predict import CACHE_OFF, MEMORY, RESTART, SLOWDOWN, Prediction, count
from rorqual.bench.speed import COMPACT, FLYWEIGHT, LLAMA, OURS, SpeedRow

if TYPE_CHECKING:
    from rorqual.bench.long import LongRow, RestartRow

_Key = tuple[str, int]
PRINTED: Mapping[str, Mapping[_Key, float]] = MappingProxyType(
    {
        LLAMA: {
            ("prefill", 1024): 911,
            ("prefill", 4096): 700,
            ("prefill", 16384): 419,
            ("decode", 1024): 237,
            ("decode", 4096): 164,
            ("decode", 16384): 111,
            ("decode", 32768): 74,
        },
        FLYWEIGHT: {
            ("prefill", 1024): 342,
            ("prefill", 4096): 292,
            ("prefill", 16384): 164,
            ("decode", 1024): 261,
            ("decode", 4096): 169,
            ("decode", 16384): 90,
        },
    }
)
"""Tokens per CPU-second of an earlier run of llama-cpp-python 0.3.36 and flyweight-llm 0.23.1 side
by side, on this network and one thread of a 2-core AVX2 machine. For runs without llama.cpp: there
its numbers are scaled by how much faster flyweight is in the run than it was in that one. Decode at
32k was not measured: the others continued, by their growth in ms per token."""
_OVER_LLAMA = (
    ("decode", 1024, 1.5),
    ("decode", 16384, 3.0),
    ("decode", 32768, 4.0),
    ("prefill", 4096, 1.5),
    ("prefill", 16384, 3.0),
)
_CACHED = {
    "identical prompt": 99.0,
    "next turn": 99.0,
    "branch at 50 %": 49.0,
}


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One target beside what was measured."""

    name: str
    measured: float
    target: float
    is_most: bool
    """Whether the target is the most allowed; otherwise it is the least."""
    unit: str
    beside: str
    """What it is measured against."""
    predicted: float | None = None
    """Said before measuring; see ``predict``."""

    @property
    def is_met(self) -> bool:
        """Whether the target is reached."""
        return self.measured <= self.target if self.is_most else self.measured >= self.target


def judge(
    speed: Sequence[SpeedRow],
    behaviour: Sequence[BehaviourRow],
    predictions: Sequence[Prediction] = (),
) -> list[TargetRow]:
    """Every target that the rows say something about."""
    values = {row.name: row for row in behaviour}
    predicted = {row.name: row.value for row in predictions}
    rows = [*_over_llama(speed, predicted), *_cache(speed)]
    for name, target in _CACHED.items():
        if name in values:
            rows.append(_least(name, values[name], target))
    if "streams over one" in values:
        rows.append(_least("8 streams over one", values["streams over one"], 2.5))
    rows += _busy(values)
    return [
        replace(row, predicted=predicted.get(_subject(row.name), row.predicted)) for row in rows
    ]


def _subject(name: str) -> str:
    """What a prediction is about: the same for both precisions of the cache."""
    return CACHE_OFF if name.startswith(CACHE_OFF) else name


def judge_long(
    rows: Sequence[LongRow],
    restart: RestartRow,
    need_bytes: float,
    predictions: Sequence[Prediction] = (),
) -> list[TargetRow]:
    """The targets of the long benchmark.

    need_bytes: weights and cache of the longest row by formula.
    """
    first, last = rows[0], rows[-1]
    own = last.peak_rss_bytes - last.library_bytes
    slower = first.decode_tokens_per_cpu_s / last.decode_tokens_per_cpu_s
    off = abs(last.cache_bytes / last.formula_bytes - 1)
    found = [
        TargetRow(
            name=SLOWDOWN,
            measured=slower,
            target=3.0,
            is_most=True,
            unit="x slower",
            beside=f"{first.decode_tokens_per_cpu_s:.0f} tokens/cpu-s at {first.context_tokens:,}, "
            f"{last.decode_tokens_per_cpu_s:.0f} at {last.context_tokens:,}",
        ),
        TargetRow(
            name=MEMORY,
            measured=own / need_bytes,
            target=1.2,
            is_most=True,
            unit="x",
            beside=f"{own / 1e6:.0f} over {need_bytes / 1e6:.0f} MB, without the "
            f"{last.library_bytes / 1e6:.0f} MB that Python and its libraries take",
        ),
        TargetRow(
            name=RESTART,
            measured=restart.answer_wall_s,
            target=10.0,
            is_most=True,
            unit="s",
            beside=f"and {restart.load_wall_s:.1f} s to load; {restart.cached_tokens:,} of "
            f"{restart.context_tokens:,} tokens cached; "
            f"{restart.same_tokens} of {restart.answer_tokens} tokens as before",
        ),
        TargetRow(
            name=f"{CACHE_OFF}, longest",
            measured=100 * off,
            target=5.0,
            is_most=True,
            unit="%",
            beside=f"{last.cache_bytes / 1e6:.1f} for {last.formula_bytes / 1e6:.1f} MB",
        ),
    ]
    predicted = {row.name: row.value for row in predictions}
    return [replace(row, predicted=predicted.get(row.name)) for row in found]


def _busy(values: Mapping[str, BehaviourRow]) -> Iterator[TargetRow]:
    for name, row in values.items():
        if name.endswith("with a busy core"):
            yield TargetRow(
                name=name,
                measured=row.value,
                target=2.5,
                is_most=True,
                unit=row.unit,
                beside=row.detail,
            )


def _least(name: str, row: BehaviourRow, target: float) -> TargetRow:
    return TargetRow(
        name=name,
        measured=row.value,
        target=target,
        is_most=False,
        unit=row.unit,
        beside=row.detail,
    )


def _over_llama(speed: Sequence[SpeedRow], predicted: Mapping[str, float]) -> Iterator[TargetRow]:
    """Predicted is our rate over theirs as measured."""
    by_key = {(row.engine, row.prompt_tokens): row for row in speed}
    for phase, length, target in _OVER_LLAMA:
        ours, theirs = by_key.get((OURS, length)), by_key.get((LLAMA, length))
        if ours is None:
            continue
        rate = _rate(ours, phase)
        if theirs is None:
            factor = _faster_now(by_key, phase, length)
            other = factor * PRINTED[LLAMA][phase, length]
            where = f"printed {PRINTED[LLAMA][phase, length]:.0f} x {factor:.2f}, flyweight's gain"
        else:
            other, where = _rate(theirs, phase), "this run"
        ours_predicted = predicted.get(f"{phase} at {count(length)}")
        yield TargetRow(
            name=f"{phase} at {count(length)} over llama.cpp",
            measured=rate / other,
            target=target,
            is_most=False,
            unit="x",
            beside=f"{rate:.0f} over {other:.0f} tokens/cpu-s ({where})",
            predicted=None if ours_predicted is None else ours_predicted / other,
        )


def _faster_now(by_key: Mapping[tuple[str, int], SpeedRow], phase: str, length: int) -> float:
    """flyweight's speed in this run over the printed one, at the nearest length that has both."""
    printed = PRINTED[FLYWEIGHT]
    both = [at for kind, at in printed if kind == phase and (FLYWEIGHT, at) in by_key]
    if not both:
        return 1.0
    at = min(both, key=lambda at: abs(at - length))
    return _rate(by_key[FLYWEIGHT, at], phase) / printed[phase, at]


def _rate(row: SpeedRow, phase: str) -> float:
    return row.prefill_tokens_per_cpu_s if phase == "prefill" else row.decode_tokens_per_cpu_s


def _cache(speed: Sequence[SpeedRow]) -> Iterator[TargetRow]:
    """At the longest prompt, where the last, partly filled block matters least."""
    for engine in (OURS, COMPACT):
        rows = [row for row in speed if row.engine == engine]
        if not rows:
            continue
        row = max(rows, key=lambda row: row.prompt_tokens)
        off = abs(row.cache_bytes_per_token / row.formula_bytes_per_token - 1)
        yield TargetRow(
            name=f"{CACHE_OFF} ({engine})",
            measured=100 * off,
            target=5.0,
            is_most=True,
            unit="%",
            beside=f"{row.cache_bytes_per_token:.1f} for {row.formula_bytes_per_token:.1f} B/token",
        )


HEAD = ("target", "predicted", "measured", "wanted", "", "what was measured")


def line(row: TargetRow) -> tuple[str, ...]:
    """Cells under ``HEAD``."""
    bound = "<=" if row.is_most else ">="
    return (
        row.name,
        "" if row.predicted is None else f"{row.predicted:.2f}",
        f"{row.measured:.2f} {row.unit.split()[0]}",
        f"{bound} {row.target:g}",
        "met" if row.is_met else "missed",
        row.beside,
    )
