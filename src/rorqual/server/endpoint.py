"""What every generating endpoint does: body in, engine work, one object or a stream of events out.

The steps: read the body; render it, on a worker thread if that may take long; ask whether the key
may; submit; turn outputs into the protocol's events as they come; remember the turn. A client that
goes away at any point ends its generation; what was generated until then is counted all the same.
``server/conversations.py`` and ``server/completions.py`` say what to render.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rorqual.engine.request import Request
from rorqual.errors import EngineError, EngineOverloadedError, RorqualError
from rorqual.protocol.parse import Event, TokenFeed
from rorqual.protocol.render import Renderer
from rorqual.server.answering import failure_in, feed
from rorqual.server.bridge import Generation, ServingEngine
from rorqual.server.failures import Wire, failure_of
from rorqual.server.history import History
from rorqual.server.record import RequestRecord, record_of

WARNING_HEADER = b"x-rorqual-warning"
"""Says what is served but probably not wanted."""

_QUICK_BYTES = 4096
_SLOW_WORDS = (b'"tools"', b"format", b"schema")

_T = TypeVar("_T")
_JSON = (b"content-type", b"application/json")
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


@dataclass(frozen=True, kw_only=True, eq=False)
class Service:
    """What the endpoints share."""

    engine: ServingEngine
    renderer: Renderer
    history: History
    """Turns generated earlier."""
    send_timeout_s: float
    """Longest wait for a client to take a part of its answer."""
    keepalive_s: float
    """Silence after which a stream gets a comment, so that nothing between takes it for dead."""


class Job(NamedTuple):
    """One request, ready to run."""

    request: Request
    answer: TokenFeed
    stream: bool
    mode: str
    warnings: tuple[str, ...]
    on_complete: Callable[[], None]
    """Called once when the answer is complete, before its end is sent."""


class Endpoint(ABC):
    """Serves one path from one engine."""

    wire: Wire
    id_prefix: str

    def __init__(self, service: Service) -> None:
        self.service = service

    @abstractmethod
    def prepare(self, body: bytes, answer_id: str, record: RequestRecord) -> Job:
        """Everything that may take long on a long prompt; runs on a worker thread then.

        ``on_output`` of the job's request is set later. Raises RorqualError.
        """

    async def __call__(self, http: HttpRequest) -> Response:
        """The response to one request."""
        try:
            return await self._start(http)
        except (RorqualError, HTTPException) as error:
            return failure_of(error).response(self.wire)

    async def _start(self, http: HttpRequest) -> Response:
        engine, record = self.service.engine, record_of(http.scope)
        body = await http.body()
        # Before rendering, which is the expensive part of a refusal.
        if engine.is_full and not engine.is_closed:
            raise EngineOverloadedError("too many requests are waiting already; try again later")
        answer_id = f"{self.id_prefix}{uuid.uuid4().hex}"
        if is_quick(body):
            job = self.prepare(body, answer_id, record)
        else:
            job = await asyncio.to_thread(self.prepare, body, answer_id, record)
        record.permit(self.service.renderer.card.name, job.mode)
        generation = Generation()
        watched = record.watch(generation.on_output, len(job.request.prompt_ids))
        generation.submit(engine, dataclasses.replace(job.request, on_output=watched))
        return _AnswerResponse(self.wire, job, generation, self.service, record)


def is_quick(body: bytes) -> bool:
    """Whether preparing ``body`` takes less time than waking another thread for it.

    It does if it is short and has no grammar to compile; a wrong guess costs others milliseconds.
    """
    return len(body) <= _QUICK_BYTES and not any(word in body for word in _SLOW_WORDS)


class _AnswerResponse(Response):
    """Sends one answer while watching for the client to leave.

    A ``Response`` in name, which is all Starlette asks: status and headers wait for the answer.
    """

    def __init__(
        self,
        wire: Wire,
        job: Job,
        generation: Generation,
        service: Service,
        record: RequestRecord,
    ) -> None:
        self._record = record
        self._wire = wire
        self._job = job
        self._generation = generation
        self._send_timeout_s = service.send_timeout_s
        self._events = answer_events(generation, job, service.keepalive_s)
        self._warnings = [(WARNING_HEADER, warning.encode()) for warning in job.warnings]
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._stream(send) if self._job.stream else self._send_whole(send)
        answer = self._job.answer
        try:
            with self._generation, contextlib.suppress(ClientDisconnect):
                await unless_disconnected(receive, work)
        finally:
            self._record.settle(
                reasoning_tokens=answer.num_reasoning_tokens, stopped_after=answer.stopped_after
            )

    async def _send_whole(self, send: Send) -> None:
        try:
            async for _ in self._events:
                pass
            status, text = 200, self._job.answer.whole(int(time.time()))
        except EngineError as error:
            failure = failure_of(error)
            status, text = failure.status(self._wire), failure.body(self._wire)
        headers = [_JSON, *self._warnings]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    async def _stream(self, send: Send) -> None:
        async def push(text: str, *, more: bool = True) -> None:
            body = text.encode()
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                raise ClientDisconnect from None

        headers = [*_EVENTS, *self._warnings]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        num_sent = 0
        try:
            async for events in self._events:
                num_sent += len(events)
                await push("".join(map(_sse, events)) or ": keep-alive\n\n")
        except EngineError as error:
            # The status line has gone out; clients look for an error in the events.
            answer_id = self._job.request.request_id
            failed = failure_of(error).events(self._wire, answer_id, num_sent)
            await push("".join(map(_sse, failed)), more=False)
        else:
            end = self._job.answer.end_mark()
            await push(_sse(end) if end else "", more=False)


async def answer_events(
    generation: Generation, job: Job, silence_s: float
) -> AsyncIterator[list[Event]]:
    """The answer's events in groups as they come; an empty group after each ``silence_s`` of none.

    Raises:
        EngineError: the model failed, the engine closed, or the reader is too slow.
    """
    answer, is_first = job.answer, True
    while not answer.is_complete:
        outputs = await generation.take(silence_s)
        events: list[Event] = []
        for output in outputs:
            events += feed(answer, output, is_first=is_first)
            is_first = False
            if answer.is_complete:  # at a stop string; the engine may not know yet
                job.on_complete()
                break
            if error := failure_in(answer, output, job.request.request_id):
                yield events
                raise error
        if events or not outputs:
            yield events


def _sse(event: Event) -> str:
    name = f"event: {event.name}\n" if event.name else ""
    return f"{name}data: {event.data}\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Run ``work``, abandoning it as soon as the client closes the connection.

    ``receive`` must have delivered the whole body. Neither wait is bounded: ``work`` bounds its
    own, and a connection is watched exactly as long.

    Raises:
        ClientDisconnect: the client left first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
