"""A guest machine as a sandbox: what the agent does not do itself - pause, fork, end.

Boundary: the machine QEMU makes, QEMU itself as an unprivileged process behind a system-call
filter, and inside the guest the same confinement of commands as in a container.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets

from rorqual.errors import SandboxRequestError, UnsupportedError
from rorqual.sandbox.agent_sandbox import AgentSandbox
from rorqual.sandbox.container.cgroup import RESERVED_PROCESSES, find_hierarchy
from rorqual.sandbox.contract import Capabilities, Limit
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.hardware import Hardware
from rorqual.sandbox.microvm.initramfs import build_initramfs
from rorqual.sandbox.microvm.kernel import find_kernel
from rorqual.sandbox.microvm.kvm import choose_accelerator
from rorqual.sandbox.microvm.line import LineClient, connect_line, renew
from rorqual.sandbox.microvm.process import Machine, find_qemu
from rorqual.sandbox.microvm.rootfs import layer_files
from rorqual.sandbox.microvm.template import TemplateStore
from rorqual.sandbox.sandbox import SandboxOptions, Snapshot

ANSWER_S = 60.0


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
        machine: Machine,
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

    async def pause(self) -> None:
        await self.machine.qmp.execute("stop")

    async def resume(self) -> None:
        await self.machine.qmp.execute("cont")
        await renew(self.client, hostname=None)

    async def destroy(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        await self.machine.end()


class MicroVMSandbox(MachineSandbox):
    """A guest forked from a template. Made by `start_microvm`."""

    def __init__(
        self, *, hardware: Hardware, store: TemplateStore, notes: tuple[str, ...], **given: object
    ) -> None:
        super().__init__(**given)  # type: ignore[arg-type]
        self.hardware = hardware
        self.notes = notes
        self._store = store

    async def snapshot(self) -> Snapshot:
        id = await self._store.keep(self.machine, self.client, self.hardware)
        return Snapshot(id=id, substrate="microvm", kind="memory")


async def start_microvm(options: SandboxOptions) -> MicroVMSandbox:
    """Start one; see `Sandbox.create`. The first of its kind boots, later ones are its forks."""
    if options.isolation is not None:
        raise SandboxRequestError(f"microvm has no isolation {options.isolation!r}; leave it out")
    if options.linger_s > 0:
        raise UnsupportedError("microvm: a sandbox cannot outlive its creator")
    qemu = await asyncio.to_thread(find_qemu)
    layout = Layout(options.root)
    store = TemplateStore(layout, qemu)
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
        kernel = await asyncio.to_thread(find_kernel)
        initramfs = await asyncio.to_thread(build_initramfs, layout, kernel)
        images = ImageStore(layout.images)
        layers = await asyncio.to_thread(layer_files, options.image, images, layout)
        notes = () if kernel.note is None else (kernel.note,)
        hardware = Hardware(
            machine=kernel.machine,
            accelerator=await choose_accelerator(layout, qemu, kernel, initramfs),
            qemu=qemu.version,
            kernel=str(kernel.file),
            initramfs=str(initramfs),
            layers=tuple(str(layer) for layer in layers),
            memory_bytes=limits.memory_bytes,
            disk_bytes=limits.disk_bytes,
            cpus=max(1, math.ceil(limits.cpus)),
            processes=limits.processes + RESERVED_PROCESSES,
            read_only=options.read_only,
        )
        template = await store.booted(hardware)
    machine = await store.run(
        template, state=template.devices, id=secrets.token_hex(8), limits=limits
    )
    try:
        await machine.qmp.execute("cont")
        client = await connect_line(machine.agent, timeout_s=ANSWER_S)
        sandbox = MicroVMSandbox(
            machine=machine,
            options=options,
            capabilities=machine_capabilities(
                f"a guest kernel under QEMU {qemu.version} ({template.hardware.accelerator})"
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
