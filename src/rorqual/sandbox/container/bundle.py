"""The OCI bundle of a sandbox, and the same for bubblewrap: pure functions to plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rorqual.sandbox.contract import Limits

AGENT_PATH = "/.rorqual/agent"

WRITABLE = ("/tmp", "/run", "/workspace", "/root", "/var/tmp")
"""Memory-backed directories of a sandbox whose root is read-only."""

# What the agent needs to become other users and to write files for its caller. It drops all of
# them in every command, and no command can reach the agent.
_AGENT_CAPABILITIES = [
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_KILL",
    "CAP_DAC_OVERRIDE",
    "CAP_CHOWN",
    "CAP_FOWNER",
    "CAP_NET_ADMIN",
]

_MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/config.gz",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/modules",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
    "/proc/pressure",
]
_READ_ONLY = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/driver",
]


def agent_arguments(*, stream: bool, linger_s: float, ttl_s: float | None) -> list[str]:
    """Command line of the agent as first process: its socket is descriptor 0, its guard 1.

    Args:
        stream: the socket is one connection, not a listening socket.
    """
    arguments = [AGENT_PATH, "--stream" if stream else "--listen", "0", "--guard", "1"]
    arguments += ["--linger", str(round(linger_s * 1000))]
    if ttl_s is not None:
        arguments += ["--ttl", str(max(1, round(ttl_s * 1000)))]
    return arguments


def oci_config(
    *,
    rootfs: Path,
    agent: list[str],
    hostname: str,
    limits: Limits,
    read_only: bool,
    host_usr: bool,
    cgroups_path: str | None,
) -> dict[str, Any]:
    """The bundle's config.json.

    Args:
        cgroups_path: for a runtime that insists on making groups: below the shim's own.
    """
    mounts: list[dict[str, Any]] = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
        ),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "nodev", "noexec", "mode=1777", "size=65536k"),
    ]
    if host_usr:
        mounts.append(_mount("/usr", "bind", "/usr", "rbind", "ro", "nosuid", "nodev"))
    if read_only:
        size = f"size={limits.disk_bytes // len(WRITABLE)}"
        mounts += [
            _mount(at, "tmpfs", "tmpfs", "nosuid", "nodev", "mode=1777", size) for at in WRITABLE
        ]
    namespaces = ("pid", "mount", "ipc", "uts", "network")
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": str(rootfs), "readonly": read_only},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": agent,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {
                "bounding": _AGENT_CAPABILITIES,
                "effective": _AGENT_CAPABILITIES,
                "permitted": _AGENT_CAPABILITIES,
            },
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
            **({"cgroupsPath": cgroups_path} if cgroups_path else {}),
        },
    }


def _mount(destination: str, type: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": type, "source": source, "options": list(options)}


def bubblewrap_arguments(
    program: str,
    *,
    rootfs: Path,
    agent: list[str],
    agent_binary: Path,
    hostname: str,
    limits: Limits,
    privileged: bool,
    read_only: bool,
    host_usr: bool,
) -> list[str]:
    """The bubblewrap command line.

    Args:
        privileged: root runs it: `rootfs` is an overlay of the sandbox's own. Otherwise it is
            shared and stays read-only, with memory-backed directories to write in.
    """
    separate = privileged and not read_only
    command = [program, "--bind" if separate else "--ro-bind", str(rootfs), "/"]
    if host_usr:
        command += ["--ro-bind", "/usr", "/usr"]
    command += ["--proc", "/proc", "--dev", "/dev"]
    # Root inside is root to the files of /proc even without capabilities.
    for path in _READ_ONLY:
        command += ["--ro-bind-try", path, path]
    for path in _MASKED:
        if Path(path).is_dir():
            command += ["--tmpfs", path]
        elif Path(path).exists():
            command += ["--ro-bind", "/dev/null", path]
    if not separate:
        for directory in WRITABLE:
            command += ["--size", str(limits.disk_bytes // len(WRITABLE)), "--tmpfs", directory]
    command += ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    command += ["--hostname", hostname, "--as-pid-1", "--new-session", "--clearenv"]
    if privileged:
        for capability in _AGENT_CAPABILITIES:
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user", "--uid", "0", "--gid", "0", "--die-with-parent"]
        # A shared root may have no place for the agent, a fresh /run always has.
        command += ["--ro-bind", str(agent_binary), "/run/.rorqual-agent"]
        agent = ["/run/.rorqual-agent", *agent[1:]]
    return [*command, "--", *agent]
