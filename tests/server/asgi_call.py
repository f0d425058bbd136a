"""Calls an ASGI application in process, with a client that can leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette

NANO = Path(__file__).parents[2] / "models" / "nano-flash"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "nano-flash", "messages": [{"role": "user", "content": "Hi"}]}


def call(app: Starlette, method: str, path: str, **options: Any) -> httpx2.Response:
    """One request and its complete response; an exception in the application is raised here."""

    async def request() -> httpx2.Response:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://rorqual") as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def post(app: Starlette, **fields: Any) -> httpx2.Response:
    """A chat request: ``BODY`` with ``fields``."""
    return call(app, "POST", CHAT, json={**BODY, **fields})


def sse_data(text: str) -> list[Any]:
    """The decoded data of a stream's events; ``[DONE]`` stays text."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line[:5] == "data:"]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass
class Visit:
    """What a client saw until it left."""

    status: int | None = None
    text: str = ""
    left: asyncio.Event = field(default_factory=asyncio.Event)


async def visit(
    app: Starlette, body: dict[str, Any], *, leave_when: Callable[[Visit], bool]
) -> Visit:
    """Post ``body`` and close the connection as soon as ``leave_when`` holds."""
    seen = Visit()
    parts = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive() -> dict[str, Any]:
        for part in parts:
            return part
        while not (seen.left.is_set() or leave_when(seen)):
            await asyncio.sleep(0.002)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        seen.status = message.get("status", seen.status)
        seen.text += message.get("body", b"").decode()
        if message["type"] == "http.response.body" and not message.get("more_body"):
            seen.left.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    async with asyncio.timeout(20):
        await app(scope, receive, send)
    return seen
