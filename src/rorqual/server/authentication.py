"""Lets in whoever holds an API key, in ``Authorization: Bearer`` or ``x-api-key``."""

from __future__ import annotations

import logging
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.errors import ConfigError
from rorqual.server.keys import ApiKey, KeyRing
from rorqual.server.record import record_of
from rorqual.server.refusal import refuse

_log = logging.getLogger(__name__)
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Authentication:
    """ASGI middleware; the key is then in the request's record.

    Args:
        open_paths: served to everybody.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["path"] not in self._open_paths:
            try:
                record_of(scope).key = self._key_of(scope)
            except HTTPException as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _key_of(self, scope: Scope) -> ApiKey:
        texts = _credentials(scope)
        if not texts:
            raise HTTPException(
                401,
                "an API key is needed: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                _CHALLENGE,
            )
        states = []
        try:
            for text in texts:
                if key := self._keys.find(text):
                    states.append(key.state(time.time()))
                    if states[-1] == "active":
                        return key
        except ConfigError as error:
            _log.error("%s", error)
            raise HTTPException(503, "API keys cannot be checked just now") from None
        # Only who holds the secret is told that it once was good.
        raise HTTPException(
            401, f"the API key is {states[0] if states else 'not a valid one'}", _CHALLENGE
        )


def _credentials(scope: Scope) -> list[str]:
    """What might be a key, best first; some clients fill both headers with different things."""
    bearer, plain = [], []
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, text = value.decode("latin-1").partition(" ")
            if kind.lower() == "bearer" and text.strip():
                bearer.append(text.strip())
        elif name == b"x-api-key" and value.strip():
            plain.append(value.decode("latin-1").strip())
    return [*bearer[:1], *plain[:1]]
