"""Between a rendered request, the engine and the answer: what a server and a terminal share.

Plain functions, no waiting: how outputs travel from the engine's thread is the caller's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict

from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.errors import EngineClosedError, EngineError
from rorqual.protocol.completions import RenderedCompletion
from rorqual.protocol.constraint import constraint_of
from rorqual.protocol.modes import Generation
from rorqual.protocol.parse import Event, TokenAlternatives, TokenFeed
from rorqual.protocol.render import RenderedRequest
from rorqual.protocol.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def engine_request(
    rendered: RenderedRequest,
    tokenizer: Tokenizer,
    request_id: str,
    on_output: Callable[[TokenOutput], None] | None = None,
    *,
    generation: Generation | None = None,
) -> Request:
    """What the engine is asked for ``rendered``; arguments as the fields of ``Request``.

    Args:
        generation: of the checkpoint: hold the answer to the request's tools, format and thinking
            budget, which compiles grammars and so may take long. None leaves it free.

    Raises:
        RequestError: a schema cannot be enforced.
    """
    constraint = None if generation is None else constraint_of(rendered, tokenizer, generation)
    return Request(
        prompt_ids=rendered.prompt_ids,
        sampling=_sampling(rendered, tokenizer),
        request_id=request_id,
        on_output=on_output,
        constraint=constraint,
    )


def text_request(rendered: RenderedCompletion, tokenizer: Tokenizer, request_id: str) -> Request:
    """What the engine is asked for a completion."""
    return Request(
        prompt_ids=rendered.prompt_ids,
        sampling=_sampling(rendered, tokenizer),
        request_id=request_id,
    )


def _sampling(
    rendered: RenderedRequest | RenderedCompletion, tokenizer: Tokenizer
) -> SamplingParams:
    return SamplingParams(**asdict(rendered.sampling), stop_token_ids=(tokenizer.eos_id,))


def feed(answer: TokenFeed, output: TokenOutput, *, is_first: bool) -> list[Event]:
    """Put one engine output into ``answer``; the events it completed.

    Once ``answer.is_complete`` the engine's further outputs, if any, mean nothing.
    """
    events: list[Event] = []
    if is_first:
        events += answer.start(output.usage.cached_tokens if output.usage else 0)
    if output.token_ids:
        events += answer.push(output.token_ids, _alternatives(output))
    if not answer.is_complete and output.finish_reason in ("stop", "length"):
        events += answer.finish("stop" if output.finish_reason == "stop" else "length")
    return events


def failure_in(answer: TokenFeed, output: TokenOutput, request_id: str) -> EngineError | None:
    """Why ``output`` left ``answer`` without an end; None if it did not.

    The model's own words go to the log only: they may hold paths or other requests' data.
    """
    if answer.is_complete or output.finish_reason is None:
        return None
    if output.finish_reason == "cancelled":
        return EngineClosedError("the engine was shut down before the answer was complete")
    _log.error("request %s failed: %s", request_id, output.error)
    return EngineError(f"the model failed on this request ({request_id})")


def _alternatives(output: TokenOutput) -> list[TokenAlternatives] | None:
    if output.logprobs is None:
        return None
    return [(entry.logprob, entry.top) for entry in output.logprobs]
