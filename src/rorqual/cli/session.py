"""One loaded model and the way from a Chat Completions body to a streamed reply, in process.

The same path a served request takes (render, engine, parse), without HTTP.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import msgspec

from rorqual.cli.models import resolve_model
from rorqual.cli.progress import byte_progress
from rorqual.engine.engine import Engine, EngineConfig
from rorqual.engine.handle import Handle
from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.errors import ConfigError, EngineError
from rorqual.model.checkpoint import load_model
from rorqual.protocol.modes import Generation, ModelCard
from rorqual.protocol.parse import Answer, Event
from rorqual.protocol.render import RenderedRequest, Renderer
from rorqual.protocol.tokenizer import Tokenizer

_CANCEL_TIMEOUT_S = 120.0
"""A cancelled request ends with the step it is in; a long prompt chunk can take a while."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A finished tool call."""

    call_id: str
    name: str
    arguments: str
    """JSON text as the model wrote it; may be invalid."""

    def to_wire(self) -> dict[str, Any]:
        """The entry of an assistant message's ``tool_calls``."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to a reply; empty where it added nothing of the kind."""

    reasoning: str = ""
    content: str = ""
    started_call: str = ""
    """Name of a tool call that begins here."""


@dataclass(kw_only=True)
class _Call:
    call_id: str = ""
    name: str = ""
    arguments: str = ""


class Reply:
    """A reply being generated. Iterate it once for its deltas; then its fields are complete."""

    def __init__(self, handle: Handle, answer: Answer) -> None:
        self._handle = handle
        self._answer = answer
        self._calls: dict[int, _Call] = {}
        self.reasoning = ""
        self.content = ""
        self.finish_reason: str | None = None
        """The wire's: ``stop``, ``length``, ``tool_calls``; None if cancelled."""
        self.usage: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come.

        Raises:
            EngineError: the model failed.
        """
        yield from self._deltas(self._answer.start())
        for output in self._handle:
            yield from self._deltas(push_output(self._answer, output))
            if self._answer.is_complete:
                self._handle.cancel()
                return

    def cancel(self) -> None:
        """Stop generating and wait until the engine has freed the request."""
        self._handle.cancel()
        self._handle.result(_CANCEL_TIMEOUT_S)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far, in order."""
        return tuple(
            ToolCall(call_id=c.call_id, name=c.name, arguments=c.arguments)
            for _, c in sorted(self._calls.items())
        )

    def message(self) -> dict[str, Any]:
        """The assistant message to append to the conversation; calls only if they are whole."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.finish_reason == "tool_calls":
            message["tool_calls"] = [call.to_wire() for call in self.tool_calls]
        return message

    def _deltas(self, events: list[Event]) -> Iterator[Delta]:
        for event in events:
            chunk = json.loads(event.data)
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                delta = choice["delta"]
                reasoning, content = delta.get("reasoning_content"), delta.get("content")
                self.reasoning += reasoning or ""
                self.content += content or ""
                if reasoning or content:
                    yield Delta(reasoning=reasoning or "", content=content or "")
                for piece in delta.get("tool_calls") or ():
                    call = self._calls.setdefault(piece["index"], _Call())
                    function = piece["function"]
                    call.arguments += function.get("arguments") or ""
                    if "id" in piece:
                        call.call_id, call.name = piece["id"], function["name"]
                        yield Delta(started_call=call.name)


@dataclass(kw_only=True)
class Session:
    """A loaded model. Made by ``open_session``."""

    card: ModelCard
    tokenizer: Tokenizer
    renderer: Renderer
    engine: Engine
    context_tokens: int
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """Start generating the reply to a streaming Chat Completions body.

        Raises:
            RequestError: the body is wrong or too long.
        """
        rendered = self.renderer.render({**body, "model": self.card.name, "stream": True})
        name = self._name()
        return Reply(self._submit(rendered, name), Answer(rendered, self.tokenizer, name))

    def complete(self, body: Mapping[str, Any], created: int) -> str:
        """The whole reply as a Chat Completions JSON object.

        Args:
            created: seconds since the epoch, for the object's field of that name.

        Raises:
            RequestError: the body is wrong or too long.
            EngineError: the model failed.
        """
        rendered = self.renderer.render({**body, "model": self.card.name, "stream": False})
        name = self._name()
        answer = Answer(rendered, self.tokenizer, name, streamed=False)
        handle = self._submit(rendered, name)
        answer.start()
        for output in handle:
            push_output(answer, output)
            if answer.is_complete:
                handle.cancel()
                break
        return answer.whole(created)

    def _submit(self, rendered: RenderedRequest, name: str) -> Handle:
        sampling = sampling_params(rendered, self.tokenizer)
        return self.engine.submit(
            Request(prompt_ids=rendered.prompt_ids, sampling=sampling, request_id=name)
        )

    def _name(self) -> str:
        return f"chatcmpl-local-{next(self._numbers)}"


def push_output(answer: Answer, output: TokenOutput) -> list[Event]:
    """Feed one engine output to ``answer``. Raises EngineError if the model failed."""
    logprobs = None
    if output.logprobs is not None:
        logprobs = [(entry.logprob, entry.top) for entry in output.logprobs]
    events = answer.push(output.token_ids, logprobs) if output.token_ids else []
    match output.finish_reason:
        case "stop" | "length" as reason:
            events += answer.finish(reason)
        case "error":
            raise EngineError(f"the model failed: {output.error}")
    return events


def sampling_params(rendered: RenderedRequest, tokenizer: Tokenizer) -> SamplingParams:
    """A rendered request's sampling in the engine's terms."""
    return SamplingParams(**asdict(rendered.sampling), stop_token_ids=(tokenizer.eos_id,))


@contextmanager
def open_session(
    model: str,
    *,
    threads: int | None = None,
    context: int | None = None,
    limits: SchedulerLimits | None = None,
    max_waiting: int = 256,
) -> Iterator[Session]:
    """Load ``model`` and run an engine on it for the length of the block.

    Args:
        threads: of the model, None for all cores. context: limit in tokens, None for the card's.
        limits, max_waiting: as in ``EngineConfig``.

    Raises:
        ConfigError, CheckpointError: the model cannot be loaded.
    """
    path = resolve_model(model)
    card = _card(path, context)
    tokenizer = Tokenizer.from_dir(path)
    with byte_progress(f"Loading {card.name}") as progress:
        network = load_model(path, progress=progress)
    if network.config.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"{path}: config.json has vocab_size {network.config.vocab_size}, tokenizer.json "
            f"{tokenizer.vocab_size}"
        )
    config = EngineConfig(
        limits=limits or SchedulerLimits(),
        max_waiting=max_waiting,
        max_context_tokens=card.context_length,
        num_threads=threads,
    )
    engine = Engine(network, config)
    try:
        yield Session(
            card=card,
            tokenizer=tokenizer,
            renderer=Renderer(card, tokenizer),
            engine=engine,
            context_tokens=engine.max_context_tokens,
        )
    finally:
        engine.close(drain=False)


def _card(path: Path, context: int | None) -> ModelCard:
    """The model's card, with its context lowered to ``context`` tokens."""
    if not (path / "card.json").is_file():
        example = {"name": path.name, "generation": "ga", "context_length": 131_072}
        raise ConfigError(
            f"{path}: no card.json, which says how to prompt this checkpoint; write one such as "
            f"{json.dumps(example)} (generation: {', '.join(get_args(Generation))})"
        )
    card = ModelCard.from_dir(path)
    if context is None:
        return card
    if context > card.context_length:
        raise ConfigError(
            f"--context {context} exceeds the {card.context_length} tokens of {card.name}"
        )
    return msgspec.structs.replace(card, context_length=context)
