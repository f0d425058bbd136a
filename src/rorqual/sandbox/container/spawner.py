"""The process that forks shims for this one, so that starting one does not wait for a program.

It is made with the first container, knows nothing of any, and ends with the last process that holds
its socket. A message to it is whole or not there, so that threads and forks of this process share
it. It serves only the user who made it, in whose place it is: who changed the user, the root or the
mount namespace since gets another.
"""

from __future__ import annotations

import functools
import os
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path

from rorqual.errors import SandboxFailedError

SEND_S = 10.0
"""How long it may not be listening."""

MAX_REQUEST_BYTES = 1 << 16
"""As in native/shim.c."""

_GONE = (BrokenPipeError, ConnectionResetError, ConnectionRefusedError)


def spawn_shim(shim: Path, arguments: Sequence[str], fds: Sequence[int]) -> None:
    """Have a shim started; whether it can do its work shows at its descriptors' ends.

    Args:
        arguments: what follows the program's name.
        fds: its descriptors 0, 2, 3 and, if there is a fourth, 4.

    Raises:
        SandboxFailedError: none can be started.
    """
    message = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    if len(message) > MAX_REQUEST_BYTES:
        raise SandboxFailedError(
            f"the arguments of the shim take {len(message)} bytes; at most {MAX_REQUEST_BYTES} fit"
        )
    try:
        try:
            _spawner(shim, _place()).send(message, fds)
        except _GONE:  # someone killed it
            _spawner.cache_clear()
            _spawner(shim, _place()).send(message, fds)
    except OSError as error:
        raise SandboxFailedError(f"the shim could not start: {error}") from error


class _Spawner:
    def __init__(self, shim: Path) -> None:
        self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        weakref.finalize(self, self._socket.close)
        self._socket.settimeout(SEND_S)
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # who sends is told
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            try:
                actions = [
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                    (os.POSIX_SPAWN_DUP2, null, 2),
                ]
                environment = {"PATH": os.defpath + ":/usr/sbin:/sbin"}
                command = [str(shim), "--spawn"]
                pid = os.posix_spawn(shim, command, environment, file_actions=actions)
            finally:
                os.close(null)
        _, status = os.waitpid(pid, 0)  # it puts itself in the background at once
        if status != 0:
            raise SandboxFailedError("the shim could not start")

    def send(self, message: bytes, fds: Sequence[int]) -> None:
        socket.send_fds(self._socket, [message], list(fds))


def _place() -> tuple[int, ...]:
    """Where and who this process is."""
    root, namespace = os.stat("/"), os.stat("/proc/self/ns/mnt")
    return os.geteuid(), root.st_dev, root.st_ino, namespace.st_ino


@functools.lru_cache(maxsize=4)
def _spawner(shim: Path, place: tuple[int, ...]) -> _Spawner:
    return _Spawner(shim)
