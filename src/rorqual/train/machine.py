"""The machine: what it is, for the files of a run and the model card, and what it can do."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, accelerator if any, threads and versions."""
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine


def usable_cores() -> int:
    """Processor cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def why_not_compile(device: str) -> str | None:
    """Why torch.compile cannot work on ``device`` here; None where it can, tried on one line.

    Takes some seconds, most of which the first real compilation then saves.
    """
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "no C++ compiler is installed (g++ or clang++)"
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(2, device=device))
    except Exception as error:  # its backends raise many kinds
        return str(error).splitlines()[0]
    return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(total / 2**30, 1)
