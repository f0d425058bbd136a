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
from rorqual.cli.sandbox_serve import add_parsers
from rorqual.errors import SandboxRequestError

if TYPE_CHECKING:  # imported where needed, so that the command line starts quickly
    from rorqual.sandbox.sandbox import SandboxOptions

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

    run = commands.add_parser(
        "run",
        help="run one command and leave nothing",
        description="Start a sandbox, run one command in it, and remove it. The exit code is the "
        "command's; 124 after a timeout.",
    )
    _add_options(run)
    run.add_argument("--timeout", type=float, default=300.0, metavar="S", help="(default: 300)")
    run.add_argument("--allow", action="append", default=[], metavar="HOST[:PORT]")
    run.add_argument("--upload", action="append", default=[], metavar="FILE:PATH")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command")
    run.set_defaults(run=_run)

    doctor = commands.add_parser(
        "doctor",
        help="say which substrates work here",
        description="Start one sandbox of each substrate; say what is missing and how to get it.",
    )
    doctor.set_defaults(run=_doctor)

    install = commands.add_parser(
        "install",
        help="install the Debian packages that are missing",
        description="Install the packages sandboxes use and this machine lacks. Debian, as root.",
    )
    install.add_argument("--dry-run", action="store_true", help="only say what is missing")
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
    images.add_parser("ls", help="list images").set_defaults(run=_image_list)
    remove = images.add_parser("rm", help="remove an image and layers only it used")
    remove.add_argument("name")
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
    _add_options(replay)
    replay.set_defaults(run=_replay)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--substrate",
        choices=("function", "container", "microvm", "vm"),
        default="container",
        help="(default: %(default)s)",
    )
    parser.add_argument("--isolation", help="crun, runc, bubblewrap or gvisor, for containers")
    parser.add_argument("--image", help='an image, a directory, or "host" (the default)')
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="(default: 512)")
    parser.add_argument("--cpus", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--processes", type=int, default=256, help="(default: 256)")
    parser.add_argument("--disk", type=int, default=512, metavar="MIB", help="(default: 512)")
    parser.add_argument("--read-only", action="store_true", help="refuse writes to the root")


def _options(args: argparse.Namespace, allow: tuple[str, ...] = ()) -> SandboxOptions:
    from rorqual.sandbox.contract import Limits, Network
    from rorqual.sandbox.sandbox import SandboxOptions

    limits = Limits(
        memory_bytes=args.memory * _MIB,
        cpus=args.cpus,
        processes=args.processes,
        disk_bytes=args.disk * _MIB,
    )
    return SandboxOptions(
        substrate=args.substrate,
        isolation=args.isolation,
        image=args.image,
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
    options = _options(args, tuple(args.allow))

    async def work() -> int:
        from rorqual.sandbox.sandbox import start_sandbox

        async with await start_sandbox(options) as sandbox:
            for local, _, path in uploads:
                await sandbox.upload(local, path)
            # A terminal is not passed on: what is typed there may be meant for this command.
            given = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
            running = await sandbox.start(argv, stdin=given, timeout_s=args.timeout)
            streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
            async for piece in running:
                streams[piece.channel].write(piece.data)
                streams[piece.channel].flush()
            result = await running.result()
        if result.status not in ("exited", "not-started"):
            print(f"rorqual: the command was ended: {result.status}", file=sys.stderr)
        elif result.status == "not-started":
            sys.stderr.buffer.write(result.stderr)
        return 124 if result.status == "timed-out" else result.returncode

    return asyncio.run(work())


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    with status("Starting one of each"):
        from rorqual.sandbox.doctor import examine

        findings = asyncio.run(examine(args.root))
    table = Table("substrate", "works", "start", "what to know", box=None, padding=(0, 2, 0, 0))
    for found in findings:
        took = f"{found.start_ms:.0f} ms" if found.start_ms is not None else ""
        lines = [found.missing or found.detail, *found.notes]
        table.add_row(found.name, "yes" if found.works else "no", took, "\n".join(lines))
    Console().print(table)
    return 0 if any(found.works for found in findings) else 1


def _install(args: argparse.Namespace) -> int:
    from rorqual.sandbox.tools import install, install_command, missing_tools

    missing = missing_tools()
    if not missing:
        print("every program that sandboxes use is here")
        return 0
    for tool in missing:
        print(f"missing: {tool.programs[0]:20} for {tool.purpose}")
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
    print(f"{image.name}: {len(image.layers)} layers, {image.num_bytes / _MIB:.1f} MiB")
    return 0


def _image_list(args: argparse.Namespace) -> int:
    from rorqual.sandbox.images import ImageStore
    from rorqual.sandbox.layout import Layout

    for image in ImageStore(Layout(args.root).images).all():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(image.created_s))
        size = f"{image.num_bytes / _MIB:.1f} MiB"
        print(f"{image.name:40} {len(image.layers):3} layers {size:>12}  {when}")
    return 0


def _image_remove(args: argparse.Namespace) -> int:
    from rorqual.sandbox.images import ImageStore
    from rorqual.sandbox.layout import Layout

    ImageStore(Layout(args.root).images).remove(args.name)
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
        report = asyncio.run(replay(log, args.trajectory, _options(args)))
    different = [step for step in report if step.differences]
    for step in different:
        print(f"{step.place:5} {' '.join(step.argv)[:100]}: {', '.join(step.differences)} differ")
    print(f"{len(report)} commands, {len(different)} differ")
    return 1 if different else os.EX_OK
