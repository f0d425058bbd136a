"""The engine: one thread owns the model and every sequence's state.

Callers submit requests from any thread; each turn of the loop is one ``step()``: admit and reap,
schedule, forward, commit. Prompts are read in chunks beside decoding sequences in one ragged
batch. Ids in, ids out; text, HTTP and prompts are other packages' business.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.handle import Handle
from rorqual.engine.request import FinishReason, Request, TokenLogprob, TokenOutput, Usage
from rorqual.engine.runner import Model, Work, forward
from rorqual.engine.scheduler import (
    SchedulerLimits,
    num_admissible,
    schedule,
)
from rorqual.engine.sequence import RunningSequence
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
_MAX_RESTARTS = 64
"""Failed steps of others that a request survives: enough for a long answer, but an end."""
_MAX_THREADS = 1024


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
    """Prompt plus answer; None takes the model's ``max_position_embeddings``."""
    num_threads: int | None = None
    """Threads torch uses inside an operation; None leaves torch's choice."""
    device: str = "cpu"
    """Where the model's parameters are."""

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_context_tokens", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if self.num_threads is not None and self.num_threads > _MAX_THREADS:
            raise ConfigError(f"num_threads must be <= {_MAX_THREADS}, got {self.num_threads}")


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot; totals count from the engine's start."""

    num_waiting: int
    num_running: int
    cache_bytes: int
    """Bytes of all running sequences' states, after the last step."""
    compressed_bytes: int
    """The part of them that grows with the context."""
    num_steps: int
    prompt_tokens: int
    """Prompt tokens computed."""
    cached_tokens: int
    """Prompt tokens reused."""
    completion_tokens: int
    finished: Mapping[FinishReason, int]


class Engine:
    """Serves requests with one model until closed.

    Thread-safe. ``on_output`` callbacks run on the engine's thread and must not block or call
    ``close``. Use as a context manager, or ``close()`` it: leaving the block normally finishes
    what was submitted, leaving it by an exception cancels.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None) -> None:
        self._model = model
        self._config = config or EngineConfig()
        self._max_context = min(
            self._config.max_context_tokens or model.config.max_position_embeddings,
            model.config.max_position_embeddings,
        )
        self._keys = itertools.count()
        self._running: dict[int, RunningSequence] = {}  # touched by the engine's thread only
        self._num_steps = 0
        self._totals = _Totals()
        self._outbox: list[tuple[Handle, TokenOutput]] = []
        # Below: shared between threads under _changed.
        self._changed = threading.Condition()
        self._waiting: deque[Handle] = deque()
        self._closing: Literal["drain", "cancel"] | None = None
        self._stats = self._snapshot()
        self._thread = threading.Thread(target=self._run, name="rorqual-engine", daemon=True)
        self._thread.start()

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
        vocab = self._model.config.vocab_size
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
            if self._config.num_threads is not None:
                torch.set_num_threads(self._config.num_threads)  # OpenMP's count is per thread
            while self._wait_for_work():
                self.step()
        except Exception as error:  # a bug of ours: stop serving, but leave nobody waiting
            _log.critical("the engine stopped", exc_info=True)
            self._abandon(f"the engine stopped: {error!r}")

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once closed and empty."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closing is not None:
                    return False
                self._changed.wait(_WAIT_S)
        return True

    def step(self) -> None:
        """Advance the running sequences once; only the engine's thread calls this."""
        self._admit_and_reap()
        batch = self._schedule()
        if batch:
            try:
                self._commit(batch, forward(self._model, batch, self._config.device))
            except Exception as error:
                _log.exception("step %d failed", self._num_steps)
                self._recover(batch, _describe(error))
            self._num_steps += 1
        self._deliver()

    def _admit_and_reap(self) -> None:
        """Drop cancelled requests, then start as many waiting ones as there is room for."""
        with self._changed:
            cancel_all = self._closing == "cancel"
            gone = [h for h in self._waiting if h.is_cancelled or cancel_all]
            for handle in gone:
                self._waiting.remove(handle)
        for sequence in list(self._running.values()):
            if sequence.handle.is_cancelled or cancel_all:
                self._finish(sequence, "cancelled")
        for handle in gone:
            self._turn_away(handle, "cancelled")
        with self._changed:
            room = num_admissible(len(self._waiting), len(self._running), self._config.limits)
            admitted = list(itertools.islice(self._waiting, room))
        for handle in admitted:
            self._start(handle)
            with self._changed:  # only now: one that breaks the engine must still get its error
                self._waiting.remove(handle)

    def _start(self, handle: Handle) -> None:
        """Give a request its memory. A prefix cache would hand out a state that has a length."""
        try:
            state = self._model.new_state()
        except Exception as error:
            _log.exception("no state for request %s", handle.request.request_id)
            self._turn_away(handle, "error", error=_describe(error))
            return
        self._totals.cached_tokens += state.length
        key = next(self._keys)
        self._running[key] = RunningSequence(key, handle, state)

    def _recover(self, batch: Sequence[Work], error: str) -> None:
        """After a failed step: find who is at fault by letting each request go on alone.

        The step may have advanced some states and not others, so all are made anew and read again.
        A request that fails alone is at fault. Each restart is followed by at least one token, so
        a long answer may see many strangers fail; the bound is for a model that always does.
        """
        for sequence, _ in batch:
            if len(batch) == 1 or sequence.num_restarts >= _MAX_RESTARTS:
                self._finish(sequence, "error", error=error)
                continue
            try:
                sequence.restart(self._model.new_state())
            except Exception as failure:
                self._finish(sequence, "error", error=_describe(failure))

    def _schedule(self) -> list[Work]:
        suspects = [sequence for sequence in self._running.values() if sequence.is_suspect]
        views = [sequence.view() for sequence in suspects[:1] or self._running.values()]
        plan = schedule(views, self._config.limits)
        return [Work(self._running[item.key], item.num_tokens) for item in plan]

    def _commit(self, batch: Sequence[Work], logits_BV: Tensor) -> None:
        """Account for what was fed; draw, publish and end where a sequence is fully read."""
        ready: list[int] = []
        for i, (sequence, num_tokens) in enumerate(batch):
            sequence.last_step = self._num_steps
            unread = max(0, len(sequence.prompt_ids) - sequence.num_fed)
            self._totals.prompt_tokens += min(num_tokens, unread)
            sequence.num_fed += num_tokens
            if sequence.num_pending == 0:
                ready.append(i)
        if not ready:
            return
        sequences = [batch[i].sequence for i in ready]
        rows = [sequence.row for sequence in sequences]
        tokens = sampler.sample(logits_BV[ready], rows)
        logprobs = sampler.logprobs(logits_BV[ready], tokens, rows)
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            self._accept(sequence, token, logprob)

    def _accept(
        self, sequence: RunningSequence, token: int | None, logprob: TokenLogprob | None
    ) -> None:
        """Publish one drawn token, and end the sequence if that was its last."""
        sampling = sequence.handle.request.sampling
        sequence.is_suspect = False
        if token is None:
            _log.error("logits of %s are not finite", sequence.handle.request.request_id)
            self._finish(sequence, "error", error="the model produced logits that are not finite")
            return
        if token in sampling.stop_token_ids:
            self._finish(sequence, "stop")
            return
        sequence.row.record(token)
        sequence.output_ids.append(token)
        self._totals.completion_tokens += 1
        answer = len(sequence.output_ids)
        output = TokenOutput(
            token_ids=(token,),
            logprobs=None if logprob is None else (logprob,),
            usage=sequence.usage() if answer == 1 else None,
        )
        if answer >= sampling.max_tokens or sequence.num_tokens >= self._max_context:
            self._finish(sequence, "length", output)
        else:
            self._outbox.append((sequence.handle, output))

    def _finish(
        self,
        sequence: RunningSequence,
        reason: FinishReason,
        output: TokenOutput | None = None,
        *,
        error: str | None = None,
    ) -> None:
        """Free the sequence's state and queue its last output. Does nothing the second time."""
        if self._running.pop(sequence.key, None) is None:
            return
        self._totals.finished[reason] += 1
        last = TokenOutput(
            token_ids=output.token_ids if output else (),
            logprobs=output.logprobs if output else None,
            finish_reason=reason,
            usage=sequence.usage(),
            error=error,
        )
        self._outbox.append((sequence.handle, last))

    def _turn_away(self, handle: Handle, reason: FinishReason, *, error: str | None = None) -> None:
        """Queue the last output of a request that never ran."""
        self._totals.finished[reason] += 1
        usage = Usage(
            prompt_tokens=len(handle.request.prompt_ids), cached_tokens=0, completion_tokens=0
        )
        self._outbox.append((handle, TokenOutput(finish_reason=reason, usage=usage, error=error)))

    def _deliver(self) -> None:
        """Publish the step's outputs, after what they report has become visible in ``stats``."""
        with self._changed:
            self._stats = self._snapshot()
        outbox, self._outbox = self._outbox, []
        for handle, output in outbox:
            handle.publish(output)

    def _abandon(self, error: str) -> None:
        """Fail everything and refuse new requests."""
        with self._changed:
            self._closing = "cancel"
            waiting, self._waiting = self._waiting, deque()
        for sequence in list(self._running.values()):
            self._finish(sequence, "error", error=error)
        for handle in waiting:
            self._turn_away(handle, "error", error=error)
        self._deliver()

    def _snapshot(self) -> EngineStats:
        states = [sequence.state for sequence in self._running.values()]
        return EngineStats(
            num_waiting=0,
            num_running=len(self._running),
            cache_bytes=sum(state.nbytes for state in states),
            compressed_bytes=sum(state.compressed_nbytes for state in states),
            num_steps=self._num_steps,
            prompt_tokens=self._totals.prompt_tokens,
            cached_tokens=self._totals.cached_tokens,
            completion_tokens=self._totals.completion_tokens,
            finished=dict(self._totals.finished),
        )


@dataclass
class _Totals:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
