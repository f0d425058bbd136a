"""Firecracker's API: the requests a machine is made of, as plain data, and a client to send them.

The client is Python's own `http.client` over the API's unix socket, one connection a request; it is
used a dozen times in a machine's life. Source: the project's published description,
src/firecracker/swagger/firecracker.yaml, version 1.17.0-dev.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from rorqual.errors import SandboxFailedError, SandboxLostError
from rorqual.sandbox.microvm.hardware import MIB, Hardware, boot_line

KERNEL, INITRAMFS, MEMORY, DEVICES, VSOCK, API = (
    "kernel",
    "initramfs",
    "memory",
    "devices",
    "v.sock",
    "api.sock",
)
"""Names in the directory Firecracker works in. A saved state remembers them, so that they are the
same for every machine and lead to its own files."""

GUEST_CID = 3
"""Address of a guest to its own Firecracker: nobody else sees it, so all have the first one."""

_MAX_ANSWER_BYTES = 1 << 20


class Request(NamedTuple):
    """One call of the API."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


PAUSE = Request("PATCH", "/vm", {"state": "Paused"})
RESUME = Request("PATCH", "/vm", {"state": "Resumed"})
DESCRIBE = Request("GET", "/")


def layer_name(number: int) -> str:
    """Name of a layer, as a drive and in the directory."""
    return f"layer{number}"


def boot_requests(hardware: Hardware) -> list[Request]:
    """What makes a new machine and starts its kernel, in order."""
    machine = {"vcpu_count": hardware.cpus, "mem_size_mib": hardware.ram_bytes // MIB}
    source = {
        "kernel_image_path": KERNEL,
        "initrd_path": INITRAMFS,
        "boot_args": boot_line(hardware),
    }
    drives = [
        Request(
            "PUT",
            f"/drives/{layer_name(number)}",
            {
                "drive_id": layer_name(number),
                "path_on_host": layer_name(number),
                "is_root_device": False,
                "is_read_only": True,
            },
        )
        for number in range(len(hardware.layers))
    ]
    return [
        Request("PUT", "/machine-config", machine),
        Request("PUT", "/boot-source", source),
        *drives,  # the guest knows them by their order
        Request("PUT", "/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK}),
        Request("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]


def save_request() -> Request:
    """Writes a paused machine's memory and devices to files; it stays paused."""
    return Request(
        "PUT",
        "/snapshot/create",
        {"snapshot_type": "Full", "snapshot_path": DEVICES, "mem_file_path": MEMORY},
    )


def load_request() -> Request:
    """Makes a paused machine from those files, in a process that was told nothing yet."""
    return Request(
        "PUT",
        "/snapshot/load",
        {
            "snapshot_path": DEVICES,
            "mem_backend": {"backend_type": "File", "backend_path": MEMORY},
            "resume_vm": False,
        },
    )


@contextmanager
def socket_path(place: int, name: str) -> Iterator[str]:
    """A path to the socket `name` in the directory open as `place`, however long its own is.

    Raises:
        OSError: there is none. A link is none: the directory is the other process's.
    """
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(f"{name} is no socket")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, place: int, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._place = place

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        with socket_path(self._place, API) as path:
            self.sock.connect(path)


class FirecrackerApi:
    """The API of the process that works in the directory open as `place`."""

    def __init__(self, place: int) -> None:
        self._place = place

    async def send(self, request: Request, *, timeout_s: float = 30.0) -> Any:
        """Send it; returns the answer's JSON, None if it is empty.

        Raises:
            SandboxFailedError: it was refused; the message is Firecracker's.
            SandboxLostError: nobody listens, or the answer does not come.
        """
        return await asyncio.to_thread(self._send, request, timeout_s)

    def _send(self, request: Request, timeout_s: float) -> Any:
        connection = _UnixConnection(self._place, timeout_s)
        body = None if request.body is None else json.dumps(request.body)
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        try:
            connection.request(request.method, request.path, body, headers)
            answer = connection.getresponse()
            data = answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise SandboxLostError(f"Firecracker does not answer: {error}") from error
        finally:
            connection.close()
        try:
            told = json.loads(data) if data else None
        except ValueError:
            told = None
        if 200 <= answer.status < 300:
            return told
        fault = told.get("fault_message") if isinstance(told, dict) else None
        raise SandboxFailedError(
            f"Firecracker: {request.method} {request.path}: {fault or answer.status}"
        )
