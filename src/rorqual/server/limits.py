"""Requests per minute and requests at a time of each API key."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.server.keys import ApiKey, Permissions
from rorqual.server.record import record_of
from rorqual.server.refusal import refuse

_BUSY_RETRY_S = 1


@dataclass
class Bucket:
    """A token bucket of one key: a minute's requests may come at once, then as they refill."""

    tokens: float
    updated_at: float
    num_running: int = 0

    def refill(self, per_minute: int, now: float) -> None:
        """Add what has accrued until ``now``, seconds on any clock that never goes back."""
        accrued = (now - self.updated_at) * per_minute / 60
        self.tokens = min(float(per_minute), self.tokens + accrued)
        self.updated_at = now

    def wait_s(self, per_minute: int) -> float:
        """Until one request is allowed; 0 if it is now."""
        return max(0.0, (1 - self.tokens) * 60 / per_minute)


class Limits:
    """ASGI middleware inside ``Authentication``; POST requests count, reading is free."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}  # as many as there are keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        key = record_of(scope).key
        if key is None or scope["method"] != "POST" or not _is_limited(key.permissions):
            await self._app(scope, receive, send)
            return
        bucket = self._bucket(key)
        headers: list[tuple[bytes, bytes]] = []

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            _take(bucket, key.permissions)
        except HTTPException as error:
            headers += _headers(bucket, key.permissions)
            await refuse(error, scope, receive, send_limits)
            return
        headers += _headers(bucket, key.permissions)
        bucket.num_running += 1
        try:
            await self._app(scope, receive, send_limits)
        finally:
            bucket.num_running -= 1

    def _bucket(self, key: ApiKey) -> Bucket:
        per_minute = key.permissions.requests_per_minute or 0
        now = self._clock()
        bucket = self._buckets.get(key.id)
        if bucket is None:
            bucket = self._buckets[key.id] = Bucket(tokens=per_minute, updated_at=now)
        bucket.refill(per_minute, now)
        return bucket


def _is_limited(may: Permissions) -> bool:
    return may.requests_per_minute is not None or may.max_concurrent is not None


def _take(bucket: Bucket, may: Permissions) -> None:
    if may.max_concurrent is not None and bucket.num_running >= may.max_concurrent:
        raise HTTPException(
            429,
            f"this API key is limited to {may.max_concurrent} requests at a time",
            {"Retry-After": str(_BUSY_RETRY_S)},
        )
    if may.requests_per_minute is not None:
        if wait_s := bucket.wait_s(may.requests_per_minute):
            raise HTTPException(
                429,
                f"this API key is limited to {may.requests_per_minute} requests per minute",
                {"Retry-After": str(math.ceil(wait_s))},
            )
        bucket.tokens -= 1


def _headers(bucket: Bucket, may: Permissions) -> list[tuple[bytes, bytes]]:
    """OpenAI's names; ``reset`` is the time until the whole minute's worth is there again."""
    if may.requests_per_minute is None:
        return []
    reset_s = (may.requests_per_minute - bucket.tokens) * 60 / may.requests_per_minute
    return [
        (b"x-ratelimit-limit-requests", b"%d" % may.requests_per_minute),
        (b"x-ratelimit-remaining-requests", b"%d" % max(0, int(bucket.tokens))),
        (b"x-ratelimit-reset-requests", b"%.3fs" % reset_s),
    ]
