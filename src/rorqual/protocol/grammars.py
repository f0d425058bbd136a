"""Grammars over one vocabulary: compiled by ``llguidance``, kept, and copied for each answer.

A grammar sees added tokens such as ``｜DSML｜`` as symbols of their own, never as text, so that no
JSON string can hold one. ``Spelling`` closes the other door: the same characters written with
ordinary tokens. Nothing here knows tools or requests; no torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import llguidance

_LEXER_FUEL = 200_000
"""Work that compiling may put into regular expressions, in llguidance's own unit; its default of
1,000,000 lets the repetition of a repetition take a second and 170 MB."""
_MAX_KEPT = 64
"""Compiled grammars kept: the tools of an agent's session recur in each of its requests."""


class GrammarError(ValueError):
    """A grammar cannot be compiled; the message is the compiler's first line."""


class Spelling:
    """One text that ordinary tokens must not spell out, followed byte by byte.

    States are the number of bytes of the text matched so far; 0 to begin with.
    """

    def __init__(self, text: str, tokens: Sequence[bytes], added: Collection[int]) -> None:
        """``tokens``: bytes by id; ``added``: the ids that may stand for ``text`` whole."""
        goal = text.encode()
        self._goal = goal
        rests = tuple(goal[at:] for at in range(1, len(goal)))
        finishing = [
            (token, spelling)
            for token, spelling in enumerate(tokens)
            if token not in added and (spelling.startswith(rests) or goal in spelling)
        ]
        self.completed_by: tuple[tuple[int, ...], ...] = tuple(
            tuple(token for token, spelling in finishing if goal in goal[:state] + spelling)
            for state in range(len(goal))
        )
        """State -> tokens that would complete the text."""

    def after(self, state: int, spelling: bytes) -> int:
        """The state after ``spelling``, which does not complete the text."""
        if not state and self._goal[0] not in spelling:
            return 0
        tail = (self._goal[:state] + spelling)[1 - len(self._goal) :]
        return next(n for n in range(len(tail), -1, -1) if tail.endswith(self._goal[:n]))


class Grammars:
    """Compiles grammars for one vocabulary. Safe to share between threads."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        eos_id: int,
        added: Collection[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        """Takes about 10 us per token.

        Args:
            tokens: bytes by id.
            eos_id: what a complete answer may end with.
            added: ids of the added tokens.
            encode: text to ids, none of them added.
        """
        self.tokens = tokens
        self.eos_id = eos_id
        self.added = frozenset(added)
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokens, eos_id, sorted(added), encode))
        self._tokenizer = llguidance.LLTokenizer(wrapped)
        self._limits = llguidance.LLParserLimits(
            verbose_errors=False, initial_lexer_fuel=_LEXER_FUEL
        )
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._spellings: dict[str, Spelling] = {}
        self._lock = threading.Lock()

    def compiled(self, grammar: str) -> llguidance.LLMatcher:
        """The matcher of a Lark grammar, to be copied before use.

        Raises:
            GrammarError: it is malformed, uses what llguidance lacks, or is too large.
        """
        with self._lock:
            if (matcher := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return matcher
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(matcher.get_error().strip().split("\n")[0])
        with self._lock:
            self._kept[grammar] = matcher
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return matcher

    def forget(self, grammar: str) -> None:
        """Keep ``grammar`` no longer: it compiles, but is of no use."""
        with self._lock:
            self._kept.pop(grammar, None)

    def spelling(self, text: str) -> Spelling:
        """The ``Spelling`` of an added token's ``text``; made once."""
        with self._lock:
            if text not in self._spellings:
                self._spellings[text] = Spelling(text, self.tokens, self.added)
            return self._spellings[text]


class _Vocabulary:
    """What ``llguidance`` asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        eos_id: int,
        added: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_id
        self.special_token_ids = added
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
