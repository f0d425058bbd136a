#!/usr/bin/python3
"""A stand-in for the Firecracker program: its published API, over HTTP on a real unix socket.

The guest is our own agent, taken out of the initial memory file system it is told to boot, run as
an ordinary process and reached through the socket device as the description says. A saved machine
is a memory file of the right size and a device file; a loaded one has a fresh agent, since
processes cannot be saved here. It runs as nobody, outside any virtual environment: standard library
only.

The name it is started by chooses a fault: ``firecracker-silent`` never listens, ``-garbage``
answers with what is no HTTP, ``-link`` saves a link, ``-dying`` ends in a save.

Source of `CALLS`: src/firecracker/swagger/firecracker.yaml, version 1.17.0-dev.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler

VERSION = "1.17.0-stand-in"
FRESH, CONFIGURED, RUNNING, PAUSED = "fresh", "configured", "running", "paused"
PRE_BOOT, POST_BOOT = (FRESH, CONFIGURED), (RUNNING, PAUSED)

MEMORY_BACKEND = {"backend_type!": ("File", "Uffd"), "backend_path!": str}

# Method and path -> states it is accepted in, and the fields of its body: name ("!": required) and
# type, allowed values, or least and greatest value.
CALLS: dict[tuple[str, str], tuple[tuple[str, ...], dict[str, object] | None]] = {
    ("GET", "/"): (PRE_BOOT + POST_BOOT, None),
    ("PUT", "/machine-config"): (
        PRE_BOOT,
        {
            "vcpu_count!": range(1, 33),
            "mem_size_mib!": int,
            "smt": bool,
            "track_dirty_pages": bool,
            "huge_pages": ("None", "Transparent", "2M"),
        },
    ),
    ("PUT", "/boot-source"): (
        PRE_BOOT,
        {"kernel_image_path!": str, "initrd_path": str, "boot_args": str},
    ),
    ("PUT", "/drives/{id}"): (
        PRE_BOOT,
        {
            "drive_id!": str,
            "is_root_device!": bool,
            "path_on_host": str,
            "is_read_only": bool,
            "partuuid": str,
            "cache_type": ("Unsafe", "Writeback"),
            "io_engine": ("Sync", "Async"),
        },
    ),
    ("PUT", "/vsock"): (
        PRE_BOOT,
        {"guest_cid!": range(3, 1 << 32), "uds_path!": str, "vsock_id": str},
    ),
    ("PUT", "/actions"): (
        PRE_BOOT + POST_BOOT,
        {"action_type!": ("FlushMetrics", "InstanceStart", "SendCtrlAltDel")},
    ),
    ("PATCH", "/vm"): (POST_BOOT, {"state!": ("Paused", "Resumed")}),
    ("PUT", "/snapshot/create"): (
        (PAUSED,),
        {"mem_file_path!": str, "snapshot_path!": str, "snapshot_type": ("Full", "Diff")},
    ),
    ("PUT", "/snapshot/load"): (
        (FRESH,),
        {
            "snapshot_path!": str,
            "mem_backend": MEMORY_BACKEND,
            "mem_file_path": str,
            "resume_vm": bool,
            "track_dirty_pages": bool,
            "clock_realtime": bool,
        },
    ),
}


class RefusedError(Exception):
    """A request that the API answers with 400."""


def check(fields: dict[str, object], body: object) -> None:
    """Refuse a body that is not as described."""
    if not isinstance(body, dict):
        raise RefusedError("the body is no object")
    known = {name.rstrip("!"): kind for name, kind in fields.items()}
    for name in fields:
        if name.endswith("!") and name[:-1] not in body:
            raise RefusedError(f"missing field `{name[:-1]}`")
    for name, value in body.items():
        if name not in known:
            raise RefusedError(f"unknown field `{name}`")
        kind = known[name]
        if isinstance(kind, dict):
            check(kind, value)
        elif isinstance(kind, type):
            if type(value) is not kind:
                raise RefusedError(f"`{name}` is no {kind.__name__}")
        elif isinstance(kind, range) and type(value) is not int:
            raise RefusedError(f"`{name}` is no integer")
        elif value not in kind:  # type: ignore[operator]
            raise RefusedError(f"`{name}` is {value!r}, which is not among the values described")


def readable(path: str) -> bytes:
    """What is in a file it was told of."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise RefusedError(f"{path}: {error}") from None


def unpack(archive: bytes, wanted: str) -> bytes:
    """One file of a cpio archive (newc)."""
    at = 0
    while archive[at : at + 6] == b"070701":
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        data = at + 110 + name_size
        data += -data % 4
        if name == wanted:
            return archive[data : data + size]
        at = data + size
        at += -at % 4
    raise RefusedError(f"the initial memory file system has no {wanted}")


class Machine:
    """The one machine of a process."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.state = FRESH
        self.settings: dict[str, dict[str, object]] = {}
        self._guest: subprocess.Popen[bytes] | None = None
        self._lines: list[socket.socket] = []
        self._lock = threading.Lock()

    def call(self, method: str, path: str, body: object) -> object:
        """Answer one request."""
        place = re.sub(r"^(/drives)/[a-z0-9_]+$", r"\1/{id}", path)
        if (method, place) not in CALLS:
            raise RefusedError(f"Invalid request method and/or path: {method} {path}.")
        states, fields = CALLS[method, place]
        if fields is not None:
            check(fields, body)
        if self.state not in states:
            when = "after" if self.state in POST_BOOT else "before"
            raise RefusedError(
                f"The requested operation is not supported {when} starting the microVM."
            )
        if fields is None:
            return {"id": "stand-in", "state": self.state, "vmm_version": VERSION}
        assert isinstance(body, dict)
        with self._lock:
            getattr(self, "_" + re.sub(r"[^a-z]+", "_", place.removesuffix("{id}")).strip("_"))(
                body, path
            )
        return None

    def _machine_config(self, body: dict[str, object], path: str) -> None:
        self._configure(path, body)

    def _boot_source(self, body: dict[str, object], path: str) -> None:
        for name in ("kernel_image_path", "initrd_path"):
            readable(str(body[name]))
        self._configure(path, body)

    def _drives(self, body: dict[str, object], path: str) -> None:
        if path != f"/drives/{body['drive_id']}":
            raise RefusedError("The id from the path does not match the id from the body!")
        readable(str(body["path_on_host"]))
        self._configure(path, body)

    def _vsock(self, body: dict[str, object], path: str) -> None:
        self._configure(path, body)

    def _configure(self, path: str, body: dict[str, object]) -> None:
        self.settings[path] = body
        self.state = CONFIGURED

    def _actions(self, body: dict[str, object], path: str) -> None:
        if body["action_type"] != "InstanceStart" or self.state in POST_BOOT:
            raise RefusedError("The requested operation is not supported.")
        if "/boot-source" not in self.settings:
            raise RefusedError("Cannot start microvm without kernel configuration.")
        self._start()
        self.state = RUNNING

    def _start(self) -> None:
        source = self.settings["/boot-source"]
        print("stand-in guest:", source["boot_args"], flush=True)
        agent = os.memfd_create("agent")  # it is run by descriptor, as from a memory file system
        os.write(agent, unpack(self._initramfs(), "agent"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("guest.sock")
        listener.listen(8)
        guard, self._guard = os.pipe()  # it leaves when this process ends
        self._guest = subprocess.Popen(
            [f"/proc/self/fd/{agent}", "--linger", "-1", "--guard", str(guard)],
            stdin=listener,
            pass_fds=[agent, guard],
            start_new_session=True,
        )
        vsock = socketserver.ThreadingUnixStreamServer(
            str(self.settings["/vsock"]["uds_path"]), Line
        )
        vsock.machine = self  # type: ignore[attr-defined]
        threading.Thread(target=vsock.serve_forever, daemon=True).start()

    def _initramfs(self) -> bytes:
        kept = self.settings.get("kept")
        if kept is not None:
            return bytes.fromhex(str(kept["initramfs"]))
        return readable(str(self.settings["/boot-source"]["initrd_path"]))

    def _vm(self, body: dict[str, object], path: str) -> None:
        paused = body["state"] == "Paused"
        if self._guest is not None:
            os.kill(self._guest.pid, signal.SIGSTOP if paused else signal.SIGCONT)
        self.state = PAUSED if paused else RUNNING

    def _snapshot_create(self, body: dict[str, object], path: str) -> None:
        if self.fault == "dying":
            if self._guest is not None:
                self._guest.kill()  # its memory is the program's
            os._exit(3)
        for line in self._lines:  # a saved machine's connections end
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._lines.clear()
        memory, devices = str(body["mem_file_path"]), str(body["snapshot_path"])
        if self.fault == "link":
            os.symlink("/etc/passwd", memory)
        else:
            with open(memory, "wb") as file:
                file.write(b"stand-in")
                file.truncate(int(str(self.settings["/machine-config"]["mem_size_mib"])) << 20)
        kept = {"initramfs": self._initramfs().hex()}
        with open(devices, "w") as text:
            json.dump({**self.settings, "kept": kept}, text)

    def _snapshot_load(self, body: dict[str, object], path: str) -> None:
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise RefusedError("exactly one of `mem_backend` and `mem_file_path` must be there")
        settings = json.loads(readable(str(body["snapshot_path"])))
        backend = body["mem_backend"]
        assert isinstance(backend, dict)
        with open(backend["backend_path"], "rb") as memory:
            if memory.read(8) != b"stand-in":
                raise RefusedError("the memory file is damaged")
        for name, drive in settings.items():
            if name.startswith("/drives/"):
                readable(drive["path_on_host"])
        self.settings = settings
        self._start()
        if self._guest is not None:
            os.kill(self._guest.pid, signal.SIGSTOP)
        self.state = PAUSED
        if body.get("resume_vm"):
            self._vm({"state": "Resumed"}, "/vm")

    def connect(self, line: socket.socket, port: int) -> socket.socket | None:
        """A connection into the guest; it ends when the machine is saved."""
        told = re.search(r"rorqual\.vsock=(\d+)", str(self.settings["/boot-source"]["boot_args"]))
        if told is None or port != int(told[1]):
            return None
        guest = socket.socket(socket.AF_UNIX)
        guest.connect("guest.sock")
        with self._lock:
            self._lines += [line, guest]
        return guest


class Line(socketserver.BaseRequestHandler):
    """A connection of the host to the socket device."""

    def handle(self) -> None:
        asked = b""
        while not asked.endswith(b"\n"):
            piece = self.request.recv(1)
            if not piece:
                return
            asked += piece
        found = re.fullmatch(rb"CONNECT (\d+)\n", asked)
        guest = found and self.server.machine.connect(self.request, int(found[1]))  # type: ignore[attr-defined]
        if not guest:
            return
        self.request.sendall(b"OK 1073741824\n")
        back = threading.Thread(target=carry, args=(guest, self.request), daemon=True)
        back.start()
        carry(self.request, guest)
        back.join()
        guest.close()


def carry(source: socket.socket, target: socket.socket) -> None:
    """Move bytes until one side ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Api(BaseHTTPRequestHandler):
    """The API's HTTP."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        text = self.rfile.read(size)
        try:
            try:
                body = json.loads(text) if text else None
            except ValueError as error:
                raise RefusedError(f"the body is no JSON: {error}") from None
            told = self.server.machine.call(self.command, self.path, body)  # type: ignore[attr-defined]
            status, said = (204, b"") if told is None else (200, json.dumps(told).encode())
        except RefusedError as error:
            status, said = 400, json.dumps({"fault_message": str(error)}).encode()
            print(
                f"Received Error. Status code: 400. Message: {error}", file=sys.stderr, flush=True
            )
        self.send_response(status)
        if said:
            self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_PUT = do_PATCH = answer

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return "unix"


def main() -> None:
    fault = os.path.basename(sys.argv[0]).partition("-")[2]
    if sys.argv[1:] == ["--version"]:
        print(f"Firecracker v{VERSION}\n")
        return
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    assert options.keys() == {"--api-sock", "--id", "--level"}, options
    assert re.fullmatch(r"[A-Za-z0-9-]{1,64}", options["--id"])
    print(f"running as {os.geteuid()}", file=sys.stderr, flush=True)
    if fault == "silent":
        time.sleep(60)
    if fault == "garbage":
        server = socket.socket(socket.AF_UNIX)
        server.bind(options["--api-sock"])
        server.listen()
        while True:
            server.accept()[0].sendall(b"SSH-2.0-what\r\n")
    api = socketserver.ThreadingUnixStreamServer(options["--api-sock"], Api)
    api.machine = Machine(fault)  # type: ignore[attr-defined]
    api.serve_forever()


if __name__ == "__main__":
    main()
