"""Whether KVM runs guests here: found out by starting one; a device that opens proves nothing.

Some hosts have /dev/kvm, create machines and processors, and then execute a guest's kernel by
emulation, minutes for a second, or not at all.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
from pathlib import Path

from rorqual.errors import SandboxError
from rorqual.sandbox.contract import MIB, Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.hardware import Accelerator
from rorqual.sandbox.microvm.kernel import Kernel, default_cache
from rorqual.sandbox.microvm.process import Machine, Qemu, start_machine

PROBE_S = 10.0
"""A guest on working KVM says its first words within a fraction of a second."""


def kvm_opens() -> bool:
    """Whether KVM may be tried at all."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


async def choose_accelerator(
    layout: Layout, qemu: Qemu, kernel: Kernel, initramfs: Path
) -> Accelerator:
    """KVM if a guest has started with it on this kernel and QEMU, else emulation; remembered."""
    if not kvm_opens():
        return "tcg"
    told = {"host": platform.release(), "qemu": qemu.version, "guest": kernel.version}
    record = default_cache().parent / "kvm.json"
    try:
        found = json.loads(record.read_text())
        if {name: found[name] for name in told} == told:
            return "kvm" if found["works"] is True else "tcg"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet
    works = await starts_with_kvm(layout, qemu, kernel, initramfs)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({**told, "works": works}))
    return "kvm" if works else "tcg"


async def starts_with_kvm(
    layout: Layout, qemu: Qemu, kernel: Kernel, initramfs: Path, *, limit_s: float = PROBE_S
) -> bool:
    """Start a guest with KVM; whether its first program has run within `limit_s`.

    The guest has no layers, which init reports on the console: proof that user space runs.
    """

    def arguments(fds: dict[str, int]) -> list[str]:
        machine = "microvm,acpi=off,pit=on,pic=on,rtc=on,x-option-roms=off"
        return [
            *("-M", machine if kernel.machine == "microvm" else "q35", "-m", "256M"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "kvm", "-cpu", "host"),
            *("-kernel", f"/proc/self/fd/{fds['kernel']}"),
            *("-initrd", f"/proc/self/fd/{fds['initramfs']}"),
            *("-append", "console=ttyS0 quiet reboot=t panic=-1 rdinit=/init rorqual.layers=0"),
            *("-chardev", f"socket,id=console,fd={fds['console']}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=c,fd={fds['control']}", "-mon", "chardev=c,mode=control"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"),
        ]

    files = {"kernel": (kernel.file, os.O_RDONLY), "initramfs": (initramfs, os.O_RDONLY)}
    machine: Machine | None = None
    try:
        async with asyncio.timeout(limit_s):
            machine = await start_machine(
                qemu,
                arguments,
                files,
                layout=layout,
                id=os.urandom(8).hex(),
                limits=Limits(),
                ram_bytes=256 * MIB,
            )
            while "init: layers" not in machine.console.text:
                await machine.qmp.execute("query-status")  # raises once QEMU has given up
                await asyncio.sleep(0.02)
            return True
    except (SandboxError, TimeoutError):
        return False
    finally:
        if machine is not None:
            await machine.end()
