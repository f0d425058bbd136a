"""The Ray actor on each host, and the room that Ray holds there: what runs under Ray's command.

With `ray_hosts.py`, the control plane's side, the only files that import ray.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from rorqual.errors import RorqualError
from rorqual.sandbox.control.machine import Machine
from rorqual.sandbox.control.worker import Worker

_RELEASED = ("REMOVED", "INFINITE")


class Failure(NamedTuple):
    """An error of ours as an answer, which keeps its type."""

    error: RorqualError


class Group(NamedTuple):
    """A placement group that is held, the row it is for, and where it is."""

    name: str
    group: PlacementGroup
    node: str | None


def groups(prefix: str) -> list[Group]:
    """Every placement group whose name begins with `prefix`, from the cluster itself."""
    found = []
    for id, entry in placement_group_table().items():
        if entry["name"].startswith(prefix) and entry["state"] not in _RELEASED:
            group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(id)))
            node = entry["bundles_to_node_id"].get(0) or None
            found.append(Group(entry["name"].removeprefix(prefix), group, node))
    return found


class HostActor:
    """A `Worker` as a Ray actor.

    Args:
        data: directory on its host; what lies beside it of hosts that are no more is removed.
        prefix: what the names of this control plane's placement groups begin with.
    """

    def __init__(
        self, data: Path, shared: Path | None, linger_s: float, reserve_bytes: int, prefix: str
    ) -> None:
        self._prefix = prefix
        # Ray's own loop, and its policy for new ones, may be uvloop's; sandboxes need asyncio's.
        self._loop = asyncio.SelectorEventLoop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._machine = Machine(data, shared=shared, linger_s=linger_s)
        self._shared = shared
        self._worker = Worker(self._machine, reserve_bytes=reserve_bytes, on_silence=self._leave)

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the worker; errors of ours are answers."""
        work = self._call(method, *arguments, **options)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await getattr(self._worker, method)(*arguments, **options)
        except RorqualError as error:
            return Failure(error)

    async def close(self) -> None:
        """End every sandbox, and remove the directory."""
        work = self._close()
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _close(self) -> None:
        await self._worker.close()
        await asyncio.to_thread(self._machine.remove)

    async def remove_dead(self, alive: frozenset[str]) -> None:
        """End what earlier Ray nodes on this machine left, whose directories are beside ours."""
        for directory in self._machine.data.parent.iterdir():
            if directory.name not in alive:
                left = Machine(directory, shared=self._shared)
                await asyncio.to_thread(left.prepare)
                await left.end_others(set())
                await asyncio.to_thread(left.remove)

    async def _leave(self) -> None:
        """Give back the room this control plane holds, and end."""
        await asyncio.to_thread(self._machine.remove)
        here = ray.get_runtime_context().get_node_id()
        for group in await asyncio.to_thread(groups, self._prefix):
            if group.node in (here, None):
                await asyncio.to_thread(remove_placement_group, group.group)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
