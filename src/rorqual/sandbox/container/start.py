"""Start a container, or attach to one that outlived its creator.

A sandbox is a directory: `lock` (held by its shim while it lives), `agent.sock`, `options.json`,
`rootfs`, `disk`, `output`. No other state exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from rorqual.errors import (
    SandboxFailedError,
    SandboxLostError,
    SandboxRequestError,
    UnsupportedError,
)
from rorqual.sandbox import wire
from rorqual.sandbox.client import AgentClient, connect
from rorqual.sandbox.container.cgroup import Cgroup, find_hierarchy
from rorqual.sandbox.container.launch import Launched, launch, short_path
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
    layout = Layout(options.root)
    restored = options.snapshot is not None and options.snapshot.kind == "memory"
    if restored:
        _check_memory(options, runtime, layout)
    launched = await _launch(options, runtime, layout)
    try:
        client = await _greet(launched, restored=restored)
    except SandboxLostError as error:
        said = launched.said()
        await asyncio.to_thread(launched.abandon)
        raise SandboxFailedError(f"{runtime.name} did not start: {said or error}") from error
    except BaseException:
        await asyncio.to_thread(launched.abandon)
        raise
    finally:
        launched.log.close()
    sandbox = ContainerSandbox(
        id=launched.id,
        options=options,
        capabilities=container_capabilities(runtime, launched.cgroup, privileged=os.geteuid() == 0),
        runtime=runtime,
        client=client,
        directory=launched.directory,
        life=launched.life,
        cgroup=launched.cgroup,
        layout=layout,
    )
    try:
        await sandbox.open_network()
    except BaseException:
        await sandbox.kill()
        raise
    return sandbox


def _check_memory(options: SandboxOptions, runtime: Runtime, layout: Layout) -> None:
    if not runtime.can_checkpoint:
        raise SandboxRequestError(
            f"{runtime.name} cannot restore processes; isolation='gvisor' can"
        )
    assert options.snapshot is not None
    if not ImageStore(layout.images).memory(options.snapshot.id).is_dir():
        raise SandboxRequestError(f"snapshot {options.snapshot.id!r} is gone")


async def _launch(options: SandboxOptions, runtime: Runtime, layout: Layout) -> Launched:
    task = asyncio.ensure_future(asyncio.to_thread(launch, options, runtime, layout))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:  # the thread goes on, and what it started must not
        with contextlib.suppress(Exception):
            launched = await task
            launched.log.close()
            await asyncio.to_thread(launched.abandon)
        raise


async def _greet(launched: Launched, *, restored: bool) -> AgentClient:
    if launched.stream is None:
        return await _meet(launched.directory, START_S)
    client = await connect(launched.stream, timeout_s=START_S, say_hello=restored)
    if restored:
        await client.ask(b"n", wire.text_field(b"M", secrets.token_hex(16) + "\n"))
    return client


async def _meet(directory: Path, timeout_s: float) -> AgentClient:
    sock = socket.socket(socket.AF_UNIX)
    try:
        with short_path(directory / "agent.sock") as path:
            sock.connect(path)
    except OSError as error:
        sock.close()
        raise SandboxLostError(f"sandbox {directory.name} is gone: {error}") from error
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
