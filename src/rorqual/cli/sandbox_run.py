"""``rorqual sandbox run``, and the options that describe a sandbox on the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import stat
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.cli.progress import status
from rorqual.errors import SandboxError, SandboxRequestError

if TYPE_CHECKING:  # imported where needed, so that the command line starts quickly
    from rorqual.sandbox.sandbox import RunningCommand, Sandbox, SandboxOptions

_MIB = 1 << 20
_PIECE_BYTES = 1 << 16
_TIMED_OUT = 124


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``run`` below ``rorqual sandbox``."""
    run = commands.add_parser(
        "run",
        help="run one command and leave nothing",
        description="Start a sandbox, run one command in it, and remove it. The exit code is the "
        "command's; 124 after a timeout. Functions run source: js -e SOURCE, python -c SOURCE.",
    )
    add_options(run)
    run.add_argument("--timeout", type=float, default=300.0, metavar="S", help="(default: 300)")
    run.add_argument("--allow", action="append", default=[], metavar="HOST[:PORT]")
    run.add_argument("--upload", action="append", default=[], metavar="FILE:PATH")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command")
    run.set_defaults(run=_run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a sandbox."""
    parser.add_argument(
        "--substrate",
        choices=("function", "container", "microvm", "vm"),
        default="container",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--isolation",
        help="crun, runc, bubblewrap or gvisor for containers, firecracker for microvms",
    )
    parser.add_argument(
        "--image", help='an image, ./DIRECTORY, "host" (the default), or the disk of a vm'
    )
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="(default: 512)")
    parser.add_argument("--cpus", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--processes", type=int, default=256, help="(default: 256)")
    parser.add_argument("--disk", type=int, default=512, metavar="MIB", help="(default: 512)")
    parser.add_argument("--read-only", action="store_true", help="refuse writes to the root")


def options_of(args: argparse.Namespace, allow: tuple[str, ...] = ()) -> SandboxOptions:
    """What the arguments of `add_options` describe."""
    from rorqual.sandbox.contract import Limits, Network
    from rorqual.sandbox.sandbox import SandboxOptions

    limits = Limits(
        memory_bytes=args.memory * _MIB,
        cpus=args.cpus,
        processes=args.processes,
        disk_bytes=args.disk * _MIB,
    )
    image = args.image
    if image is not None and ("/" in image or args.substrate == "vm"):
        image = str(Path(image).absolute())  # no image's name has a slash, and a vm takes a disk
    return SandboxOptions(
        substrate=args.substrate,
        isolation=args.isolation,
        image=image,
        limits=limits,
        network=Network(allow=allow) if allow else None,
        read_only=args.read_only,
        root=args.root,
    )


def _run(args: argparse.Namespace) -> int:
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise SandboxRequestError("no command: rorqual sandbox run [OPTIONS] -- CMD [ARGUMENT...]")
    uploads = [spec.rpartition(":") for spec in args.upload]
    if any(not local or not path.startswith("/") for local, _, path in uploads):
        raise SandboxRequestError("--upload takes FILE:/ABSOLUTE/PATH")
    options = options_of(args, tuple(args.allow))

    async def work() -> int:
        async with await _start(options) as sandbox:
            for local, _, path in uploads:
                await sandbox.upload(local, path)
            running = await _start_command(sandbox, argv, args.timeout)
            streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
            async for piece in running:
                streams[piece.channel].write(piece.data)
                streams[piece.channel].flush()
            result = await running.result()
        if result.status == "timed-out":
            print(f"rorqual: ended after --timeout {args.timeout:g} s", file=sys.stderr)
            return _TIMED_OUT
        if result.status == "not-started":
            sys.stderr.buffer.write(result.stderr)
        elif result.status != "exited":
            print(f"rorqual: the command was ended: {result.status}", file=sys.stderr)
        return result.returncode

    return asyncio.run(work())


async def _start(options: SandboxOptions) -> Sandbox:
    from rorqual.sandbox.sandbox import start_sandbox

    slow = options.substrate in ("microvm", "vm")
    with status(f"Starting a {options.substrate}") if slow else nullcontext():
        sandbox = await start_sandbox(options)
    for note in sandbox.notes:
        print(f"rorqual: {note}", file=sys.stderr)
    return sandbox


async def _start_command(sandbox: Sandbox, argv: list[str], timeout_s: float) -> RunningCommand:
    # A terminal is not passed on: what is typed there may be meant for this command.
    if sys.stdin is None or sys.stdin.isatty():
        return await sandbox.start(argv, timeout_s=timeout_s)
    is_pipe = not stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)
    if not is_pipe or sandbox.options.substrate == "function":  # which takes it with the call
        return await sandbox.start(argv, stdin=sys.stdin.buffer.read(), timeout_s=timeout_s)
    running = await sandbox.start(argv, stdin=None, timeout_s=timeout_s)
    loop = asyncio.get_running_loop()

    def feed() -> None:
        try:
            while data := os.read(sys.stdin.fileno(), _PIECE_BYTES):
                asyncio.run_coroutine_threadsafe(running.write(data), loop).result()
            loop.call_soon_threadsafe(running.close_stdin)
        except (RuntimeError, OSError, SandboxError, CancelledError):
            pass  # the command ended first, and the loop with it

    # Its end is not waited for: whoever holds the pipe may keep it open for ever.
    threading.Thread(target=feed, daemon=True).start()
    return running
