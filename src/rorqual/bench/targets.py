"""What the engine is held to, and how far a run's rows are from it. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rorqual.bench.behaviour import BehaviourRow
from rorqual.bench.speed import COMPACT, LLAMA, OURS, SpeedRow

PRINTED: Mapping[tuple[str, int], float] = MappingProxyType(
    {
        ("prefill", 1024): 911,
        ("prefill", 4096): 700,
        ("prefill", 16384): 419,
        ("decode", 1024): 237,
        ("decode", 4096): 164,
        ("decode", 16384): 111,
        ("decode", 32768): 74,
    }
)
"""llama.cpp's tokens per CPU-second, for runs without it: llama-cpp-python 0.3.36 on this network,
one thread of a 2-core AVX2 machine, measured in another run. The one at 32k is not measured: the
others continued, by their growth in ms per token."""
_OVER_LLAMA = (
    ("decode", 1024, 1.5),
    ("decode", 16384, 3.0),
    ("decode", 32768, 4.0),
    ("prefill", 4096, 1.5),
    ("prefill", 16384, 3.0),
)
_CACHED = {"identical prompt": 99.0, "next turn": 99.0, "branch at 50 %": 49.0}


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

    @property
    def is_met(self) -> bool:
        """Whether the target is reached."""
        return self.measured <= self.target if self.is_most else self.measured >= self.target


def judge(speed: Sequence[SpeedRow], behaviour: Sequence[BehaviourRow]) -> list[TargetRow]:
    """Every target that the rows say something about."""
    values = {row.name: row for row in behaviour}
    rows = [*_over_llama(speed), *_cache(speed)]
    for name, target in _CACHED.items():
        if name in values:
            rows.append(_least(name, values[name], target))
    if "streams over one" in values:
        rows.append(_least("8 streams over one", values["streams over one"], 2.5))
    for name, row in values.items():
        if name.endswith("with a busy core"):
            rows.append(
                TargetRow(
                    name=name,
                    measured=row.value,
                    target=2.5,
                    is_most=True,
                    unit=row.unit,
                    beside=row.detail,
                )
            )
    return rows


def _least(name: str, row: BehaviourRow, target: float) -> TargetRow:
    return TargetRow(
        name=name,
        measured=row.value,
        target=target,
        is_most=False,
        unit=row.unit,
        beside=row.detail,
    )


def _over_llama(speed: Sequence[SpeedRow]) -> Iterator[TargetRow]:
    by_key = {(row.engine, row.prompt_tokens): row for row in speed}
    for phase, length, target in _OVER_LLAMA:
        ours, theirs = by_key.get((OURS, length)), by_key.get((LLAMA, length))
        if ours is None:
            continue
        rate = _rate(ours, phase)
        other = PRINTED[phase, length] if theirs is None else _rate(theirs, phase)
        where = "printed, another run" if theirs is None else "this run"
        yield TargetRow(
            name=f"{phase} at {length // 1024}k over llama.cpp",
            measured=rate / other,
            target=target,
            is_most=False,
            unit="x",
            beside=f"{rate:.0f} over {other:.0f} tokens/cpu-s ({where})",
        )


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
            name=f"cache off the formula ({engine})",
            measured=100 * off,
            target=5.0,
            is_most=True,
            unit="%",
            beside=f"{row.cache_bytes_per_token:.1f} for {row.formula_bytes_per_token:.1f} B/token",
        )


HEAD = ("target", "measured", "wanted", "", "what was measured")


def line(row: TargetRow) -> tuple[str, ...]:
    """Cells under ``HEAD``."""
    bound = "<=" if row.is_most else ">="
    return (
        row.name,
        f"{row.measured:.2f} {row.unit.split()[0]}",
        f"{bound} {row.target:g}",
        "met" if row.is_met else "missed",
        row.beside,
    )
