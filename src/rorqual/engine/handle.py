"""The caller's end of a submitted request: outputs as they come, the whole answer, or giving up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from rorqual.engine.request import Request, TokenLogprob, TokenOutput

_log = logging.getLogger(__name__)
_WAIT_S = 60.0
"""Longest sleep of a waiting iterator before it looks again."""


class Handle:
    """One request in the engine. Safe to use from any thread; never blocks the engine."""

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        """Made by ``Engine.submit``; ``wake`` tells the engine that ``cancel`` was called."""
        self.request = request
        self._wake = wake
        self._changed = threading.Condition()
        self._outputs: list[TokenOutput] = []
        self._finished = False
        self._submitted_at = time.monotonic()
        self._cancelled = False
        self._callback_failed = False

    @property
    def is_finished(self) -> bool:
        """Whether the last output has been published."""
        return self._finished

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called; the engine notices at the next step boundary."""
        return self._cancelled

    def is_late(self, now: float) -> bool:
        """Whether the request's deadline has passed; ``now`` as ``time.monotonic`` has it."""
        deadline = self.request.deadline_s
        return deadline is not None and now - self._submitted_at >= deadline

    def lateness(self) -> str:
        """What to tell the owner of a late request."""
        return f"not finished within its deadline of {self.request.deadline_s:g} s"

    def cancel(self) -> None:
        """Stop at the next step boundary and free the request's state. Idempotent.

        The last output then has finish_reason ``cancelled``, unless the request finished first.
        """
        self._cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[TokenOutput]:
        """Every output from the first on, blocking until each comes; ends after the last."""
        at = 0
        while True:
            with self._changed:
                while at == len(self._outputs):
                    self._changed.wait(_WAIT_S)
                output = self._outputs[at]
            yield output
            if output.finish_reason is not None:
                return
            at += 1

    def result(self, timeout_s: float | None = None) -> TokenOutput:
        """The whole answer as one output, once finished.

        Raises:
            TimeoutError: not finished within ``timeout_s``; the request keeps running.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._finished:
                left = _WAIT_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(
                        f"request {self.request.request_id} unfinished after {timeout_s} s"
                    )
                self._changed.wait(min(left, _WAIT_S))
            outputs = list(self._outputs)
        token_ids = tuple(token for output in outputs for token in output.token_ids)
        logprobs: tuple[TokenLogprob, ...] | None = None
        if self.request.sampling.logprobs is not None:
            logprobs = tuple(entry for output in outputs for entry in output.logprobs or ())
        last = outputs[-1]
        return TokenOutput(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=last.finish_reason,
            usage=last.usage,
            error=last.error,
        )

    def publish(self, output: TokenOutput) -> None:
        """Deliver ``output``; the engine's thread calls this, outside every lock.

        If the callback raises, the request is cancelled, the failure logged,
        and the callback not called again.
        """
        with self._changed:
            self._outputs.append(output)
            self._finished = output.finish_reason is not None
            self._changed.notify_all()
        callback = self.request.on_output
        if callback is None or self._callback_failed:
            return
        try:
            callback(output)
        except Exception:
            _log.exception("on_output of request %s raised", self.request.request_id)
            self._callback_failed = True
            self._cancelled = True
