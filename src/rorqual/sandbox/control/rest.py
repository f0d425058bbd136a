"""The REST routes: E2B's for the life of sandboxes, and plain ones for commands and files."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rorqual.sandbox.contract import MIB, Entry, ExecResult
from rorqual.sandbox.control.failures import bad_request
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.store import Row
from rorqual.sandbox.control.wants import (
    DEFAULT_LEASE_S,
    creation,
    flag,
    json_body,
    number,
    raw_body,
    text,
    texts,
)

ENVD_VERSION = "0.5.8"
"""What E2B clients take the data plane for: they then send files as they are."""
MAX_FILE_BYTES = 256 * MIB
_MAX_EXEC_S = 86_400.0
_PAGE = 100


class Rest:
    """Handlers; `routes` puts them on paths."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def routes(self) -> list[Route]:
        """Every path of this module."""
        one = "/sandboxes/{id}"
        routes = [
            Route(one, self.get, methods=["GET"]),
            Route(one, self.kill, methods=["DELETE"]),
            Route(f"{one}/timeout", self.timeout, methods=["POST"]),
            Route(f"{one}/refreshes", self.refresh, methods=["POST"]),
            Route(f"{one}/pause", self.pause, methods=["POST"]),
            Route(f"{one}/resume", self.resume, methods=["POST"]),
            Route(f"{one}/connect", self.connect, methods=["POST"]),
            Route(f"/v2{one}/connect", self.connect, methods=["POST"]),
            Route(f"{one}/exec", self.exec, methods=["POST"]),
            Route(f"{one}/files", self.read, methods=["GET"]),
            Route(f"{one}/files", self.write, methods=["PUT"]),
            Route(f"{one}/files", self.remove, methods=["DELETE"]),
            Route(f"{one}/files/list", self.list_files, methods=["GET"]),
        ]
        for path in ("/sandboxes", "/v2/sandboxes"):
            routes.append(Route(path, self.create, methods=["POST"]))
            routes.append(Route(path, self.list, methods=["GET"]))
        return routes

    def _row(self, request: Request) -> Row:
        return self._plane.row(request.path_params["id"], request.scope["owner"])

    # -- life
    async def create(self, request: Request) -> Response:
        """Make one; 201."""
        wanted = creation(await json_body(request), request.headers.get("idempotency-key"))
        row = await self._plane.create(request.scope["owner"], wanted)
        return JSONResponse(created(row), 201)

    async def list(self, request: Request) -> Response:
        """The caller's, by state and metadata, in pages."""
        query = request.query_params
        states = set(",".join(query.getlist("state")).split(",")) - {""}
        if unknown := states - {"running", "paused"}:
            raise bad_request(f"state {min(unknown)!r} is not running or paused")
        # E2B clients quote names and values, and then the whole of them again.
        wanted = [(unquote(k), unquote(v)) for k, v in parse_qsl(query.get("metadata", ""))]
        rows = [
            row
            for row in self._plane.rows(request.scope["owner"])
            if (not states or row.state in states)
            and all(row.metadata.get(name) == value for name, value in wanted)
        ]
        limit = _integer(query, "limit", _PAGE, 1, _PAGE)
        start = _integer(query, "nextToken", 0, 0, 1 << 31)
        headers = {"X-Next-Token": str(start + limit)} if start + limit < len(rows) else {}
        return JSONResponse([detail(row) for row in rows[start : start + limit]], headers=headers)

    async def get(self, request: Request) -> Response:
        """One in full."""
        return JSONResponse(detail(self._row(request)))

    async def kill(self, request: Request) -> Response:
        """End it; 204 when nothing of it is left."""
        await self._plane.kill(self._row(request))
        return Response(status_code=204)

    async def timeout(self, request: Request) -> Response:
        """Let it live so many seconds from now."""
        body = await json_body(request)
        if "timeout" not in body:
            raise bad_request("timeout is missing")
        self._plane.set_lease(self._row(request), number(body, "timeout", 0.0))
        return Response(status_code=204)

    async def refresh(self, request: Request) -> Response:
        """Let it live at least so many seconds from now."""
        body = await json_body(request)
        lease_s = number(body, "duration", DEFAULT_LEASE_S)
        self._plane.set_lease(self._row(request), lease_s, only_extend=True)
        return Response(status_code=204)

    async def pause(self, request: Request) -> Response:
        """Freeze it."""
        await json_body(request)  # E2B's choices are about disks; here memory always stays
        await self._plane.pause(self._row(request))
        return Response(status_code=204)

    async def resume(self, request: Request) -> Response:
        """Let it go on."""
        return JSONResponse(created(await self._resumed(request)), 201)

    async def connect(self, request: Request) -> Response:
        """Go on if paused, and extend its lease."""
        was_paused = self._row(request).state == "paused"
        row = await self._resumed(request)
        return JSONResponse(created(row), 201 if was_paused else 200)

    async def _resumed(self, request: Request) -> Row:
        body = await json_body(request)
        lease_s = number(body, "timeout", DEFAULT_LEASE_S)
        return await self._plane.resume(self._row(request), lease_s)

    # -- commands and files
    async def exec(self, request: Request) -> Response:
        """Run a command to its end; a bad end is status 200 and data."""
        body = await json_body(request, limit=16 * MIB)
        command, options = exec_options(body)
        sandbox = await self._plane.use(self._row(request))
        result = await sandbox.exec(command, **options)
        self._plane.metrics.commands.labels(result.status).inc()
        self._plane.metrics.command_s.observe(result.wall_s)
        return JSONResponse(result_body(result))

    async def read(self, request: Request) -> Response:
        """A file's bytes."""
        sandbox = await self._plane.use(self._row(request))
        data = await sandbox.read(_path(request), user=request.query_params.get("user"))
        return Response(data, media_type="application/octet-stream")

    async def write(self, request: Request) -> Response:
        """Write the body to a file."""
        sandbox = await self._plane.use(self._row(request))
        data = await raw_body(request, MAX_FILE_BYTES)
        await sandbox.write(_path(request), data, user=request.query_params.get("user"))
        return Response(status_code=204)

    async def remove(self, request: Request) -> Response:
        """Remove a file or a directory."""
        sandbox = await self._plane.use(self._row(request))
        await sandbox.remove(_path(request))
        return Response(status_code=204)

    async def list_files(self, request: Request) -> Response:
        """The names in a directory."""
        sandbox = await self._plane.use(self._row(request))
        entries = await sandbox.list(_path(request))
        return JSONResponse([entry_body(entry) for entry in entries])


def _integer(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    given = query.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 12 and low <= int(given) <= high):
        raise bad_request(f"{name} is not a number from {low} to {high}")
    return int(given)


def _path(request: Request) -> str:
    path = request.query_params.get("path", "")
    if not path.startswith("/") or "\0" in path:
        raise bad_request(f"path {path[:200]!r} is not an absolute path")
    return path


def exec_options(body: dict[str, Any]) -> tuple[str | list[str], dict[str, Any]]:
    """A command and how to run it: `command` is a shell line or a list of words."""
    known = {"command", "cwd", "env", "user", "stdin", "timeout", "merge", "place"}
    if unknown := sorted(set(body) - known):
        raise bad_request(f"unknown field {unknown[0]!r}")
    command = body.get("command")
    words = command if isinstance(command, list) else [command]
    if not words or not all(isinstance(word, str) for word in words):
        raise bad_request("command is not a string or a list of strings")
    for word in words:
        text({"command": word}, "command", "")
    timeout = number(body, "timeout", 0.0)
    if timeout > _MAX_EXEC_S:
        raise bad_request(f"timeout is over {_MAX_EXEC_S:g} s")
    options = {
        "cwd": text(body, "cwd", "") or None,
        "env": texts(body, "env"),
        "user": text(body, "user", "") or None,
        "stdin": text(body, "stdin", ""),
        "timeout_s": timeout or None,
        "merge": flag(body, "merge"),
    }
    assert command is not None
    return command, options


def created(row: Row) -> dict[str, Any]:
    """What creation and connection answer."""
    return {
        "sandboxID": row.id,
        "templateID": row.template,
        "alias": row.template,
        "clientID": "rorqual",
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": row.access_token,
        "domain": None,
    }


def detail(row: Row) -> dict[str, Any]:
    """A sandbox as lists and lookups show it."""
    return {
        **created(row),
        "startedAt": show_time(row.started_s),
        "endAt": show_time(row.lease_end_s),
        "state": row.state,
        "cpuCount": max(1, round(row.cpus)),
        "memoryMB": row.memory_bytes // MIB,
        "diskSizeMB": row.disk_bytes // MIB,
        "metadata": row.metadata,
        "allowInternetAccess": False,
        "rorqual": {"substrate": row.substrate, "cpus": row.cpus},
    }


def show_time(seconds: float) -> str:
    """A time as RFC 3339 writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def result_body(result: ExecResult) -> dict[str, Any]:
    """An `ExecResult` as JSON; output that is not UTF-8 is given in base64."""
    return {
        "returncode": result.returncode,
        "status": result.status,
        **_stream("stdout", result.stdout),
        **_stream("stderr", result.stderr),
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
        "truncated": result.truncated,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "max_rss_bytes": result.max_rss_bytes,
        "replayed": result.replayed,
    }


def _stream(name: str, data: bytes) -> dict[str, str]:
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {
            name: data.decode("utf-8", "replace"),
            f"{name}_base64": base64.b64encode(data).decode(),
        }


def entry_body(entry: Entry) -> dict[str, Any]:
    """A name in a directory."""
    return {
        "name": entry.name,
        "kind": entry.kind,
        "size_bytes": entry.size_bytes,
        "mode": entry.mode,
        "modified_s": entry.modified_s,
        "target": entry.target,
    }
