"""``rorqual sandbox``: run a command in one, see what works here, images, and trajectory logs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.cli.progress import status
from rorqual.cli.sandbox_kernel import add_parser as add_kernel_parser
from rorqual.cli.sandbox_run import add_options, options_of
from rorqual.cli.sandbox_run import add_parser as add_run_parser
from rorqual.cli.sandbox_serve import add_parsers
from rorqual.errors import SandboxRequestError

if TYPE_CHECKING:
    from rorqual.sandbox.images import Image

_MIB = 1 << 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "sandbox",
        help="run commands in sandboxes",
        description="Run commands nobody has checked in sandboxes, and look after these.",
    )
    parser.add_argument(
        "--root", type=Path, help="where sandboxes and images are kept (default: the system's)"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    add_run_parser(commands)

    doctor = commands.add_parser(
        "doctor",
        help="say which substrates work here",
        description="Start one sandbox of each substrate; say what is missing and how to get it.",
    )
    doctor.add_argument("--vm-image", metavar="DISK", type=Path, help="try the vm, with this disk")
    doctor.set_defaults(run=_doctor)

    install = commands.add_parser(
        "install",
        help="install the Debian packages that are missing",
        description="Install the packages sandboxes use and this machine lacks. Debian, as root.",
    )
    install.add_argument("--dry-run", action="store_true", help="only say what is missing")
    install.add_argument("--kernel", action="store_true", help="what 'kernel build' needs, too")
    install.add_argument("--tests", action="store_true", help="what the heavy tests need, too")
    install.set_defaults(run=_install)

    sweep = commands.add_parser("sweep", help="remove what killed sandboxes left behind")
    sweep.set_defaults(run=_sweep)

    add_parsers(commands)
    add_kernel_parser(commands)

    image = commands.add_parser("image", help="build, list and remove images")
    images = image.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = images.add_parser(
        "build", help="from a directory, an OCI archive, or Debian packages (debian:SUITE)"
    )
    build.add_argument("name")
    build.add_argument("source", help="a directory, an OCI archive or layout, or debian:SUITE")
    build.add_argument("--packages", default="", help="comma separated, for debian:SUITE")
    build.add_argument("--mirror", default="", help="for debian:SUITE")
    build.set_defaults(run=_image_build)
    images.add_parser("ls", help="list images and snapshots").set_defaults(run=_image_list)
    remove = images.add_parser("rm", help="remove images or snapshots, and layers only they used")
    remove.add_argument("name", nargs="+")
    remove.set_defaults(run=_image_remove)

    log = commands.add_parser("log", help="show a trajectory, or list all")
    log.add_argument("file", type=Path, help="the log file")
    log.add_argument("trajectory", nargs="?")
    log.set_defaults(run=_log)

    replay = commands.add_parser(
        "replay",
        help="run a trajectory again and report what differs",
        description="Run a trajectory's commands in a fresh sandbox. Exits with 1 on a difference.",
    )
    replay.add_argument("file", type=Path, help="the log file")
    replay.add_argument("trajectory")
    add_options(replay)
    replay.set_defaults(run=_replay)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    with status("Starting one of each"):
        from rorqual.sandbox.doctor import examine

        disk = args.vm_image.absolute() if args.vm_image is not None else None
        findings = asyncio.run(examine(args.root, vm_image=disk))
    table = Table("substrate", "works", "start", "what to know", box=None, padding=(0, 2, 0, 0))
    for found in findings:
        took = f"{found.start_ms:.0f} ms" if found.start_ms is not None else ""
        lines = [found.missing or found.detail, *found.notes]
        works = "?" if found.works is None else "yes" if found.works else "no"
        table.add_row(found.name, works, took, "\n".join(lines))
    Console().print(table)
    return 0 if any(found.works for found in findings) else 1


def _install(args: argparse.Namespace) -> int:
    from rorqual.sandbox.tools import install, install_command, missing_tools, wanted_tools

    missing = missing_tools(tools=wanted_tools(kernel=args.kernel, tests=args.tests))
    if not missing:
        print("everything is here")
        return 0
    for tool in missing:
        print(f"missing: {tool.packages[0]:20} for {tool.purpose}")
    if args.dry_run:
        print(" ".join(install_command(missing)))
        return 1
    with status("Installing " + " ".join(tool.packages[0] for tool in missing)):
        refused = install(missing)
    for tool in refused:
        print(f"not available here: {' '.join(tool.packages)}, for {tool.purpose}")
    print(f"installed {len(missing) - len(refused)} of {len(missing)}")
    return 1 if refused else 0


def _sweep(args: argparse.Namespace) -> int:
    from rorqual.sandbox.container.remains import sweep

    removed = sweep(args.root)
    print(f"removed {len(removed)} dead sandboxes")
    return 0


def _image_build(args: argparse.Namespace) -> int:
    with status(f"Building {args.name}"):
        from rorqual.sandbox.images import ImageStore
        from rorqual.sandbox.layout import Layout

        store = ImageStore(Layout(args.root).images)
        if args.source.startswith("debian:"):
            packages = tuple(filter(None, args.packages.split(",")))
            suite = args.source.removeprefix("debian:")
            image = store.build_debian(
                args.name, suite=suite, packages=packages, mirror=args.mirror
            )
        else:
            image = store.build(args.name, Path(args.source))
    print(f"{image.name}: {_layers(image)}, {image.num_bytes / _MIB:.1f} MiB")
    return 0


def _image_list(args: argparse.Namespace) -> int:
    from rorqual.sandbox.images import ImageStore
    from rorqual.sandbox.layout import Layout
    from rorqual.sandbox.saved import saved_machines

    layout = Layout(args.root)
    images, machines = ImageStore(layout.images).all(), saved_machines(layout)
    for image in images:
        _print_stored(image.name, _layers(image), image.num_bytes, image.created_s)
    for saved in machines:
        _print_stored(saved.id, "snapshot", saved.num_bytes, saved.created_s)
    if not images and not machines:
        print("none; build one: rorqual sandbox image build NAME DIRECTORY", file=sys.stderr)
    return 0


def _layers(image: Image) -> str:
    return f"{len(image.layers)} layer{'s' if len(image.layers) != 1 else ''}"


def _print_stored(name: str, kind: str, num_bytes: int, created_s: float) -> None:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(created_s))
    print(f"{name:40} {kind:>10} {num_bytes / _MIB:8.1f} MiB  {when}")


def _image_remove(args: argparse.Namespace) -> int:
    from rorqual.sandbox.images import ImageStore
    from rorqual.sandbox.layout import Layout
    from rorqual.sandbox.saved import remove_saved

    layout = Layout(args.root)
    for name in args.name:
        if not remove_saved(layout, name):
            ImageStore(layout.images).remove(name)
        print(f"removed {name}")
    return 0


def _log(args: argparse.Namespace) -> int:
    from rorqual.sandbox.trajectory.log import TrajectoryLog

    if not args.file.exists():
        raise SandboxRequestError(f"{args.file} does not exist")
    with contextlib.closing(TrajectoryLog(args.file)) as log:
        if args.trajectory is None:
            for name, count, at in log.trajectories():
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
                print(f"{name:32} {count:6} records  last {when}")
            return 0
        records = log.records(args.trajectory)
        if not records:
            raise SandboxRequestError(f"{args.file} has no trajectory {args.trajectory!r}")
        for record in records:
            data = record.data
            match record.kind:
                case "intent":
                    text = " ".join(data["argv"])
                case "finished":
                    text = f"{data['status']} {data['returncode']}  {data['stdout_bytes']} B out"
                    text += f"  {data['wall_s']:.3f} s"
                case _:
                    text = " ".join(f"{name}={value}" for name, value in data.items())
            shown = text.replace("\n", "\\n")
            print(f"{record.sequence:6} {record.place:5} {record.kind:9} {shown[:160]}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from rorqual.sandbox.trajectory.log import TrajectoryLog
    from rorqual.sandbox.trajectory.session import replay

    if not args.file.exists():
        raise SandboxRequestError(f"{args.file} does not exist")
    with contextlib.closing(TrajectoryLog(args.file)) as log, status("Replaying"):
        report = asyncio.run(replay(log, args.trajectory, options_of(args)))
    different = [step for step in report if step.differences]
    for step in different:
        print(f"{step.place:5} {' '.join(step.argv)[:100]}: {', '.join(step.differences)} differ")
    print(f"{len(report)} commands, {len(different)} differ")
    return 1 if different else os.EX_OK
