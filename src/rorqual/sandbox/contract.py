"""What every sandbox promises, as data: limits, network policy, results, capabilities.

Plain values only; the behaviour is in sandbox.py. Units are in the names: bytes, seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rorqual.errors import CommandFailedError, SandboxRequestError

SubstrateName = Literal["function", "container", "microvm", "vm"]
Limit = Literal["memory", "cpu", "processes", "disk", "output", "wall"]
ExecStatus = Literal[
    "exited", "signalled", "timed-out", "killed", "out-of-memory", "output-limit", "not-started"
]
EntryKind = Literal["file", "directory", "link", "other"]

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one sandbox may use. Every field is enforced where `Capabilities.enforced` names it.

    Attributes:
        memory_bytes: resident memory of all processes. Containers keep written files in memory:
            together they take at most memory_bytes + disk_bytes, and processes may use what is
            not filled with files.
        cpus: processor time per second of real time; 0.5 is half a core.
        processes: live processes and threads.
        disk_bytes: what may be written into the sandbox's file system.
        output_bytes: what an `ExecResult` keeps in memory per stream; more goes to a file.
        spill_bytes: largest such file per stream; a command that writes more is killed.
        exec_s: seconds a command may take where `exec` states none.
    """

    memory_bytes: int = 512 * MIB
    cpus: float = 1.0
    processes: int = 256
    disk_bytes: int = 512 * MIB
    output_bytes: int = 1 * MIB
    spill_bytes: int = 256 * MIB
    exec_s: float = 300.0

    def __post_init__(self) -> None:
        least = {
            "memory_bytes": 4 * MIB,
            "cpus": 0.01,
            "processes": 4,
            "disk_bytes": 1 * MIB,
            "output_bytes": 0,
            "spill_bytes": 0,
            "exec_s": 0.001,
        }
        for name, value in least.items():
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float) or given < value:
                raise SandboxRequestError(f"limits.{name} is {given!r}; it must be >= {value}")


_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9])?(:\d{1,5})?|\[[0-9a-f:.]+\](:\d{1,5})?")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Where a sandbox may connect to. The default is nowhere.

    Attributes:
        allow: `name`, `*.name` (any subdomain) or an address, each with an optional `:port`
            (else 80 and 443). Connections go through a proxy which checks the name asked for and
            refuses names that resolve to private addresses.
        direct: `name:port` or `address:port`, IPv4, for programs that know no proxy: a TCP
            connection to it just works. The name is resolved once, when the sandbox starts.
        allow_private: let allowed names resolve to private, loopback and link-local addresses.
    """

    allow: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    allow_private: bool = False

    def __post_init__(self) -> None:
        for rule in self.allow:
            if not _HOST.fullmatch(rule):
                raise SandboxRequestError(
                    f"network rule {rule!r} is not NAME, *.NAME or ADDRESS with an optional :PORT"
                )
        if len(self.direct) > 48:
            raise SandboxRequestError(f"network.direct has {len(self.direct)} rules; at most 48")
        for rule in self.direct:
            valid = _HOST.fullmatch(rule) and ":" in rule and rule[0] not in "*["
            if not valid or not 0 < split_host(rule)[1] < 65536:
                raise SandboxRequestError(f"network.direct {rule!r} is not NAME:PORT")


def split_host(rule: str) -> tuple[str, int]:
    """Name and port of a `name:port` rule."""
    name, _, port = rule.rpartition(":")
    return name, int(port)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a substrate can do here; asking for what it cannot raises `UnsupportedError`.

    Attributes:
        processes: commands may start others and leave them running.
        users: `exec(user=...)` may name other users.
        snapshot: "files", "memory" (files and running processes) or None.
        survives_host: the sandbox outlives its creator where asked to, and can be attached to.
        enforced: the limits that hold.
        boundary: what separates it from the host, in words.
    """

    processes: bool = True
    pty: bool = True
    users: bool = True
    network: bool = True
    expose: bool = True
    pause: bool = True
    snapshot: Literal["files", "memory"] | None = "files"
    survives_host: bool = True
    enforced: frozenset[Limit] = frozenset({"memory", "cpu", "processes", "disk", "output", "wall"})
    boundary: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name in a directory listing; sizes in bytes, time in seconds since 1970."""

    name: str
    kind: EntryKind
    size_bytes: int
    mode: int
    modified_s: float
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """How a command ended. A bad end is data, not an exception, until `check` is called.

    Attributes:
        returncode: exit code; 128 + signal if a signal ended it; 127 or 126 if it never started.
        status: why it ended.
        stdout, stderr: the first `Limits.output_bytes` of each.
        stdout_bytes, stderr_bytes: how much each was in full.
        stdout_file, stderr_file: where all of it is, if it was more than was kept in memory. The
            files belong to the sandbox and go with it.
        replayed: the answer came from a trajectory log; nothing ran.
    """

    command: tuple[str, ...]
    returncode: int
    status: ExecStatus
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_file: Path | None = None
    stderr_file: Path | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    max_rss_bytes: int = 0
    replayed: bool = False

    @property
    def ok(self) -> bool:
        """Whether it exited with 0."""
        return self.status == "exited" and self.returncode == 0

    @property
    def truncated(self) -> bool:
        """Whether `stdout` or `stderr` holds only the beginning."""
        return self.stdout_bytes > len(self.stdout) or self.stderr_bytes > len(self.stderr)

    @property
    def text(self) -> str:
        """stdout as text; undecodable bytes become U+FFFD."""
        return self.stdout.decode("utf-8", "replace")

    def check(self) -> ExecResult:
        """Return self, or raise `CommandFailedError` with the end of stderr."""
        if self.ok:
            return self
        tail = self.stderr[-2000:].decode("utf-8", "replace").strip()
        raise CommandFailedError(
            f"{' '.join(self.command)!r} {self.status} with {self.returncode}"
            + f": {tail}" * bool(tail)
        )


@dataclass(frozen=True, kw_only=True)
class ExecRequest:
    """One command as it is dispatched, validated.

    Attributes:
        argv: program and arguments.
        stdin: bytes given to it, or None where the caller writes them later.
        env: variables added to the sandbox's.
        cwd: absolute directory; None is the user's home.
        user: name, uid or uid:gid; None is root inside, without any capability.
        exec_id: name in the sandbox's journal; the command then survives a lost connection.
    """

    argv: tuple[str, ...]
    stdin: bytes | None = b""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    timeout_s: float = 300.0
    merge: bool = False
    pty: tuple[int, int] | None = None
    exec_id: str | None = None

    def __post_init__(self) -> None:
        if not self.argv:
            raise SandboxRequestError("the command is empty")
        texts = [*self.argv, *self.env, *self.env.values(), self.cwd or "", self.user or ""]
        if any("\0" in text for text in texts):
            raise SandboxRequestError("a command, variable, directory or user holds a zero byte")
        if any("=" in name or not name for name in self.env):
            raise SandboxRequestError("a variable's name is empty or holds '='")
        if self.cwd is not None and not self.cwd.startswith("/"):
            raise SandboxRequestError(f"cwd {self.cwd!r} is not absolute")
        if not self.timeout_s > 0:
            raise SandboxRequestError(f"timeout_s is {self.timeout_s!r}; it must be > 0")
        if self.exec_id is not None and not re.fullmatch(r"[\w.:-]{1,64}", self.exec_id, re.ASCII):
            raise SandboxRequestError(
                f"exec_id {self.exec_id!r} is not 1-64 of A-Z a-z 0-9 _ . : -"
            )


def as_argv(command: str | Sequence[str]) -> tuple[str, ...]:
    """A shell line becomes ``/bin/sh -c LINE``; a sequence stays what it is."""
    if isinstance(command, str):
        return ("/bin/sh", "-c", command)
    argv = tuple(command)
    if not all(isinstance(word, str) for word in argv):
        raise SandboxRequestError("a command is a string or a sequence of strings")
    return argv
