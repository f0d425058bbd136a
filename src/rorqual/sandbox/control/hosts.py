"""Where sandboxes run, as the control plane sees it: one machine, or a cluster of them.

`Machine` is this process's own; `RayHosts` places each sandbox on a host of a Ray cluster. The
plane does not know which of the two it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from rorqual.errors import ConfigError
from rorqual.sandbox.control.store import Row
from rorqual.sandbox.control.wants import Wanted
from rorqual.sandbox.sandbox import Sandbox


class Started(NamedTuple):
    """A sandbox and the host it runs on."""

    host: str
    sandbox: Sandbox


@dataclass(kw_only=True)
class Found:
    """What was found again: sandboxes by row, and how many belonged to no row and were ended."""

    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    num_orphans: int = 0


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How to use a Ray cluster.

    Attributes:
        address: of its head; "auto" is the one this machine belongs to, "local" starts one here.
        wait_s: how long a creation waits for room.
        cpu_share: part of a sandbox's CPU limit that is reserved; limits hold whatever it is.
        resource: name of a custom resource a host must offer to get sandboxes; None is all hosts.
    """

    address: str = "auto"
    wait_s: float = 3.0
    cpu_share: float = 0.25
    resource: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.cpu_share <= 1:
            raise ConfigError(f"a share of {self.cpu_share:g} of the CPU limit is not 0 to 1")


class HostState(NamedTuple):
    """One host as ``/metrics`` shows it."""

    name: str
    address: str
    is_up: bool


class Hosts(Protocol):
    """The machines of one control plane; used from one event loop."""

    async def recover(self, rows: Sequence[Row]) -> Found:
        """Connect to what an earlier control plane left of `rows`, and end everything else."""

    async def start(self, name: str, wanted: Wanted) -> Started:
        """Start a sandbox for the row called `name`.

        Raises:
            AnswerError: 429 where no host has the room.
            SandboxError: it could not be started.
        """

    async def end(self, row: Row) -> None:
        """End what is left of a row's sandbox without a connection to it.

        Raises:
            SandboxFailedError: something of it stays.
        """

    async def close(self, *, keep: bool) -> None:
        """Let go of the hosts; with `keep` what runs there waits for the next control plane."""

    def states(self) -> Sequence[HostState]:
        """Every host that is known now."""


class Line(Protocol):
    """Calls to one host's `Worker`."""

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method there, once.

        Raises:
            SandboxLostError: the host is gone.
            SandboxFailedError: no answer came; what became of the call is unknown.
            RorqualError: what the method raised.
        """
