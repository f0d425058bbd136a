"""What starting a container does on this machine without waiting for it to answer.

A directory, control groups, a bundle, and the shim with its sockets: all of it blocks for some
milliseconds, so that `start_container` runs it in a thread, several at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from rorqual.errors import SandboxError, SandboxFailedError
from rorqual.sandbox.container.bundle import agent_arguments, bubblewrap_arguments, oci_config
from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.container.remains import remove_remains
from rorqual.sandbox.container.runtime import SEALED_FD, Runtime
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.sandbox import SandboxOptions


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A container whose shim runs; the agent has not answered yet.

    Attributes:
        life: its end means that everything is gone; None for one that may outlive this process.
        stream: our end of the agent's only connection; None where the agent listens.
        log: what the shim and the runtime say.
    """

    id: str
    directory: Path
    cgroup: Cgroup | None
    life: socket.socket | None
    stream: socket.socket | None
    log: BinaryIO

    def said(self) -> str:
        """The beginning of the log."""
        self.log.seek(0)
        return self.log.read(2000).decode("utf-8", "replace").strip()

    def abandon(self) -> None:
        """End it and remove everything of it."""
        if self.stream is not None:
            self.stream.close()
        remove_remains(self.directory, self.life)


def launch(options: SandboxOptions, runtime: Runtime, layout: Layout) -> Launched:
    """Start the shim; what fails on the way leaves nothing behind.

    Raises:
        SandboxError: an image is unknown, or the shim could not be started.
    """
    id = secrets.token_hex(8)
    directory = layout.sandboxes / id
    privileged = os.geteuid() == 0
    hierarchy = find_hierarchy() if privileged else None
    cgroup = Cgroup(hierarchy, id) if hierarchy is not None else None
    lowers, host_usr = _lower_layers(options, layout)
    directory.mkdir(parents=True, mode=0o700)
    if cgroup is not None:
        try:
            cgroup.create(options.limits)
        except SandboxError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    log = tempfile.TemporaryFile()  # noqa: SIM115  (it is handed on)
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
        if options.ttl_s is not None:  # a frozen agent keeps no time
            shim += ["--ttl", str(max(1, round(options.ttl_s * 1000)))]
        shim += ["--", *command]
        if runtime.can_checkpoint and options.linger_s == 0:
            shim += ["--again", *_restore(runtime, directory, directory / "again")]
        life, stream = _spawn(shim, directory, log.fileno(), options, runtime)
    except BaseException:
        log.close()
        remove_remains(directory)
        raise
    return Launched(id=id, directory=directory, cgroup=cgroup, life=life, stream=stream, log=log)


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
    if options.linger_s > 0:  # else nobody can attach to it
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
    command: list[str], directory: Path, log: int, options: SandboxOptions, runtime: Runtime
) -> tuple[socket.socket | None, socket.socket | None]:
    """Start the shim with a listening socket or one end of a stream for the agent.

    Returns the socket whose end means that everything is gone (None for a sandbox that may outlive
    this process), and our end of the stream.
    """
    life, shims_life = socket.socketpair()
    stream: socket.socket | None = None
    if runtime.can_listen:
        agents = socket.socket(socket.AF_UNIX)
    else:
        stream, agents = socket.socketpair()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        if runtime.can_listen:
            with short_path(directory / "agent.sock") as path:
                agents.bind(path)
            agents.listen(16)
        actions = [
            (os.POSIX_SPAWN_DUP2, agents.fileno(), 0),
            (os.POSIX_SPAWN_DUP2, null, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_DUP2, shims_life.fileno(), 3),
        ]
        if (sealed := runtime.sealed()) is not None:
            actions.append((os.POSIX_SPAWN_DUP2, sealed, SEALED_FD))
        environment = {"PATH": os.defpath + ":/usr/sbin:/sbin"}
        pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
        _, status = os.waitpid(pid, 0)  # the shim puts itself in the background at once
        if status != 0:
            raise SandboxFailedError("the shim could not start")
    except BaseException as error:
        life.close()
        if stream is not None:
            stream.close()
        if isinstance(error, OSError):
            raise SandboxFailedError(f"the shim could not start: {error}") from error
        raise
    finally:
        agents.close()
        shims_life.close()
        os.close(null)
    if options.linger_s > 0:
        life.close()
        return None, stream
    life.setblocking(False)
    return life, stream


@contextlib.contextmanager
def short_path(socket_path: Path) -> Iterator[str]:
    """A name of a socket that fits where a socket's path is limited."""
    folder = os.open(socket_path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{socket_path.name}"
    finally:
        os.close(folder)
