"""This machine as a host: starts, finds again and ends sandboxes in a directory of its own.

Whatever lies in that directory is ours: a container no row speaks of was being started when we were
killed, and is ended. Images, compiled programs and base layers are shared with other users of this
machine by links.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from rorqual.errors import SandboxError, SandboxFailedError, SandboxLostError
from rorqual.sandbox.agent_sandbox import AgentSandbox
from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.container.remains import remove_remains, sweep
from rorqual.sandbox.container.runtime import find_runtime
from rorqual.sandbox.container.start import attach_container
from rorqual.sandbox.contract import SubstrateName
from rorqual.sandbox.control.hosts import Found, HostState, Started
from rorqual.sandbox.control.store import Row
from rorqual.sandbox.control.wants import Wanted
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, start_sandbox

_log = logging.getLogger(__name__)
LOCAL = "local"
"""What the only host is called."""
MAX_LIFE_S = 7 * 86_400.0
"""No sandbox lives longer: the agent inside keeps the time, whatever becomes of its owner."""
_SHARED = ("images", "bin", "layers", "wasm")
_UNBORN_S = 2.0
_ADOPT_AT_ONCE = 8


class Known(NamedTuple):
    """A sandbox that should live here: its row's name and its own id."""

    name: str
    guest: str
    substrate: str
    is_paused: bool


def known_of(rows: Iterable[Row]) -> list[Known]:
    """What rows say should live; one that was being started is nobody's."""
    return [
        Known(row.id, row.guest, row.substrate, row.state == "paused")
        for row in rows
        if row.guest is not None and row.state != "creating"
    ]


class Machine:
    """This machine's sandboxes of one control plane; a `Hosts` of one.

    Args:
        data: the control plane's directory.
        shared: root of the images; None is the system's.
        linger_s: how long containers wait for a control plane that died.
    """

    def __init__(self, data: Path, *, shared: Path | None = None, linger_s: float = 600.0) -> None:
        self.data = data.absolute()
        self.layout = Layout(self.data)
        self.shared = Layout(shared)
        self.linger_s = linger_s

    def prepare(self) -> None:
        """Make the directory, and empty what only a dead control plane used."""
        self.layout.sandboxes.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in _SHARED:
            link, target = self.data / name, self.shared.root / name
            if link != target and not link.is_symlink():
                target.mkdir(parents=True, exist_ok=True)
                link.symlink_to(target)

    # -- as the only host
    async def recover(self, rows: Sequence[Row]) -> Found:
        """Adopt what rows speak of, end everything else in the directory."""
        await asyncio.to_thread(self.prepare)
        await asyncio.to_thread(self.sweep)
        found = await self.adopt(known_of(rows))
        num_orphans = await self.end_others({sandbox.id for sandbox in found.values()})
        return Found(sandboxes=found, num_orphans=num_orphans)

    async def start(self, name: str, wanted: Wanted) -> Started:
        """Start one; see `Sandbox.create` for what it raises."""
        return Started(LOCAL, await self.launch(wanted))

    async def end(self, row: Row) -> None:
        """End a row's container; nothing else outlives its connection."""
        if row.guest is not None and row.substrate == "container":
            await self.end_guest(row.guest)

    async def close(self, *, keep: bool) -> None:
        """Nothing is held."""

    def states(self) -> list[HostState]:
        """This machine."""
        return [HostState(LOCAL, LOCAL, True)]

    # -- as a host of many
    async def launch(self, wanted: Wanted) -> Sandbox:
        """Start a sandbox; see `Sandbox.create` for what it raises."""
        image = await asyncio.to_thread(self._image, wanted.template)
        is_container = wanted.substrate == "container"
        outlives = is_container and find_runtime(wanted.isolation).can_listen
        options = SandboxOptions(
            substrate=cast(SubstrateName, wanted.substrate),
            image=image,
            isolation=wanted.isolation,
            limits=wanted.limits,
            network=wanted.network,
            ttl_s=MAX_LIFE_S,
            linger_s=self.linger_s if outlives else 0.0,
            read_only=wanted.read_only,
            root=self.data,
        )
        return await start_sandbox(options)

    def _image(self, template: str) -> str | None:
        """A template is an image; "base" is the default unless an image is called so."""
        known = {image.name for image in ImageStore(self.layout.images).all()}
        return None if template == "base" and template not in known else template

    def guests(self) -> list[str]:
        """Ids of everything in the directory, live or not."""
        return sorted(path.name for path in self.layout.sandboxes.iterdir())

    async def adopt(self, known: Iterable[Known]) -> dict[str, Sandbox]:
        """Connect again; by name, without those that are gone."""
        gate = asyncio.Semaphore(_ADOPT_AT_ONCE)
        found: dict[str, Sandbox] = {}

        async def settle(one: Known) -> None:
            async with gate:
                try:
                    sandbox = await self._adopt(one)
                except (SandboxError, OSError, TimeoutError) as error:
                    _log.warning("sandbox %s cannot be adopted: %s", one.name, error)
                else:
                    if sandbox is not None:
                        found[one.name] = sandbox

        async with asyncio.TaskGroup() as group:
            for one in known:
                group.create_task(settle(one))
        return found

    async def _adopt(self, known: Known) -> Sandbox | None:
        if known.substrate != "container":
            return None
        hierarchy = find_hierarchy() if os.geteuid() == 0 else None
        if hierarchy is not None:  # a frozen agent does not answer
            with contextlib.suppress(OSError, SandboxError):
                Cgroup(hierarchy, known.guest).thaw()
        try:
            sandbox: AgentSandbox = await attach_container(known.guest, root=self.data)
        except SandboxLostError:
            return None
        if known.is_paused:
            await sandbox.pause()
        return sandbox

    async def end_others(self, guests: set[str]) -> int:
        """End every container in the directory but these; returns how many."""
        others = [guest for guest in self.guests() if guest not in guests]
        for guest in others:
            try:
                await self.end_guest(guest)
            except (SandboxError, OSError) as error:
                _log.error("%s; 'rorqual sandbox sweep' tries again", error)
        return len(others)

    async def end_guest(self, id: str) -> None:
        """End a container without a connection to it, and remove what is left of it."""
        await asyncio.to_thread(self._end_guest, self.layout.sandboxes / id)

    def _end_guest(self, directory: Path) -> None:
        hierarchy = find_hierarchy() if os.geteuid() == 0 else None
        if hierarchy is not None:
            with contextlib.suppress(OSError, SandboxError):
                Cgroup(hierarchy, directory.name).thaw()
        for _ in range(int(_UNBORN_S / 0.02)):  # its shim may be about to lock it
            if (directory / "lock").exists() or not directory.exists():
                break
            time.sleep(0.02)
        if (pid := _holder(directory / "lock")) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not remove_remains(directory):
            raise SandboxFailedError(f"sandbox {directory.name} could not be removed")

    def remove(self) -> None:
        """Remove the directory itself, unless something lives in it; what it shares stays."""
        if self.layout.sandboxes.exists() and not self.guests():
            shutil.rmtree(self.data, ignore_errors=True)  # of links it removes the link

    def sweep(self) -> list[str]:
        """Remove what is left of containers whose shim was killed."""
        return sweep(self.data)


def _holder(lock: Path) -> int | None:
    """The process that holds a sandbox's lock; None if nobody does."""
    try:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        pass
    return None


def with_env(sandbox: Sandbox, env: dict[str, str]) -> Sandbox:
    """Give a sandbox the variables its commands get; containers are all started without."""
    if env:
        sandbox.options = dataclasses.replace(sandbox.options, env=dict(env))
    return sandbox
