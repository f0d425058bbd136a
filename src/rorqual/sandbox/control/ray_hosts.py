"""The hosts of a Ray cluster: Ray chooses where a sandbox goes, one actor per host does the work.

Room is a placement group of one bundle (memory + disk limits as `memory`, a share of the CPU limit
as `CPU`), which Ray puts on a host that has it and which is held until the sandbox ends. The actors
are detached and named: a control plane that died finds them again. Nothing is ever retried: an
actor is restarted by Ray, a call to it is not repeated. With `ray_actor.py` the only files that
import ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayError, RayTaskError
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rorqual.errors import (
    ConfigError,
    SandboxError,
    SandboxFailedError,
    SandboxLostError,
)
from rorqual.sandbox.control.admission import Refusal
from rorqual.sandbox.control.failures import over_capacity
from rorqual.sandbox.control.hosts import Found, HostState, RayOptions, Started
from rorqual.sandbox.control.layers import Manifest, manifest_of, send_image
from rorqual.sandbox.control.machine import Known, known_of
from rorqual.sandbox.control.ray_actor import Failure, Group, HostActor, groups
from rorqual.sandbox.control.remote import RemoteSandbox
from rorqual.sandbox.control.store import Row
from rorqual.sandbox.control.wants import Wanted
from rorqual.sandbox.control.worker import Described, Pulse, Settled
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout

_log = logging.getLogger(__name__)
BEAT_S = 1.0
"""How often each host is asked who lives."""
_REACH_S = 5.0
_ANSWER_S = 10.0
_START_S = 60.0
_CLOSE_S = 20.0
"""A host that a signal ended together with this process never answers."""
_AGAIN_S = 60.0
_MANY_CALLS = 10_000


class _Host:
    """The control plane's side of one host: a `Line` to its worker.

    Args:
        is_there: whether Ray counts the node among the living now.
    """

    def __init__(
        self, node: str, address: str, actor: Any, is_there: Callable[[str], Awaitable[bool]]
    ) -> None:
        self.node = node
        self.address = address
        self.actor = actor
        self.needs_actor = False
        self.boot: str | None = None
        self.is_up = True
        self.sandboxes: dict[str, RemoteSandbox] = {}
        self.images: set[Manifest] = set()
        self._is_there = is_there
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.node[:12]} ({self.address})"

    def lose(self) -> None:
        """It is gone: every call that waits ends now, and so does every sandbox."""
        self.is_up = False
        for sandbox in self.sandboxes.values():
            sandbox.is_lost = True
        if not self._lost.done():
            self._lost.set_result(None)
        with contextlib.suppress(RayError):
            ray.kill(self.actor, no_restart=True)

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """See `Line.call`."""
        return await self._answer(self.actor.call.remote(method, *arguments, **options), method)

    async def close(self) -> None:
        """See `HostActor.close`."""
        await self._answer(self.actor.close.remote(), "close")

    async def remove_dead(self, alive: frozenset[str]) -> None:
        """See `HostActor.remove_dead`."""
        await self._answer(self.actor.remove_dead.remote(alive), "remove_dead")

    async def _answer(self, reference: Any, method: str) -> Any:
        waiting = asyncio.ensure_future(_await(reference))
        try:
            await asyncio.wait({waiting, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done():
                raise SandboxLostError(f"host {self.name} is lost")
            answer = waiting.result()
        except RayTaskError as error:  # not an error of ours: a bug, or another version there
            cause = type(error.cause).__name__
            _log.error("host %s: %s failed", self.name, method, exc_info=error)
            raise SandboxFailedError(f"host {self.name}: {method} failed: {cause}") from None
        except RayError as error:
            said = _first_line(error)
            if not await self._is_there(self.node):
                raise SandboxLostError(f"host {self.name} is lost: {said}") from None
            self.needs_actor |= isinstance(error, ActorDiedError | ActorUnschedulableError)
            raise SandboxFailedError(
                f"host {self.name} did not answer; what became of the call is unknown, and it is "
                f"not repeated: {said}"
            ) from None
        finally:
            waiting.cancel()
        if isinstance(answer, Failure):
            raise answer.error
        return answer


async def _await(reference: Any) -> Any:
    return await reference


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class RayHosts:
    """The hosts of one cluster, as `Hosts`. `connect` first.

    Args:
        data: the control plane's directory; each host has one of its own below the same path.
        shared: root of the images, the same path on every host; None is the system's.
        linger_s: how long sandboxes and room wait for a control plane that died.
        reserve_bytes: memory of each host that stays free.
    """

    def __init__(
        self,
        data: Path,
        options: RayOptions,
        *,
        shared: Path | None = None,
        linger_s: float = 600.0,
        reserve_bytes: int = 0,
    ) -> None:
        self._data = data.absolute()
        self._options = options
        self._shared = shared
        self._linger_s = linger_s
        self._reserve_bytes = reserve_bytes
        self._namespace = _namespace(self._data)
        self._prefix = f"{self._namespace}/"
        self._hosts: dict[str, _Host] = {}
        self._opening: dict[str, asyncio.Task[_Host]] = {}
        self._groups: dict[str, Group] = {}
        self._images = ImageStore(Layout(shared).images)
        self._copying: dict[str, asyncio.Lock] = {}
        self._num_orphans = 0
        self._try_at: dict[str, float] = {}
        self._watcher: asyncio.Task[None] | None = None

    def connect(self) -> None:
        """Join the cluster; no dashboard is started here, and no usage is reported.

        Raises:
            ConfigError: there is none.
        """
        self._check_reachable()
        local: dict[str, Any] = (
            {"include_dashboard": False} if self._options.address == "local" else {}
        )
        try:
            ray.init(
                address=self._options.address,
                namespace=self._namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise ConfigError(
                f"no Ray cluster at {self._options.address!r}: {_first_line(error)}; start one "
                "with 'ray start --head', or give --ray local"
            ) from None

    def _check_reachable(self) -> None:
        """Ray itself tries for minutes, and then ends the process."""
        host, _, port = self._options.address.rpartition(":")
        if not (host and port.isdigit()):
            return
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f"no Ray cluster at {host}:{port}: {error}") from None

    # -- Hosts
    async def recover(self, rows: Sequence[Row]) -> Found:
        """Find the actors and the room of an earlier control plane, and settle every host."""
        named = {row.id: row for row in rows if row.guest is not None and row.state != "creating"}
        for group in await asyncio.to_thread(groups, self._prefix):
            self._groups[group.name] = group
        for name in [name for name in self._groups if name not in named]:
            await self._release(name)
        await self._look({row.id: row for row in named.values()})
        found = Found(num_orphans=self._num_orphans)
        for host in self._hosts.values():
            found.sandboxes |= host.sandboxes
        for name in [name for name in self._groups if name not in found.sandboxes]:
            await self._release(name)
        self._watcher = asyncio.create_task(self._watch())
        return found

    async def start(self, name: str, wanted: Wanted) -> Started:
        """Reserve room, and start there."""
        node = await self._reserve(name, wanted)
        try:
            host = await self._host(node)
            await self._bring_image(host, wanted.template)
            # Variables go with each command, from here: a host keeps none.
            sent = replace(wanted, env={}, metadata={}, client_token=None)
            answer: Described | Refusal = await host.call("start", name, sent)
        except BaseException as error:
            await self._release(name)
            if isinstance(error, SandboxError) and node[:12] not in str(error):
                error.args = (f"host {self._shown(node)}: {error}",)
            raise
        if isinstance(answer, Refusal):
            await self._release(name)
            raise over_capacity(replace(answer, message=f"host {host.name}: {answer.message}"))
        return Started(node, self._hold(host, name, answer))

    async def end(self, row: Row) -> None:
        """Tell its host to end a row's sandbox; a host that is gone has none."""
        host = self._hosts.get(row.host or "")
        try:
            if host is not None:
                host.sandboxes.pop(row.id, None)
                with contextlib.suppress(SandboxLostError):
                    await host.call("kill", row.id, row.guest)
        finally:
            await self._release(row.id)

    async def close(self, *, keep: bool) -> None:
        """Leave the cluster; without `keep` the actors end too."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if not keep:
            for host in list(self._hosts.values()):
                with contextlib.suppress(SandboxError, TimeoutError):
                    await asyncio.wait_for(host.close(), _CLOSE_S)
                host.lose()
            for name in list(self._groups):
                await self._release(name)
        await asyncio.to_thread(ray.shutdown)

    def states(self) -> list[HostState]:
        """Every host that sandboxes may be placed on."""
        return [HostState(host.node, host.address, host.is_up) for host in self._hosts.values()]

    async def _bring_image(self, host: _Host, template: str) -> None:
        """Copy an image of this machine's store to a host that lacks it, once."""
        manifest = await asyncio.to_thread(manifest_of, self._images, template)
        if manifest is None or manifest in host.images:
            return
        async with self._copying.setdefault(f"{host.node} {template}", asyncio.Lock()):
            if manifest not in host.images:
                await send_image(self._images, manifest, host)
                host.images.add(manifest)

    def _shown(self, node: str) -> str:
        host = self._hosts.get(node)
        return host.name if host is not None else node[:12]

    # -- room
    async def _reserve(self, name: str, wanted: Wanted) -> str:
        """Have Ray put the sandbox's room somewhere; returns the node."""
        limits, options = wanted.limits, self._options
        bundle: dict[str, float] = {"memory": wanted.need_bytes}
        if cpus := round(limits.cpus * options.cpu_share, 4):
            bundle["CPU"] = cpus
        if options.resource is not None:
            bundle[options.resource] = 0.0001
        group = await asyncio.to_thread(
            placement_group, [bundle], name=f"{self._prefix}{name}", lifetime="detached"
        )
        self._groups[name] = Group(name, group, None)
        try:
            await asyncio.wait_for(_await(group.ready()), options.wait_s)
            table = await asyncio.to_thread(placement_group_table, group)
            node: str = table["bundles_to_node_id"][0]
        except BaseException as error:
            await self._release(name)
            if isinstance(error, TimeoutError):
                shown = f"{wanted.need_bytes >> 20} MiB and {cpus:g} CPUs"
                message = f"no host has room for {shown} (waited {options.wait_s:g} s)"
                refusal = Refusal(reason="no-host", message=message, retry_after_s=5)
                raise over_capacity(refusal) from None
            if isinstance(error, RayError):
                raise SandboxFailedError(f"Ray placed nothing: {_first_line(error)}") from None
            raise
        self._groups[name] = Group(name, group, node)
        return node

    async def _release(self, name: str) -> None:
        group = self._groups.pop(name, None)
        if group is not None:
            await asyncio.to_thread(remove_placement_group, group.group)

    # -- hosts
    def _hold(self, host: _Host, name: str, described: Described) -> RemoteSandbox:
        async def release() -> None:
            host.sandboxes.pop(name, None)
            await self._release(name)

        sandbox = RemoteSandbox(name, described, host, linger_s=self._linger_s, release=release)
        host.sandboxes[name] = sandbox
        return sandbox

    async def _host(self, node: str, known: Sequence[Known] = ()) -> _Host:
        """A host with its actor running and settled."""
        if (host := self._hosts.get(node)) is not None:
            return host
        if (task := self._opening.get(node)) is None:
            task = asyncio.create_task(self._open(node, known))
            self._opening[node] = task
            task.add_done_callback(lambda _: self._opening.pop(node, None))
        return await asyncio.shield(task)

    async def _open(self, node: str, known: Sequence[Known]) -> _Host:
        alive = await self._alive()
        if node not in alive:
            raise SandboxLostError(f"host {node[:12]} is gone")
        host = _Host(node, alive[node], self._actor(node), self._is_there)
        try:
            async with asyncio.timeout(_START_S):
                await self._settle(host, known)
                await host.remove_dead(frozenset(alive))
        except SandboxFailedError:
            if not host.needs_actor:
                raise
            raise SandboxFailedError(
                f"host {host.name} cannot hold sandboxes: its actor did not start. Is rorqual of "
                "this version installed there? Ray's logs say more"
            ) from None
        except TimeoutError:
            raise SandboxFailedError(f"host {host.name} did not start in {_START_S:g} s") from None
        self._hosts[node] = host
        return host

    def _actor(self, node: str) -> Any:
        """The actor of a node, which may run already; Ray restarts it, and repeats no call."""
        actor: Any = ray.remote(HostActor)
        return actor.options(
            name=f"host-{node}",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=_MANY_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(
            self._data / "hosts" / node,
            self._shared,
            self._linger_s,
            self._reserve_bytes,
            self._prefix,
        )

    async def _settle(self, host: _Host, known: Sequence[Known]) -> None:
        settled: Settled = await host.call("settle", list(known), self._names_on(host.node))
        host.boot = settled.boot
        self._num_orphans += settled.num_orphans
        for name in [one.name for one in known]:
            held = host.sandboxes.get(name)
            if name not in settled.found:
                if held is not None:
                    held.is_lost = True
            elif held is None:
                self._hold(host, name, settled.found[name])

    def _names_on(self, node: str) -> frozenset[str]:
        """Sandboxes that live there, or are being started: each has its room."""
        return frozenset(name for name, group in self._groups.items() if group.node == node)

    async def _alive(self) -> dict[str, str]:
        """Nodes that may get sandboxes, and their addresses."""
        needed = self._options.resource
        return {
            node["NodeID"]: node["NodeManagerAddress"]
            for node in await asyncio.to_thread(ray.nodes)
            if node["Alive"] and (needed is None or needed in node["Resources"])
        }

    async def _is_there(self, node: str) -> bool:
        return node in await self._alive()

    # -- watching
    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self._look({})
            except Exception:  # the watch itself must go on
                _log.exception("watching the hosts")

    async def _look(self, rows: dict[str, Row]) -> None:
        """Open hosts that joined, let go of those that left, ask the others who lives."""
        alive = await self._alive()
        for node in set(self._hosts) - set(alive):
            gone = self._hosts.pop(node)
            _log.warning("host %s is gone with %d sandboxes", gone.name, len(gone.sandboxes))
            gone.lose()
        work: list[Coroutine[Any, Any, None]] = []
        for node in alive:
            if (host := self._hosts.get(node)) is not None:
                work.append(self._beat(host))
            else:
                there = [row for row in rows.values() if row.host == node]
                work.append(self._try_open(node, known_of(there)))
        await asyncio.gather(*work)

    async def _try_open(self, node: str, known: Sequence[Known]) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._try_at.get(node, now):
            return
        try:
            await self._host(node, known)
        except SandboxError as error:
            _log.warning("%s; it is tried again in %g s", error, _AGAIN_S)
            self._try_at[node] = now + _AGAIN_S

    async def _beat(self, host: _Host) -> None:
        before = list(host.sandboxes.values())
        try:
            async with asyncio.timeout(_ANSWER_S):
                if host.needs_actor:  # Ray gave it up, or somebody killed it
                    host.actor, host.needs_actor = self._actor(host.node), False
                pulse: Pulse = await host.call("beat", self._names_on(host.node))
                if pulse.boot != host.boot:  # it was started anew, and has to find them again
                    await self._settle(host, [sandbox.known for sandbox in before])
                else:
                    for sandbox in before:
                        sandbox.is_lost |= sandbox.name not in pulse.live
                host.is_up = True
        except (SandboxError, TimeoutError) as error:
            if host.is_up:
                _log.warning("host %s does not answer: %s", host.name, error or "no time")
            host.is_up = False


def _namespace(data: Path) -> str:
    """A name of this control plane's own in the cluster, the same after a restart."""
    path = data / "ray-namespace"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        name = f"rorqual-{secrets.token_hex(8)}"
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(name)
        return name
