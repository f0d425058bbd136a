"""The stream of training samples: which task, how long, from which seed.

Sample ``i`` is a pure function of (seed, split, i, difficulty), so a run can stop and continue at
any sample, and two runs with one seed see the same data. Nothing is downloaded. The tasks are in
``documents``, ``copying``, ``tool_use`` and ``small_talk``; held-out splits are by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from rorqual.errors import ConfigError
from rorqual.model.packed import ALIGNMENT
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train import copying, documents, small_talk, tool_use
from rorqual.train.conversation import TASKS, Dialogue, Encoded, Task, encode
from rorqual.train.documents import Split

_TOKENS_PER_QUESTION = 46
"""Rough tokens of one question and its quoted answer."""
_DOCUMENT_TOKENS_PER_QUESTION = 22
"""Many questions per document: retrieval is learned from answers, not from reading."""
_TOOLS_BLOCK_TOKENS = 700
"""Room a document conversation leaves for a declared tools block."""
_MAX_COPY_TOKENS = 500
"""Longest text of a copying exercise."""
_SHARE_MEMORY = 0.98
"""Weight of older samples in the shares: a stage that brings in a task does not make up for all
the time before, which would mean nothing else for hundreds of steps."""
_MAX_MISSES = 200
"""Samples in a row that do not fit before ``draw`` gives up."""


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What samples look like at one moment of the curriculum."""

    min_document_tokens: int
    max_document_tokens: int
    """Document lengths are drawn log-uniformly from this range, in tokens."""
    max_sample_tokens: int
    """No sample is longer than this; the row length of packing."""
    tool_share: float
    """Share of tokens from tool conversations."""
    chat_share: float = 0.01
    """Share of tokens from small talk; documents get the rest."""
    copy_share: float = 0.0
    """Share of document conversations that only repeat text; training split only."""


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where a stream stands; plain data for checkpoints."""

    next_index: int = 0
    tokens_by_task: tuple[float, ...] = (0.0,) * len(TASKS)
    """Tokens drawn lately, in the order of ``TASKS``; keeps the shares."""


class SampleStream:
    """Draws encoded samples one after another.

    The task is the one furthest below its share of recent tokens, so shares hold without chance.
    Not thread-safe; one owner.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, seed: int, split: Split, state: StreamState | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._split = split
        state = state or StreamState()
        self._next_index = state.next_index
        self._tokens = list(state.tokens_by_task)

    @property
    def state(self) -> StreamState:
        """A snapshot that continues after the samples drawn so far."""
        return StreamState(next_index=self._next_index, tokens_by_task=tuple(self._tokens))

    def draw(self, difficulty: Difficulty) -> Encoded:
        """The next sample, at most ``difficulty.max_sample_tokens`` long.

        Raises ConfigError where documents of this difficulty never fit that length.
        """
        task = self._most_wanted(difficulty)
        for _ in range(_MAX_MISSES):
            rng = Random(f"{self._seed}/{self._split}/{self._next_index}")
            self._next_index += 1
            sample = make_sample(self._tokenizer, rng, task, difficulty, self._split)
            if sample is not None:
                self._tokens = [_SHARE_MEMORY * tokens for tokens in self._tokens]
                self._tokens[TASKS.index(task)] += len(sample)
                return sample
        raise ConfigError(
            f"no {task} sample fits max_sample_tokens = {difficulty.max_sample_tokens}"
        )

    def _most_wanted(self, difficulty: Difficulty) -> Task:
        total = sum(self._tokens) + 1
        tool, chat = difficulty.tool_share, difficulty.chat_share
        shares = (1.0 - tool - chat, tool, chat)
        lack = [share - drawn / total for share, drawn in zip(shares, self._tokens, strict=True)]
        return TASKS[lack.index(max(lack))]


def make_sample(
    tokenizer: Tokenizer, rng: Random, task: Task, difficulty: Difficulty, split: Split
) -> Encoded | None:
    """One encoded sample, cut between turns to fit and to fill whole alignment blocks.

    Returns None where not even the first turn fits (rare; the caller draws again).
    """
    dialogue = make_dialogue(rng, task, difficulty, split)
    encoded = encode(tokenizer, dialogue)
    if dialogue.think and not dialogue.keeps_reasoning:  # a prefix would hold no reasoning
        return encoded if len(encoded) <= difficulty.max_sample_tokens else None
    return fit(encoded, difficulty.max_sample_tokens)


def make_dialogue(rng: Random, task: Task, difficulty: Difficulty, split: Split) -> Dialogue:
    """One conversation of ``task`` at ``difficulty``, drawn from ``rng`` alone."""
    if task == "chat":
        return small_talk.make_dialogue(rng)
    if task == "tool":
        return tool_use.make_dialogue(rng, num_requests=rng.randint(2, 5), split=split)
    low, high = difficulty.min_document_tokens, difficulty.max_document_tokens
    if split == "train" and difficulty.copy_share and rng.random() < difficulty.copy_share:
        longest = max(low, min(high, _MAX_COPY_TOKENS))
        return copying.make_dialogue(rng, num_tokens=int(low * (longest / low) ** rng.random()))
    tools: tuple[dict[str, Any], ...] = ()
    room = difficulty.max_sample_tokens
    if room >= 3 * _TOOLS_BLOCK_TOKENS and rng.random() < 0.08:
        tools = tool_use.make_tools(rng, rng.randint(1, 2))
        room -= _TOOLS_BLOCK_TOKENS
    high = max(low, min(high, room - 4 * _TOKENS_PER_QUESTION))
    document_tokens = int(low * (high / low) ** rng.random())
    space = max(1, (room - document_tokens) // _TOKENS_PER_QUESTION)
    wanted = max(4, document_tokens // _DOCUMENT_TOKENS_PER_QUESTION)
    return documents.make_dialogue(
        rng,
        document_tokens=document_tokens,
        num_questions=min(space, wanted, 40),
        split=split,
        tools=tools,
    )


def fit(encoded: Encoded, max_tokens: int) -> Encoded | None:
    """Cut after the assistant turn that wastes least of its last alignment block.

    Keeps at least half of the turns that fit in ``max_tokens``; None where none fits.
    """
    ends = turn_ends(encoded)
    ends = ends[ends <= max_tokens]
    if len(ends) == 0:
        return None
    candidates = ends[len(ends) // 2 :]
    blocks = -(-candidates // ALIGNMENT) * ALIGNMENT
    used = candidates / blocks
    best = int(np.flatnonzero(used >= used.max() - 0.02)[-1])
    return encoded.cut(int(candidates[best]))


def turn_ends(encoded: Encoded) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Offsets just after each assistant turn."""
    answer = encoded.answer
    following = np.append(answer[1:], -1)
    return np.flatnonzero((answer >= 0) & (following != answer)) + 1
