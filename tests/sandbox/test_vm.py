"""Full machines: a disk with a boot loader of its own, made here, and the contract over it."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import SandboxFailedError, SubstrateMissingError
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.initramfs import pack
from rorqual.sandbox.microvm.kernel import find_kernel
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions
from rorqual.sandbox.vm.sandbox import VMSandbox, start_vm

from .conftest import Make, run
from .test_contract import (  # noqa: F401  (run again, with this module's `make`)
    test_a_paused_sandbox_can_be_killed,
    test_background_process_outlives_its_command_only,
    test_commands_return_code_output_and_usage,
    test_files_round_trip,
    test_fork_shares_the_past_and_not_the_future,
    test_other_users_are_really_others,
    test_output_flood_is_cut_and_said,
    test_pause_stops_and_resume_continues,
    test_stdin_of_any_size_arrives_whole,
    test_streaming_and_interactive_input,
    test_terminal_has_size_and_echo,
    test_timeout_kills_the_whole_tree,
    test_ttl_ends_it,
)

pytestmark = pytest.mark.sandbox

FIRST_SECTOR = 2048

INIT = b"""#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /proc /sys /dev /tmp /run /etc /root /home/user /workspace /var/tmp /usr/bin /usr/sbin
$B --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/console 2>&1
mkdir -p /dev/pts; mount -t devpts pts /dev/pts
chmod 1777 /tmp /workspace /var/tmp; chown 1000:1000 /home/user
echo root:x:0:0::/root:/bin/sh > /etc/passwd
echo user:x:1000:1000::/home/user:/bin/sh >> /etc/passwd
for module in /modules/*; do insmod $module; done
exec /agent --port rorqual.agent
"""


@pytest.fixture(scope="session")
def disk(root: Path) -> Path:
    """A disk with a file system, a boot loader, Debian's kernel and BusyBox."""
    boot_sector = Path("/usr/lib/grub/i386-pc/boot.img")
    tools = ("grub-mkimage", "mformat", "mcopy", "qemu-img")
    if not boot_sector.exists() or any(shutil.which(tool) is None for tool in tools):
        pytest.skip("needs apt-get install grub-pc-bin grub-common mtools qemu-utils")
    busybox = Path("/bin/busybox")
    try:
        kernels = list(find_kernel().file.parent.parent.glob("q35-*/vmlinuz"))
    except SubstrateMissingError as error:
        pytest.skip(str(error))
    if not kernels or not busybox.exists():
        pytest.skip("needs rorqual sandbox kernel fetch and apt-get install busybox-static")
    files = {"init": INIT, "bin/busybox": busybox.read_bytes()}
    files["agent"] = Layout(root).agent().read_bytes()
    for module in sorted(kernels[0].parent.glob("modules/*.ko")):
        files[f"modules/{module.name}"] = module.read_bytes()
    made = root / "guest"
    made.mkdir()
    (made / "initrd").write_bytes(pack(files))
    shutil.copy(kernels[0], made / "vmlinuz")
    (made / "grub.cfg").write_text(
        "set root=(hd0,msdos1)\n"
        "linux /vmlinuz console=ttyS0 quiet rdinit=/init reboot=t panic=-1\n"
        "initrd /initrd\nboot\n"
    )
    loader = ["grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)", "-c", made / "grub.cfg"]
    loader += ["-o", made / "core", "biosdisk", "part_msdos", "fat", "linux", "boot"]
    image = made / "disk.raw"
    subprocess.run(loader, check=True)
    sectors = 32 << 11
    first = bytearray(boot_sector.read_bytes())
    first[446:510] = struct.pack("<B3xB3xII48x", 0x80, 0x0E, FIRST_SECTOR, sectors)
    with image.open("wb") as file:
        file.truncate((FIRST_SECTOR + sectors) * 512)
        file.write(first + (made / "core").read_bytes())
    partition = f"{image}@@{FIRST_SECTOR * 512}"
    subprocess.run(
        ["mformat", "-i", partition, "-T", str(sectors), "-h", "16", "-s", "63", "::"], check=True
    )
    subprocess.run(["mcopy", "-i", partition, made / "vmlinuz", made / "initrd", "::"], check=True)
    return image


@pytest.fixture
def make(root: Path, disk: Path) -> Make:
    async def make(**options: Any) -> Sandbox:
        if "snapshot" not in options:
            options["image"] = disk
        return await Sandbox.create("vm", root=root, **options)

    return make


def test_disk_memory_and_screen_are_the_machines_own(make: Make, disk: Path) -> None:
    async def work() -> None:
        before = disk.read_bytes()
        async with await make() as sandbox:
            assert isinstance(sandbox, VMSandbox)
            assert (await sandbox.screenshot()).startswith(b"\x89PNG")
            await sandbox.exec("echo mine | dd of=/dev/vda bs=512 seek=60000 conv=fsync")
            await sandbox.exec("sleep 600 >/dev/null 2>&1 &")
            snapshot = await sandbox.snapshot()
            await sandbox.exec("echo more | dd of=/dev/vda bs=512 seek=60000 conv=fsync")
            async with await make(snapshot=snapshot) as copy:
                read = (
                    "dd if=/dev/vda bs=512 skip=60000 count=1 iflag=direct 2>/dev/null | head -c5"
                )
                assert (await copy.exec(read)).text == "mine\n"
                assert (await sandbox.exec(read)).text == "more\n"
                assert (await copy.exec("pidof sleep")).ok
                names = {(await machine.exec("hostname")).text for machine in (sandbox, copy)}
                assert len(names) == 2
        assert disk.read_bytes() == before

    run(work(), timeout_s=600)


def test_a_guest_without_an_agent_is_an_error_with_its_last_words(
    root: Path, disk: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        empty = tmp_path / "empty.raw"
        empty.write_bytes(b"\0" * (1 << 20))
        with pytest.raises(SandboxFailedError, match=r"rorqual\.agent"):
            await start_vm(SandboxOptions(substrate="vm", root=root, image=empty), boot_s=4.0)
        assert not list((root / "sandboxes").iterdir())

    run(work())
