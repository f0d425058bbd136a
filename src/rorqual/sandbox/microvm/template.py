"""Saved machines that new ones start from: a memory file and the state of the devices.

A template is made by booting once. Forks map its memory privately, so that each costs only what it
changes and starts without booting. A snapshot of a running machine becomes a template as well. How
machines are booted, saved and started is QEMU's part here and Firecracker's in
firecracker_template.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rorqual.errors import (
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
)
from rorqual.sandbox.contract import ExecRequest, Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.hardware import Descriptors, Hardware, arguments
from rorqual.sandbox.microvm.launch import NOBODY, MachineProcess
from rorqual.sandbox.microvm.line import LineClient, connect_line
from rorqual.sandbox.microvm.process import Machine, Qemu, start_machine

BOOT_S = 120.0
"""Longest boot: emulation on a busy machine."""

ANSWER_S = 60.0
"""Longest wait for the agent of a machine that goes on."""

RESTORE_S = 60.0
KEEP_TEMPLATES = 8
_WARM_UP = ("/bin/sh", "-c", "ls / >/dev/null; cat /proc/uptime >/dev/null")

M = TypeVar("M", bound=MachineProcess)


@dataclass(frozen=True)
class Template:
    """A directory: `memory`, `devices`, `hardware.json`."""

    directory: Path
    hardware: Hardware

    @property
    def memory(self) -> Path:
        return self.directory / "memory"

    @property
    def devices(self) -> Path:
        return self.directory / "devices"


class Templates(ABC, Generic[M]):
    """The templates below one root; booted ones by their hardware, snapshots by their id.

    Attributes:
        program: what runs the machines, and its version; it starts only what it saved itself.
    """

    program: str
    version: str

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._root = layout.root / "templates"

    # -- what differs
    @abstractmethod
    def runs(self, hardware: Hardware) -> bool:
        """Whether machines of this hardware are this program's, of whatever version."""

    @abstractmethod
    async def start(self, template: Template, *, id: str, limits: Limits) -> tuple[M, LineClient]:
        """A fork of `template` that runs, and its agent.

        Raises:
            SandboxFailedError: it did not start; the message has why.
        """

    @abstractmethod
    async def _boot(self, partial: Template) -> None:
        """Boot a machine, warm it up and write it to `partial`'s files."""

    @abstractmethod
    async def _save_running(self, machine: M, client: LineClient, partial: Template) -> None:
        """Write a machine that goes on afterwards to `partial`'s files."""

    # -- what does not
    def snapshot(self, id: str) -> Template:
        """The template of a snapshot.

        Raises:
            SandboxRequestError: there is none, or it was made by another program or version.
        """
        if not id.startswith("machine-") or not id.removeprefix("machine-").isalnum():
            raise SandboxRequestError(f"{id!r} is no snapshot of a machine")
        template = self._load(self._root / id)
        if template is None:
            raise SandboxRequestError(f"snapshot {id!r} is gone")
        if not self.runs(template.hardware):
            raise SandboxRequestError(
                f"snapshot {id!r} was not made by {self.program}: give the isolation it was made "
                "with"
            )
        if template.hardware.version != self.version:
            raise SandboxRequestError(
                f"snapshot {id!r} is of {self.program} {template.hardware.version}; "
                f"here is {self.version}"
            )
        return template

    def _load(self, directory: Path) -> Template | None:
        try:
            data = json.loads((directory / "hardware.json").read_text())
            hardware = Hardware(**{**data, "layers": tuple(data["layers"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        template = Template(directory, hardware)
        needed = (template.memory, template.devices, *map(Path, _files_of(hardware)))
        return template if all(path.exists() for path in needed) else None

    async def booted(self, hardware: Hardware) -> Template:
        """The template of freshly booted `hardware`; boots it if there is none."""
        directory = self._root / hardware.key
        async with self._locked(hardware.key):
            template = await asyncio.to_thread(self._load, directory)
            if template is not None:
                with contextlib.suppress(OSError):
                    os.utime(directory)  # least recently used goes first
                return template
            self._discard_old()
            async with self._making(hardware, directory) as partial:
                await self._boot(partial)
        return Template(directory, hardware)

    async def keep(self, machine: M, client: LineClient, hardware: Hardware) -> str:
        """Save a running machine as a template and let it go on; returns the snapshot's id."""
        id = f"machine-{secrets.token_hex(12)}"
        async with self._making(hardware, self._root / id) as partial:
            await self._save_running(machine, client, partial)
        return id

    @asynccontextmanager
    async def _making(self, hardware: Hardware, target: Path) -> AsyncIterator[Template]:
        """An empty directory; becomes `target` when the block ends well."""
        partial = self._root / f".{target.name}.{secrets.token_hex(4)}"
        partial.mkdir(parents=True, mode=0o700)
        template = Template(partial, hardware)
        try:
            yield template
            (partial / "hardware.json").write_text(json.dumps(asdict(hardware)))
            shutil.rmtree(target, ignore_errors=True)  # a damaged one
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @asynccontextmanager
    async def _locked(self, key: str) -> AsyncIterator[None]:
        """One maker per template, also across processes."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._root / f".{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.05)
            yield
        finally:
            os.close(fd)

    def _discard_old(self) -> None:
        """Remove the least recently used booted templates; running forks keep their memory."""
        booted = [path for path in self._root.iterdir() if path.is_dir() and path.name[0] != "."]
        booted = [path for path in booted if not path.name.startswith("machine-")]
        booted.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in booted[KEEP_TEMPLATES - 1 :]:
            shutil.rmtree(path, ignore_errors=True)
            path.with_name(f".{path.name}.lock").unlink(missing_ok=True)


class TemplateStore(Templates[Machine]):
    """QEMU's. The memory file is mapped shared while a template is made, and privately by forks."""

    program = "QEMU"

    def __init__(self, layout: Layout, qemu: Qemu) -> None:
        super().__init__(layout)
        self.version = qemu.version
        self._qemu = qemu

    def runs(self, hardware: Hardware) -> bool:
        return hardware.machine != "firecracker"

    async def start(
        self, template: Template, *, id: str, limits: Limits
    ) -> tuple[Machine, LineClient]:
        machine = await self.run(template, state=template.devices, id=id, limits=limits)
        try:
            await machine.resume()
            return machine, await self._meet(machine, ANSWER_S)
        except BaseException:
            await machine.end()
            raise

    async def _boot(self, partial: Template) -> None:
        _make_memory(partial)
        machine = await self.run(partial, shared=True)
        try:
            client = await self._meet(machine, BOOT_S)
            await warm_up(client)
            async with client.silence():
                await save_devices(machine, partial.devices)
            client.close()
        finally:
            await machine.end()

    async def _save_running(self, machine: Machine, client: LineClient, partial: Template) -> None:
        # Its memory is a private view and goes through a stream once; a second QEMU turns the
        # stream into a file that forks can share.
        stream = partial.directory / "stream"
        try:
            async with client.silence():
                await machine.pause()
                try:
                    await _migrate(machine, stream, with_memory=True)
                finally:
                    await machine.resume()
            _make_memory(partial)
            copy = await self.run(partial, shared=True, state=stream)
            try:
                await save_devices(copy, partial.devices)
            finally:
                await copy.end()
        finally:
            stream.unlink(missing_ok=True)

    async def run(
        self,
        template: Template,
        *,
        shared: bool = False,
        state: Path | None = None,
        id: str | None = None,
        limits: Limits | None = None,
    ) -> Machine:
        """Start a machine from `template`'s memory: from `state` if given, else by booting.

        Args:
            shared: write to the memory file itself.
            state: a stream that `_migrate` or `save_devices` wrote; the machine stays stopped.
        """
        hardware = template.hardware
        # Even a private view is opened for writing by QEMU.
        files = {
            "kernel": (Path(hardware.kernel), os.O_RDONLY),
            "initramfs": (Path(hardware.initramfs), os.O_RDONLY),
            "memory": (template.memory, os.O_RDWR),
        }
        for number, layer in enumerate(hardware.layers):
            files[f"layer{number}"] = (Path(layer), os.O_RDONLY)

        def as_arguments(numbers: dict[str, int]) -> list[str]:
            layers = tuple(numbers[f"layer{n}"] for n in range(len(hardware.layers)))
            plain = {k: v for k, v in numbers.items() if not k.startswith("layer")}
            fds = Descriptors(layers=layers, **plain)
            return arguments(hardware, fds, shared=shared, incoming=state is not None)

        machine = await start_machine(
            self._qemu,
            as_arguments,
            files,
            layout=self._layout,
            id=id or secrets.token_hex(8),
            limits=limits or Limits(cpus=max(1, hardware.cpus)),
            ram_bytes=hardware.ram_bytes,
        )
        if state is not None:
            try:
                async with asyncio.timeout(RESTORE_S):
                    await load_devices(machine, state, ignore_memory=state == template.devices)
            except BaseException as error:
                await machine.end()
                if isinstance(error, TimeoutError):
                    raise SandboxFailedError("the machine's state did not load") from None
                raise
        return machine

    async def _meet(self, machine: Machine, timeout_s: float) -> LineClient:
        try:
            return await connect_line(machine.agent, timeout_s=timeout_s)
        except SandboxLostError as error:
            said = machine.console.text[-1500:] or "its console is silent"
            raise SandboxFailedError(f"the guest did not start: {error}: {said}") from error


def _make_memory(template: Template) -> None:
    with template.memory.open("wb") as memory:
        memory.truncate(template.hardware.ram_bytes)
        if os.geteuid() == 0:
            os.fchown(memory.fileno(), NOBODY, NOBODY)


def _files_of(hardware: Hardware) -> tuple[str, ...]:
    return (hardware.kernel, hardware.initramfs, *hardware.layers)


async def warm_up(client: LineClient) -> None:
    """Run a shell once, so that every fork finds it and its libraries in memory."""

    def ignore(channel: object, data: bytes) -> None:
        pass

    request = ExecRequest(argv=_WARM_UP, timeout_s=60.0)
    process = await client.start(request, sink=ignore)
    await process.wait()  # an image without a shell is an image like any other


async def save_devices(machine: Machine, file: Path) -> None:
    """Write everything but the shared memory to `file`; the machine stays stopped."""
    await machine.qmp.execute("stop")
    await _migrate(machine, file, with_memory=False)


async def load_devices(machine: Machine, file: Path, *, ignore_memory: bool) -> None:
    """Load a saved state into a machine that waits for one; it is stopped afterwards."""
    await _ignore_shared_memory(machine, ignore_memory)
    await _hand_over(machine, file, os.O_RDONLY)
    await machine.qmp.execute("migrate-incoming", {"uri": "fd:state"})
    await machine.qmp.wait_status("paused", "prelaunch", "postmigrate", "running")


async def _ignore_shared_memory(machine: Machine, state: bool) -> None:
    # Part of the format: reader and writer must agree on it.
    capability = {"capability": "x-ignore-shared", "state": state}
    await machine.qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})


async def _migrate(machine: Machine, file: Path, *, with_memory: bool) -> None:
    await _ignore_shared_memory(machine, not with_memory)
    # The default limit of 128 MB/s is for networks.
    await machine.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    await _hand_over(machine, file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    await machine.qmp.execute("migrate", {"uri": "fd:state"})
    await machine.qmp.wait_migrated()


async def _hand_over(machine: Machine, file: Path, flags: int) -> None:
    fd = os.open(file, flags | os.O_CLOEXEC, 0o600)
    try:
        await machine.qmp.execute("getfd", {"fdname": "state"}, fd=fd)
    finally:
        os.close(fd)
