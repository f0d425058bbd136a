"""One training conversation as plain data, and its rendering into token ids with a loss mask.

A conversation is rendered exactly as a served request is: by ``deepseek-recipe``'s V4 encoding
with special ranges, encoded by ``protocol.tokenizer`` (the template's tokens only inside those
ranges). The loss falls on what the model must generate and on nothing else: reasoning,
``</think>`` where it closes reasoning, answer or DSML block, and the end-of-sentence token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    DeepseekV4Encoding,
    Message,
    SystemMessage,
    ToolCall,
    ToolDefinition,
    ToolMessage,
    UserMessage,
)
from numpy.typing import NDArray

from rorqual.protocol.tokenizer import Tokenizer

Task = Literal["evidence", "tool", "chat"]
TASKS: tuple[Task, ...] = ("evidence", "tool", "chat")
AnswerKind = Literal["evidence", "absent", "call", "result", "chat", "copy"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One assistant turn with the input that precedes it."""

    kind: AnswerKind
    user: str
    """The user's text, or the tool result's JSON when ``kind`` is ``result``."""
    content: str
    """The assistant's visible text; empty for a call."""
    reasoning: str
    """One short thought, rendered only in think mode."""
    call_name: str = ""
    call_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A generated conversation with its checkable answers."""

    task: Task
    think: bool
    turns: tuple[Turn, ...]
    system: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    """Function objects ``{"name", "description", "parameters"}`` declared to the model."""

    @property
    def keeps_reasoning(self) -> bool:
        """Whether reasoning of every turn is rendered (V4 drops earlier ones without tools)."""
        return self.think and bool(self.tools)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A rendered conversation as ids; all arrays have one entry per token."""

    task: Task
    tokens: NDArray[np.int32]
    answer: NDArray[np.int32]
    """Index of the assistant turn a token must be generated in, or -1: no loss."""
    kinds: tuple[AnswerKind, ...]
    """Kind of each assistant turn."""

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, end: int) -> Encoded:
        """The first ``end`` tokens, with only the assistant turns they hold."""
        num_turns = int(self.answer[:end].max(initial=-1)) + 1
        return Encoded(
            task=self.task,
            tokens=self.tokens[:end],
            answer=self.answer[:end],
            kinds=self.kinds[:num_turns],
        )


def prompt_ids(tokenizer: Tokenizer, dialogue: Dialogue, turn: int) -> list[int]:
    """Ids a server would feed the model to have it generate assistant turn ``turn``."""
    return _render(tokenizer, dialogue, turn, complete=False)


def encode(tokenizer: Tokenizer, dialogue: Dialogue) -> Encoded:
    """Render a whole conversation with its loss mask.

    The ids up to an assistant turn are what a server renders to have that turn generated. In
    think mode without tools V4's template drops the reasoning of turns that are over, so there
    only the last turn is generated thinking; the turns before it stand as they do in its prompt.
    """
    if dialogue.think and not dialogue.keeps_reasoning:
        last = dialogue.turns[-1]
        ids = [
            *prompt_ids(tokenizer, dialogue, len(dialogue.turns) - 1),
            *tokenizer.encode_plain(last.reasoning),
            tokenizer.think_end_id,
            *tokenizer.encode_plain(last.content),
            tokenizer.eos_id,
        ]
    else:
        ids = _render(tokenizer, dialogue, len(dialogue.turns) - 1, complete=True)
        while ids[-1] != tokenizer.eos_id:
            ids.pop()
    return Encoded(
        task=dialogue.task,
        tokens=np.asarray(ids, dtype=np.int32),
        answer=_answer_index(ids, tokenizer),
        kinds=tuple(turn.kind for turn in dialogue.turns),
    )


def _answer_index(ids: Sequence[int], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Which assistant turn must generate each token; the mode token after the header is given."""
    answer = np.full(len(ids), -1, dtype=np.int32)
    turn = -1
    start = 0
    inside = False
    for at, token in enumerate(ids):
        if token == tokenizer.assistant_id:
            turn += 1
            start, inside = at + 2, True
        elif token == tokenizer.eos_id and inside:
            answer[start : at + 1] = turn
            inside = False
    return answer


def _render(tokenizer: Tokenizer, dialogue: Dialogue, last: int, *, complete: bool) -> list[int]:
    messages: list[Message] = [SystemMessage(dialogue.system)] if dialogue.system else []
    for index, turn in enumerate(dialogue.turns[: last + 1]):
        if turn.kind == "result":
            messages.append(ToolMessage(turn.user, f"call_{index - 1}"))
        else:
            messages.append(UserMessage(turn.user))
        if index < last or complete:
            messages.append(_assistant(turn, index, think=dialogue.think))
    conversation = Conversation(
        messages,
        thinking_mode=dialogue.think,
        tools=[
            ToolDefinition(tool["name"], tool["description"], tool["parameters"])
            for tool in dialogue.tools
        ],
        reasoning_effort="low" if dialogue.think else None,
    )
    rendered = DeepseekV4Encoding().render_conversation(conversation)
    return tokenizer.encode_prompt(rendered.prompt, rendered.special_ranges)


def _assistant(turn: Turn, index: int, *, think: bool) -> AssistantMessage:
    calls = None
    if turn.call_name:
        arguments = json.dumps(turn.call_arguments, ensure_ascii=False)
        calls = [ToolCall(f"call_{index}", turn.call_name, arguments)]
    return AssistantMessage(turn.content, turn.reasoning if think else None, calls)
