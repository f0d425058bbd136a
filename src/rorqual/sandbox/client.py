"""The host's side of one connection to an agent: commands, their bytes, and built-in operations.

The connection may be a unix socket (containers) or any stream socket (a guest's serial line). It
belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal, NamedTuple, cast

from rorqual.errors import (
    SandboxFailedError,
    SandboxLostError,
    SandboxRefusedError,
    SandboxRequestError,
)
from rorqual.sandbox import wire
from rorqual.sandbox.contract import ExecRequest

Channel = Literal["stdout", "stderr"]

HIGH_WATER_BYTES = 256 * 1024


class Output(NamedTuple):
    """A piece of what a command wrote."""

    channel: Channel
    data: bytes


class Process:
    """One command that runs in a sandbox.

    What it writes goes to `sink` if given, else it waits for `async for piece in process`; the
    command pauses while nobody takes its output.
    """

    def __init__(
        self,
        client: AgentClient,
        stream: int,
        request: ExecRequest,
        sink: Callable[[Channel, bytes], None] | None,
    ) -> None:
        self.request = request
        self._client = client
        self._stream = stream
        self._sink = sink
        self._pieces: asyncio.Queue[Output | None] = asyncio.Queue()
        self._exit: asyncio.Future[wire.Exit] = client.loop.create_future()
        self._received = [0, 0]
        self._acknowledged = [0, 0]
        self._input_sent = 0
        self._input_taken = 0
        self._input_room = asyncio.Event()
        self._attached: asyncio.Future[None] | None = None
        self._feeding: asyncio.Task[None] | None = None

    # -- called by the connection
    def on_frame(self, frame: wire.Frame) -> None:
        """Take one frame of this command's stream."""
        match frame.type:
            case b"D":
                channel = frame.payload[0] - 1
                (offset,) = struct.unpack_from("<Q", frame.payload, 1)
                self._on_output(channel, offset, frame.payload[9:])
            case b"C":
                (self._input_taken,) = struct.unpack("<Q", frame.payload)
                self._input_room.set()
            case b"X":
                self._finish(wire.decode_exit(frame.payload))
            case b"A" if self._attached is not None:
                self._input_sent, self._input_taken = struct.unpack("<QQ", frame.payload)
                self._attached.set_result(None)
            case b"E":
                (number,) = struct.unpack_from("<i", frame.payload)
                text = frame.payload[4:].decode("utf-8", "replace")
                self.fail(_request_error(number, text))

    def fail(self, error: Exception) -> None:
        """End without a result."""
        waiting = self._attached
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        if not self._exit.done():
            self._exit.set_exception(error)
            self._exit.exception()  # a caller that stopped waiting is no reason for a warning
        self._input_room.set()
        self._pieces.put_nowait(None)

    def _finish(self, exit: wire.Exit) -> None:
        if not self._exit.done():
            self._exit.set_result(exit)
        self._client.release(self._stream)
        self._input_room.set()
        self._pieces.put_nowait(None)

    def _on_output(self, channel: int, offset: int, data: bytes) -> None:
        if offset != self._received[channel]:
            self._client.abort(SandboxFailedError("output of a command arrived out of order"))
            return
        self._received[channel] += len(data)
        name: Channel = "stderr" if channel else "stdout"
        if self._sink is None:
            self._pieces.put_nowait(Output(name, data))
            return
        self._sink(name, data)
        self._acknowledge(channel, self._received[channel])

    def _acknowledge(self, channel: int, offset: int) -> None:
        # Half a window at most stays unacknowledged, unless the log wants each byte settled.
        if offset - self._acknowledged[channel] >= wire.WINDOW_BYTES // 4:
            self._acknowledged[channel] = offset
            self._client.send(b"c", self._stream, struct.pack("<BQ", channel + 1, offset))

    # -- for callers
    def __aiter__(self) -> AsyncIterator[Output]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Output]:
        taken = [0, 0]
        while (piece := await self._pieces.get()) is not None:
            yield piece
            channel = int(piece.channel == "stderr")
            taken[channel] += len(piece.data)
            self._acknowledge(channel, taken[channel])
        self._pieces.put_nowait(None)  # whoever iterates again finds the end again

    async def write(self, data: bytes) -> None:
        """Give it bytes on stdin; waits while it does not read them."""
        view = memoryview(data)
        while view and not self._exit.done():
            room = wire.WINDOW_BYTES - (self._input_sent - self._input_taken)
            if room <= 0:
                self._input_room.clear()
                await self._input_room.wait()
                continue
            piece = view[: min(room, wire.CHUNK_BYTES)]
            self._client.send(b"d", self._stream, struct.pack("<Q", self._input_sent) + piece)
            self._input_sent += len(piece)
            view = view[len(piece) :]
            await self._client.drain()

    def close_stdin(self) -> None:
        """Tell it that no more input comes."""
        self._client.send(b"e", self._stream)

    def kill(self) -> None:
        """Kill it and everything it started."""
        self._client.send(b"k", self._stream)

    def send_signal(self, number: int) -> None:
        """Signal its process group."""
        self._client.send(b"s", self._stream, struct.pack("<i", number))

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal, in characters."""
        self._client.send(b"w", self._stream, struct.pack("<HH", rows, columns))

    async def wait(self) -> wire.Exit:
        """How it ended. Its output must be taken by someone meanwhile."""
        return await asyncio.shield(self._exit)


def _request_error(number: int, text: str) -> Exception:
    if number == errno.EAGAIN:
        return SandboxRefusedError("the sandbox is at its limit of processes")
    if number == errno.EEXIST:
        return SandboxRequestError(f"exec id {text!r} was dispatched before", errno=number)
    if number == errno.ENOENT:
        return SandboxRequestError(
            f"exec id {text!r} is not in the sandbox's journal", errno=number
        )
    if number in (errno.EINVAL, errno.E2BIG, errno.ERANGE):
        return SandboxRequestError(f"{os.strerror(number)}: {text}", errno=number)
    return SandboxFailedError(f"the agent could not do it: {text}: {os.strerror(number)}")


class AgentClient(asyncio.Protocol):
    """A connection; make one with `connect`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.boot_id = ""
        self.ready: asyncio.Future[str] = self.loop.create_future()
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Process] = {}
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._numbers = itertools.count(1)
        self._writable = asyncio.Event()
        self._writable.set()
        self._error: Exception | None = None
        self._held: list[bytes] | None = None
        self._moving = False

    # -- asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # other loops have their own classes
        self._decoder = wire.Decoder()
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._on_frame(frame)
        except (SandboxFailedError, struct.error, IndexError) as error:
            self.abort(SandboxFailedError(f"the agent broke the protocol: {error}"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._moving:
            return
        error = self._error or SandboxLostError("the sandbox is gone")
        for process in list(self._streams.values()):
            process.fail(error)
        self._streams.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
        self._writable.set()
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()
        if not self.closed.done():
            self.closed.set_result(None)

    def _on_frame(self, frame: wire.Frame) -> None:
        if frame.type == b"R":
            (version,) = struct.unpack_from("<I", frame.payload)
            if version != wire.VERSION:
                self.abort(SandboxFailedError(f"the agent speaks version {version}"))
                return
            self.boot_id = frame.payload[4:].decode("ascii")
            if not self.ready.done():
                self.ready.set_result(self.boot_id)
        elif frame.stream in self._answers:
            answer = self._answers.pop(frame.stream)
            if not answer.done():
                answer.set_result(frame.payload)
        elif frame.stream in self._streams:
            self._streams[frame.stream].on_frame(frame)

    # -- sending
    def send(self, type: bytes, stream: int, payload: bytes = b"") -> None:
        """Queue one frame; does nothing on a connection that is gone."""
        if self._held is not None:
            self._held.append(wire.encode(type, stream, payload))
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(type, stream, payload))

    async def move(self, work: Callable[[], Awaitable[socket.socket]]) -> None:
        """Go on over the socket that `work` returns, to the same agent, restored meanwhile.

        No half of a message is under way while `work` runs, and what is sent waits. If it fails,
        the connection is lost.
        """
        answer = asyncio.create_task(self.ask(b"z"))
        await asyncio.sleep(0)  # the request itself is sent
        held: list[bytes] = []
        self._held = held
        try:
            await answer
            self._moving = True
            sock = await work()
            if self._transport is not None:
                self._transport.abort()
            sock.setblocking(False)
            await self.loop.create_connection(lambda: self, sock=sock)
            self._held = None
            self.send(b"y", 0)
            if self._transport is not None:
                self._transport.writelines(held)
            self._moving = False
            await self.ask(b"p")
        except BaseException:
            self._held, self._moving = None, False
            if self._transport is not None:
                self._transport.abort()
            if not self.closed.done():
                self.connection_lost(None)
            raise

    async def drain(self) -> None:
        """Wait until the connection takes more."""
        await self._writable.wait()

    def release(self, stream: int) -> None:
        """Forget a stream that ended."""
        self._streams.pop(stream, None)

    def abort(self, error: Exception) -> None:
        """Close at once; what waits gets `error`."""
        self._error = error
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close the connection; the agent ends commands that were not to be kept."""
        if self._transport is not None:
            self._transport.close()

    @property
    def is_open(self) -> bool:
        """Whether the connection still stands."""
        return not self.closed.done()

    # -- operations
    async def start(
        self,
        request: ExecRequest,
        *,
        sink: Callable[[Channel, bytes], None] | None = None,
        confine: bool = True,
        builtin: str | None = None,
    ) -> Process:
        """Dispatch a command; `request.stdin` is sent and closed unless it is None."""
        payload = wire.encode_exec(request, confine=confine, builtin=builtin)
        if len(payload) > wire.MAX_REQUEST_BYTES:
            raise SandboxRequestError(
                f"arguments and variables take {len(payload)} bytes; "
                f"at most {wire.MAX_REQUEST_BYTES} fit, write them to a file"
            )
        process = self._open(request, sink)
        self.send(b"x", process._stream, payload)
        if request.stdin is not None:
            await self.feed(process, request.stdin)
        return process

    async def feed(self, process: Process, data: bytes) -> None:
        """Write `data` and close stdin, in the background once it is more than one window."""

        async def write() -> None:
            await process.write(data)
            process.close_stdin()

        if len(data) <= wire.WINDOW_BYTES:
            await write()
        else:
            process._feeding = self.loop.create_task(write())

    def _open(self, request: ExecRequest, sink: Callable[[Channel, bytes], None] | None) -> Process:
        if self.closed.done():
            raise self._error or SandboxLostError("the sandbox is gone")
        stream = next(self._numbers)
        process = Process(self, stream, request, sink)
        self._streams[stream] = process
        return process

    async def attach(
        self,
        request: ExecRequest,
        *,
        have: tuple[int, int] = (0, 0),
        sink: Callable[[Channel, bytes], None] | None = None,
    ) -> Process | None:
        """Take over command `request.exec_id` from the journal; None if it was never dispatched.

        Args:
            have: bytes of stdout and stderr that are already held; output goes on from there.
        """
        assert request.exec_id is not None
        process = self._open(request, sink)
        process._received = list(have)
        process._acknowledged = list(have)
        process._attached = self.loop.create_future()
        name = request.exec_id.encode() + b"\0"
        self.send(b"a", process._stream, struct.pack("<QQ", *have) + name)
        try:
            await process._attached
        except SandboxRequestError as error:
            self.release(process._stream)
            if error.errno == errno.ENOENT:
                return None
            raise
        if request.stdin is not None:
            await self.feed(process, request.stdin[process._input_sent :])
        return process

    def forget(self, exec_id: str) -> None:
        """Drop a finished command from the agent's journal."""
        self.send(b"f", 0, exec_id.encode() + b"\0")

    async def ask(self, type: bytes, payload: bytes = b"") -> bytes:
        """One request with one answer: ``p`` (ping) or ``n`` (renew identity)."""
        if self.closed.done():
            raise self._error or SandboxLostError("the sandbox is gone")
        stream = next(self._numbers)
        answer: asyncio.Future[bytes] = self.loop.create_future()
        self._answers[stream] = answer
        self.send(type, stream, payload)
        return await answer

    async def run_builtin(
        self, name: str, *arguments: str, stdin: bytes = b"", user: str | None = None, limit: int
    ) -> tuple[int, bytes]:
        """Run a built-in to its end; its errno (0 is good) and output.

        Raises:
            SandboxRequestError: it wrote more than `limit` bytes.
        """
        data = bytearray()
        request = ExecRequest(argv=arguments, stdin=stdin, user=user, timeout_s=120.0)

        def take(channel: Channel, piece: bytes) -> None:
            if channel == "stdout" and len(data) <= limit:
                data.extend(piece)
                if len(data) > limit:
                    process.kill()

        process = await self.start(request, sink=take, builtin=name)
        exit = await process.wait()
        if len(data) > limit:
            raise SandboxRequestError(f"{name} {arguments[0]!r}: more than {limit} bytes")
        if exit.status == "not-started":
            raise stage_error(exit, request)
        if exit.status != "exited":
            raise SandboxFailedError(f"{name} {arguments[0]!r} {exit.status}")
        return exit.code, bytes(data)


def stage_error(exit: wire.Exit, request: ExecRequest) -> Exception:
    """Why a command could not be started, for everything but a program that is not there."""
    why = os.strerror(exit.error)
    if exit.error == errno.EAGAIN:
        return SandboxRefusedError("the sandbox is at its limit of processes")
    match exit.stage:
        case "d":
            return SandboxRequestError(f"cwd {request.cwd!r}: {why}", errno=exit.error)
        case "u":
            return SandboxRequestError(f"user {request.user!r}: {why}", errno=exit.error)
        case _:
            return SandboxFailedError(f"the sandbox could not start a command: {why}")


async def connect(sock: socket.socket, *, timeout_s: float, say_hello: bool = False) -> AgentClient:
    """Greet the agent behind a connected socket.

    Args:
        say_hello: the agent does not know that this connection is new: it was restored from a
            checkpoint. Commands of the host before, but for named ones, end.

    Raises:
        SandboxLostError: it does not answer.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    _, client = await loop.create_connection(AgentClient, sock=sock)
    if say_hello:
        client.send(b"h", 0)
    try:
        await asyncio.wait_for(asyncio.shield(client.ready), timeout_s)
    except (TimeoutError, SandboxLostError):
        client.close()
        with contextlib.suppress(Exception):
            await client.closed
        raise SandboxLostError("the agent did not answer") from None
    return client
