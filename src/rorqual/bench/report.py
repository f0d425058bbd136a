"""Conditions, tables and CSV files: what makes a printed number repeatable. Measures nothing."""

from __future__ import annotations

import csv
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def conditions(program: Sequence[str], argv: Sequence[str]) -> dict[str, str]:
    """What a reader needs to repeat a run of ``program`` with ``argv``."""
    return {
        "command": shlex.join([*program, *argv]),
        "commit": _commit(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def version_of(distribution: str) -> str:
    """Of an installed package, or that there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def print_conditions(header: Mapping[str, str]) -> None:
    """One ``# key: value`` line each."""
    for key, value in header.items():
        print(f"# {key}: {value}", flush=True)


def write_csv(path: Path, header: Mapping[str, str], rows: Sequence[DataclassInstance]) -> None:
    """The conditions as comments, then one line per row; ``rows`` are of one type, at least one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        for key, value in header.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in asdict(row).items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of ``write_csv``, without its conditions."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def read_conditions(path: Path) -> dict[str, str]:
    """The conditions of a file of ``write_csv``."""
    found = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("# "):
                key, _, value = line[2:].rstrip("\n").partition(": ")
                found[key] = value
    return found


def table(head: Sequence[str], lines: Sequence[Sequence[str]], *, words_last: bool = False) -> str:
    """Aligned columns; the first to the left, the others to the right.

    words_last: the last column to the left, too.
    """
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    left = {0, len(head) - 1} if words_last else {0}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of a Markdown page."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def rss_bytes() -> tuple[int, int]:
    """Resident memory of this process: now and at its highest; zeros where /proc is missing."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(sizes["VmRSS"]) << 10, int(sizes["VmHWM"]) << 10


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _commit() -> str:
    """Short hash of the checkout this file is in, with ``+changes`` where it differs."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return out.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.machine()
