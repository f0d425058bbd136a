"""Requests and tokens per minute, and requests at a time, of each API key.

What a request will cost in tokens is known only when it ends, so it is let in while any of the
minute's tokens are left and pays afterwards; what it overdraws, the key's next requests wait for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.server.failures import Wire, wire_of
from rorqual.server.keys import ApiKey, Permissions
from rorqual.server.record import record_of
from rorqual.server.refusal import refuse

_BUSY_RETRY_S = 1


@dataclass
class Bucket:
    """A minute's worth of something, which may be used at once and comes back at its rate."""

    left: float
    """Below 0 when more was used than there was."""
    updated_at: float

    def refill(self, per_minute: int, now: float) -> None:
        """Add what has accrued until ``now``, seconds on any clock that never goes back."""
        accrued = (now - self.updated_at) * per_minute / 60
        self.left = min(float(per_minute), self.left + accrued)
        self.updated_at = now

    def wait_s(self, per_minute: int) -> float:
        """Until there is one; 0 if there is now."""
        return max(0.0, (1 - self.left) * 60 / per_minute)


@dataclass
class _Account:
    """What one key has left."""

    requests: Bucket
    tokens: Bucket
    num_running: int = 0

    def charge(self, num_tokens: int) -> None:
        """Take what a request that has ended cost."""
        self.tokens.left -= num_tokens


class _Rate(NamedTuple):
    kind: str
    per_minute: int
    bucket: Bucket


class Limits:
    """ASGI middleware inside ``Authentication``; POST requests count, reading is free."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._accounts: dict[str, _Account] = {}  # as many as there are keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        record = record_of(scope)
        key = record.key
        if key is None or scope["method"] != "POST" or not _is_limited(key.permissions):
            await self._app(scope, receive, send)
            return
        account = self._account(key)
        rates = _rates(account, key.permissions)
        wire = wire_of(scope["path"])
        headers: list[tuple[bytes, bytes]] = []

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            _admit(account, rates, key.permissions.max_concurrent)
        except HTTPException as error:
            headers += _headers(rates, wire)
            await refuse(error, scope, receive, send_limits)
            return
        account.requests.left -= 1
        headers += _headers(rates, wire)
        record.charge = account.charge
        account.num_running += 1
        try:
            await self._app(scope, receive, send_limits)
        finally:
            account.num_running -= 1

    def _account(self, key: ApiKey) -> _Account:
        may, now = key.permissions, self._clock()
        account = self._accounts.get(key.id)
        if account is None:
            account = self._accounts[key.id] = _Account(
                Bucket(may.requests_per_minute or 0, now), Bucket(may.tokens_per_minute or 0, now)
            )
        account.requests.refill(may.requests_per_minute or 0, now)
        account.tokens.refill(may.tokens_per_minute or 0, now)
        return account


def _is_limited(may: Permissions) -> bool:
    limits = (may.requests_per_minute, may.tokens_per_minute, may.max_concurrent)
    return any(limit is not None for limit in limits)


def _rates(account: _Account, may: Permissions) -> list[_Rate]:
    """The key's limits per minute."""
    rates = (
        ("requests", may.requests_per_minute, account.requests),
        ("tokens", may.tokens_per_minute, account.tokens),
    )
    return [_Rate(kind, limit, bucket) for kind, limit, bucket in rates if limit is not None]


def _admit(account: _Account, rates: list[_Rate], max_concurrent: int | None) -> None:
    """Raises HTTPException 429 if the key has to wait."""
    if max_concurrent is not None and account.num_running >= max_concurrent:
        raise HTTPException(
            429,
            f"this API key is limited to {max_concurrent} requests at a time",
            {"Retry-After": str(_BUSY_RETRY_S)},
        )
    for kind, per_minute, bucket in rates:
        if wait_s := bucket.wait_s(per_minute):
            raise HTTPException(
                429,
                f"this API key is limited to {per_minute} {kind} per minute",
                {"Retry-After": str(math.ceil(wait_s))},
            )


def _headers(rates: list[_Rate], wire: Wire) -> list[tuple[bytes, bytes]]:
    """In the words of OpenAI or Anthropic; ``reset`` says when the whole minute's worth is there
    again."""
    headers = []
    for kind, per_minute, bucket in rates:
        reset_s = (per_minute - bucket.left) * 60 / per_minute
        values = {"limit": str(per_minute), "remaining": str(max(0, int(bucket.left)))}
        if wire == "messages":
            reset_at = datetime.fromtimestamp(math.ceil(time.time() + reset_s), UTC)
            values["reset"] = reset_at.strftime("%Y-%m-%dT%H:%M:%SZ")
            headers += [(f"anthropic-ratelimit-{kind}-{name}", v) for name, v in values.items()]
        else:
            values["reset"] = f"{reset_s:.3f}s"
            headers += [(f"x-ratelimit-{name}-{kind}", v) for name, v in values.items()]
    return [(name.encode(), value.encode()) for name, value in headers]
