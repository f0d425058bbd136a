"""A container as a sandbox: what the agent does not do itself - freeze, snapshot, end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import stat
from pathlib import Path

from rorqual.errors import SandboxFailedError, UnsupportedError
from rorqual.sandbox.agent_sandbox import AgentSandbox
from rorqual.sandbox.client import AgentClient
from rorqual.sandbox.container.cgroup import Cgroup
from rorqual.sandbox.container.runtime import Runtime
from rorqual.sandbox.contract import Capabilities, Limit
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.sandbox import SandboxOptions, Snapshot

END_S = 15.0
"""How long the shim may take to kill and clean up."""


def container_capabilities(
    runtime: Runtime, cgroup: Cgroup | None, *, privileged: bool
) -> Capabilities:
    """What containers of `runtime` can do here."""
    enforced: set[Limit] = {"output", "wall", "disk"}
    if cgroup is not None:
        enforced |= {"memory", "cpu", "processes"}
    kernel = "the host's kernel, behind namespaces, a system-call filter and no capabilities"
    if runtime.name == "gvisor":
        enforced.discard("processes")  # its processes are not the host's, which are counted
        kernel = "gVisor's own kernel in user space"
    return Capabilities(
        users=privileged,
        pause=cgroup is not None,
        snapshot="files" if privileged else None,
        survives_host=runtime.can_listen,
        enforced=frozenset(enforced),
        boundary=kernel,
    )


class ContainerSandbox(AgentSandbox):
    """A running container. Made by `start_container` and `attach_container`."""

    def __init__(
        self,
        *,
        id: str,
        options: SandboxOptions,
        capabilities: Capabilities,
        client: AgentClient,
        directory: Path,
        life: socket.socket | None,
        cgroup: Cgroup | None,
        layout: Layout,
    ) -> None:
        super().__init__(
            id=id,
            options=options,
            capabilities=capabilities,
            client=client,
            directory=directory,
            confine=True,
        )
        self._life = life
        self._cgroup = cgroup
        self._layout = layout
        self._ended = False

    def ran_out_of_memory(self) -> bool:
        return self._cgroup is not None and self._cgroup.new_oom_kills() > 0

    # -- state
    async def pause(self) -> None:
        if self._cgroup is None:
            raise UnsupportedError("without control groups a container cannot be paused")
        self._cgroup.freeze()

    async def resume(self) -> None:
        if self._cgroup is None:
            raise UnsupportedError("without control groups a container cannot be paused")
        self._cgroup.thaw()

    async def snapshot(self) -> Snapshot:
        if self.capabilities.snapshot is None:
            raise UnsupportedError("an unprivileged container has no layer to snapshot")
        upper = self.directory / "disk" / "upper"
        base = self.options.snapshot.id if self.options.snapshot else self.options.image
        store = ImageStore(self._layout.images)
        await self.pause()
        try:
            id = await asyncio.to_thread(store.commit, upper, base, seen_by=self._shim())
        finally:
            await self.resume()
        return Snapshot(id=id, substrate="container", kind="files")

    async def change_digest(self) -> str | None:
        if self.capabilities.snapshot is None:
            return None
        return await asyncio.to_thread(
            _digest_tree, Path(f"/proc/{self._shim()}/root{self.directory}/disk/upper")
        )

    def _shim(self) -> int:
        """Process id of the shim: this sandbox's mounts exist only in its namespace."""
        try:
            return int((self.directory / "lock").read_text().split()[0])
        except (OSError, ValueError, IndexError) as error:
            raise SandboxFailedError(f"sandbox {self.id} has no shim") from error

    # -- end
    async def destroy(self) -> None:
        if self._ended:
            return
        self._ended = True
        self.client.send(b"q", 0)
        if self._life is None:
            await self._wait_for_removal()
            return
        loop = asyncio.get_running_loop()
        life, self._life = self._life, None
        try:
            life.shutdown(socket.SHUT_WR)  # the shim kills what lives, cleans up and leaves
            async with asyncio.timeout(END_S):
                while await loop.sock_recv(life, 1):
                    pass
        except OSError:
            pass  # it had left before
        except TimeoutError:
            raise SandboxFailedError(f"sandbox {self.id} did not end in {END_S:g} s") from None
        finally:
            life.close()
        if self.directory.exists():
            from rorqual.sandbox.container.start import remove_remains

            await asyncio.to_thread(remove_remains, self.directory)

    async def _wait_for_removal(self) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int((self.directory / "lock").read_text().split()[0])
            os.kill(pid, signal.SIGTERM)
        async with asyncio.timeout(END_S):
            while self.directory.exists():
                await asyncio.sleep(0.003)


def _digest_tree(top: Path) -> str:
    """Digest of names, kinds, modes, owners and contents below `top`, without times."""
    digest = hashlib.sha256()
    for directory, names, files in os.walk(top):
        names.sort()
        for name in sorted(files + names):
            path = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):  # something inside is still at work
                status = os.lstat(path)
                shown = (os.path.relpath(path, top), status.st_mode, status.st_uid, status.st_rdev)
                digest.update(repr(shown).encode())
                if stat.S_ISLNK(status.st_mode):
                    digest.update(os.readlink(path).encode("utf-8", "surrogateescape"))
                elif stat.S_ISREG(status.st_mode):
                    # A file may have become a link since it was looked at.
                    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    with open(fd, "rb") as content:
                        digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
