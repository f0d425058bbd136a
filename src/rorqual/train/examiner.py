"""Asks a model the held-out exam as a client would, and counts the verdicts on its answers.

Questions come one per request and as follow-ups in a conversation; tool requests with the answer
from their result; everything in non-think and think mode. Follow-ups build on the model's own
answers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rorqual.protocol.modes import Mode
from rorqual.train.conversation import Dialogue, Turn
from rorqual.train.exam import (
    FOLLOW_UPS_PER_DOCUMENT,
    DocumentExam,
    Message,
    Question,
    tool_opening,
)
from rorqual.train.generate import common_beginning
from rorqual.train.grading import Share, Verdict, grade_absent, grade_call, grade_evidence
from rorqual.train.served import ChatModel, Reply

MODES: tuple[Mode, ...] = ("non-think", "think")
EVIDENCE_TOKENS = 96
"""Longest answer to a question; right ones have 42 tokens with reasoning, 60 at most."""
CALL_TOKENS = 208
"""Longest answer with tools; right calls have 98 tokens with reasoning, 155 at most."""
_EXAMPLES = 2
"""Wrong answers kept per slice, for reading."""


class Slice(NamedTuple):
    """What a row of the report is about."""

    task: str
    """``evidence``, ``absent`` or ``tool``."""
    tokens: int
    """Document length at most; 0 for tools."""
    mode: Mode
    turn: str
    """``first`` or ``follow-up``."""


@dataclass
class Tally:
    """Verdicts so far of one slice."""

    verdicts: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    answer_tokens: list[int] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, verdict: Verdict, reply: Reply, question: str, expected: str) -> None:
        """Count one answer; a wrong one may be kept as an example."""
        for measure, met in verdict.items():
            self.verdicts[measure].append(met)
        self.answer_tokens.append(reply.num_tokens)
        if not all(verdict.values()) and len(self.examples) < _EXAMPLES:
            self.examples.append({"question": question, "expected": expected, "got": reply.raw})

    def extend(self, other: Tally) -> None:
        """Count what ``other`` counted after this."""
        for measure, met in other.verdicts.items():
            self.verdicts[measure] += met
        self.answer_tokens += other.answer_tokens
        self.examples = (self.examples + other.examples)[:_EXAMPLES]

    def to_dict(self, key: Slice) -> dict[str, Any]:
        """One row of the report."""
        measures = {
            name: Share(right=sum(met), total=len(met)).to_dict()
            for name, met in self.verdicts.items()
        }
        mean = sum(self.answer_tokens) / max(1, len(self.answer_tokens))
        return {
            **key._asdict(),
            "measures": measures,
            "mean_answer_tokens": round(mean, 1),
            "wrong_examples": self.examples,
        }


class Examiner:
    """Asks a model everything and keeps the verdicts. ``on_done`` is called per answer."""

    def __init__(self, chat: ChatModel, on_done: Callable[[], None] = lambda: None) -> None:
        self._chat = chat
        self._on_done = on_done
        self.tallies: dict[Slice, Tally] = defaultdict(Tally)

    # ---- documents -----------------------------------------------------------------------------
    def ask_documents(self, exams: Sequence[DocumentExam], bucket: int) -> None:
        """Every question of ``exams`` in both modes, then each document's follow-ups.

        All of ``exams`` are worked on together: the states of their documents must fit in memory.
        """
        opened = self._ask_first(exams, bucket)
        for number in range(FOLLOW_UPS_PER_DOCUMENT):
            self._ask_follow_up(opened, bucket, number)
        self._chat.decoder.forget()

    def _ask_first(
        self, group: Sequence[DocumentExam], bucket: int
    ) -> list[tuple[DocumentExam, Mode, list[Message]]]:
        """Each question alone; returns the conversations that go on: the first stated ones."""
        asked = [(exam, q, mode) for exam in group for q in exam.questions for mode in MODES]
        requests = [
            self._chat.render(exam.opening(q), mode, max_tokens=EVIDENCE_TOKENS)
            for exam, q, mode in asked
        ]
        for exam in group:
            prompts = [
                r.prompt_ids for r, (of, _, _) in zip(requests, asked, strict=True) if of is exam
            ]
            self._chat.decoder.remember(common_beginning(prompts))
            # The conversation that goes on; modes differ in the last token only.
            self._chat.decoder.remember(prompts[0][:-1])
        opened = []
        replies = self._chat.reply(requests, on_done=self._on_done)
        for (exam, question, mode), reply in zip(asked, replies, strict=True):
            self._grade(exam, question, reply, bucket, mode, "first")
            if question is exam.questions[0]:
                opened.append((exam, mode, [*exam.opening(question), reply.message]))
        return opened

    def _ask_follow_up(
        self,
        opened: Sequence[tuple[DocumentExam, Mode, list[Message]]],
        bucket: int,
        number: int,
    ) -> None:
        for exam, _, messages in opened:
            messages.append({"role": "user", "content": exam.follow_ups[number].text})
        requests = [
            self._chat.render(messages, mode, max_tokens=EVIDENCE_TOKENS)
            for _, mode, messages in opened
        ]
        for request in requests:
            self._chat.decoder.remember(request.prompt_ids[:-1])
        replies = self._chat.reply(requests, on_done=self._on_done)
        for (exam, mode, messages), reply in zip(opened, replies, strict=True):
            self._grade(exam, exam.follow_ups[number], reply, bucket, mode, "follow-up")
            messages.append(reply.message)

    def _grade(
        self,
        exam: DocumentExam,
        question: Question,
        reply: Reply,
        bucket: int,
        mode: Mode,
        turn: str,
    ) -> None:
        if question.fact is None:
            verdict, task, expected = grade_absent(reply.content), "absent", ""
        else:
            verdict = grade_evidence(reply.content, exam.text, question.fact)
            task, expected = "evidence", f"{question.fact.sentence} | {question.fact.value}"
        tally = self.tallies[Slice(task, bucket, mode, turn)]
        tally.add(verdict, reply, question.text, expected)

    # ---- tools ---------------------------------------------------------------------------------
    def ask_tools(self, dialogues: Sequence[Dialogue]) -> None:
        """Every request of ``dialogues`` in both modes: the call, then the answer.

        The model's own call goes into the conversation where it is correct, the right call where
        it is not, so that answers from results are measured on all of them.
        """
        open_ = [(d, mode, tool_opening(d)) for d in dialogues for mode in MODES]
        for number in range(0, max(len(d.turns) for d in dialogues), 2):
            going = [o for o in open_ if number < len(o[0].turns)]
            turn = "first" if number == 0 else "follow-up"
            self._ask_tool_round(going, number, turn)
        self._chat.decoder.forget()

    def _ask_tool_round(
        self, open_: Sequence[tuple[Dialogue, Mode, list[Message]]], number: int, turn: str
    ) -> None:
        for dialogue, _, messages in open_:
            messages.append({"role": "user", "content": dialogue.turns[number].user})
        calls = self._reply_with_tools(open_)
        verdicts = []
        for (dialogue, mode, messages), reply in zip(open_, calls, strict=True):
            wanted = dialogue.turns[number]
            verdict = grade_call(reply, wanted, dialogue.tools)
            verdicts.append(verdict)
            message = reply.message if verdict["correct"] else _right_call(wanted, mode)
            call_id = message["tool_calls"][0]["id"]
            result = dialogue.turns[number + 1].user
            messages += [message, {"role": "tool", "tool_call_id": call_id, "content": result}]
        answers = self._reply_with_tools(open_)
        for (dialogue, mode, messages), called, answered, verdict in zip(
            open_, calls, answers, verdicts, strict=True
        ):
            request, from_result = dialogue.turns[number : number + 2]
            verdict["answer"] = answered.content == from_result.content
            verdict["round_trip"] = verdict["correct"] and verdict["answer"]
            tally = self.tallies[Slice("tool", 0, mode, turn)]
            whole = Reply(
                message=answered.message,
                finish_reason=answered.finish_reason,
                raw=f"{called.raw}\n---\n{answered.raw}",
                num_tokens=called.num_tokens + answered.num_tokens,
            )
            expected = (
                f"{request.call_name} {json.dumps(request.call_arguments)} | {from_result.content}"
            )
            tally.add(verdict, whole, request.user, expected)
            # A call where the answer was due would leave a request without its result.
            stray = answered.message.get("tool_calls")
            messages.append(_right_answer(from_result, mode) if stray else answered.message)

    def _reply_with_tools(
        self, open_: Sequence[tuple[Dialogue, Mode, list[Message]]]
    ) -> list[Reply]:
        requests = [
            self._chat.render(messages, mode, max_tokens=CALL_TOKENS, tools=dialogue.tools)
            for dialogue, mode, messages in open_
        ]
        for request in requests:
            self._chat.decoder.remember(request.prompt_ids[:-1])
        return self._chat.reply(requests, on_done=self._on_done)


def merged(examiners: Iterable[Examiner]) -> list[dict[str, Any]]:
    """The report's rows of all ``examiners``, sorted by slice."""
    tallies: dict[Slice, Tally] = defaultdict(Tally)
    for examiner in examiners:
        for key, tally in examiner.tallies.items():
            tallies[key].extend(tally)
    order = sorted(tallies, key=lambda key: (key.task, key.mode, key.turn, key.tokens))
    return [tallies[key].to_dict(key) for key in order]


def num_answers(exams: Iterable[Sequence[DocumentExam]], dialogues: Sequence[Dialogue]) -> int:
    """Answers an ``Examiner`` will ask for."""
    single = sum(len(exam.questions) + FOLLOW_UPS_PER_DOCUMENT for group in exams for exam in group)
    return len(MODES) * (single + sum(len(d.turns) for d in dialogues))


def _right_answer(turn: Turn, mode: Mode) -> Message:
    thought = {"reasoning_content": turn.reasoning} if mode == "think" else {}
    return {"role": "assistant", "content": turn.content, **thought}


def _right_call(turn: Turn, mode: Mode) -> Message:
    function = {"name": turn.call_name, "arguments": json.dumps(turn.call_arguments)}
    call = {"id": "call_0", "type": "function", "function": function}
    return {**_right_answer(turn, mode), "tool_calls": [call]}
