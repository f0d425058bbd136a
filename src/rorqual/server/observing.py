"""The outermost door: gives each request an id and a record, and reports it when it is over."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.server.record import RequestRecord, TokenTimes

_CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; nobody is left to read it
_OTHER = "other"
"""Route of a path that is none, so that strangers cannot fill logs and metrics with names."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""W3C Trace Context, section 3.2."""

Report = Callable[[RequestRecord, str, str], None]
"""Called with the record, the method and the route of each request that ended."""


class Observing:
    """ASGI middleware; ``scope["state"]["record"]`` is there for everything inside.

    Args:
        routes: path patterns by endpoint, as the router leaves it in the scope.
        reports: called in order; they must not raise or block.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Mapping[object, str],
        times: TokenTimes,
        reports: Sequence[Report],
    ) -> None:
        self._app = app
        self._routes = routes
        self._paths = frozenset(routes.values())
        self._times = times
        self._reports = reports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        given_id, traceparent = None, None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given_id = value
            elif name == b"traceparent":
                traceparent = value
        if given_id is None or not _REQUEST_ID.fullmatch(given_id):
            given_id = b"req_" + secrets.token_hex(12).encode()
        extra = [(b"x-request-id", given_id), (b"request-id", given_id)]
        trace = _trace_of(traceparent)
        if trace is not None:
            trace_id, flags = trace
            span = secrets.token_hex(8).encode()
            extra.append((b"traceparent", b"00-%s-%s-%s" % (trace_id, span, flags)))
        record = RequestRecord(given_id.decode(), trace[0].decode() if trace else None, self._times)
        scope.setdefault("state", {})["record"] = record

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except Exception:
            record.status = 500
            raise
        finally:
            if record.status is None:
                record.status = _CLIENT_CLOSED_REQUEST
            route = self._route(scope)
            for report in self._reports:
                report(record, scope["method"], route)

    def _route(self, scope: Scope) -> str:
        path: str = scope["path"]
        return path if path in self._paths else self._routes.get(scope.get("endpoint"), _OTHER)


def _trace_of(header: bytes | None) -> tuple[bytes, bytes] | None:
    """Trace id and flags of a valid ``traceparent``; anything else counts as absent."""
    match = _TRACEPARENT.fullmatch(header) if header else None
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[5] is not None):
        return None
    if not match[2].strip(b"0") or not match[3].strip(b"0"):
        return None
    return match[2], match[4]
