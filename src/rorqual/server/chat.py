"""``POST /v1/chat/completions``: body in, engine work, one object or a stream of events out.

The steps: read the body within limits; render it on a worker thread; submit; turn outputs into
the protocol's events as they come. A client that goes away at any point ends its generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rorqual.engine.request import Request, TokenOutput
from rorqual.errors import EngineError, EngineOverloadedError, RequestError
from rorqual.protocol.parse import Answer, Event
from rorqual.protocol.render import RenderedRequest, Renderer
from rorqual.server.answering import engine_request, failure_in, feed
from rorqual.server.bridge import Generation, ServingEngine
from rorqual.server.failures import failure_of

_BODY_TIMEOUT_S = 60.0
"""Longest wait for a client to send its body."""

_T = TypeVar("_T")
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """Serves chat completions from one engine."""

    engine: ServingEngine
    renderer: Renderer
    max_body_bytes: int
    send_timeout_s: float
    """Longest wait for a client to take a part of its answer."""
    keepalive_s: float
    """Silence after which a stream gets a comment, so that nothing between takes it for dead."""

    async def __call__(self, http: HttpRequest) -> Response:
        """The response to one request; raises RorqualError or HTTPException before it starts."""
        body = await read_body(http, self.max_body_bytes)
        if (
            self.engine.is_full and not self.engine.is_closed
        ):  # before rendering, which is the expensive part of a refusal
            raise EngineOverloadedError("too many requests are waiting already; try again later")
        generation = Generation()
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        rendered, request = await asyncio.to_thread(
            self._prepare, body, answer_id, generation.on_output
        )
        answer = Answer(rendered, self.renderer.tokenizer, answer_id, streamed=rendered.stream)
        generation.submit(self.engine, request)
        events = answer_events(generation, answer, answer_id, self.keepalive_s)
        return _AnswerResponse(
            answer,
            generation,
            events,
            streamed=rendered.stream,
            send_timeout_s=self.send_timeout_s,
        )

    def _prepare(
        self, body: bytes, answer_id: str, on_output: Callable[[TokenOutput], None]
    ) -> tuple[RenderedRequest, Request]:
        """Everything that may take long on a long prompt; runs on a worker thread."""
        rendered = self.renderer.render(body)
        if rendered.constraint is not None and rendered.constraint.kind == "regex":
            raise RequestError(
                "response_format of type 'regex' is not supported: answers are not constrained",
                param="response_format",
            )
        request = engine_request(rendered, self.renderer.tokenizer, answer_id, on_output)
        return rendered, request


async def read_body(http: HttpRequest, max_bytes: int) -> bytes:
    """The request's whole body.

    Raises:
        HTTPException: 413 above ``max_bytes``; 408 if it does not arrive in time.
    """
    too_large = HTTPException(413, f"the body is larger than {max_bytes} bytes")
    declared = http.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in http.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive in {_BODY_TIMEOUT_S:g} s") from None
    return bytes(body)


class _AnswerResponse(Response):
    """Sends one answer while watching for the client to leave.

    A ``Response`` in name, which is all Starlette asks: status and headers wait for the answer.
    """

    def __init__(
        self,
        answer: Answer,
        generation: Generation,
        events: AsyncIterator[list[Event]],
        *,
        streamed: bool,
        send_timeout_s: float,
    ) -> None:
        self._answer = answer
        self._generation = generation
        self._events = events
        self._send_answer = self._stream if streamed else self._send_whole
        self._send_timeout_s = send_timeout_s
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation, contextlib.suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send_answer(send))

    async def _send_whole(self, send: Send) -> None:
        try:
            async for _ in self._events:
                pass
            status, text = 200, self._answer.whole(created=int(time.time()))
        except EngineError as error:
            failure = failure_of(error)
            status, text = failure.status, failure.body()
        await send({"type": "http.response.start", "status": status, "headers": _JSON})
        await send({"type": "http.response.body", "body": text.encode()})

    async def _stream(self, send: Send) -> None:
        async def push(text: str, *, more: bool = True) -> None:
            body = text.encode()
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                raise ClientDisconnect from None

        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        try:
            async for events in self._events:
                await push("".join(map(_sse, events)) or ": keep-alive\n\n")
        except EngineError as error:
            # The status line has gone out; clients look for an error object in the data.
            await push(_sse(Event(None, failure_of(error).body())), more=False)
        else:
            end = self._answer.end_mark()
            await push(_sse(end) if end else "", more=False)


async def answer_events(
    generation: Generation, answer: Answer, request_id: str, silence_s: float
) -> AsyncIterator[list[Event]]:
    """The answer's events in groups as they come; an empty group after each ``silence_s`` of none.

    Raises:
        EngineError: the model failed, the engine closed, or the reader is too slow.
    """
    is_first = True
    while not answer.is_complete:
        outputs = await generation.take(silence_s)
        events: list[Event] = []
        for output in outputs:
            events += feed(answer, output, is_first=is_first)
            is_first = False
            if answer.is_complete:  # at a stop string; the engine may not know yet
                break
            if error := failure_in(answer, output, request_id):
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
