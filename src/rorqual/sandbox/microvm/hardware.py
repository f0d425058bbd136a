"""The machines of the microvm substrate, and QEMU's command lines: pure functions of plain data.

Every file and socket is a descriptor QEMU inherits, so that it can run as a user who may open none
of them. What Firecracker is told is in firecracker_api.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from rorqual.errors import SandboxRequestError

MIB = 1 << 20
RESERVED_BYTES = 64 * MIB
"""What kernel and agent need beside the memory a caller was promised."""

TRANSLATION_MIB = 64
"""Largest cache of translated code under emulation, per machine."""

MAX_LAYERS = {"microvm": 6, "q35": 20, "firecracker": 16}
"""Free virtio places: a microvm has eight, one is the agent's line; Firecracker has 19 interrupts,
and its kernel's command line is full at about as many."""

VSOCK_PORT = 999
"""Where the agent of a Firecracker guest listens; below 1024, so that no command can."""

Accelerator = Literal["kvm", "tcg"]
MachineType = Literal["microvm", "q35", "firecracker"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a guest consists of. Machines of equal hardware are forks of one template.

    Attributes:
        kernel, initramfs, layers: digests or paths, lowest layer first.
        machine: a machine type of QEMU, or Firecracker's only one.
        version: QEMU's or Firecracker's; a saved state is for the version that wrote it.
    """

    machine: MachineType
    accelerator: Accelerator
    version: str
    kernel: str
    initramfs: str
    layers: tuple[str, ...]
    memory_bytes: int
    disk_bytes: int
    cpus: int
    processes: int
    read_only: bool

    def __post_init__(self) -> None:
        if len(self.layers) > MAX_LAYERS[self.machine]:
            raise SandboxRequestError(
                f"the image has {len(self.layers)} layers; a {self.machine} machine takes at most "
                f"{MAX_LAYERS[self.machine]}: build it into one from a directory"
            )

    @property
    def ram_bytes(self) -> int:
        """Memory of the guest: programs, files and the kernel, in whole MiB."""
        return -(-(self.memory_bytes + self.disk_bytes + RESERVED_BYTES) // MIB) * MIB

    @property
    def key(self) -> str:
        """Name of its template."""
        told = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """Numbers of the descriptors that QEMU inherits."""

    kernel: int
    initramfs: int
    memory: int
    layers: tuple[int, ...]
    agent: int
    control: int
    console: int


def boot_line(hardware: Hardware) -> str:
    """The kernel's command line; native/init.c reads the part after ``rorqual.``."""
    words = ["console=ttyS0", "quiet", "panic=-1", "rdinit=/init"]
    if hardware.machine == "firecracker":  # its keyboard controller knows one key: reset
        words += ["reboot=k", f"rorqual.vsock={VSOCK_PORT}"]
    else:
        words.append("reboot=t")
    words += [
        f"rorqual.layers={len(hardware.layers)}",
        f"rorqual.disk={hardware.disk_bytes}",
        f"rorqual.processes={hardware.processes}",
        f"rorqual.read_only={int(hardware.read_only)}",
    ]
    return " ".join(words)


def common_arguments(*, accelerator: Accelerator, cpus: int, agent: int, control: int) -> list[str]:
    """What every machine has: no defaults, a control socket, the agent's line, a call filter."""
    kind = "kvm" if accelerator == "kvm" else f"tcg,tb-size={TRANSLATION_MIB}"
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-accel", kind, "-cpu", "host" if accelerator == "kvm" else "max", "-smp", str(cpus)),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-chardev", f"socket,id=control,fd={control}", "-mon", "chardev=control,mode=control"),
        *("-chardev", f"socket,id=agent,fd={agent}"),
    ]


def arguments(
    hardware: Hardware, fds: Descriptors, *, shared: bool, incoming: bool = False
) -> list[str]:
    """QEMU's arguments.

    Args:
        shared: write to the memory file (a template in the making) instead of a private view.
        incoming: wait for a saved state instead of starting the kernel.
    """
    mib = hardware.ram_bytes // MIB
    if hardware.machine == "microvm":
        # Without ACPI: under emulation its timer calibration fails.
        machine = "microvm,acpi=off,pit=on,pic=on,rtc=on,x-option-roms=off"
        serial, disk = "virtio-serial-device", "virtio-blk-device"
    else:
        machine, serial, disk = "q35", "virtio-serial-pci", "virtio-blk-pci"
    command = [
        *("-M", f"{machine},memory-backend=ram", "-m", f"{mib}M"),
        "-object",
        f"memory-backend-file,id=ram,size={mib}M,mem-path=/proc/self/fd/{fds.memory},"
        f"share={'on' if shared else 'off'}",
        *("-kernel", f"/proc/self/fd/{fds.kernel}", "-initrd", f"/proc/self/fd/{fds.initramfs}"),
        *("-append", boot_line(hardware)),
        *("-chardev", f"socket,id=console,fd={fds.console}", "-serial", "chardev:console"),
        *("-device", f"{serial},max_ports=2"),
        *("-device", "virtserialport,chardev=agent,name=rorqual.agent,nr=1"),
        *common_arguments(
            accelerator=hardware.accelerator,
            cpus=hardware.cpus,
            agent=fds.agent,
            control=fds.control,
        ),
    ]
    for number, fd in enumerate(fds.layers):
        command += ["-add-fd", f"fd={fd},set={number + 1}"]
        drive = f"file=/dev/fdset/{number + 1},if=none,id=d{number},format=raw,readonly=on"
        command += ["-drive", drive]
        command += ["-device", f"{disk},drive=d{number},serial=layer{number}"]
    if incoming:
        command += ["-incoming", "defer"]
    return command
