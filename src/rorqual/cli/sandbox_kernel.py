"""``rorqual sandbox kernel`` and ``guest-agent``: what guest machines need that apt cannot give."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rorqual.cli.progress import status


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
    actions.add_parser("ls", help="say which is used").set_defaults(run=_list)
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

    with _step_progress("Building the kernel") as progress:
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
    from rorqual.sandbox.microvm.kernel import find_kernel

    kernel = find_kernel()
    print(f"{kernel.version} for {kernel.machine}: {kernel.file}")
    if kernel.note is not None:
        print(kernel.note)
    return 0


def _agent(args: argparse.Namespace) -> int:
    from rorqual.sandbox.layout import Layout

    shutil.copy(Layout(args.root).agent(), args.file)
    args.file.chmod(0o755)
    print(f"{args.file}: start it in the guest as root with --port rorqual.agent")
    return 0


@contextmanager
def _step_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Remaining())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
