"""The data plane E2B clients speak: Connect calls for commands and directories, HTTP for files.

One address serves all sandboxes; the header ``E2b-Sandbox-Id`` says which. Each has a token of its
own (``X-Access-Token``). Connect's JSON form only. Pids are numbers of this server, for commands it
started; they are forgotten when it ends.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import json
import posixpath
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rorqual.errors import RorqualError, SandboxRequestError
from rorqual.sandbox.contract import Entry, ExecResult
from rorqual.sandbox.control.failures import (
    AnswerError,
    answer_to,
    bad_request,
    not_found,
    sandbox_gone,
)
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.rest import MAX_FILE_BYTES, show_time
from rorqual.sandbox.control.store import Row
from rorqual.sandbox.control.wants import (
    flag,
    json_body,
    mapping,
    number,
    parse_object,
    raw_body,
    text,
    texts,
)
from rorqual.sandbox.sandbox import RunningCommand, Sandbox

_FRAME = struct.Struct(">BI")
_END_OF_STREAM = 2
_MAX_MESSAGE_BYTES = 16 << 20
_FOREVER_S = 86_400.0
_SIGNALS = {"SIGNAL_SIGTERM": 15, "SIGNAL_SIGKILL": 9}
_KINDS = {"file": "FILE_TYPE_FILE", "directory": "FILE_TYPE_DIRECTORY", "link": "FILE_TYPE_SYMLINK"}
_Call = Callable[[Sandbox, dict[str, Any], str | None], Awaitable[dict[str, Any]]]


@dataclass
class _Command:
    """A command this server started, and whoever listens to it."""

    pid: int
    sandbox: str
    config: dict[str, Any]
    tag: str | None
    running: RunningCommand
    pieces: asyncio.Queue[dict[str, Any] | None] = field(
        default_factory=lambda: asyncio.Queue(maxsize=64)
    )
    heard: bool = True
    task: asyncio.Task[None] | None = None


class Envd:
    """Handlers and the commands under way."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._commands: dict[tuple[str, int], _Command] = {}
        self._pids = itertools.count(1)

    def routes(self) -> list[Route]:
        """Every path of this module."""
        calls: dict[str, _Call] = {
            "process.Process/List": self._list_processes,
            "process.Process/SendSignal": self._send_signal,
            "process.Process/SendInput": self._send_input,
            "process.Process/CloseStdin": self._close_stdin,
            "filesystem.Filesystem/ListDir": self._list_directory,
            "filesystem.Filesystem/Stat": self._stat,
            "filesystem.Filesystem/MakeDir": self._make_directory,
            "filesystem.Filesystem/Move": self._move,
            "filesystem.Filesystem/Remove": self._remove,
        }
        routes = [
            Route(f"/{name}", self._unary(call), methods=["POST"]) for name, call in calls.items()
        ]
        return [
            *routes,
            Route("/process.Process/Start", self.start, methods=["POST"]),
            Route("/files", self.read, methods=["GET"]),
            Route("/files", self.write, methods=["POST"]),
        ]

    def _row(self, request: Request) -> Row:
        """The sandbox that a request names and has the token of."""
        id = request.headers.get("e2b-sandbox-id", "")
        if not self._plane.exists(id):
            raise sandbox_gone(id)
        row = self._plane.by_access_token(id, request.headers.get("x-access-token", ""))
        if row is None:
            message = "X-Access-Token is not this sandbox's"
            raise AnswerError(status=401, error_code="access_token", message=message)
        return row

    def _unary(self, call: _Call) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                sandbox = await self._plane.use(self._row(request))
                body = await json_body(request, limit=_MAX_MESSAGE_BYTES)
                return JSONResponse(await call(sandbox, body, _user(request)))
            except AnswerError as error:
                return error.connect_response()
            except RorqualError as error:
                return answer_to(error).connect_response()

        return handle

    # -- commands
    async def start(self, request: Request) -> Response:
        """Start a command and stream its events."""
        try:
            row = self._row(request)
            sandbox = await self._plane.use(row)
            body = parse_object(_unframe(await raw_body(request, _MAX_MESSAGE_BYTES)))
            command = await self._start(row, sandbox, body, request)
        except AnswerError as error:
            return _stream_of(error.connect_error())
        except RorqualError as error:
            return _stream_of(answer_to(error).connect_error())
        return StreamingResponse(
            self._events(command),
            media_type="application/connect+json",
        )

    async def _start(
        self, row: Row, sandbox: Sandbox, body: dict[str, Any], request: Request
    ) -> _Command:
        config = mapping(body, "process")
        program = text(config, "cmd", "")
        arguments = config.get("args") or []
        if not program or not isinstance(arguments, list):
            raise bad_request("process.cmd is not a program, or process.args not a list")
        words = [program, *(text({"args": word}, "args", "") for word in arguments)]
        keep_open = flag(body, "stdin", True)
        if mapping(body, "pty"):
            raise bad_request("terminals are not served here", "unsupported")
        running = await sandbox.start(
            words,
            stdin=None if keep_open and sandbox.capabilities.processes else b"",
            env=texts(config, "envs"),
            cwd=text(config, "cwd", "") or None,
            user=_user(request),
            timeout_s=_deadline_s(request),
        )
        tag = text(body, "tag", "") or None
        command = _Command(next(self._pids), row.id, config, tag, running)
        self._commands[row.id, command.pid] = command
        command.task = asyncio.create_task(self._pump(command))
        return command

    async def _pump(self, command: _Command) -> None:
        """Move a command's output to its listener; without one it goes nowhere."""
        try:
            async for piece in command.running:
                if command.heard:
                    shown = base64.b64encode(piece.data).decode()
                    await command.pieces.put({"event": {"data": {piece.channel: shown}}})
            result = await command.running.result()
            self._plane.metrics.commands.labels(result.status).inc()
            self._plane.metrics.command_s.observe(result.wall_s)
            last = _end_event(result)
        except RorqualError as error:
            last = {"error": answer_to(error).connect_error()}
        finally:
            self._commands.pop((command.sandbox, command.pid), None)
        if command.heard:
            await command.pieces.put(last)
            await command.pieces.put(None)

    async def _events(self, command: _Command) -> AsyncIterator[bytes]:
        yield _frame(0, {"event": {"start": {"pid": command.pid}}})
        try:
            while (piece := await command.pieces.get()) is not None:
                if "error" in piece:
                    yield _frame(_END_OF_STREAM, piece)
                    return
                yield _frame(0, piece)
            yield _frame(_END_OF_STREAM, {})
        finally:
            command.heard = False  # the command goes on; its output is lost from here
            while not command.pieces.empty():
                command.pieces.get_nowait()

    def _find(self, sandbox: Sandbox, body: dict[str, Any]) -> _Command:
        selector = mapping(body, "process")
        pid, tag = selector.get("pid"), selector.get("tag")
        for command in self._commands.values():
            mine = self._plane.is_guest(command.sandbox, sandbox)
            if mine and ((tag is not None and command.tag == tag) or command.pid == pid):
                return command
        raise not_found(f"no command {str(tag or pid)[:80]!r} runs here")

    async def _list_processes(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        return {
            "processes": [
                {"pid": command.pid, "config": command.config}
                | ({"tag": command.tag} if command.tag else {})
                for command in self._commands.values()
                if self._plane.is_guest(command.sandbox, sandbox)
            ]
        }

    async def _send_signal(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        signal = _SIGNALS.get(str(body.get("signal")))
        if signal is None:
            raise bad_request(f"signal is not one of {sorted(_SIGNALS)}")
        command = self._find(sandbox, body)
        if signal == 9:
            command.running.kill()
        else:
            command.running.send_signal(signal)
        return {}

    async def _send_input(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        given = text(mapping(body, "input"), "stdin", "")
        try:
            data = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            raise bad_request("input.stdin is not base64") from None
        await self._find(sandbox, body).running.write(data)
        return {}

    async def _close_stdin(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        self._find(sandbox, body).running.close_stdin()
        return {}

    # -- directories
    async def _list_directory(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        if number(body, "depth", 1) > 1:
            raise bad_request("depth over 1 is not supported", "unsupported")
        path = _absolute(text(body, "path", ""), user)
        entries = await sandbox.list(path)
        if [entry.name for entry in entries] == [""]:
            raise bad_request(f"{path} is not a directory")
        return {"entries": [_entry(path, entry) for entry in entries]}

    async def _stat(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        return {"entry": await _look_up(sandbox, _absolute(text(body, "path", ""), user))}

    async def _make_directory(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        path = _absolute(text(body, "path", ""), user)
        if await _exists(sandbox, path):
            raise AnswerError(status=409, error_code="exists", message=f"{path} exists")
        await sandbox.mkdir(path)
        return {"entry": await _look_up(sandbox, path)}

    async def _move(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        source = _absolute(text(body, "source", ""), user)
        target = _absolute(text(body, "destination", ""), user)
        await _look_up(sandbox, source)
        await sandbox.mkdir(posixpath.dirname(target))
        done = await sandbox.exec(["mv", "-T", "--", source, target], user=user, timeout_s=60.0)
        if not done.ok:
            raise bad_request(done.stderr.decode("utf-8", "replace").strip())
        return {"entry": await _look_up(sandbox, target)}

    async def _remove(
        self, sandbox: Sandbox, body: dict[str, Any], user: str | None
    ) -> dict[str, Any]:
        await sandbox.remove(_absolute(text(body, "path", ""), user))
        return {}

    # -- files
    async def read(self, request: Request) -> Response:
        """A file's bytes."""
        sandbox = await self._plane.use(self._row(request))
        user = request.query_params.get("username")
        path = _absolute(request.query_params.get("path", ""), user)
        data = await sandbox.read(path, user=user)
        return Response(data, media_type="application/octet-stream")

    async def write(self, request: Request) -> Response:
        """Write the body to a file."""
        sandbox = await self._plane.use(self._row(request))
        user = request.query_params.get("username")
        written = []
        async for path, data in _uploads(request):
            path = _absolute(path, user)
            await sandbox.write(path, data, user=user)
            written.append({"name": posixpath.basename(path), "type": "file", "path": path})
        return JSONResponse(written)


async def _uploads(request: Request) -> AsyncIterator[tuple[str, bytes]]:
    """Paths and contents: the body as it is, or the files of a form."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > MAX_FILE_BYTES:
        message = f"the body is over {MAX_FILE_BYTES} bytes"
        raise AnswerError(status=413, error_code="too_large", message=message)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    path = request.query_params.get("path", "")
    if "content-encoding" in request.headers:
        raise _not_taken("compressed files are not taken")
    if kind == "application/octet-stream":
        yield path, await raw_body(request, MAX_FILE_BYTES)
    elif kind == "multipart/form-data":
        async with request.form(max_files=1000, max_fields=10) as form:
            files = [part for part in form.getlist("file") if isinstance(part, UploadFile)]
            if not files or (path and len(files) > 1):
                raise bad_request("the form has no file, or several for one path")
            for file in files:
                yield path or file.filename or "", await file.read()
    else:
        raise _not_taken("files are taken as application/octet-stream or multipart/form-data")


def _not_taken(message: str) -> AnswerError:
    return AnswerError(status=415, error_code="media_type", message=message)


def _user(request: Request) -> str | None:
    """The user of a call, from HTTP's basic authorization without a password."""
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        name = base64.b64decode(encoded, validate=True).decode().partition(":")[0]
    except (binascii.Error, ValueError):
        raise bad_request("Authorization is not base64") from None
    return name or None


def _absolute(path: str, user: str | None) -> str:
    """A path as the user means it: relative ones start at home."""
    if not path or "\0" in path:
        raise bad_request("path is empty or holds a zero byte")
    home = "/root" if user in (None, "root", "0") else f"/home/{user}"
    return posixpath.normpath(posixpath.join(home, path))


def _deadline_s(request: Request) -> float:
    given = request.headers.get("connect-timeout-ms", "")
    if not given:
        return _FOREVER_S
    if not (given.isascii() and given.isdigit() and len(given) < 12):
        raise bad_request("Connect-Timeout-Ms is not a number")
    return min(_FOREVER_S, max(0.001, int(given) / 1000))


async def _look_up(sandbox: Sandbox, path: str) -> dict[str, Any]:
    """One path: a file's own entry, or a directory's in its parent."""
    parent, name = posixpath.split(path)
    if not name:
        return _entry("/", Entry(name="", kind="directory", size_bytes=0, mode=0o755, modified_s=0))
    for entry in await sandbox.list(parent):
        if entry.name == name:
            return _entry(parent, entry)
    raise not_found(f"{path} does not exist")


async def _exists(sandbox: Sandbox, path: str) -> bool:
    try:
        await _look_up(sandbox, path)
    except (AnswerError, SandboxRequestError):
        return False
    return True


def _entry(parent: str, entry: Entry) -> dict[str, Any]:
    body: dict[str, Any] = {
        "name": entry.name,
        "type": _KINDS.get(entry.kind, "FILE_TYPE_UNSPECIFIED"),
        "path": posixpath.join(parent, entry.name),
        "size": str(entry.size_bytes),
        "mode": entry.mode & 0o7777,
        "permissions": f"{entry.mode & 0o7777:o}",
        "modifiedTime": show_time(entry.modified_s),
    }
    return body | ({"symlinkTarget": entry.target} if entry.target else {})


def _end_event(result: ExecResult) -> dict[str, Any]:
    if result.status == "timed-out":
        error = {"code": "deadline_exceeded", "message": "the command took longer than its time"}
        return {"error": {**error, "fault": "caller"}}
    ended_well = result.status in ("exited", "not-started")
    end: dict[str, Any] = {
        "exitCode": result.returncode,
        "exited": ended_well,
        "status": f"{result.status} {result.returncode}",
    }
    if not ended_well:
        end["error"] = result.status
    elif result.status == "not-started":
        end["error"] = result.stderr.decode("utf-8", "replace").strip()
    return {"event": {"end": end}}


def _frame(flags: int, message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return _FRAME.pack(flags, len(data)) + data


def _unframe(body: bytes) -> bytes:
    """The one message of a request stream."""
    if len(body) < _FRAME.size:
        raise bad_request("the body is not a Connect stream")
    flags, size = _FRAME.unpack(body[: _FRAME.size])
    if flags != 0 or len(body) < _FRAME.size + size:
        raise bad_request("the body is not one uncompressed Connect message")
    return body[_FRAME.size : _FRAME.size + size]


def _stream_of(error: dict[str, str]) -> Response:
    """A stream that ends at once, with an error."""
    return Response(_frame(_END_OF_STREAM, {"error": error}), media_type="application/connect+json")
