"""Whole directories into and out of a sandbox, one file at a time, without archives.

No archive is ever unpacked here, so there is no entry that could name a path outside.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.errors import SandboxFailedError, SandboxRequestError

if TYPE_CHECKING:
    from rorqual.sandbox.sandbox import Sandbox

MAX_DEPTH = 128


async def upload(sandbox: Sandbox, local: Path, path: str) -> None:
    """Copy `local` (file or directory) to `path` inside; see `Sandbox.upload`."""
    if not local.exists():
        raise SandboxRequestError(f"{local} does not exist")
    root = local.resolve()
    if root.is_file():
        await sandbox.write(path, root.read_bytes(), mode=root.stat().st_mode & 0o777)
        return
    await sandbox.mkdir(path)
    for at, names, files in os.walk(root):
        directory = Path(at)
        inside = path.rstrip("/") + "/" + directory.relative_to(root).as_posix()
        for name in names:
            if (directory / name).is_symlink():
                raise SandboxRequestError(f"{directory / name} is a link to a directory")
            await sandbox.mkdir(f"{inside}/{name}")
        for name in files:
            file = directory / name
            target = file.resolve()
            if not target.is_relative_to(root):
                raise SandboxRequestError(f"{file} is a link that leads out of {local}")
            if target.is_file():
                mode = target.stat().st_mode & 0o777
                await sandbox.write(f"{inside}/{name}", target.read_bytes(), mode=mode)


async def download(sandbox: Sandbox, path: str, local: Path) -> None:
    """Copy `path` inside to `local`; see `Sandbox.download`."""
    entries = await sandbox.list(path)
    if len(entries) == 1 and entries[0].name == "":
        if entries[0].kind != "file":
            raise SandboxRequestError(f"{path} is neither a file nor a directory")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(await sandbox.read(path))
        return
    await _download_directory(sandbox, path.rstrip("/"), local, MAX_DEPTH)


async def _download_directory(sandbox: Sandbox, path: str, local: Path, depth: int) -> None:
    if depth == 0:
        raise SandboxRequestError(f"{path} is nested more than {MAX_DEPTH} deep")
    local.mkdir(parents=True, exist_ok=True)
    for entry in await sandbox.list(path):
        if entry.name in ("", ".", "..") or "/" in entry.name or "\0" in entry.name:
            raise SandboxFailedError(f"the sandbox named a file {entry.name!r}")
        target = local / entry.name
        if target.is_symlink():
            raise SandboxRequestError(f"{target} is a link; it is not written through")
        if entry.kind == "directory":
            await _download_directory(sandbox, f"{path}/{entry.name}", target, depth - 1)
        elif entry.kind == "file":
            target.write_bytes(await sandbox.read(f"{path}/{entry.name}"))
            target.chmod(entry.mode & 0o777)
