"""The worker's second wall: a system-call filter around the engine, installed before any call.

The engine is the first wall. Should a script break out of it, the process it is in can compute,
and read and write descriptors it already holds; it cannot start programs, open sockets, signal or
trace others. Where the machine has no known filter the worker runs without and says so.
"""

from __future__ import annotations

import ctypes
import platform
import signal
import struct

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 1, 38, 22, 2
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _JEQ, _RET = 0x20, 0x15, 0x06

# Numbers on (x86_64, aarch64); None where the machine has no such call.
_COMPUTE: dict[str, tuple[int | None, int]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, 73),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "exit": (60, 93),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "ppoll": (271, 73),
    "getrandom": (318, 278),
}
_DANGEROUS: dict[str, tuple[int | None, int]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "fork": (57, 1079),
    "vfork": (58, 1071),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "unlinkat": (263, 35),
    "renameat2": (316, 276),
    "mkdirat": (258, 34),
    "symlinkat": (266, 36),
    "linkat": (265, 37),
}


def end_with_host() -> None:
    """Have this process killed when its host is gone: a script that never ends reads no line."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def raise_wall(*, allow_files: bool) -> bool:
    """Filter this process from now on; False if this machine's numbers are not known here.

    Args:
        allow_files: refuse what is dangerous instead of allowing only what computing needs; an
            engine that serves files and threads needs more calls than can be listed usefully.
    """
    machine = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(platform.machine())
    if machine is None:
        return False
    column, architecture = machine
    table = _DANGEROUS if allow_files else _COMPUTE
    listed, other = (_EPERM, _ALLOW) if allow_files else (_ALLOW, _EPERM)
    numbers = sorted({pair[column] for pair in table.values()} - {None}, key=lambda n: n or 0)
    code = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, architecture), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:  # the x32 calls share the architecture and would pass by number
        code += [(0x35, 0, 1, 0x40000000), (_RET, 0, 0, _KILL)]
    for number in numbers:
        code += [(_JEQ, 0, 1, number or 0), (_RET, 0, 0, listed)]
    code.append((_RET, 0, 0, other))
    packed = b"".join(struct.pack("<HBBI", *row) for row in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("@HP", len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _FILTER, program, 0, 0) == 0)
