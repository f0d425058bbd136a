"""A guest machine as a sandbox: what the agent does not do itself - pause, fork, end.

Boundary: the machine QEMU or Firecracker makes, that program itself as an unprivileged process
behind a system-call filter, and inside the guest the same confinement of commands as in a
container.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxRequestError, SubstrateMissingError, UnsupportedError
from rorqual.sandbox.agent_sandbox import AgentSandbox
from rorqual.sandbox.container.cgroup import RESERVED_PROCESSES, find_hierarchy
from rorqual.sandbox.contract import Capabilities, Limit
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.firecracker import find_firecracker
from rorqual.sandbox.microvm.firecracker_template import FirecrackerStore
from rorqual.sandbox.microvm.hardware import Accelerator, Hardware, MachineType
from rorqual.sandbox.microvm.initramfs import build_initramfs
from rorqual.sandbox.microvm.kernel import BUILD_COMMAND, Kernel, find_kernel, kernels
from rorqual.sandbox.microvm.kvm import choose_accelerator, kvm_opens
from rorqual.sandbox.microvm.launch import MachineProcess
from rorqual.sandbox.microvm.line import LineClient, renew
from rorqual.sandbox.microvm.process import find_qemu
from rorqual.sandbox.microvm.rootfs import layer_files
from rorqual.sandbox.microvm.template import Templates, TemplateStore
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, Snapshot
from rorqual.sandbox.saved import remove_saved


def machine_capabilities(boundary: str) -> Capabilities:
    """What guest machines can do here."""
    enforced: set[Limit] = {"memory", "output", "wall", "disk", "processes"}
    if os.geteuid() == 0 and find_hierarchy() is not None:
        enforced.add("cpu")
    return Capabilities(
        snapshot="memory", survives_host=False, enforced=frozenset(enforced), boundary=boundary
    )


class MachineSandbox(AgentSandbox):
    """A running guest; base of the microvm and vm substrates."""

    client: LineClient

    def __init__(
        self,
        *,
        machine: MachineProcess,
        options: SandboxOptions,
        capabilities: Capabilities,
        client: LineClient,
        confine: bool,
    ) -> None:
        super().__init__(
            id=machine.directory.name,
            options=options,
            capabilities=capabilities,
            client=client,
            directory=machine.directory,
            confine=confine,
        )
        self.machine = machine
        self._expiry: asyncio.TimerHandle | None = None
        if options.ttl_s is not None:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(options.ttl_s, machine.stop_now)

    def ran_out_of_memory(self) -> bool:
        return self.machine.console.new_kills() > 0

    async def fork(self, count: int = 1) -> Sequence[Sandbox]:
        forks = await super().fork(count)
        taken = forks[0].options.snapshot
        if taken is not None:  # they have all of it; nobody else knows of it
            await asyncio.to_thread(remove_saved, Layout(self.options.root), taken.id)
        return forks

    async def pause(self) -> None:
        await self.machine.pause()

    async def resume(self) -> None:
        await self.machine.resume()
        await renew(self.client, hostname=None)

    async def destroy(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        await self.machine.end()


class MicroVMSandbox(MachineSandbox):
    """A guest forked from a template. Made by `start_microvm`."""

    def __init__(
        self, *, hardware: Hardware, store: Templates[Any], notes: tuple[str, ...], **given: object
    ) -> None:
        super().__init__(**given)  # type: ignore[arg-type]
        self.hardware = hardware
        self.notes = notes
        self._store = store

    async def snapshot(self) -> Snapshot:
        id = await self._store.keep(self.machine, self.client, self.hardware)
        return Snapshot(id=id, substrate="microvm", kind="memory")


async def start_microvm(options: SandboxOptions) -> MicroVMSandbox:
    """Start one; see `Sandbox.create`. The first of its kind boots, later ones are its forks.

    ``isolation="firecracker"`` runs it under Firecracker, else it is QEMU.
    """
    if options.isolation not in (None, "firecracker"):
        raise SandboxRequestError(
            f"microvm has no isolation {options.isolation!r}: leave it out for QEMU, "
            "or give 'firecracker'"
        )
    if options.linger_s > 0:
        raise UnsupportedError("microvm: a sandbox cannot outlive its creator")
    layout = Layout(options.root)
    if options.isolation is None:
        qemu = await asyncio.to_thread(find_qemu)
        return await start_from(TemplateStore(layout, qemu), options, qemu_base)
    firecracker = await asyncio.to_thread(find_firecracker)
    return await start_from(FirecrackerStore(layout, firecracker), options, firecracker_base)


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a new guest is booted from, beside the layers of its image."""

    machine: MachineType
    accelerator: Accelerator
    kernel: Kernel
    initramfs: Path


async def qemu_base(layout: Layout) -> Base:
    """The best kernel, on KVM if that works."""
    qemu = await asyncio.to_thread(find_qemu)
    kernel = await asyncio.to_thread(find_kernel)
    initramfs = await asyncio.to_thread(build_initramfs, layout, kernel)
    accelerator = await choose_accelerator(layout, qemu, kernel, initramfs)
    return Base(machine=kernel.machine, accelerator=accelerator, kernel=kernel, initramfs=initramfs)


async def firecracker_base(layout: Layout) -> Base:
    """Our own kernel, on KVM once a guest has run on it.

    Raises:
        SubstrateMissingError: what is not here, and how to get it.
    """
    if not kvm_opens():
        raise SubstrateMissingError("Firecracker needs KVM, and /dev/kvm is not here to be opened")
    kernel = next((kernel for kernel in await asyncio.to_thread(kernels) if kernel.vsock), None)
    if kernel is None:
        raise SubstrateMissingError(
            f"Firecracker needs our own kernel with sockets to its host: {BUILD_COMMAND} "
            "(one that was built before it had them serves QEMU only)"
        )
    qemu = await asyncio.to_thread(find_qemu)  # KVM is tried with it
    initramfs = await asyncio.to_thread(build_initramfs, layout, kernel)
    if await choose_accelerator(layout, qemu, kernel, initramfs) != "kvm":
        raise SubstrateMissingError(
            "Firecracker needs KVM: /dev/kvm opens here, but no guest has started with it"
        )
    return Base(machine="firecracker", accelerator="kvm", kernel=kernel, initramfs=initramfs)


async def start_from(
    store: Templates[Any],
    options: SandboxOptions,
    find_base: Callable[[Layout], Awaitable[Base]],
) -> MicroVMSandbox:
    """Start a fork of one of `store`'s templates: the snapshot's that is asked for, or a booted
    one's, for which `find_base` says what to boot."""
    layout = Layout(options.root)
    limits = options.limits
    notes: tuple[str, ...] = ()
    if options.snapshot is not None:
        template = await asyncio.to_thread(store.snapshot, options.snapshot.id)
        asked = (limits.memory_bytes, limits.disk_bytes, limits.processes)
        has = template.hardware
        if asked != (has.memory_bytes, has.disk_bytes, has.processes - RESERVED_PROCESSES):
            raise SandboxRequestError(
                "a fork has its snapshot's limits: memory, disk and processes cannot change"
            )
    else:
        base = await find_base(layout)
        images = ImageStore(layout.images)
        layers = await asyncio.to_thread(layer_files, options.image, images, layout)
        notes = () if base.kernel.note is None else (base.kernel.note,)
        hardware = Hardware(
            machine=base.machine,
            accelerator=base.accelerator,
            version=store.version,
            kernel=str(base.kernel.file),
            initramfs=str(base.initramfs),
            layers=tuple(str(layer) for layer in layers),
            memory_bytes=limits.memory_bytes,
            disk_bytes=limits.disk_bytes,
            cpus=max(1, math.ceil(limits.cpus)),
            processes=limits.processes + RESERVED_PROCESSES,
            read_only=options.read_only,
        )
        template = await store.booted(hardware)
    machine, client = await store.start(template, id=secrets.token_hex(8), limits=limits)
    try:
        sandbox = MicroVMSandbox(
            machine=machine,
            options=options,
            capabilities=machine_capabilities(
                f"a guest kernel under {store.program} {store.version} "
                f"({template.hardware.accelerator})"
            ),
            client=client,
            confine=True,
            hardware=template.hardware,
            store=store,
            notes=notes,
        )
        await renew(client, hostname=f"sandbox-{sandbox.id[:6]}")
        await sandbox.open_network()
    except BaseException:
        await machine.end()
        raise
    return sandbox
