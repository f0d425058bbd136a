"""Whether one more sandbox fits: a pure decision on counts and bytes, with the reason of a refusal.

What is promised is what is counted: a sandbox's limits, not what it happens to use now, so that
none is killed because others grew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.errors import SandboxRequestError
from rorqual.sandbox.control.store import Row


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much one machine takes.

    Attributes:
        max_sandboxes: warm ones included.
        max_memory_bytes: sum of memory and disk limits; written files are in memory.
        max_per_key: sandboxes of one API key.
        reserve_bytes: memory of the machine that stays free whatever was promised.
        max_lease_s: longest time to live a caller may ask for.
    """

    max_sandboxes: int = 256
    max_memory_bytes: int = 64 << 30
    max_per_key: int = 64
    reserve_bytes: int = 256 << 20
    max_lease_s: float = 86_400.0

    def __post_init__(self) -> None:
        for name in ("max_sandboxes", "max_memory_bytes", "max_per_key", "max_lease_s"):
            if getattr(self, name) <= 0:
                raise SandboxRequestError(f"{name} is {getattr(self, name)}; it must be > 0")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why not now; `reason` is for machines: "count", "memory", "host-memory", "quota"."""

    reason: str
    message: str
    retry_after_s: int


def admit(
    policy: Policy,
    active: Sequence[Row],
    *,
    owner: str,
    need_bytes: int,
    free_bytes: int | None,
    now_s: float,
    other_bytes: int = 0,
    other_count: int = 0,
) -> Refusal | None:
    """None if a sandbox of `need_bytes` (memory + disk limits) may start now.

    Args:
        free_bytes: what the machine has available now; None if unknown.
        other_bytes, other_count: promised to sandboxes that are not in `active`.
    """
    mine = [row for row in active if row.owner == owner and row.state != "warm"]
    if len(mine) >= policy.max_per_key:
        message = f"this key has {len(mine)} sandboxes; its quota is {policy.max_per_key}"
        return Refusal(reason="quota", message=message, retry_after_s=_wait_s(mine, now_s))
    count = len(active) + other_count
    if count >= policy.max_sandboxes:
        message = f"{count} sandboxes live; at most {policy.max_sandboxes} may"
        return Refusal(reason="count", message=message, retry_after_s=_wait_s(active, now_s))
    promised = sum(row.memory_bytes + row.disk_bytes for row in active) + other_bytes
    if promised + need_bytes > policy.max_memory_bytes:
        message = (
            f"{promised >> 20} of {policy.max_memory_bytes >> 20} MiB are promised; "
            f"{need_bytes >> 20} MiB more do not fit"
        )
        return Refusal(reason="memory", message=message, retry_after_s=_wait_s(active, now_s))
    if free_bytes is not None and free_bytes < policy.reserve_bytes:
        message = f"the machine has {free_bytes >> 20} MiB left; {policy.reserve_bytes >> 20} stay"
        return Refusal(reason="host-memory", message=message, retry_after_s=5)
    return None


def _wait_s(rows: Sequence[Row], now_s: float) -> int:
    """Until the first lease ends; callers often end theirs earlier, so at most a minute."""
    left = min((row.lease_end_s - now_s for row in rows), default=1.0)
    return max(1, min(60, math.ceil(left)))


def available_memory_bytes() -> int | None:
    """What Linux says can still be used; None where it says nothing."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None
