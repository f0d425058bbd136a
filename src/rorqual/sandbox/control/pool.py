"""Sandboxes started ahead of time: refilled to a high mark when fewer than a low mark are left.

Unlike `rorqual.sandbox.pool` this holds ids of rows: a warm sandbox is admitted like any other, and
found again after a crash.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.errors import SandboxRequestError
from rorqual.sandbox.control.wants import Wanted


@dataclass(frozen=True, kw_only=True)
class Watermarks:
    """0 and 0 is no pool."""

    low: int = 0
    high: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise SandboxRequestError(f"a warm pool of {self.low} to {self.high} makes no sense")


class WarmPool:
    """Ids of sandboxes nobody has yet; all of one shape. It starts and ends none itself."""

    def __init__(self, wanted: Wanted, marks: Watermarks) -> None:
        self.wanted = wanted
        self.marks = marks
        self.ready: list[str] = []
        self._filling = False

    def fits(self, wanted: Wanted) -> bool:
        """Whether a sandbox of the pool is what is wanted."""
        return wanted.shape() == self.wanted.shape()

    def take(self) -> str | None:
        """The oldest one, or None."""
        return self.ready.pop(0) if self.ready else None

    @property
    def needs_one(self) -> bool:
        """Whether to start another: below the low mark, or on the way up to the high one."""
        if len(self.ready) < self.marks.low:
            self._filling = True
        if len(self.ready) >= self.marks.high:
            self._filling = False
        return self._filling
