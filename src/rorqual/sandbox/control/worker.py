"""What runs on one host of many: its sandboxes, and their commands, called from the control plane.

Every argument and answer is plain data that can be sent. The plane calls `beat` all the time; when
it has not for `linger_s`, it is dead, and everything here ends. How calls get here is not known
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from rorqual.errors import RorqualError, SandboxError, SandboxFailedError, SandboxLostError
from rorqual.sandbox.client import Output
from rorqual.sandbox.contract import Capabilities, ExecRequest, ExecResult
from rorqual.sandbox.control.admission import Refusal, available_memory_bytes
from rorqual.sandbox.control.layers import LayerTaker
from rorqual.sandbox.control.machine import Known, Machine
from rorqual.sandbox.control.wants import Wanted
from rorqual.sandbox.sandbox import RunningCommand, Sandbox, SandboxOptions

_log = logging.getLogger(__name__)
_HELD_BYTES = 512 << 10
"""How much of a command's output waits here to be taken; then it waits in the sandbox."""
_LOOK_S = 1.0
_LAYER_CALLS = frozenset({"lacks", "take", "finish", "save"})
_FILE_CALLS = frozenset({"read", "write", "list", "mkdir", "remove"})


class Described(NamedTuple):
    """A sandbox as its host tells of it."""

    guest: str
    options: SandboxOptions
    capabilities: Capabilities


class Pulse(NamedTuple):
    """A sign of life.

    Attributes:
        boot: another one after this process was started anew.
        live: names of the sandboxes that live.
    """

    boot: str
    live: frozenset[str]


class Settled(NamedTuple):
    """What was found again on a host, by name, and how much of nobody's was ended."""

    boot: str
    found: dict[str, Described]
    num_orphans: int


class _Command:
    """A command under way, and what it wrote that nobody took: at most `_HELD_BYTES`."""

    def __init__(self, sandbox: str, running: RunningCommand) -> None:
        self.sandbox = sandbox
        self.running = running
        self._held: list[Output] = []
        self._size = 0
        self._error: RorqualError | None = None
        self._is_over = False
        self._filled, self._drained = asyncio.Event(), asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    async def _read(self) -> None:
        try:
            async for piece in self.running:
                self._held.append(piece)
                self._size += len(piece.data)
                self._filled.set()
                while self._size >= _HELD_BYTES:
                    self._drained.clear()
                    await self._drained.wait()
        except RorqualError as error:
            self._error = error
        self._is_over = True
        self._filled.set()

    async def take(self) -> list[Output]:
        """What there is, as soon as there is something; neighbours of one channel as one."""
        if self._pump is None:  # from now on it is not left for the result
            self._pump = asyncio.create_task(self._read())
        await self._filled.wait()
        held, self._held, self._size = self._held, [], 0
        self._drained.set()
        if not self._is_over:
            self._filled.clear()
        if not held and self._error is not None:
            raise self._error
        runs = itertools.groupby(held, key=lambda piece: piece.channel)
        return [Output(name, b"".join(piece.data for piece in run)) for name, run in runs]

    def stop(self) -> None:
        """Kill it; nobody asks for it any more."""
        if self._pump is not None:
            self._pump.cancel()
        self.running.kill()


class Worker:
    """The sandboxes of one host.

    Args:
        machine: starts and finds containers.
        reserve_bytes: memory of the host that stays free.
        on_silence: called once everything was ended for want of a control plane.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        reserve_bytes: int = 0,
        on_silence: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._layers = LayerTaker(machine.shared.images)
        self._reserve_bytes = reserve_bytes
        self._on_silence = on_silence
        self._clock = clock
        self._boot = secrets.token_hex(8)
        self._sandboxes: dict[str, Sandbox] = {}
        self._starting: dict[str, asyncio.Task[Sandbox]] = {}
        self._commands: dict[str, _Command] = {}
        self._heard = clock()
        self._settled = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    # -- the control plane comes, stays and goes
    async def settle(self, known: Sequence[Known], names: frozenset[str]) -> Settled:
        """Find again what the control plane knows; end the rest, and all earlier commands.

        Args:
            known: what should live here.
            names: those, and what is being started at this moment.
        """
        self._heard = self._clock()
        if self._watcher is None:
            await asyncio.to_thread(self._machine.prepare)
            await asyncio.to_thread(self._machine.sweep)
            self._watcher = asyncio.create_task(self._watch())
        self._settled.clear()  # what is started now has no name yet, and would be ended below
        try:
            return await self._settle(known, names)
        finally:
            self._settled.set()

    async def _settle(self, known: Sequence[Known], names: frozenset[str]) -> Settled:
        for command in self._commands.values():  # whoever started them cannot ask for them again
            command.stop()
        self._commands.clear()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)
        strangers = [name for name in self._sandboxes if name not in names]
        for name in strangers:
            await self._end(name)
        missing = [one for one in known if one.name not in self._sandboxes]
        self._sandboxes |= await self._machine.adopt(missing)
        mine = {sandbox.id for sandbox in self._sandboxes.values()}
        num_orphans = len(strangers) + await self._machine.end_others(mine)
        found = {
            one.name: _describe(sandbox)
            for one in known
            if (sandbox := self._sandboxes.get(one.name)) is not None and sandbox.is_alive
        }
        return Settled(self._boot, found, num_orphans)

    async def beat(self, names: frozenset[str]) -> Pulse:
        """The control plane lives and has sandboxes `names` here; others end."""
        self._heard = self._clock()
        for name, sandbox in list(self._sandboxes.items()):
            if name not in names or not sandbox.is_alive:
                task = asyncio.create_task(self._end(name))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)
        live = {name for name, sandbox in self._sandboxes.items() if sandbox.is_alive}
        return Pulse(self._boot, frozenset(live))

    async def _watch(self) -> None:
        while self._clock() - self._heard < self._machine.linger_s:
            await asyncio.sleep(_LOOK_S)
        _log.warning("no control plane for %g s: all sandboxes end", self._machine.linger_s)
        await self.close()
        if self._on_silence is not None:
            await self._on_silence()

    async def close(self) -> None:
        """End every sandbox."""
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            self._watcher.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)
        await asyncio.gather(*(self._end(name) for name in list(self._sandboxes)))
        await self._machine.end_others(set())

    # -- life
    async def start(self, name: str, wanted: Wanted) -> Described | Refusal:
        """Start a sandbox under `name`; a refusal where the host has no memory left."""
        free = await asyncio.to_thread(available_memory_bytes)
        if free is not None and free < self._reserve_bytes:
            message = f"it has {free >> 20} MiB left; {self._reserve_bytes >> 20} stay free"
            return Refusal(reason="host-memory", message=message, retry_after_s=5)
        await self._settled.wait()
        task = asyncio.create_task(self._launch(name, wanted))
        self._starting[name] = task
        task.add_done_callback(lambda _: self._starting.pop(name, None))
        # Nobody may be there any more when it is done: the next beat or settling ends it.
        return _describe(await asyncio.shield(task))

    async def _launch(self, name: str, wanted: Wanted) -> Sandbox:
        sandbox = self._sandboxes[name] = await self._machine.launch(wanted)
        return sandbox

    async def kill(self, name: str, guest: str | None) -> None:
        """End a sandbox, and its container where this process has no connection to it."""
        if name in self._sandboxes:
            await self._end(name)
        if guest is not None and guest in self._machine.guests():
            await self._machine.end_guest(guest)

    async def _end(self, name: str) -> None:
        sandbox = self._sandboxes.pop(name, None)
        if sandbox is None:
            return
        for key in [key for key, command in self._commands.items() if command.sandbox == name]:
            self._commands.pop(key).stop()
        with contextlib.suppress(SandboxError, OSError):  # a frozen one cannot end by itself
            await sandbox.resume()
        try:
            await sandbox.kill()
        except (SandboxError, OSError, TimeoutError) as error:
            _log.warning("sandbox %s did not end in order: %s", name, error)
            with contextlib.suppress(SandboxError, OSError):  # the next settling tries again
                await self._machine.end_guest(sandbox.id)

    async def pause(self, name: str) -> None:
        """Freeze it."""
        await self._find(name).pause()

    async def resume(self, name: str) -> None:
        """Let it go on."""
        await self._find(name).resume()

    def _find(self, name: str) -> Sandbox:
        sandbox = self._sandboxes.get(name)
        if sandbox is None:
            raise SandboxFailedError(f"sandbox {name} is not held by its host; it may be soon")
        return sandbox

    # -- images
    async def layers(self, call: str, *arguments: Any) -> Any:
        """One of the calls of `LayerTaker`."""
        assert call in _LAYER_CALLS, call
        return await asyncio.to_thread(getattr(self._layers, call), *arguments)

    # -- files
    async def file(self, name: str, call: str, arguments: tuple[Any, ...], **options: Any) -> Any:
        """One of a sandbox's calls for files."""
        assert call in _FILE_CALLS, call
        return await getattr(self._find(name), call)(*arguments, **options)

    # -- commands; `key` is the caller's name for one
    async def dispatch(self, name: str, key: str, request: ExecRequest, keep_output: bool) -> None:
        """Start a command, once: a key that was used is refused."""
        assert key not in self._commands, key
        sandbox = self._find(name)
        # Made again here: only the sandbox itself knows what its substrate adds to a request.
        options = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
        request = sandbox.request(options.pop("argv"), **options)
        running = await sandbox.dispatch(request, keep_output=keep_output)
        self._commands[key] = _Command(name, running)

    async def take(self, key: str) -> list[Output]:
        """The next pieces of output, as soon as there is one; none at its end."""
        return await self._command(key).take()

    async def result(self, key: str) -> ExecResult:
        """Wait for its end. Spilled output stays on this host, so its path is left out."""
        command = self._command(key)
        try:
            result = await command.running.result()
        finally:
            self._commands.pop(key, None)
        return dataclasses.replace(result, stdout_file=None, stderr_file=None)

    async def feed(self, key: str, data: bytes) -> None:
        """Give it bytes on stdin; waits while it does not read them."""
        await self._command(key).running.write(data)

    async def close_stdin(self, key: str) -> None:
        """No more input comes."""
        self._command(key).running.close_stdin()

    async def signal(self, key: str, number: int) -> None:
        """Signal its process group."""
        self._command(key).running.send_signal(number)

    async def resize(self, key: str, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        self._command(key).running.resize(rows, columns)

    async def stop(self, key: str) -> None:
        """Kill a command and everything it started."""
        self._command(key).running.kill()

    def _command(self, key: str) -> _Command:
        command = self._commands.get(key)
        if command is None:
            raise SandboxLostError("the command ended with its sandbox, or with its host's worker")
        return command


def _describe(sandbox: Sandbox) -> Described:
    return Described(sandbox.id, sandbox.options, sandbox.capabilities)
