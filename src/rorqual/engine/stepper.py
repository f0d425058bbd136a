"""The engine thread's half: running sequences, one step at a time, on one backend.

A step is: schedule, feed, verify, draft. A sequence that decodes may feed a guess at its next
token along with the token drawn last; where the draw after that token is the guess, the draw after
the guess counts too. Draws are what they would be without guesses, greedy or not, since the same
random numbers meet the same logits; a wrong guess costs time only.

Knows no queue and no other thread. ``engine.py`` feeds it requests and publishes what it says.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.backend import Backend, Feed
from rorqual.engine.grammar import restrict
from rorqual.engine.handle import Handle
from rorqual.engine.request import FinishReason, TokenLogprob, TokenOutput, Usage
from rorqual.engine.scheduler import SchedulerLimits, num_admissible, schedule
from rorqual.engine.sequence import RunningSequence
from rorqual.errors import EngineError

_log = logging.getLogger(__name__)
_MAX_RESTARTS = 64
"""Failed steps of others that a request survives: enough for a long answer, but an end."""


class Work(NamedTuple):
    """One sequence's part of a step."""

    sequence: RunningSequence
    tokens: Sequence[int]
    num_drafts: int
    """How many of the last tokens are guesses."""
    num_logits: int


@dataclass
class Totals:
    """Counts since the start."""

    num_steps: int = 0
    num_preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)


class Stepper:
    """Runs sequences on ``backend`` until they end. One thread.

    ``outbox`` collects what there is to publish; whoever calls ``step`` empties it.
    """

    def __init__(
        self,
        backend: Backend,
        limits: SchedulerLimits,
        max_context_tokens: int,
        *,
        speculate: bool,
        now: Callable[[], float],
    ) -> None:
        self.totals = Totals()
        self.outbox: list[tuple[Handle, TokenOutput]] = []
        self._backend = backend
        self._limits = limits
        self._max_context = max_context_tokens
        self._speculates = speculate and backend.can_draft
        self._now = now
        self._keys = itertools.count()
        self._running: dict[int, RunningSequence] = {}
        self._preempted: deque[RunningSequence] = deque()
        """Lost their memory, not their place: they go on before anybody new starts."""

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._running and not self._preempted

    @property
    def num_running(self) -> int:
        """Sequences that have begun and not ended."""
        return len(self._running) + len(self._preempted)

    # ---- beginnings and ends -------------------------------------------------------------------
    def room(self, num_waiting: int) -> int:
        """How many of the waiting requests may be offered to ``start`` now."""
        if self._preempted:
            return 0
        return num_admissible(num_waiting, len(self._running), self._limits)

    def start(self, handle: Handle) -> bool:
        """Begin a request; False if it must wait for memory. One that can never run is refused."""
        request = handle.request
        longest = min(len(request.prompt_ids) + request.sampling.max_tokens, self._max_context)
        admission = self._backend.admit(longest)
        if admission.verdict == "later" and self._running:
            return False
        if admission.verdict != "now":
            # With nothing running, waiting longer frees nothing.
            self.turn_away(handle, "error", error=admission.reason)
            return True
        try:
            sequence = RunningSequence(next(self._keys), handle)
            sequence.memory = self._backend.begin(request.prompt_ids)
        except EngineError as error:  # the constraint, by its own words
            self.turn_away(handle, "error", error=str(error))
            return True
        except Exception as error:
            _log.exception("no memory for request %s", request.request_id)
            self.turn_away(handle, "error", error=_describe(error))
            return True
        sequence.num_cached = sequence.memory.num_cached
        self.totals.cached_tokens += sequence.num_cached
        self._running[sequence.key] = sequence
        return True

    def reap(self, *, cancel_all: bool) -> None:
        """End what was cancelled or is past its deadline."""
        for sequence in [*self._running.values(), *self._preempted]:
            if sequence.handle.is_cancelled or cancel_all:
                self.finish(sequence, "cancelled")
            elif sequence.handle.is_late(self._now()):
                self.finish(sequence, "error", error=sequence.handle.lateness())

    def finish(
        self,
        sequence: RunningSequence,
        reason: FinishReason,
        output: TokenOutput | None = None,
        *,
        error: str | None = None,
    ) -> None:
        """Free the sequence's memory and queue its last output. Does nothing the second time."""
        if self._running.pop(sequence.key, None) is None:
            if sequence not in self._preempted:
                return
            self._preempted.remove(sequence)
        self._release(sequence)
        self.totals.finished[reason] += 1
        last = TokenOutput(
            token_ids=output.token_ids if output else (),
            logprobs=output.logprobs if output else None,
            finish_reason=reason,
            usage=sequence.usage(),
            error=error,
        )
        self.outbox.append((sequence.handle, last))

    def turn_away(self, handle: Handle, reason: FinishReason, *, error: str | None = None) -> None:
        """Queue the last output of a request that never ran."""
        self.totals.finished[reason] += 1
        usage = Usage(
            prompt_tokens=len(handle.request.prompt_ids), cached_tokens=0, completion_tokens=0
        )
        self.outbox.append((handle, TokenOutput(finish_reason=reason, usage=usage, error=error)))

    def abandon(self, error: str) -> None:
        """Fail everything."""
        for sequence in [*self._running.values(), *self._preempted]:
            self.finish(sequence, "error", error=error)

    # ---- the step ------------------------------------------------------------------------------
    def step(self) -> None:
        """Advance the running sequences once."""
        self._resume()
        batch = self._plan()
        if not batch:
            return
        try:
            logits_RV = self._backend.step(
                [Feed(work.sequence.held, work.tokens, work.num_logits) for work in batch]
            )
            self._commit(batch, logits_RV)
            self._draft(work.sequence for work in batch)
        except Exception as error:
            _log.exception("step %d failed", self.totals.num_steps)
            self._recover([work.sequence for work in batch], _describe(error))
        self.totals.num_steps += 1

    def _plan(self) -> list[Work]:
        """What to feed, with memory reserved for it."""
        suspects = [s for s in self._running.values() if s.is_suspect]
        views = [s.view() for s in suspects[:1] or self._running.values()]
        batch: list[Work] = []
        for item in schedule(views, self._limits):
            sequence = self._running.get(item.key)
            if sequence is None:  # preempted for the sake of one before it
                continue
            work = self._work(sequence, item.num_tokens)
            if self._make_room(sequence, len(work.tokens), {w.sequence.key for w in batch}):
                batch.append(work)
        return batch

    def _work(self, sequence: RunningSequence, num_tokens: int) -> Work:
        tokens = sequence.next_tokens(num_tokens)
        is_last = sequence.num_fed + num_tokens == sequence.num_tokens
        drafts = sequence.draft_ids if is_last else []
        allowed = self._backend.max_feed(sequence.held, len(tokens) + len(drafts))
        drafts = drafts[: max(0, allowed - len(tokens))]
        tokens = [*tokens[:allowed], *drafts]
        is_last = is_last and allowed >= num_tokens
        return Work(sequence, tokens, len(drafts), 1 + len(drafts) if is_last else 0)

    def _make_room(self, sequence: RunningSequence, num_tokens: int, planned: set[int]) -> bool:
        """Reserve, at the cost of whoever came last; False if that is the sequence itself."""
        while not self._backend.reserve(sequence.held, num_tokens):
            others = [key for key in self._running if key not in planned]
            victim = self._running[max(others)]
            if len(self._running) == 1:
                self.finish(victim, "error", error="the cache has no memory left for this request")
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: RunningSequence) -> None:
        """Take a sequence's memory; what it computed stays in the cache as long as it can."""
        del self._running[sequence.key]
        self._release(sequence)
        self._preempted.appendleft(sequence)
        self.totals.num_preempted += 1

    def _resume(self) -> None:
        """Give memory back to preempted sequences, first come first served."""
        while self._preempted and len(self._running) < self._limits.max_running:
            sequence = self._preempted[0]
            admission = self._backend.admit(sequence.num_tokens + 1)
            if admission.verdict != "now":
                if self._running:
                    return
                self.finish(sequence, "error", error=admission.reason)
                continue
            try:
                sequence.memory = self._backend.begin(sequence.all_tokens, is_resumed=True)
            except Exception as error:
                _log.exception("no memory for request %s", sequence.handle.request.request_id)
                self.finish(sequence, "error", error=_describe(error))
                continue
            self._preempted.popleft()
            self._running[sequence.key] = sequence

    def _release(self, sequence: RunningSequence) -> None:
        memory, sequence.memory = sequence.memory, None
        sequence.draft_ids = []
        if memory is not None:
            self._backend.finish(memory)

    def _recover(self, sequences: Sequence[RunningSequence], error: str) -> None:
        """After a failed step: find who is at fault by letting each request go on alone.

        The step may have advanced some states and not others, so all are read again. A request
        that fails alone is at fault. Each restart is followed by at least one token, so a long
        answer may see many strangers fail; the bound is for a backend that always does.
        """
        for sequence in sequences:
            if sequence.key not in self._running:
                continue
            if len(sequences) == 1 or sequence.num_restarts >= _MAX_RESTARTS:
                self.finish(sequence, "error", error=error)
                continue
            try:
                self._release(sequence)
                sequence.restart(self._backend.begin(sequence.all_tokens, is_resumed=True))
            except Exception as failure:
                self.finish(sequence, "error", error=_describe(failure))

    # ---- verification --------------------------------------------------------------------------
    def _commit(self, batch: Sequence[Work], logits_RV: Tensor) -> None:
        """Account for what was fed; draw, publish and end where a sequence is fully read."""
        first_row = 0
        ready: list[tuple[Work, int]] = []
        for work in batch:
            sequence = work.sequence
            sequence.last_step = self.totals.num_steps
            real = len(work.tokens) - work.num_drafts
            unread = max(0, len(sequence.prompt_ids) - sequence.num_fed)
            self.totals.prompt_tokens += min(real, unread)
            self._backend.commit(sequence.held, work.tokens[:real])
            if work.num_logits:
                ready.append((work, first_row))
            first_row += work.num_logits
        depth = 0
        while ready:
            ready = self._verify(ready, logits_RV, depth)
            depth += 1

    def _verify(
        self, ready: Sequence[tuple[Work, int]], logits_RV: Tensor, depth: int
    ) -> list[tuple[Work, int]]:
        """Draw after guess ``depth`` of each; returns those whose next guess was right."""
        sequences = [work.sequence for work, _ in ready]
        wanted = [row + depth for _, row in ready]
        is_all = wanted == list(range(len(logits_RV)))  # then there is nothing to copy
        logits_BV = logits_RV if is_all else logits_RV[wanted]
        rows = [sequence.row for sequence in sequences]
        allowed = restrict(logits_BV, [sequence.constraint for sequence in sequences])
        tokens = sampler.sample(allowed.logits_BV, rows)
        logprobs = sampler.logprobs(logits_BV, tokens, rows)
        right: list[tuple[Work, int]] = []
        for i, (work, row) in enumerate(ready):
            sequence, token = work.sequence, tokens[i]
            guess = sequence.draft_ids[depth] if depth < work.num_drafts else None
            if guess is not None:
                sequence.judge(token == guess)
                self.totals.drafted_tokens += 1
                self.totals.accepted_tokens += token == guess
            if (error := allowed.errors.get(i)) is not None:
                self.finish(sequence, "error", error=error)
            elif (
                self._accept(sequence, token, logprobs[i]) and guess is not None and guess == token
            ):
                self._backend.commit(sequence.held, [guess])
                right.append((work, row))
        return right

    def _accept(
        self, sequence: RunningSequence, token: int | None, logprob: TokenLogprob | None
    ) -> bool:
        """Publish one drawn token; False if the sequence ended with it."""
        sampling = sequence.handle.request.sampling
        sequence.is_suspect = False
        if token is None:
            _log.error("logits of %s are not finite", sequence.handle.request.request_id)
            self.finish(sequence, "error", error="the model produced logits that are not finite")
            return False
        if token in sampling.stop_token_ids:
            self.finish(sequence, "stop")
            return False
        try:
            end = sequence.follow(token)
        except EngineError as error:
            self.finish(sequence, "error", error=str(error))
            return False
        self.totals.completion_tokens += 1
        answer = len(sequence.output_ids)
        output = TokenOutput(
            token_ids=(token,),
            logprobs=None if logprob is None else (logprob,),
            usage=sequence.usage() if answer == 1 else None,
        )
        if end is None and (
            answer >= sampling.max_tokens or sequence.num_tokens >= self._max_context
        ):
            end = "length"
        if end is not None:
            self.finish(sequence, end, output)
            return False
        self.outbox.append((sequence.handle, output))
        return True

    def _draft(self, sequences: Iterable[RunningSequence]) -> None:
        """Guess the token after next for those that decode."""
        if not self._speculates:
            return
        eager = list(self._worth_drafting(sequences))
        if not eager:
            return
        guesses = self._backend.draft(
            [sequence.held for sequence in eager], [sequence.output_ids[-1] for sequence in eager]
        )
        for sequence, guess in zip(eager, guesses, strict=True):
            sequence.draft_ids = [guess]

    def _worth_drafting(self, sequences: Iterable[RunningSequence]) -> Iterator[RunningSequence]:
        for sequence in sequences:
            sequence.draft_ids = []
            if sequence.key not in self._running or not sequence.output_ids:
                continue
            left = sequence.handle.request.sampling.max_tokens - len(sequence.output_ids)
            fits = sequence.num_tokens + 1 < self._max_context
            if left > 1 and fits and sequence.num_pending == 1 and sequence.trusts_drafts():
                yield sequence


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
