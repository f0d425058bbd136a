"""An engine that says what it is told to: for tests and demonstrations of everything above it.

Same interface as ``rorqual.engine.engine.Engine``: ``submit`` returns a handle, outputs come from
another thread. No model, no torch.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from rorqual.engine.request import FinishReason, Request, TokenLogprob, TokenOutput, Usage
from rorqual.errors import EngineClosedError, EngineOverloadedError
from rorqual.protocol.tokenizer import Tokenizer

_TEMPLATE = re.compile("</?think>|｜DSML｜")


@dataclass(kw_only=True)
class Script:
    """How one request is answered."""

    text: str
    """What the model would write; ``<think>``, ``</think>`` and ``｜DSML｜`` become tokens."""
    tokens_per_output: int = 1
    cached_tokens: int = 0
    """Prompt tokens reported as reused."""
    error: str | None = None
    """Fail with this after the text instead of stopping."""
    hold_after: int | None = None
    """Wait after this many tokens until ``release`` or cancellation."""
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, kw_only=True)
class ScriptedLoad:
    """How busy the engine is."""

    num_waiting: int
    num_running: int


class ScriptedHandle:
    """The caller's end of one request."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.finished = threading.Event()
        """Set after the last output was delivered."""
        self._outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()

    def cancel(self) -> None:
        """End after the token being written."""
        self.cancelled.set()

    def publish(self, output: TokenOutput) -> None:
        """The engine's side."""
        self._outputs.put(output)

    def __iter__(self) -> Iterator[TokenOutput]:
        """Outputs until the last; for requests without a callback."""
        while True:
            output = self._outputs.get(timeout=60)
            yield output
            if output.finish_reason is not None:
                return


class ScriptedEngine:
    """Answers every request with ``script(request)``, one thread per request.

    Args:
        script: text to answer with, or a function of the request that gives text or a ``Script``.
        max_running: requests beyond this are refused as overload.
        max_context_tokens: as a real engine's; nothing is refused because of it here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: str | Script | Callable[[Request], str | Script],
        *,
        max_running: int = 64,
        max_context_tokens: int = 1_048_576,
    ) -> None:
        self.max_context_tokens = max_context_tokens
        self.requests: list[Request] = []
        """Everything submitted and accepted, in order."""
        self.handles: list[ScriptedHandle] = []
        self._tokenizer = tokenizer
        self._script = script
        self._max_running = max_running
        self._is_closed = False
        self._changed = threading.Condition()
        self._num_running = 0

    def submit(self, request: Request) -> ScriptedHandle:
        """Start answering. Raises as the real engine does."""
        with self._changed:
            if self._is_closed:
                raise EngineClosedError("the engine is shut down")
            if self._num_running >= self._max_running:
                raise EngineOverloadedError(f"{self._num_running} requests are running already")
            self._num_running += 1
            handle = ScriptedHandle()
            self.requests.append(request)
            self.handles.append(handle)
        threading.Thread(target=self._answer, args=(request, handle), daemon=True).start()
        return handle

    @property
    def is_closed(self) -> bool:
        """Whether requests are refused."""
        return self._is_closed

    @property
    def is_full(self) -> bool:
        """Whether requests are refused as overload just now."""
        return self._num_running >= self._max_running

    def stats(self) -> ScriptedLoad:
        """Requests being answered; none ever waits."""
        with self._changed:
            return ScriptedLoad(num_waiting=0, num_running=self._num_running)

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether all requests have ended within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_running == 0, timeout_s)

    def close(self) -> None:
        """Refuse new requests and cancel the others."""
        with self._changed:
            self._is_closed = True
        for handle in self.handles:
            handle.cancel()

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- one thread per request ---------------------------------------------------------------
    def _answer(self, request: Request, handle: ScriptedHandle) -> None:
        deliver = request.on_output or handle.publish
        try:
            for output in self._outputs(request, handle):
                deliver(output)
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()
            handle.finished.set()

    def _outputs(self, request: Request, handle: ScriptedHandle) -> Iterator[TokenOutput]:
        try:
            script = self._script(request) if callable(self._script) else self._script
        except Exception as failure:  # an assertion of a test: nobody may wait for its answer
            script = Script(text="", error=str(failure) or repr(failure))
        if isinstance(script, str):
            script = Script(text=script)
        spans = [match.span() for match in _TEMPLATE.finditer(script.text)]
        ids = self._tokenizer.encode_prompt(script.text, spans)
        reason: FinishReason = "error" if script.error is not None else "stop"
        if len(ids) >= request.sampling.max_tokens:
            ids, reason = ids[: request.sampling.max_tokens], "length"
        sent = 0
        while sent < len(ids):
            if script.hold_after is not None and sent >= script.hold_after:
                while not (script.release.wait(0.005) or handle.cancelled.is_set()):
                    pass
            if handle.cancelled.is_set():
                reason = "cancelled"
                break
            part = tuple(ids[sent : sent + script.tokens_per_output])
            usage = None if sent else self._usage(request, script, len(part))
            sent += len(part)
            yield TokenOutput(token_ids=part, logprobs=_logprobs(request, part), usage=usage)
        yield TokenOutput(
            finish_reason=reason, usage=self._usage(request, script, sent), error=script.error
        )

    def _usage(self, request: Request, script: Script, completion_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=script.cached_tokens,
            completion_tokens=completion_tokens,
        )


def _logprobs(request: Request, token_ids: tuple[int, ...]) -> tuple[TokenLogprob, ...] | None:
    """Made-up probabilities: the token written has 1/2, the n-th alternative e^-n."""
    wanted = request.sampling.logprobs
    if wanted is None:
        return None
    top = tuple((token, -float(token)) for token in range(1, wanted + 1))
    return tuple(TokenLogprob(token_id=t, logprob=-0.6931471805599453, top=top) for t in token_ids)
