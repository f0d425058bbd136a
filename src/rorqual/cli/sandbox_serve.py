"""``rorqual sandbox serve`` and ``rorqual sandbox mcp``: sandboxes for other programs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.cli.keys import add_key_file_option, key_file
from rorqual.cli.options import positive_int
from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.sandbox.control.app import KeyCheck
    from rorqual.sandbox.control.hosts import RayOptions

_MIB = 1 << 20
_WITHOUT_BOUND = 1 << 60


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare both subcommands."""
    serve = commands.add_parser(
        "serve",
        help="serve sandboxes over HTTP, to E2B clients too",
        description="Serve sandboxes over HTTP. Listens on this machine only; with --host on other "
        "addresses, to holders of a key of 'rorqual keys'. What an earlier one left is adopted.",
    )
    serve.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    serve.add_argument(
        "--port", type=int, default=8090, help="0 takes a free one (default: %(default)s)"
    )
    serve.add_argument(
        "--data", type=Path, help="its directory (default: 'control' in the sandboxes' root)"
    )
    serve.add_argument("--require-key", action="store_true", help="on this machine too")
    add_key_file_option(serve)
    serve.add_argument("--max-sandboxes", type=positive_int, default=256, metavar="N")
    serve.add_argument("--max-per-key", type=positive_int, default=64, metavar="N")
    serve.add_argument(
        "--memory",
        type=positive_int,
        metavar="MIB",
        help="sum of all sandboxes' memory and disk limits (default: this machine's memory)",
    )
    serve.add_argument(
        "--warm",
        default="0:0",
        metavar="LOW:HIGH",
        help="sandboxes started ahead: refill to HIGH below LOW (default: none)",
    )
    serve.add_argument(
        "--linger",
        type=positive_int,
        default=600,
        metavar="S",
        help="how long sandboxes wait for a server that died (default: %(default)s)",
    )
    serve.add_argument(
        "--keep", action="store_true", help="on an orderly end, leave sandboxes for the next start"
    )
    serve.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="place sandboxes on the hosts of a Ray cluster: its address, 'auto' for the one this "
        "machine belongs to (without a value), 'local' to start one here",
    )
    serve.add_argument(
        "--ray-cpu-share",
        type=float,
        default=0.25,
        metavar="PART",
        help="part of each sandbox's CPU limit that Ray reserves (default: %(default)s)",
    )
    serve.add_argument(
        "--ray-resource", metavar="NAME", help="only hosts that offer this custom resource"
    )
    serve.set_defaults(run=_serve)

    mcp = commands.add_parser(
        "mcp",
        help="one sandbox as MCP tools on standard input and output",
        description="Offer exec, read_file, write_file and list_files of one fresh sandbox to an "
        "MCP client, on standard input and output. The sandbox ends with the connection.",
    )
    mcp.add_argument("--image", help='an image, a directory, or "host" (the default)')
    mcp.add_argument("--isolation", help="crun, runc, bubblewrap or gvisor")
    mcp.add_argument("--memory", type=positive_int, default=512, metavar="MIB")
    mcp.add_argument("--allow", action="append", default=[], metavar="HOST[:PORT]")
    mcp.set_defaults(run=_mcp)


def _serve(args: argparse.Namespace) -> int:
    from rorqual.sandbox.control.admission import Policy
    from rorqual.sandbox.control.pool import Watermarks
    from rorqual.sandbox.control.serve import serve
    from rorqual.sandbox.layout import Layout

    low, _, high = args.warm.partition(":")
    if not (low.isdigit() and high.isdigit()):
        raise ConfigError(f"--warm is LOW:HIGH, not {args.warm!r}")
    memory = args.memory * _MIB if args.memory else _total_memory_bytes()
    if args.ray is not None and not args.memory:
        memory = _WITHOUT_BOUND  # Ray knows what each host has
    policy = Policy(
        max_sandboxes=args.max_sandboxes, max_per_key=args.max_per_key, max_memory_bytes=memory
    )
    with contextlib.ExitStack() as resources:
        serve(
            args.data or Layout(args.root).root / "control",
            shared=args.root,
            host=args.host,
            port=args.port,
            keys=_keys(args, resources),
            policy=policy,
            marks=Watermarks(low=int(low), high=int(high)),
            linger_s=float(args.linger),
            keep=args.keep,
            ray=_ray(args),
            announce=lambda url: print(_welcome(url), flush=True),
        )
    print("stopped", file=sys.stderr)
    return 0


def _ray(args: argparse.Namespace) -> RayOptions | None:
    from rorqual.sandbox.control.hosts import RayOptions

    if args.ray is None:
        return None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray would report to its makers
    return RayOptions(address=args.ray, cpu_share=args.ray_cpu_share, resource=args.ray_resource)


def _welcome(url: str) -> str:
    return (
        f"sandboxes are served at {url}\n"
        f"  E2B clients: E2B_API_URL={url} E2B_SANDBOX_URL={url}\n"
        f'  curl -X POST {url}/sandboxes -d \'{{"templateID": "base"}}\''
    )


def _keys(args: argparse.Namespace, resources: contextlib.ExitStack) -> KeyCheck | None:
    from rorqual.server.keys import KeyRing, KeyStore
    from rorqual.server.run import check_exposure, is_loopback

    if is_loopback(args.host) and not args.require_key:
        return None
    ring = KeyRing(resources.enter_context(KeyStore(key_file(args))))
    check_exposure(args.host, ring)

    def check(text: str) -> str | None:
        key = ring.find(text)
        return key.id if key is not None and key.state(time.time()) == "active" else None

    return check


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mcp(args: argparse.Namespace) -> int:
    from rorqual.sandbox.adapters.mcp import serve_stdio
    from rorqual.sandbox.contract import Limits, Network
    from rorqual.sandbox.sandbox import SandboxOptions

    options = SandboxOptions(
        image=args.image,
        isolation=args.isolation,
        limits=Limits(memory_bytes=args.memory * _MIB),
        network=Network(allow=tuple(args.allow)) if args.allow else None,
        root=args.root,
    )
    asyncio.run(serve_stdio(options))
    return 0
