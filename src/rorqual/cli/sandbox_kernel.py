"""``rorqual sandbox kernel`` and ``guest-agent``: what guest machines need that apt cannot give."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rorqual.cli.progress import status
from rorqual.errors import SandboxRequestError

_MIB = 1 << 20
_PERCENT_STEP = 10


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommands below ``rorqual sandbox``."""
    kernel = commands.add_parser("kernel", help="get the kernel that microvm guests run")
    actions = kernel.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = actions.add_parser(
        "build",
        help="build the small one",
        description="Build the small kernel once and keep it in the user's cache: 10 to 17 minutes "
        "of processor time, 2 GB of scratch space. Needs Debian's linux-source, which is "
        "downloaded with apt-get if it is not installed.",
    )
    build.add_argument("--source", type=Path, help="a kernel tree or linux-source-*.tar.xz")
    build.add_argument("--jobs", type=int, help="(default: one per processor)")
    build.add_argument("--scratch", type=Path, help="where to work (default: the system's)")
    build.set_defaults(run=_build)
    fetch = actions.add_parser(
        "fetch",
        help="take Debian's cloud kernel out of its package",
        description="Download Debian's cloud kernel with apt-get and unpack it, without "
        "installing it. Guests start slower with it than with the small one.",
    )
    fetch.add_argument("--package", type=Path, help="the .deb file, instead of a download")
    fetch.set_defaults(run=_fetch)
    actions.add_parser("ls", help="list those that are here").set_defaults(run=_list)
    remove = actions.add_parser(
        "rm",
        help="remove kernels",
        description="Remove kernels. Guests that run go on; snapshots made with one are lost.",
    )
    remove.add_argument("name", nargs="*", help="as 'kernel ls' shows it")
    remove.add_argument("--unused", action="store_true", help="all but the one that is used")
    remove.set_defaults(run=_remove)
    agent = commands.add_parser(
        "guest-agent",
        help="write the agent that a vm's disk must start",
        description="Write the agent, one static program. A guest starts it as root at boot: "
        "agent --port rorqual.agent",
    )
    agent.add_argument("file", type=Path)
    agent.set_defaults(run=_agent)


def _build(args: argparse.Namespace) -> int:
    from rorqual.sandbox.microvm.kernel import build_kernel

    with _ended_orderly(), _stage_progress() as progress:
        kernel = build_kernel(
            source=args.source, jobs=args.jobs, scratch=args.scratch, progress=progress
        )
    print(f"{kernel.version} for {kernel.machine}: {kernel.file}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from rorqual.sandbox.microvm.kernel import fetch_kernel

    with status("Taking the kernel out of its package"):
        kernel = fetch_kernel(package=args.package)
    print(f"{kernel.version} for {kernel.machine}: {kernel.file}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from rorqual.sandbox.microvm.kernel import find_kernel, kernels

    used = find_kernel()  # raises with the commands that get one
    for kernel in kernels():
        num_bytes = sum(file.stat().st_size for file in kernel.file.parent.rglob("*"))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(kernel.file.stat().st_mtime))
        mark = "used" if kernel == used else ""
        print(f"{kernel.name:48} {num_bytes / _MIB:7.1f} MiB  {when}  {mark}".rstrip())
    if used.note is not None:
        print(used.note)
    return 0


def _remove(args: argparse.Namespace) -> int:
    from rorqual.sandbox.microvm.kernel import kernels, remove_kernel

    names = list(args.name)
    if args.unused:
        names += [kernel.name for kernel in kernels()[1:] if kernel.name not in names]
    elif not names:
        raise SandboxRequestError("name a kernel of 'rorqual sandbox kernel ls', or give --unused")
    for name in names:
        print(f"removed {remove_kernel(name).name}")
    return 0


def _agent(args: argparse.Namespace) -> int:
    from rorqual.sandbox.layout import Layout

    shutil.copy(Layout(args.root).agent(), args.file)
    args.file.chmod(0o755)
    print(f"{args.file}: start it in the guest as root with --port rorqual.agent")
    return 0


@contextmanager
def _ended_orderly() -> Iterator[None]:
    """A request to terminate ends the build as an interrupt does: nothing of it is left."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; elsewhere a line per stage and per tenth of one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Remaining())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=f"Kernel: {stage}", completed=done, total=total or None
        )


def _lines() -> Callable[[str, int, int], None]:
    said = ""

    def show(stage: str, done: int, total: int) -> None:
        nonlocal said
        percent = 100 * done // total // _PERCENT_STEP * _PERCENT_STEP if total else 0
        line = f"kernel: {stage} {percent} %" if total else f"kernel: {stage}"
        if line != said:
            print(line, file=sys.stderr, flush=True)
        said = line

    return show
