"""A full machine as a sandbox: q35, the caller's disk below an overlay, savevm and loadvm.

The guest is the caller's own: it must run the agent on its line ``rorqual.agent`` (see
docs/sandbox-vm.md), and commands there are what the agent is, usually root. The boundary is the
machine.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rorqual.errors import (
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
    SubstrateMissingError,
    UnsupportedError,
)
from rorqual.sandbox.contract import MIB
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.hardware import Accelerator, common_arguments
from rorqual.sandbox.microvm.initramfs import build_initramfs
from rorqual.sandbox.microvm.kernel import find_kernel
from rorqual.sandbox.microvm.kvm import choose_accelerator
from rorqual.sandbox.microvm.line import LineClient, connect_line, renew
from rorqual.sandbox.microvm.process import Machine, Qemu, find_qemu, start_machine
from rorqual.sandbox.microvm.sandbox import MachineSandbox, machine_capabilities
from rorqual.sandbox.sandbox import SandboxOptions, Snapshot
from rorqual.sandbox.vm.disk import Disk, copy_overlay, make_overlay, open_disk

BOOT_S = 300.0
"""Longest boot to the agent: a full system under emulation."""

RESTORE_S = 60.0
_SAVED = "rorqual"


@dataclass(frozen=True, kw_only=True)
class Computer:
    """A machine around a disk. A saved state is for an equal one.

    Attributes:
        ram_bytes: all of the guest's memory.
    """

    disk: Disk
    ram_bytes: int
    cpus: int
    accelerator: Accelerator
    qemu: str


def computer_arguments(computer: Computer, fds: dict[str, int], *, restore: bool) -> list[str]:
    """QEMU's arguments; `fds` has agent, control, console, disk and overlay."""
    blocks: tuple[dict[str, object], ...] = (
        {"driver": "file", "filename": "/dev/fdset/1", "node-name": "base-file", "read-only": True},
        {
            "driver": computer.disk.format,
            "file": "base-file",
            "node-name": "base",
            "read-only": True,
        },
        {"driver": "file", "filename": "/dev/fdset/2", "node-name": "over-file"},
        {"driver": "qcow2", "file": "over-file", "node-name": "disk", "backing": "base"},
    )
    command = ["-M", "q35", "-m", f"{computer.ram_bytes // MIB}M"]
    command += ["-add-fd", f"fd={fds['disk']},set=1", "-add-fd", f"fd={fds['overlay']},set=2"]
    for block in blocks:
        command += ["-blockdev", json.dumps(block)]
    command += [
        *("-device", "virtio-blk-pci,drive=disk,bootindex=1"),
        *("-device", "virtio-serial-pci,max_ports=2"),
        *("-device", "virtserialport,chardev=agent,name=rorqual.agent,nr=1"),
        *("-chardev", f"socket,id=console,fd={fds['console']}", "-serial", "chardev:console"),
        *("-vga", "std"),
        *common_arguments(
            accelerator=computer.accelerator,
            cpus=computer.cpus,
            agent=fds["agent"],
            control=fds["control"],
        ),
    ]
    if restore:
        command += ["-loadvm", _SAVED]
    return command


class VMSandbox(MachineSandbox):
    """A running full machine. Made by `start_vm`."""

    machine: Machine

    def __init__(
        self, *, computer: Computer, layout: Layout, machine: Machine, **given: object
    ) -> None:
        super().__init__(machine=machine, **given)  # type: ignore[arg-type]
        self.computer = computer
        self._layout = layout

    async def snapshot(self) -> Snapshot:
        id = f"vm-{secrets.token_hex(12)}"
        target = self._layout.root / "machines" / id
        partial = target.with_name(f".{id}")
        partial.mkdir(parents=True, mode=0o700)
        qmp = self.machine.qmp
        try:
            async with self.client.silence():
                await qmp.execute("stop")
                try:
                    await qmp.hmp(f"savevm {_SAVED}")
                    overlay = self.directory / "overlay.qcow2"
                    await asyncio.to_thread(copy_overlay, overlay, partial / "overlay.qcow2")
                    await qmp.hmp(f"delvm {_SAVED}")
                finally:
                    await qmp.execute("cont")
            (partial / "computer.json").write_text(json.dumps(_as_json(self.computer)))
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Snapshot(id=id, substrate="vm", kind="memory")

    async def screenshot(self) -> bytes:
        """What its screen shows, as a PNG file."""
        file = self.directory / f"screen-{secrets.token_hex(4)}.png"
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        number = 1000
        try:
            await self.machine.qmp.execute("add-fd", {"fdset-id": number}, fd=fd)
            try:
                shot = {"filename": f"/dev/fdset/{number}", "format": "png"}
                await self.machine.qmp.execute("screendump", shot)
            finally:
                await self.machine.qmp.execute("remove-fd", {"fdset-id": number})
            return file.read_bytes()
        finally:
            os.close(fd)
            file.unlink()


def _as_json(computer: Computer) -> dict[str, object]:
    disk = computer.disk
    return {
        "disk": str(disk.path),
        "modified_ns": disk.path.stat().st_mtime_ns,
        "ram_bytes": computer.ram_bytes,
        "cpus": computer.cpus,
        "accelerator": computer.accelerator,
        "qemu": computer.qemu,
    }


def _saved_computer(folder: Path, qemu: Qemu) -> Computer:
    try:
        data = json.loads((folder / "computer.json").read_text())
        disk = open_disk(data["disk"])
        computer = Computer(
            disk=disk,
            ram_bytes=data["ram_bytes"],
            cpus=data["cpus"],
            accelerator=data["accelerator"],
            qemu=data["qemu"],
        )
        unchanged = data["modified_ns"] == disk.path.stat().st_mtime_ns
    except (OSError, ValueError, KeyError) as error:
        raise SandboxRequestError(f"snapshot {folder.name!r} is gone") from error
    if not unchanged:
        raise SandboxRequestError(f"{disk.path} was changed after snapshot {folder.name!r}")
    if computer.qemu != qemu.version:
        raise SandboxRequestError(
            f"snapshot {folder.name!r} is of QEMU {computer.qemu}; here is {qemu.version}"
        )
    return computer


async def _new_computer(options: SandboxOptions, layout: Layout, qemu: Qemu) -> Computer:
    disk = await asyncio.to_thread(open_disk, options.image)
    try:  # KVM is asked with a kernel of ours, which this guest has no part in
        kernel = await asyncio.to_thread(find_kernel)
        initramfs = await asyncio.to_thread(build_initramfs, layout, kernel)
        accelerator = await choose_accelerator(layout, qemu, kernel, initramfs)
    except SubstrateMissingError:
        accelerator = "tcg"
    return Computer(
        disk=disk,
        ram_bytes=-(-options.limits.memory_bytes // MIB) * MIB,
        cpus=max(1, math.ceil(options.limits.cpus)),
        accelerator=accelerator,
        qemu=qemu.version,
    )


async def start_vm(options: SandboxOptions, *, boot_s: float = BOOT_S) -> VMSandbox:
    """Start one; see `Sandbox.create`.

    Args:
        boot_s: how long the guest may take to its agent; `options.ttl_s` counts from then.
    """
    if options.isolation is not None:
        raise SandboxRequestError(f"vm has no isolation {options.isolation!r}; leave it out")
    if options.linger_s > 0:
        raise UnsupportedError("vm: a sandbox cannot outlive its creator")
    if options.read_only:
        raise UnsupportedError("vm: what is writable inside is the guest's matter")
    qemu = await asyncio.to_thread(find_qemu)
    layout = Layout(options.root)
    id = secrets.token_hex(8)
    directory = layout.sandboxes / id
    overlay = directory / "overlay.qcow2"
    saved: Path | None = None
    if options.snapshot is not None:
        if not options.snapshot.id.removeprefix("vm-").isalnum():
            raise SandboxRequestError(f"{options.snapshot.id!r} is no snapshot of a vm")
        saved = layout.root / "machines" / options.snapshot.id
        computer = await asyncio.to_thread(_saved_computer, saved, qemu)
        if -(-options.limits.memory_bytes // MIB) * MIB != computer.ram_bytes:
            raise SandboxRequestError("a fork has its snapshot's memory; it cannot change")
    else:
        computer = await _new_computer(options, layout, qemu)
    directory.mkdir(parents=True, mode=0o700)
    try:
        if saved is not None:
            await asyncio.to_thread(copy_overlay, saved / "overlay.qcow2", overlay)
        else:
            await asyncio.to_thread(make_overlay, computer.disk, overlay)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    files = {"disk": (computer.disk.path, os.O_RDONLY), "overlay": (overlay, os.O_RDWR)}
    machine = await start_machine(
        qemu,
        lambda fds: computer_arguments(computer, fds, restore=saved is not None),
        files,
        layout=layout,
        id=id,
        limits=options.limits,
        ram_bytes=computer.ram_bytes,
    )
    try:
        client = await _meet(machine, saved is not None, boot_s)
        sandbox = VMSandbox(
            computer=computer,
            layout=layout,
            machine=machine,
            options=options,
            capabilities=replace(
                machine_capabilities(
                    f"a machine under QEMU {qemu.version} ({computer.accelerator}); commands are "
                    "root in the guest"
                ),
                enforced=machine_capabilities("").enforced - {"disk", "processes"},
            ),
            client=client,
            confine=False,
        )
        await renew(client, hostname=f"sandbox-{id[:6]}")
        await sandbox.open_network()
    except BaseException:
        await machine.end()
        raise
    return sandbox


async def _meet(machine: Machine, restored: bool, boot_s: float) -> LineClient:
    if restored:
        async with asyncio.timeout(RESTORE_S):
            await machine.qmp.execute("cont")
            await machine.qmp.hmp(f"delvm {_SAVED}")
    try:
        return await connect_line(machine.agent, timeout_s=RESTORE_S if restored else boot_s)
    except SandboxLostError as error:
        said = machine.console.text[-1500:] or "its serial console is silent"
        raise SandboxFailedError(
            f"no agent answered from the guest: it must run on the line rorqual.agent; {said}"
        ) from error
