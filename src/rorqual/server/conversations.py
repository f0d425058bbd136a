"""``POST /v1/chat/completions``, ``/v1/messages`` and ``/v1/responses``: one endpoint, three wires.

Also ``POST /v1/messages/count_tokens``. What differs between the protocols is in
``protocol/dialects.py`` and ``deepseek-recipe``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import MappingProxyType

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual.errors import RorqualError
from rorqual.protocol.dialects import Protocol
from rorqual.protocol.history import turn_keys
from rorqual.protocol.parse import Answer
from rorqual.protocol.render import RenderedRequest
from rorqual.server.answering import engine_request
from rorqual.server.endpoint import Endpoint, Job, Service
from rorqual.server.failures import failure_of
from rorqual.server.history import OwnersHistory
from rorqual.server.record import RequestRecord, record_of

_ID_PREFIXES: Mapping[Protocol, str] = MappingProxyType(
    {"chat": "chatcmpl-", "messages": "msg_", "responses": "resp_"}
)


class ConversationEndpoint(Endpoint):
    """Answers conversations in one protocol."""

    def __init__(self, service: Service, protocol: Protocol) -> None:
        super().__init__(service)
        self.wire = self.protocol = protocol
        self.id_prefix = _ID_PREFIXES[protocol]

    def prepare(self, body: bytes, answer_id: str, record: RequestRecord) -> Job:
        """See ``Endpoint.prepare``."""
        renderer, memory = self.service.renderer, self._memory(record)
        card, tokenizer = renderer.card, renderer.tokenizer
        rendered = renderer.render(body, self.protocol, memory)
        answer = Answer(rendered, tokenizer, answer_id, streamed=rendered.stream)

        def on_complete() -> None:
            turn = answer.turn(int(time.time()))
            record.num_tool_parse_failures += answer.num_unread_calls(turn)
            if not rendered.is_continuation:
                keys = turn_keys(rendered.history_digest, turn.content, turn.calls)
                memory.remember(keys, turn)

        return Job(
            engine_request(rendered, tokenizer, answer_id, generation=card.generation),
            answer,
            rendered.stream,
            rendered.mode,
            rendered.warnings,
            on_complete,
        )

    async def count_tokens(self, http: HttpRequest) -> Response:
        """How many tokens the prompt of a body would have; nothing is generated."""
        record = record_of(http.scope)
        try:
            rendered = await asyncio.to_thread(self._render, await http.body(), record)
            record.permit(self.service.renderer.card.name, rendered.mode)
        except (RorqualError, HTTPException) as error:
            return failure_of(error).response(self.wire)
        return JSONResponse({"input_tokens": len(rendered.prompt_ids)})

    def _render(self, body: bytes, record: RequestRecord) -> RenderedRequest:
        return self.service.renderer.render(body, self.protocol, self._memory(record))

    def _memory(self, record: RequestRecord) -> OwnersHistory:
        return self.service.history.of(record.key.id if record.key else "")
