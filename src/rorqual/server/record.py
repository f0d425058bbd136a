"""What is known about one HTTP request: filled in as it passes, read once at its end.

It is at ``scope["state"]["record"]``. The protocol side calls ``permit`` once model and mode are
known, hands ``watch(...)`` to the engine and calls ``settle`` once the answer has ended, whichever
way; everything else is the doors' business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.types import Scope

from rorqual.engine.request import FinishReason, TokenOutput
from rorqual.server.keys import ApiKey


class TokenTimes(Protocol):
    """Where the times between tokens are counted; called on the engine's thread."""

    def first_token(self, seconds: float) -> None:
        """Since the request arrived."""

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """Since the output before; ``num_tokens`` came together."""


class RequestRecord:
    """One request; the event loop's, but for what ``watch`` counts on the engine's thread.

    The engine may still be writing when the answer ends, at a stop string or because the client
    has left, so its counts are taken over once, by ``settle``, and what comes later is nobody's.
    """

    __slots__ = (
        "_engine_finish",
        "_last_output",
        "_num_cached",
        "_num_generated",
        "_num_prompt",
        "_times",
        "cached_tokens",
        "charge",
        "completion_tokens",
        "finish",
        "key",
        "mode",
        "model",
        "num_tool_parse_failures",
        "prompt_tokens",
        "reasoning_tokens",
        "request_id",
        "started",
        "status",
        "trace_id",
        "ttft_s",
    )

    def __init__(self, request_id: str, trace_id: str | None, times: TokenTimes) -> None:
        self.request_id = request_id
        self.trace_id = trace_id
        """The caller's trace, 32 hexadecimal digits, if it sent one."""
        self.started = time.perf_counter()
        self.status: int | None = None
        self.key: ApiKey | None = None
        self.model: str | None = None
        self.mode: str | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        """The part of ``completion_tokens`` that is reasoning."""
        self.num_tool_parse_failures = 0
        """Tool calls that could not be read; counted by the protocol side."""
        self.charge: Callable[[int], object] | None = None
        """Told the tokens of prompt and answer when the answer has ended."""
        self.finish: FinishReason | None = None
        """None until an answer has ended."""
        self.ttft_s: float | None = None
        self._times = times
        self._last_output = 0.0
        self._num_prompt = self._num_cached = self._num_generated = 0
        self._engine_finish: FinishReason | None = None

    def elapsed_s(self) -> float:
        """Since the request arrived."""
        return time.perf_counter() - self.started

    def permit(self, model: str, mode: str) -> None:
        """Note what is asked for. Raises HTTPException 403 if the request's key may not."""
        self.model, self.mode = model, mode
        if self.key is None:
            return
        may = self.key.permissions
        for kind, name, allowed in (("model", model, may.models), ("mode", mode, may.modes)):
            if allowed is not None and name not in allowed:
                granted = ", ".join(sorted(allowed))
                raise HTTPException(
                    403, f"this API key may not use the {kind} {name}, only {granted}"
                )

    def watch(
        self, on_output: Callable[[TokenOutput], None], num_prompt_tokens: int
    ) -> Callable[[TokenOutput], None]:
        """``on_output``, with its tokens counted and timed; for the answer to one prompt."""
        self._num_prompt = num_prompt_tokens

        def watched(output: TokenOutput) -> None:
            self._count(output)
            on_output(output)

        return watched

    def _count(self, output: TokenOutput) -> None:
        if num_tokens := len(output.token_ids):
            now = time.perf_counter()
            if self.ttft_s is None:
                self.ttft_s = now - self.started
                self._times.first_token(self.ttft_s)
            else:
                self._times.next_tokens(now - self._last_output, num_tokens)
            self._last_output = now
            self._num_generated += num_tokens
        if output.usage is not None:
            self._num_cached = output.usage.cached_tokens
        if output.finish_reason is not None:
            self._engine_finish = output.finish_reason

    def settle(self, *, reasoning_tokens: int, stopped_after: int | None) -> None:
        """Take over what was counted, and charge it; once, when no more is sent to the client.

        An answer the engine has not ended counts as cancelled, with the tokens it has so far.

        Args:
            reasoning_tokens: read so far.
            stopped_after: tokens the client was told of, if a stop string ended the answer: it
                does so for the client before the engine knows.
        """
        if self.finish is not None:
            return
        if stopped_after is None:
            self.finish, self.completion_tokens = self._engine_finish, self._num_generated
        else:
            self.finish, self.completion_tokens = "stop", stopped_after
        self.finish = self.finish or "cancelled"
        self.prompt_tokens, self.cached_tokens = self._num_prompt, self._num_cached
        self.reasoning_tokens = reasoning_tokens
        if self.charge is not None:
            self.charge(self.prompt_tokens + self.completion_tokens)


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that ``scope`` belongs to."""
    record: RequestRecord = scope["state"]["record"]
    return record
