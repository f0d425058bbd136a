"""Which substrates work on this machine: each is started once, since nothing less proves it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import SandboxError, SubstrateMissingError
from rorqual.sandbox.container.cgroup import find_hierarchy
from rorqual.sandbox.sandbox import Sandbox

_PROBES: tuple[tuple[str, str, dict[str, Any], list[str]], ...] = (
    ("function (JavaScript)", "function", {}, ["js", "-e", "print(42)"]),
    ("function (Python)", "function", {}, ["python", "-c", "print(42)"]),
    ("container (crun)", "container", {"isolation": "crun"}, ["echo", "42"]),
    ("container (runc)", "container", {"isolation": "runc"}, ["echo", "42"]),
    ("container (bubblewrap)", "container", {"isolation": "bubblewrap"}, ["echo", "42"]),
    ("container (gVisor)", "container", {"isolation": "gvisor"}, ["echo", "42"]),
    ("microvm", "microvm", {}, ["echo", "42"]),
    ("microvm (Firecracker)", "microvm", {"isolation": "firecracker"}, ["echo", "42"]),
)

_UNTRIED = "not tried: it needs a disk of yours, --vm-image DISK; it runs on what microvm runs on"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one substrate.

    Attributes:
        works: None if it was not tried.
        missing: what to install, and the command, if that is why it does not work.
        notes: limits that do not hold here, or how to make it better.
    """

    name: str
    works: bool | None
    detail: str
    start_ms: float | None = None
    missing: str | None = None
    notes: tuple[str, ...] = ()


async def examine(root: Path | None = None, *, vm_image: Path | None = None) -> list[Finding]:
    """Start one of each and run a command in it; a vm only with a disk of the caller's."""
    findings = []
    for name, substrate, options, command in _PROBES:
        findings.append(await _try(name, substrate, options, command, root))
    if vm_image is None:
        return [*findings, Finding(name="vm", works=None, detail=_UNTRIED)]
    given = {"image": vm_image}
    return [*findings, await _try("vm", "vm", given, ["echo", "42"], root)]


async def _try(
    name: str, substrate: str, options: dict[str, Any], command: list[str], root: Path | None
) -> Finding:
    started = time.perf_counter()
    try:
        async with await Sandbox.create(substrate, root=root, **options) as sandbox:  # type: ignore[arg-type]
            result = await sandbox.exec(command, timeout_s=60.0)
            took = (time.perf_counter() - started) * 1000
            notes, boundary = _notes(sandbox), sandbox.capabilities.boundary
    except SubstrateMissingError as error:
        return Finding(name=name, works=False, detail="not installed", missing=str(error))
    except SandboxError as error:
        return Finding(name=name, works=False, detail=str(error))
    if result.text.strip() != "42":
        said = result.stderr.decode("utf-8", "replace").strip()
        return Finding(name=name, works=False, detail=f"{result.status}: {said}")
    return Finding(name=name, works=True, detail=boundary, start_ms=took, notes=notes)


def _notes(sandbox: Sandbox) -> tuple[str, ...]:
    notes = [*sandbox.notes]
    every = {"memory", "cpu", "processes", "disk", "output", "wall"}
    if unenforced := sorted(every - sandbox.capabilities.enforced):
        notes.append(f"limits that do not hold: {', '.join(unenforced)}")
    if sandbox.options.substrate == "container" and find_hierarchy() is None:
        notes.append("no writable control groups: run as root for memory, cpu and process limits")
    return tuple(notes)
