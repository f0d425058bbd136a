"""Start a container, or attach to one that outlived its creator; sweep what dead ones left.

A sandbox is a directory: `lock` (held by its shim while it lives), `agent.sock`, `options.json`,
`rootfs`, `disk`, `output`. No other state exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rorqual.errors import (
    SandboxError,
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
    UnsupportedError,
)
from rorqual.sandbox import wire
from rorqual.sandbox.client import AgentClient, connect
from rorqual.sandbox.container.bundle import agent_arguments, bubblewrap_arguments, oci_config
from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.container.runtime import Runtime, find_runtime
from rorqual.sandbox.container.sandbox import ContainerSandbox, container_capabilities
from rorqual.sandbox.contract import Limits, Network
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.sandbox import SandboxOptions

START_S = 30.0


async def start_container(options: SandboxOptions) -> ContainerSandbox:
    """Start one; see `Sandbox.create`."""
    runtime = find_runtime(options.isolation)
    if options.linger_s > 0 and not runtime.can_listen:
        raise UnsupportedError(f"{runtime.name}: a sandbox cannot outlive its creator")
    if options.snapshot is not None and options.snapshot.kind == "memory":
        if not runtime.can_checkpoint:
            raise SandboxRequestError(
                f"{runtime.name} cannot restore processes; isolation='gvisor' can"
            )
        if not ImageStore(Layout(options.root).images).memory(options.snapshot.id).is_dir():
            raise SandboxRequestError(f"snapshot {options.snapshot.id!r} is gone")
    layout = Layout(options.root)
    id = secrets.token_hex(8)
    directory = layout.sandboxes / id
    privileged = os.geteuid() == 0
    hierarchy = find_hierarchy() if privileged else None
    cgroup = Cgroup(hierarchy, id) if hierarchy is not None else None
    lowers, host_usr = await asyncio.to_thread(_lower_layers, options, layout)
    directory.mkdir(parents=True, mode=0o700)
    if cgroup is not None:
        try:
            cgroup.create(options.limits)
        except SandboxError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    log = tempfile.TemporaryFile()  # noqa: SIM115  (closed below, after it was read)
    life: socket.socket | None = None
    try:
        command = _prepare(options, runtime, layout, directory, lowers, host_usr, privileged)
        shim = [str(layout.shim()), str(directory)]
        if cgroup is not None:
            shim += [part for at in cgroup.directories.values() for part in ("--cgroup", str(at))]
            shim += [part for at in cgroup.residues for part in ("--residue", str(at))]
        if runtime.is_oci and hierarchy is not None and hierarchy.unified is not None:
            shim += ["--umount", str(hierarchy.unified)]
        if privileged:
            shim += _mounts(options, directory, lowers)
        if options.linger_s == 0:
            shim.append("--life")
        shim += ["--", *command]
        if runtime.can_checkpoint and options.linger_s == 0:
            shim += ["--again", *_restore(runtime, directory, directory / "again")]
        life, stream = _spawn(shim, directory, log.fileno(), options, listen=runtime.can_listen)
        if stream is None:
            client = await _meet(directory, START_S)
        else:
            restored = options.snapshot is not None and options.snapshot.kind == "memory"
            client = await connect(stream, timeout_s=START_S, say_hello=restored)
            if restored:
                await client.ask(b"n", wire.text_field(b"M", secrets.token_hex(16) + "\n"))
    except SandboxLostError as error:
        log.seek(0)
        said = log.read(2000).decode("utf-8", "replace").strip()
        await asyncio.to_thread(remove_remains, directory, life)
        raise SandboxFailedError(f"{runtime.name} did not start: {said or error}") from error
    except BaseException:
        await asyncio.to_thread(remove_remains, directory, life)
        raise
    finally:
        log.close()
    sandbox = ContainerSandbox(
        id=id,
        options=options,
        capabilities=container_capabilities(runtime, cgroup, privileged=privileged),
        runtime=runtime,
        client=client,
        directory=directory,
        life=life,
        cgroup=cgroup,
        layout=layout,
    )
    try:
        await sandbox.open_network()
    except BaseException:
        await sandbox.kill()
        raise
    return sandbox


def _lower_layers(options: SandboxOptions, layout: Layout) -> tuple[list[Path], bool]:
    """Read-only directories of the root, topmost first, and whether /usr is the host's."""
    store = ImageStore(layout.images)
    image = options.snapshot.id if options.snapshot is not None else options.image
    lowers, host_usr = store.resolve(image, layout)
    return [layout.agent_layer(), *lowers], host_usr


def _mounts(options: SandboxOptions, directory: Path, lowers: list[Path]) -> list[str]:
    lower = ":".join(str(path) for path in lowers)
    size = f"size={options.limits.disk_bytes},mode=755,nr_inodes=1000000"
    upper, work = directory / "disk" / "upper", directory / "disk" / "work"
    arguments = ["--tmpfs", str(directory / "disk"), size]
    arguments += ["--mkdir", str(upper), "--mkdir", str(work)]
    overlay = f"lowerdir={lower},upperdir={upper},workdir={work}"
    return [*arguments, "--overlay", str(directory / "rootfs"), overlay]


def _prepare(
    options: SandboxOptions,
    runtime: Runtime,
    layout: Layout,
    directory: Path,
    lowers: list[Path],
    host_usr: bool,
    privileged: bool,
) -> list[str]:
    """Write the sandbox's files; returns the runtime's command line."""
    for name in ("rootfs", "disk"):
        (directory / name).mkdir()
    (directory / "options.json").write_text(json.dumps(_as_json(options), default=str))
    agent = agent_arguments(
        stream=not runtime.can_listen, linger_s=options.linger_s, ttl_s=options.ttl_s
    )
    hostname = f"sandbox-{directory.name[:6]}"
    if not runtime.is_oci:
        return bubblewrap_arguments(
            runtime.program,
            rootfs=directory / "rootfs" if privileged else lowers[-1],
            agent=agent,
            agent_binary=layout.agent(),
            hostname=hostname,
            limits=options.limits,
            privileged=privileged,
            read_only=options.read_only,
            host_usr=host_usr,
        )
    config = oci_config(
        rootfs=directory / "rootfs",
        agent=agent,
        hostname=hostname,
        limits=options.limits,
        read_only=options.read_only,
        host_usr=host_usr,
        cgroups_path=f"/rorqual/{directory.name}" if runtime.name == "runc" else None,
    )
    (directory / "config.json").write_text(json.dumps(config))
    if options.snapshot is not None and options.snapshot.kind == "memory":
        memory = ImageStore(layout.images).memory(options.snapshot.id)
        return _restore(runtime, directory, memory)
    bundle = ["--bundle", str(directory), directory.name]
    return [*runtime.command(directory), "run", "--detach", *bundle]


def _restore(runtime: Runtime, directory: Path, memory: Path) -> list[str]:
    bundle = ["--bundle", str(directory), "--image-path", str(memory), directory.name]
    return [*runtime.command(directory), "restore", "--detach", *bundle]


def _as_json(options: SandboxOptions) -> dict[str, object]:
    kept = ("isolation", "image", "limits", "network", "ttl_s", "linger_s", "env", "read_only")
    values = asdict(options)
    return {name: values[name] for name in kept}


def _spawn(
    command: list[str], directory: Path, log: int, options: SandboxOptions, *, listen: bool
) -> tuple[socket.socket | None, socket.socket | None]:
    """Start the shim with a listening socket or one end of a stream for the agent.

    Returns the socket whose end means that everything is gone (None for a sandbox that may outlive
    this process), and our end of the stream.
    """
    life, shims_life = socket.socketpair()
    stream: socket.socket | None = None
    if listen:
        agents = socket.socket(socket.AF_UNIX)
    else:
        stream, agents = socket.socketpair()
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        if listen:
            agents.bind(_short(folder))  # through the descriptor: a socket's path is limited
            agents.listen(16)
        actions = [
            (os.POSIX_SPAWN_DUP2, agents.fileno(), 0),
            (os.POSIX_SPAWN_DUP2, null, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_DUP2, shims_life.fileno(), 3),
        ]
        environment = {"PATH": os.defpath + ":/usr/sbin:/sbin"}
        pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
        _, status = os.waitpid(pid, 0)  # the shim puts itself in the background at once
        if status != 0:
            raise SandboxFailedError("the shim could not start")
    except OSError as error:
        life.close()
        raise SandboxFailedError(f"the shim could not start: {error}") from error
    finally:
        agents.close()
        shims_life.close()
        os.close(folder)
        os.close(null)
    if options.linger_s > 0:
        life.close()
        return None, stream
    life.setblocking(False)
    return life, stream


def _short(folder: int) -> str:
    return f"/proc/self/fd/{folder}/agent.sock"


async def _meet(directory: Path, timeout_s: float) -> AgentClient:
    sock = socket.socket(socket.AF_UNIX)
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(_short(folder))
    except OSError as error:
        sock.close()
        raise SandboxLostError(f"sandbox {directory.name} is gone: {error}") from error
    finally:
        os.close(folder)
    return await connect(sock, timeout_s=timeout_s)


async def attach_container(id: str, *, root: Path | None = None) -> ContainerSandbox:
    """Connect to a sandbox that was created with `linger_s` and has not ended.

    Raises:
        SandboxLostError: it has.
    """
    layout = Layout(root)
    directory = layout.sandboxes / id
    if not id.isalnum():
        raise SandboxRequestError(f"{id!r} is no sandbox id")
    try:
        stored = json.loads((directory / "options.json").read_text())
    except (OSError, ValueError):
        raise SandboxLostError(f"sandbox {id} is gone") from None
    network = stored.pop("network")
    options = SandboxOptions(
        **{
            **stored,
            "limits": Limits(**stored["limits"]),
            "network": _as_network(network) if network else None,
        },
        root=root,
    )
    privileged = os.geteuid() == 0
    hierarchy = find_hierarchy() if privileged else None
    cgroup = Cgroup(hierarchy, id) if hierarchy is not None else None
    if cgroup is not None:
        cgroup.new_oom_kills()
    client = await _meet(directory, START_S)
    runtime = find_runtime(options.isolation)
    sandbox = ContainerSandbox(
        id=id,
        options=options,
        capabilities=container_capabilities(runtime, cgroup, privileged=privileged),
        runtime=runtime,
        client=client,
        directory=directory,
        life=None,
        cgroup=cgroup,
        layout=layout,
    )
    await sandbox.open_network()
    return sandbox


def _as_network(stored: dict[str, Any]) -> Network:
    lists = {name: tuple(stored[name]) for name in ("allow", "direct")}
    return Network(**{**stored, **lists})


def remove_remains(directory: Path, life: socket.socket | None = None) -> bool:
    """Remove a sandbox whose shim is dead or dying; True if nothing of it is left."""
    if life is not None:
        life.close()
    for _ in range(500):
        if not directory.exists():
            return True
        with contextlib.suppress(OSError):
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return _remove_dead(directory)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)
        time.sleep(0.01)
    return False


def _remove_dead(directory: Path) -> bool:
    hierarchy = find_hierarchy() if os.geteuid() == 0 else None
    gone = True
    if hierarchy is not None:
        cgroup = Cgroup(hierarchy, directory.name)
        for _ in range(200):
            cgroup.kill()
            if gone := cgroup.remove():
                break
            time.sleep(0.005)
    if gone:  # else the directory stays, so that the next sweep finds the groups
        shutil.rmtree(directory, ignore_errors=True)
    return gone and not directory.exists()


def sweep(root: Path | None = None) -> list[str]:
    """Remove what sandboxes left whose shim was killed; returns their ids. Live ones are kept."""
    removed = []
    layout = Layout(root)
    entries = sorted(layout.sandboxes.iterdir()) if layout.sandboxes.exists() else []
    for directory in entries:
        try:
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            # Without a lock its shim has not come so far, or its creator died before starting it.
            with contextlib.suppress(OSError):
                if time.time() - directory.stat().st_mtime > START_S and _remove_dead(directory):
                    removed.append(directory.name)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
        if _remove_dead(directory):
            removed.append(directory.name)
    return removed
