"""What starting a container does on this machine without waiting for it to answer.

A directory, control groups, a bundle, and the shim with its sockets: all of it blocks for some
milliseconds, so that `start_container` runs it in a thread, several at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from rorqual.sandbox.container.bundle import agent_arguments, bubblewrap_arguments, oci_config
from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.container.remains import remove_remains
from rorqual.sandbox.container.runtime import Runtime, disk_of
from rorqual.sandbox.container.spawner import spawn_shim
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.sandbox import SandboxOptions


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A container whose shim runs; the agent has not answered yet.

    Attributes:
        life: its end means that everything is gone; None for one that may outlive this process.
        stream: our end of the agent's only connection; None where the agent listens, so that others
            can attach.
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
    plan = _Plan(options, runtime, layout, directory)
    log = tempfile.TemporaryFile()  # noqa: SIM115  (it is handed on)
    life: socket.socket | None = None
    try:
        _make_directory(directory)
        life, stream = _spawn(layout.shim(), plan, log.fileno())
        # It makes the mounts while this makes what the runtime needs beside them.
        if plan.cgroup is not None:
            plan.cgroup.create(options.limits)
        plan.write_files()
        with contextlib.suppress(OSError):  # if it has ended, so has the agent's socket
            life.send(b"g")
    except BaseException:
        log.close()
        remove_remains(directory, life)
        raise
    if options.linger_s > 0:
        life.close()
        life = None
    else:
        life.setblocking(False)
    return Launched(
        id=id, directory=directory, cgroup=plan.cgroup, life=life, stream=stream, log=log
    )


def _make_directory(directory: Path) -> None:
    try:
        os.mkdir(directory, 0o700)
    except FileNotFoundError:
        directory.mkdir(parents=True, mode=0o700)


class _Plan:
    """What one container will be started with: everything but doing it.

    Attributes:
        lowers: read-only directories of the root, topmost first.
        host_usr: whether /usr is the host's.
    """

    def __init__(
        self, options: SandboxOptions, runtime: Runtime, layout: Layout, directory: Path
    ) -> None:
        self.options = options
        self.runtime = runtime
        self.layout = layout
        self.directory = directory
        self.privileged = os.geteuid() == 0
        self.hierarchy = find_hierarchy() if self.privileged else None
        self.cgroup = Cgroup(self.hierarchy, directory.name) if self.hierarchy else None
        image = options.snapshot.id if options.snapshot is not None else options.image
        lowers, self.host_usr = ImageStore(layout.images).resolve(image, layout)
        self.lowers = [layout.agent_layer(), *lowers]

    def shim_arguments(self) -> list[str]:
        """What the shim is told; see native/shim.c."""
        arguments = [str(self.directory), "--wait"]
        if self.cgroup is not None:
            for at in self.cgroup.directories.values():
                arguments += ["--cgroup", at]
            for at in self.cgroup.residues:
                arguments += ["--residue", at]
        if (
            self.runtime.is_oci
            and self.hierarchy is not None
            and self.hierarchy.unified is not None
        ):
            arguments += ["--umount", str(self.hierarchy.unified)]
        if self.privileged:
            arguments += self._mounts()
        lingers = self.options.linger_s > 0
        if not lingers:
            arguments.append("--life")
        if self.options.ttl_s is not None:  # a frozen agent keeps no time
            arguments += ["--ttl", str(max(1, round(self.options.ttl_s * 1000)))]
        arguments += ["--", *self._command()]
        if self.runtime.can_checkpoint and not lingers:
            arguments += ["--again", *self._restore(self.directory / "again")]
        return arguments

    def _mounts(self) -> list[str]:
        lower = ":".join(str(path) for path in self.lowers)
        disk = disk_of(self.directory)
        size = f"size={self.options.limits.disk_bytes},mode=755,nr_inodes=1000000"
        arguments = ["--mkdir", disk, "--tmpfs", disk, size]
        for name in ("upper", "work", "rootfs"):
            arguments += ["--mkdir", f"{disk}/{name}"]
        overlay = f"lowerdir={lower},upperdir={disk}/upper,workdir={disk}/work"
        return [*arguments, "--overlay", f"{disk}/rootfs", overlay]

    def _command(self) -> list[str]:
        """The runtime's command line."""
        if not self.runtime.is_oci:
            return bubblewrap_arguments(
                self.runtime.program,
                rootfs=self._rootfs() if self.privileged else self.lowers[-1],
                agent=self._agent(),
                agent_binary=self.layout.agent(),
                hostname=self._hostname(),
                limits=self.options.limits,
                privileged=self.privileged,
                read_only=self.options.read_only,
                host_usr=self.host_usr,
            )
        snapshot = self.options.snapshot
        if snapshot is not None and snapshot.kind == "memory":
            return self._restore(ImageStore(self.layout.images).memory(snapshot.id))
        bundle = ["--bundle", str(self.directory), self.directory.name]
        return [*self.runtime.command(self.directory), "run", "--detach", *bundle]

    def _restore(self, memory: Path) -> list[str]:
        bundle = ["--bundle", str(self.directory), "--image-path", str(memory), self.directory.name]
        return [*self.runtime.command(self.directory), "restore", "--detach", *bundle]

    def write_files(self) -> None:
        """Write what the runtime and who attaches read."""
        if self.options.linger_s > 0:  # else nobody can attach to it
            stored = json.dumps(_as_json(self.options), default=str)
            (self.directory / "options.json").write_text(stored)
        if not self.runtime.is_oci:
            return
        config = oci_config(
            rootfs=self._rootfs(),
            agent=self._agent(),
            hostname=self._hostname(),
            limits=self.options.limits,
            read_only=self.options.read_only,
            host_usr=self.host_usr,
            cgroups_path=f"/rorqual/{self.directory.name}" if self.runtime.name == "runc" else None,
        )
        (self.directory / "config.json").write_text(json.dumps(config))

    def _rootfs(self) -> Path:
        return Path(disk_of(self.directory), "rootfs")  # both go with one unmount

    def _hostname(self) -> str:
        return f"sandbox-{self.directory.name[:6]}"

    def _agent(self) -> list[str]:
        linger_s = self.options.linger_s
        return agent_arguments(stream=linger_s == 0, linger_s=linger_s, ttl_s=self.options.ttl_s)


def _as_json(options: SandboxOptions) -> dict[str, object]:
    kept = ("isolation", "image", "limits", "network", "ttl_s", "linger_s", "env", "read_only")
    values = asdict(options)
    return {name: values[name] for name in kept}


def _spawn(shim: Path, plan: _Plan, log: int) -> tuple[socket.socket, socket.socket | None]:
    """Start the shim, with a listening socket or one end of a stream for the agent.

    Returns the socket that it waits on, whose end means that everything is gone, and our end of the
    stream.
    """
    life, shims_life = socket.socketpair()
    stream: socket.socket | None = None
    if plan.options.linger_s > 0:
        agents = socket.socket(socket.AF_UNIX)
    else:
        stream, agents = socket.socketpair()
    with shims_life, agents:
        try:
            if stream is None:
                with short_path(plan.directory / "agent.sock") as path:
                    agents.bind(path)
                agents.listen(16)
            given = [agents.fileno(), log, shims_life.fileno()]
            if (sealed := plan.runtime.sealed()) is not None:
                given.append(sealed)
            spawn_shim(shim, plan.shim_arguments(), given)
        except BaseException:
            life.close()
            if stream is not None:
                stream.close()
            raise
    return life, stream


@contextlib.contextmanager
def short_path(socket_path: Path) -> Iterator[str]:
    """A name of a socket that fits where a socket's path is limited."""
    folder = os.open(socket_path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{socket_path.name}"
    finally:
        os.close(folder)
