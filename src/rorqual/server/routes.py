"""Every path of the three protocols, and the one place where they are put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.routing import Route

from rorqual.protocol.constraint import build_constraint
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.bridge import ServingEngine
from rorqual.server.completions import CompletionEndpoint
from rorqual.server.conversations import ConversationEndpoint
from rorqual.server.endpoint import Service
from rorqual.server.history import History
from rorqual.server.models import Models

_BASES = ("/v1", "", "/beta")
"""OpenAI's base path, DeepSeek's own, and the one it keeps for continuation."""
_ANTHROPIC_BASES = ("/v1", "/anthropic/v1")


def protocol_routes(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    card: ModelCard,
    *,
    history: History | None = None,
    keepalive_s: float,
    send_timeout_s: float,
    is_strict: bool = False,
) -> Sequence[Route]:
    """The routes serving ``card``'s model from ``engine``, by protocol and base path.

    They need the request's record (``server/record.py``) in the scope, and the body bounded.

    Args:
        history: remembers turns; the caller closes it. None: in memory, until the process ends.
        keepalive_s: silence after which a stream gets a comment.
        send_timeout_s: longest wait for a client to take a part of its answer.
        is_strict: refuse tool calls sent back without their reasoning, as the hosted API does.

    Raises:
        ConfigError: the tokenizer does not fit the card's prompt layout.
    """
    renderer = Renderer(
        card,
        tokenizer,
        max_context_tokens=engine.max_context_tokens,
        is_constrained=True,
        is_strict=is_strict,
    )
    # The vocabulary's tables for grammars, about a second for a large one: made before the first
    # request rather than during it.
    build_constraint(tokenizer, thinking=True, max_thinking_tokens=0, generation=card.generation)
    service = Service(
        engine=engine,
        renderer=renderer,
        history=history or History(),
        send_timeout_s=send_timeout_s,
        keepalive_s=keepalive_s,
    )
    chat = ConversationEndpoint(service, "chat")
    messages = ConversationEndpoint(service, "messages")
    responses = ConversationEndpoint(service, "responses")
    completions = CompletionEndpoint(service)
    models = Models(renderer, created=int(time.time()))

    def post(path: str, endpoint: Callable[[Request], object]) -> Route:
        return Route(path, endpoint, methods=["POST"])

    routes = []
    for base in _BASES:
        routes += [
            post(f"{base}/chat/completions", chat.__call__),
            post(f"{base}/responses", responses.__call__),
            post(f"{base}/completions", completions.__call__),
        ]
    for base in _ANTHROPIC_BASES:
        routes += [
            post(f"{base}/messages/count_tokens", messages.count_tokens),
            post(f"{base}/messages", messages.__call__),
        ]
    for base in (*_BASES, "/anthropic/v1"):
        routes += [
            Route(f"{base}/models", models.list),
            Route(f"{base}/models/{{name:path}}", models.get),
        ]
    return routes
