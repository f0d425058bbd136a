"""An engine that costs next to nothing, so that what is measured is the server around it.

Every request gets the same tokens: all at once inside ``submit``, or one per step to every running
request from one thread, as a real engine does. No model, no torch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from rorqual.engine.request import FinishReason, Request, TokenOutput, Usage
from rorqual.errors import EngineClosedError, EngineOverloadedError


@dataclass(frozen=True, kw_only=True)
class PacedLoad:
    """How busy the engine is; nothing ever waits."""

    num_waiting: int
    num_running: int


class PacedHandle:
    """The caller's end of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_sent = 0
        self.is_cancelled = False

    def cancel(self) -> None:
        """End at the next step; from any thread."""
        self.is_cancelled = True


class PacedEngine:
    """Answers every request with ``token_ids``; close it, or use it as a context manager.

    Args:
        step_s: time between two tokens of a request; 0 answers inside ``submit``.
        max_running: requests beyond this are refused as overload.
    """

    def __init__(
        self, token_ids: tuple[int, ...], *, step_s: float = 0.0, max_running: int = 4096
    ) -> None:
        self.max_context_tokens = 1_048_576
        self._token_ids = token_ids
        self._step_s = step_s
        self._max_running = max_running
        self._running: list[PacedHandle] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paced-engine", daemon=True)
        if step_s:
            self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether requests are refused for good."""
        return self._closing.is_set()

    @property
    def is_full(self) -> bool:
        """Whether requests are refused as overload just now."""
        return len(self._running) >= self._max_running

    def stats(self) -> PacedLoad:
        """A snapshot."""
        return PacedLoad(num_waiting=0, num_running=len(self._running))

    def submit(self, request: Request) -> PacedHandle:
        """Answer ``request``, which must have a callback. Raises as the real engine does."""
        if self.is_closed:
            raise EngineClosedError("the engine is shut down")
        handle = PacedHandle(request)
        if not self._step_s:
            self._deliver(handle, len(self._token_ids))
            self._end(handle)
            return handle
        with self._lock:
            if self.is_full:
                raise EngineOverloadedError(f"{len(self._running)} requests are running already")
            self._running.append(handle)
        return handle

    def close(self) -> None:
        """Refuse new requests and cancel the others."""
        self._closing.set()
        if self._step_s:
            self._thread.join()

    def __enter__(self) -> PacedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.wait(self._step_s):
            self._step()
        for handle in self._running:
            handle.cancel()
        self._step()

    def _step(self) -> None:
        with self._lock:
            handles = list(self._running)
        ended = set()
        for handle in handles:
            if not handle.is_cancelled:
                self._deliver(handle, 1)
            if handle.is_cancelled or handle.num_sent >= self._limit(handle):
                self._end(handle)
                ended.add(handle)
        if ended:
            with self._lock:
                self._running = [h for h in self._running if h not in ended]

    def _limit(self, handle: PacedHandle) -> int:
        return min(len(self._token_ids), handle.request.sampling.max_tokens)

    def _deliver(self, handle: PacedHandle, num_tokens: int) -> None:
        start = handle.num_sent
        handle.num_sent = min(start + num_tokens, self._limit(handle))
        assert handle.request.on_output is not None
        handle.request.on_output(
            TokenOutput(
                token_ids=self._token_ids[start : handle.num_sent],
                usage=None if start else _usage(handle),
            )
        )

    def _end(self, handle: PacedHandle) -> None:
        reason: FinishReason = "stop"
        if handle.is_cancelled:
            reason = "cancelled"
        elif handle.num_sent < len(self._token_ids):
            reason = "length"
        assert handle.request.on_output is not None
        handle.request.on_output(TokenOutput(finish_reason=reason, usage=_usage(handle)))


def _usage(handle: PacedHandle) -> Usage:
    prompt_tokens = len(handle.request.prompt_ids)
    return Usage(
        prompt_tokens=prompt_tokens,
        cached_tokens=prompt_tokens // 2,
        completion_tokens=handle.num_sent,
    )
