"""The Firecracker driver against a program that speaks its published API; see the stand-in.

Not run on hardware with KVM: what a real guest does is not tested here.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual.errors import (
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
    SubstrateMissingError,
)
from rorqual.sandbox import native
from rorqual.sandbox.contract import MIB, ExecRequest, Limits
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.microvm.firecracker import (
    Firecracker,
    find_firecracker,
    start_firecracker,
)
from rorqual.sandbox.microvm.firecracker_api import (
    DESCRIBE,
    PAUSE,
    RESUME,
    Request,
    boot_requests,
    load_request,
    save_request,
)
from rorqual.sandbox.microvm.firecracker_template import FirecrackerStore
from rorqual.sandbox.microvm.hardware import Hardware
from rorqual.sandbox.microvm.initramfs import pack
from rorqual.sandbox.microvm.kernel import Kernel
from rorqual.sandbox.microvm.line import LineClient
from rorqual.sandbox.microvm.process import Qemu
from rorqual.sandbox.microvm.sandbox import Base, start_from, start_microvm
from rorqual.sandbox.microvm.template import TemplateStore
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, Snapshot

from .conftest import run
from .firecracker_program import CALLS, VERSION, RefusedError, check

PROGRAM = Path(__file__).with_name("firecracker_program.py")

if not Path("/usr/bin/python3").exists() or shutil.which("setpriv") is None:
    pytest.skip("the stand-in needs /usr/bin/python3 and setpriv", allow_module_level=True)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory everybody may read: the program runs as nobody."""
    directory = Path(tempfile.mkdtemp(prefix="firecracker-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def program(place: Path, monkeypatch: pytest.MonkeyPatch) -> Firecracker:
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return installed(place)


def installed(place: Path, fault: str = "") -> Firecracker:
    target = place / f"firecracker{fault and '-' + fault}"
    shutil.copy(PROGRAM, target)
    target.chmod(0o755)
    return Firecracker(str(target), VERSION)


@pytest.fixture
def hardware(place: Path, root: Path) -> Hardware:
    files = {"kernel": b"a kernel", "layer": b"\0" * 4096}
    files["initramfs"] = pack({"init": b"", "agent": Layout(root).agent().read_bytes()})
    private = place / "private"  # only its owner may enter: the program is given descriptors
    private.mkdir(mode=0o700, exist_ok=True)
    for name, data in files.items():
        (private / name).write_bytes(data)
    return Hardware(
        machine="firecracker",
        accelerator="kvm",
        version=VERSION,
        kernel=str(private / "kernel"),
        initramfs=str(private / "initramfs"),
        layers=(str(private / "layer"),) * 3,
        memory_bytes=64 * MIB,
        disk_bytes=MIB,
        cpus=2,
        processes=64,
        read_only=False,
    )


async def told(client: LineClient, *argv: str, exec_id: str | None = None) -> bytes:
    said = bytearray()
    request = ExecRequest(argv=argv, timeout_s=30.0, cwd="/", exec_id=exec_id)
    process = await client.start(request, sink=lambda _, data: said.extend(data))
    await process.wait()
    return bytes(said)


def nothing_left(layout: Layout) -> bool:
    left = list(layout.sandboxes.iterdir()) if layout.sandboxes.exists() else []
    partial = [path for path in (layout.root / "templates").glob(".*") if path.is_dir()]
    return not left and not partial


def test_every_request_is_as_the_description_says(hardware: Hardware) -> None:
    requests = [DESCRIBE, PAUSE, RESUME, save_request(), load_request(), *boot_requests(hardware)]
    seen = set()
    for request in requests:
        path = "/drives/{id}" if request.path.startswith("/drives/") else request.path
        _, fields = CALLS[request.method, path]
        seen.add((request.method, path))
        if fields is None:
            assert request.body is None
        else:
            check(fields, request.body)
    assert seen == CALLS.keys()
    drives = [r.path for r in boot_requests(hardware) if r.path.startswith("/drives/")]
    assert drives == ["/drives/layer0", "/drives/layer1", "/drives/layer2"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/machine-config", {"vcpu_count": 33, "mem_size_mib": 128}),
        ("/machine-config", {"vcpu_count": 1}),
        ("/vsock", {"guest_cid": 2, "uds_path": "v.sock"}),
        ("/vsock", {"guest_cid": 3, "uds_path": "v.sock", "port": 1}),
        ("/actions", {"action_type": "Start"}),
        ("/snapshot/load", {"snapshot_path": "d", "mem_backend": {"backend_type": "File"}}),
        ("/boot-source", []),
    ],
)
def test_the_stand_in_refuses_what_is_not_described(path: str, body: object) -> None:
    _, fields = CALLS["PUT", path]
    assert fields is not None
    with pytest.raises(RefusedError):
        check(fields, body)


def test_a_template_boots_once_and_its_forks_run_commands(
    program: Firecracker, hardware: Hardware, root: Path
) -> None:
    layout = Layout(root)

    async def work() -> None:
        store = FirecrackerStore(layout, program)
        template = await store.booted(hardware)
        assert template.memory.stat().st_size == hardware.ram_bytes
        made = template.devices.stat().st_mtime_ns
        assert (await store.booted(hardware)).devices.stat().st_mtime_ns == made
        assert nothing_left(layout)
        forks = [
            await store.start(template, id=os.urandom(8).hex(), limits=Limits()) for _ in range(2)
        ]
        try:
            for machine, client in forks:
                assert await told(client, "echo", machine.directory.name) == (
                    machine.directory.name.encode() + b"\n"
                )
            (first, client), (_, other) = forks
            if os.geteuid() == 0:
                assert "running as 65534" in first.said()
            await first.pause()
            waiting = asyncio.create_task(told(client, "echo", "late"))
            assert await told(other, "echo", "on") == b"on\n"
            assert not waiting.done()
            await first.resume()
            assert await waiting == b"late\n"
            await first.end()
            assert not first.is_running
            assert await told(other, "echo", "still") == b"still\n"
        finally:
            for machine, _ in forks:
                await machine.end()
        assert nothing_left(layout)

    run(work())


def test_a_running_machine_is_saved_and_its_commands_go_on(
    program: Firecracker, hardware: Hardware, root: Path
) -> None:
    layout = Layout(root)

    async def work() -> None:
        store = FirecrackerStore(layout, program)
        template = await store.booted(hardware)
        machine, client = await store.start(template, id=os.urandom(8).hex(), limits=Limits())
        try:
            count = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.1; done"
            running = asyncio.create_task(told(client, "sh", "-c", count))
            await asyncio.sleep(0.25)
            id = await store.keep(machine, client, hardware)
            assert await running == b"1\n2\n3\n4\n5\n6\n7\n8\n"  # nothing twice, nothing lost
            kept = store.snapshot(id)
            fork, forked = await store.start(kept, id=os.urandom(8).hex(), limits=Limits())
            try:
                assert await told(forked, "echo", "fork") == b"fork\n"
                second = await store.keep(fork, forked, kept.hardware)  # a fork's own fork
                assert store.snapshot(second).memory.exists()
            finally:
                await fork.end()
        finally:
            await machine.end()
        assert nothing_left(layout)
        with pytest.raises(SandboxRequestError, match="was not made by QEMU"):
            TemplateStore(layout, Qemu("qemu-system-x86_64", "7.2")).snapshot(id)
        newer = FirecrackerStore(layout, Firecracker(program.program, "2.0.0"))
        with pytest.raises(SandboxRequestError, match=r"is of Firecracker 1\.17.* here is 2\.0\.0"):
            newer.snapshot(id)

    run(work())


def test_a_guest_that_takes_no_new_identity_is_no_sandbox(
    program: Firecracker, hardware: Hardware, root: Path
) -> None:
    """The stand-in's guest is a process without the right to set a clock: it is refused."""

    async def base(layout: Layout) -> Base:
        kernel = Kernel(file=Path(hardware.kernel), machine="microvm", version="0", vsock=True)
        return Base(
            machine="firecracker",
            accelerator="kvm",
            kernel=kernel,
            initramfs=Path(hardware.initramfs),
        )

    layout = Layout(root)
    options = SandboxOptions(
        root=root, substrate="microvm", isolation="firecracker", limits=Limits(disk_bytes=MIB)
    )
    with pytest.raises(SandboxFailedError, match="the guest did not renew"):
        run(start_from(FirecrackerStore(layout, program), options, base))
    assert nothing_left(layout)


def test_what_the_api_refuses_is_said_with_its_words(
    program: Firecracker, hardware: Hardware, root: Path
) -> None:
    layout = Layout(root)
    store = FirecrackerStore(layout, program)

    async def many() -> None:
        await store.booted(replace(hardware, cpus=33))

    with pytest.raises(SandboxFailedError, match=r"PUT /machine-config: `vcpu_count` is 33"):
        run(many())

    async def early() -> None:
        machine = await start_firecracker(
            program, {}, layout=layout, id="early", limits=Limits(), ram_bytes=64 * MIB
        )
        try:
            with pytest.raises(SandboxFailedError, match="not supported before starting"):
                await machine.pause()
            with pytest.raises(SandboxFailedError, match="No such file"):
                await machine.tell([load_request()])
            with pytest.raises(SandboxFailedError, match="Invalid request method"):
                await machine.api.send(Request("PUT", "/what", {}))
        finally:
            await machine.end()

    run(early())
    assert nothing_left(layout)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("silent", "did not answer in 0.5 s"), ("garbage", "did not answer in 0.5 s")],
)
def test_an_api_that_does_not_answer_is_an_error(
    place: Path, root: Path, fault: str, said: str
) -> None:
    layout = Layout(root)

    async def work() -> None:
        with pytest.raises(SandboxFailedError, match=said):
            await start_firecracker(
                installed(place, fault),
                {},
                layout=layout,
                id=fault,
                limits=Limits(),
                ram_bytes=64 * MIB,
                start_s=0.5,
            )

    run(work())
    assert nothing_left(layout)


def test_a_program_that_does_not_start_says_why(root: Path) -> None:
    layout = Layout(root)

    async def work() -> None:
        with pytest.raises(SandboxFailedError, match=r"did not start: .*/nowhere/firecracker"):
            await start_firecracker(
                Firecracker("/nowhere/firecracker", VERSION),
                {},
                layout=layout,
                id="absent",
                limits=Limits(),
                ram_bytes=64 * MIB,
            )

    run(work())
    assert nothing_left(layout)


def test_a_link_instead_of_a_saved_file_is_not_followed(
    place: Path, hardware: Hardware, root: Path
) -> None:
    layout = Layout(root)
    store = FirecrackerStore(layout, installed(place, "link"))
    with pytest.raises(SandboxFailedError, match="what Firecracker saved is not there"):
        run(store.booted(replace(hardware, processes=65)))
    assert nothing_left(layout)


def test_a_machine_that_dies_while_it_is_saved_is_lost(
    place: Path, hardware: Hardware, root: Path
) -> None:
    layout = Layout(root)
    dying = replace(hardware, processes=66)

    async def work() -> None:
        template = await FirecrackerStore(layout, installed(place)).booted(dying)
        store = FirecrackerStore(layout, installed(place, "dying"))
        machine, client = await store.start(template, id=os.urandom(8).hex(), limits=Limits())
        try:
            running = asyncio.create_task(told(client, "sleep", "2"))
            await asyncio.sleep(0.1)
            with pytest.raises(SandboxLostError, match="was lost in its snapshot"):
                await store.keep(machine, client, dying)
            with pytest.raises(SandboxLostError):
                await running
        finally:
            await machine.end()

    run(work())
    assert nothing_left(layout)


def test_what_is_missing_is_named(place: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def create() -> None:
        async with await Sandbox.create("microvm", root=root, isolation="firecracker"):
            pass

    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SubstrateMissingError, match="firecracker is not installed"):
        asyncio.run(create())
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin:/usr/sbin:/sbin")
    installed(place)
    assert find_firecracker().version == VERSION
    # KVM, or a kernel for it, or a guest that has started with it; the stand-in has no other guest.
    with pytest.raises((SubstrateMissingError, SandboxFailedError)):
        asyncio.run(create())
    options = SandboxOptions(
        root=root,
        substrate="microvm",
        isolation="firecracker",
        snapshot=Snapshot(id="machine-0", substrate="microvm", kind="memory"),
    )
    with pytest.raises(SandboxRequestError, match="is gone"):
        asyncio.run(start_microvm(options))
    (place / "firecracker").write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    with pytest.raises(SubstrateMissingError, match="does not start: broken"):
        find_firecracker()


def test_the_agent_builds_with_a_socket_to_its_host(root: Path) -> None:
    assert b"--vsock" in native.build("agent", Layout(root).binaries).read_bytes()
