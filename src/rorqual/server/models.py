"""``GET /v1/models``: the one served model under all its names.

An entry has OpenAI's fields and Anthropic's, so that both kinds of client can list models.
"""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rorqual.errors import UnknownModelError
from rorqual.protocol.modes import MODES
from rorqual.protocol.render import Renderer
from rorqual.server.failures import failure_of, wire_of
from rorqual.server.record import record_of


class Models:
    """The catalogue."""

    def __init__(self, renderer: Renderer, *, created: int) -> None:
        """``created``: seconds since the epoch."""
        self._renderer = renderer
        card = renderer.card
        self._entries = {
            name: {
                "id": name,
                "object": "model",
                "type": "model",
                "display_name": name,
                "created": created,
                "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
                "owned_by": "rorqual",
                "context_length": renderer.context_tokens,
                "modes": list(MODES),
                "default_mode": card.default_mode,
                "description": card.description,
            }
            for name in (card.name, *card.aliases)
        }

    async def list(self, http: Request) -> Response:
        """All models the key may use."""
        key = record_of(http.scope).key
        allowed = key.permissions.models if key else None
        may = allowed is None or self._renderer.card.name in allowed
        entries = [*self._entries.values()] if may else []
        names = [entry["id"] for entry in entries]
        return JSONResponse(
            {
                "object": "list",
                "data": entries,
                "has_more": False,
                "first_id": names[0] if names else None,
                "last_id": names[-1] if names else None,
            }
        )

    async def get(self, http: Request) -> Response:
        """One model."""
        name = http.path_params["name"]
        if name in self._entries:
            return JSONResponse(self._entries[name])
        error = UnknownModelError(self._renderer.unknown_model(name), param="model")
        return failure_of(error).response(wire_of(http.url.path))
