"""The engine: one thread owns a backend and every sequence on it.

Callers submit requests from any thread; each turn of the loop is one ``step()``: admit and reap,
advance the running sequences (``stepper.py``), publish. Prompts are read in chunks beside decoding
sequences in one ragged batch. Ids in, ids out; text, HTTP and prompts are other packages' business.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from rorqual.engine.backend import Backend
from rorqual.engine.handle import Handle
from rorqual.engine.request import FinishReason, Request
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.engine.stepper import Stepper
from rorqual.errors import (
    ConfigError,
    EngineClosedError,
    EngineOverloadedError,
    PromptTooLongError,
    RequestError,
)

_log = logging.getLogger(__name__)
_WAIT_S = 60.0
"""Longest sleep of an idle engine before it looks around again."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on.

    Raises:
        ConfigError: a value is out of range.
    """

    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_waiting: int = 256
    """Requests queued before ``submit`` refuses."""
    max_context_tokens: int | None = None
    """Prompt plus answer; None takes all the backend can."""
    speculate: bool = True
    """Guess tokens ahead where the backend can and it pays; never changes what is answered."""

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot; totals count from the engine's start."""

    num_waiting: int
    num_running: int
    cache_bytes: int
    """Bytes the backend holds: running sequences and what is kept for later."""
    compressed_bytes: int
    """The part of them that grows with the context."""
    num_steps: int
    num_preempted: int
    """Times a sequence lost its memory to another and had to be read again."""
    prompt_tokens: int
    """Prompt tokens computed."""
    cached_tokens: int
    """Prompt tokens reused."""
    completion_tokens: int
    drafted_tokens: int
    """Guesses at tokens ahead, and how many were right."""
    accepted_tokens: int
    finished: Mapping[FinishReason, int]


class Engine:
    """Serves requests on one backend until closed; then closes the backend too.

    Thread-safe. ``on_output`` callbacks run on the engine's thread and must not block or call
    ``close``. Use as a context manager, or ``close()`` it: leaving the block normally finishes
    what was submitted, leaving it by an exception cancels.
    """

    def __init__(self, backend: Backend, config: EngineConfig | None = None) -> None:
        self._backend = backend
        self._config = config or EngineConfig()
        self._max_context = min(
            self._config.max_context_tokens or backend.max_context_tokens,
            backend.max_context_tokens,
        )
        self._stepper = Stepper(  # touched by the engine's thread only
            backend,
            self._config.limits,
            self._max_context,
            speculate=self._config.speculate,
            now=time.monotonic,
        )
        # Below: shared between threads under _changed.
        self._changed = threading.Condition()
        self._waiting: deque[Handle] = deque()
        self._closing: Literal["drain", "cancel"] | None = None
        self._stats = self._snapshot()
        self._thread = threading.Thread(target=self._run, name="rorqual-engine", daemon=True)
        self._thread.start()
        # A thread still inside native code when the interpreter goes would abort the process.
        self._close_at_exit = functools.partial(self.close, drain=False)
        atexit.register(self._close_at_exit)

    # ---- any thread ---------------------------------------------------------------------------
    @property
    def max_context_tokens(self) -> int:
        """Longest prompt plus answer."""
        return self._max_context

    @property
    def is_closed(self) -> bool:
        """Whether requests are refused, because of ``close`` or because the engine broke down."""
        return self._closing is not None

    @property
    def is_full(self) -> bool:
        """Whether ``submit`` would refuse just now because the queue is full."""
        return len(self._waiting) >= self._config.max_waiting

    def submit(self, request: Request) -> Handle:
        """Queue ``request``; returns at once.

        Raises:
            RequestError: a prompt token is outside the vocabulary.
            PromptTooLongError: the prompt leaves no room for an answer.
            EngineOverloadedError: the queue is full.
            EngineClosedError: ``close`` was called.
        """
        vocab = self._backend.vocab_size
        if (top := max(request.prompt_ids)) >= vocab:
            raise RequestError(
                f"prompt_ids: token {top} is outside the vocabulary of {vocab}", param="prompt_ids"
            )
        if len(request.prompt_ids) >= self._max_context:
            raise PromptTooLongError(
                f"the prompt has {len(request.prompt_ids)} tokens; this model's context holds "
                f"{self._max_context}, answer included",
                param="prompt_ids",
            )
        handle = Handle(request, self._wake)
        with self._changed:
            if self._closing is not None:
                raise EngineClosedError("the engine is shut down")
            if len(self._waiting) >= self._config.max_waiting:
                raise EngineOverloadedError(
                    f"{len(self._waiting)} requests are waiting already; try again later"
                )
            self._waiting.append(handle)
            self._changed.notify_all()
        return handle

    def stats(self) -> EngineStats:
        """A consistent snapshot, at most one step old except for the queue's length."""
        with self._changed:
            waiting = len(self._waiting)
            snapshot = self._stats
        return dataclasses.replace(snapshot, num_waiting=waiting)

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Refuse new requests, then finish (``drain``) or cancel the others, and join.

        Idempotent; ``close(drain=False)`` after a draining close cuts it short.

        Raises:
            TimeoutError: still running after ``timeout_s``.
        """
        with self._changed:
            if self._closing != "cancel":
                self._closing = "drain" if drain else "cancel"
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine is still running after {timeout_s} s")
        atexit.unregister(self._close_at_exit)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ---- the engine's thread ------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
        except Exception as error:  # a bug of ours: stop serving, but leave nobody waiting
            _log.critical("the engine stopped", exc_info=True)
            self._abandon(f"the engine stopped: {error!r}")
        finally:
            try:
                self._backend.close()
            except Exception:
                _log.exception("the backend did not close; what it had to write may be lost")

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once closed and empty."""
        with self._changed:
            while not self._waiting and self._stepper.is_idle:
                if self._closing is not None:
                    return False
                self._changed.wait(_WAIT_S)
        return True

    def step(self) -> None:
        """Advance the running sequences once; only the engine's thread calls this."""
        self._admit_and_reap()
        self._stepper.step()
        self._deliver()

    def _admit_and_reap(self) -> None:
        """Drop what was cancelled or is late, then start as many waiting as there is room for."""
        now = time.monotonic()
        with self._changed:
            cancel_all = self._closing == "cancel"
            gone = [h for h in self._waiting if h.is_cancelled or h.is_late(now) or cancel_all]
            for handle in gone:
                self._waiting.remove(handle)
        self._stepper.reap(cancel_all=cancel_all)
        for handle in gone:
            if handle.is_cancelled or cancel_all:
                self._stepper.turn_away(handle, "cancelled")
            else:
                self._stepper.turn_away(handle, "error", error=handle.lateness())
        with self._changed:
            room = self._stepper.room(len(self._waiting))
            offered = list(itertools.islice(self._waiting, room))
        for handle in offered:
            if not self._stepper.start(handle):
                break
            with self._changed:  # only now: one that breaks the engine must still get its error
                self._waiting.remove(handle)

    def _deliver(self) -> None:
        """Publish the step's outputs, after what they report has become visible in ``stats``."""
        with self._changed:
            self._stats = self._snapshot()
        outbox, self._stepper.outbox = self._stepper.outbox, []
        for handle, output in outbox:
            handle.publish(output)

    def _abandon(self, error: str) -> None:
        """Fail everything and refuse new requests."""
        with self._changed:
            self._closing = "cancel"
            waiting, self._waiting = self._waiting, deque()
        self._stepper.abandon(error)
        for handle in waiting:
            self._stepper.turn_away(handle, "error", error=error)
        self._deliver()

    def _snapshot(self) -> EngineStats:
        use, totals = self._backend.memory_use(), self._stepper.totals
        return EngineStats(
            num_waiting=0,
            num_running=self._stepper.num_running,
            cache_bytes=use.cache_bytes,
            compressed_bytes=use.compressed_bytes,
            num_steps=totals.num_steps,
            num_preempted=totals.num_preempted,
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens,
            completion_tokens=totals.completion_tokens,
            drafted_tokens=totals.drafted_tokens,
            accepted_tokens=totals.accepted_tokens,
            finished=dict(totals.finished),
        )
