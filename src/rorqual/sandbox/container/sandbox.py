"""A container as a sandbox: what the agent does not do itself - freeze, snapshot, end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rorqual.errors import SandboxError, SandboxFailedError, SandboxLostError, UnsupportedError
from rorqual.sandbox.agent_sandbox import AgentSandbox
from rorqual.sandbox.client import AgentClient
from rorqual.sandbox.container.cgroup import Cgroup
from rorqual.sandbox.container.egress import find_routes, install_rules, process_inside
from rorqual.sandbox.container.runtime import Runtime, disk_of
from rorqual.sandbox.contract import Capabilities, Limit, Network
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.proxy import DirectRelay
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, Snapshot

END_S = 15.0
"""How long the shim may take to kill and clean up."""

CHECKPOINT_S = 60.0


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
        snapshot="memory" if runtime.can_checkpoint else "files" if privileged else None,
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
        runtime: Runtime,
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
        self._runtime = runtime
        self._life = life
        self._cgroup = cgroup
        self._layout = layout
        self._ended = False

    def ran_out_of_memory(self) -> bool:
        return self._cgroup is not None and self._cgroup.new_oom_kills() > 0

    async def open_routes(self, network: Network) -> None:
        if self._cgroup is None or self._runtime.name == "gvisor":
            raise UnsupportedError(
                f"{self._runtime.name} here: there are no direct routes, only names by the proxy"
            )
        routes = await find_routes(network)
        pid = process_inside(self._cgroup.directories.values())
        await asyncio.to_thread(install_rules, pid, routes)
        named = {route.address: route.host for route in routes if route.address != route.host}
        hosts = b"" if not named else await self.read("/etc/hosts")
        lines = "".join(f"{address} {host}\n" for address, host in named.items()).encode()
        if lines not in hosts:
            await self.write("/etc/hosts", hosts + lines)
        for route in routes:
            relay = DirectRelay(
                self.client,
                network,
                inside_port=route.inside,
                address=route.address,
                port=route.port,
            )
            await relay.start()
            self.relays.append(relay)

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
        upper = Path(disk_of(self.directory), "upper")
        base = self.options.snapshot.id if self.options.snapshot else self.options.image
        store = ImageStore(self._layout.images)
        commit = partial(store.commit, upper, base, seen_by=self._shim())
        if self._runtime.can_checkpoint:
            return await self._checkpoint(store, commit)
        await self.pause()
        try:
            id = await asyncio.to_thread(commit)
        finally:
            await self.resume()
        return Snapshot(id=id, substrate="container", kind="files")

    async def _checkpoint(self, store: ImageStore, commit: Callable[..., str]) -> Snapshot:
        """Save the processes, which ends them, keep the files as they are then, and restore."""
        assert self._life is not None, "what can checkpoint cannot outlive its creator"
        life = self._life
        id = f"memory-{secrets.token_hex(12)}"
        image = self.directory / "again"

        async def save_and_restore() -> socket.socket:
            image.mkdir()
            life.send(b"w")  # the end to come is not the last
            command = [*self._runtime.command(self.directory), "checkpoint"]
            await _run([*command, f"--image-path={image}", self.id])
            await asyncio.to_thread(commit, name=id)
            await asyncio.to_thread(_link_tree, image, store.memory(id))
            ours, agents = socket.socketpair()
            with agents:
                socket.send_fds(life, [b"r"], [agents.fileno()])
            return ours

        try:
            async with asyncio.timeout(CHECKPOINT_S):
                await self.client.move(save_and_restore)
        except (TimeoutError, SandboxError) as error:
            await self.kill()
            raise SandboxLostError(
                f"sandbox {self.id} was lost in its snapshot: {error}"
            ) from error
        await asyncio.to_thread(shutil.rmtree, image)
        return Snapshot(id=id, substrate="container", kind="memory")

    async def fork(self, count: int = 1) -> Sequence[Sandbox]:
        forks = await super().fork(count)
        taken = forks[0].options.snapshot
        if taken is not None and taken.kind == "memory":
            # The forks run: of their snapshot only the files are still needed, as a lower layer.
            memory = ImageStore(self._layout.images).memory(taken.id)
            await asyncio.to_thread(shutil.rmtree, memory, ignore_errors=True)
        return forks

    async def change_digest(self) -> str | None:
        if self.capabilities.snapshot is None:
            return None
        return await asyncio.to_thread(
            _digest_tree, Path(f"/proc/{self._shim()}/root{disk_of(self.directory)}/upper")
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
        if self._life is None:
            self.client.send(b"q", 0)
            await self._wait_for_removal()
            return
        loop = asyncio.get_running_loop()
        life, self._life = self._life, None
        try:
            life.shutdown(socket.SHUT_WR)  # the shim kills what lives, cleans up and leaves
            self.client.close()
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
            from rorqual.sandbox.container.remains import remove_remains

            await asyncio.to_thread(remove_remains, self.directory)

    async def _wait_for_removal(self) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int((self.directory / "lock").read_text().split()[0])
            os.kill(pid, signal.SIGTERM)
        async with asyncio.timeout(END_S):
            while self.directory.exists():
                await asyncio.sleep(0.003)


async def _run(command: list[str]) -> None:
    """Run a program of the runtime to its end; raises `SandboxFailedError` with what it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, said = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        text = said[-500:].decode("utf-8", "replace").strip()
        raise SandboxFailedError(f"{command[0]}: {text}")


def _link_tree(source: Path, target: Path) -> None:
    """The files of `source` also under `target`; both are below one root, so links suffice."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, target / file.name)


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
