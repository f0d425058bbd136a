"""Text to token ids and back, with the template's tokens kept out of users' reach.

A V4 vocabulary has two parts: byte-level BPE entries, and *added* tokens such as ``<｜User｜>``
that structure the prompt. Text written by anybody but the template is encoded without the added
part, so a user who types ``<｜Assistant｜>`` gets ordinary tokens. This module knows nothing of
conversations; ``protocol/render.py`` says which spans of a prompt are the template's.

Ids of the official vocabulary: the released ``tokenizer.json`` of DeepSeek-V4; the cut vocabulary
of the nano models keeps its first entries.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import deepseek_recipe as recipe
import tokenizers

from rorqual.errors import ConfigError, RequestError
from rorqual.protocol.grammars import Grammars

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
SYSTEM = "<｜System｜>"  # V4.1's vocabulary only
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"

_REQUIRED = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML)

TEMPLATE_TOKENS = (
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    "<|EOT|>",
    THINK_START,
    THINK_END,
    DSML,
    "<｜begin▁sys｜>",
    "<｜end▁sys｜>",
    LATEST_REMINDER,
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)
"""Added tokens a cut vocabulary keeps, in the official order of ids."""

NUM_TEMPLATE_IDS = 32
"""Ids at the end of a cut vocabulary: ``TEMPLATE_TOKENS``, then reserved ones."""


class Tokenizer:
    """One vocabulary: ordinary byte-level BPE plus added template tokens.

    Stateless after construction and safe to share between threads.

    Raises:
        ConfigError: the tokenizer is not a byte-level BPE with V4's template tokens.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        """Build from the object of a ``tokenizer.json``; ``raw`` is not changed."""
        try:
            vocab = cast("dict[str, int]", raw["model"]["vocab"])
            added = {str(t["content"]): int(t["id"]) for t in raw["added_tokens"]}
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
            self.stream_decoder = recipe.Tokenizer.from_str(json.dumps(raw))
            """The same vocabulary as deepseek-recipe's stream processor wants it."""
            size = 1 + max(*vocab.values(), *added.values())
        except Exception as error:  # the library raises bare Exception on a bad file
            raise ConfigError(f"not a usable BPE tokenizer: {error!r}") from None
        if missing := [token for token in _REQUIRED if token not in added]:
            raise ConfigError(f"tokenizer lacks the template token {missing[0]!r}")
        self._added = added
        self._bytes = _bytes_by_id(vocab, added, size)
        self.max_token_bytes = max(len(spelling) for spelling in self._bytes)
        """Bytes of the longest token: a text of n bytes has at least n / this many tokens."""

    @classmethod
    def from_dir(cls, path: Path) -> Tokenizer:
        """Load ``path/tokenizer.json``. Raises ConfigError naming the file."""
        return cls.from_file(path / "tokenizer.json")

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Load a ``tokenizer.json``. Raises ConfigError naming the file."""
        raw = _read_json(path)
        try:
            return cls(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    # ---- ids ----------------------------------------------------------------------------------
    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; ids are 0 .. vocab_size - 1."""
        return len(self._bytes)

    @property
    def eos_id(self) -> int:
        """Ends an assistant turn."""
        return self._added[EOS]

    @property
    def pad_id(self) -> int:
        """Fills unused training positions; the EOS id where the vocabulary has no pad."""
        return self._added.get(PAD, self.eos_id)

    @property
    def assistant_id(self) -> int:
        """``<｜Assistant｜>``."""
        return self._added[ASSISTANT]

    @property
    def think_start_id(self) -> int:
        """``<think>``."""
        return self._added[THINK_START]

    @property
    def think_end_id(self) -> int:
        """``</think>``."""
        return self._added[THINK_END]

    def special_id(self, token: str) -> int:
        """Id of the added token spelled ``token``. Raises ConfigError if there is none."""
        try:
            return self._added[token]
        except KeyError:
            raise ConfigError(f"this tokenizer has no template token {token!r}") from None

    def has_special(self, token: str) -> bool:
        """Whether there is an added token spelled ``token``."""
        return token in self._added

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all added tokens."""
        return frozenset(self._added.values())

    @cached_property
    def grammars(self) -> Grammars:
        """Grammars over this vocabulary; made at the first use, in about 10 us per token."""
        return Grammars(
            self._bytes, eos_id=self.eos_id, added=self.special_ids, encode=self.encode_plain
        )

    # ---- encoding -----------------------------------------------------------------------------
    def encode_plain(self, text: str) -> list[int]:
        """Encode text nobody vouches for: the result never holds an added token's id.

        Raises:
            RequestError: ``text`` holds a lone surrogate, which has no UTF-8 form.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text is not valid Unicode: lone surrogate at character {error.start}"
            ) from None
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str, special_ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Encode a rendered prompt; only ``special_ranges`` may use the added vocabulary.

        Args:
            prompt: the whole prompt text.
            special_ranges: ascending, disjoint, half-open code point ranges, each the spelling of
                exactly one added token.

        Raises:
            ConfigError: a range spells no token of this vocabulary.
            RequestError: the rest is not valid Unicode.
        """
        ids: list[int] = []
        at = 0
        for start, end in special_ranges:
            if start > at:
                ids += self.encode_plain(prompt[at:start])
            ids.append(self.special_id(prompt[start:end]))
            at = end
        if at < len(prompt):
            ids += self.encode_plain(prompt[at:])
        return ids

    def encode_spliced(
        self,
        prompt: str,
        special_ranges: Sequence[tuple[int, int]],
        spans: Iterable[tuple[int, int, Sequence[int]]],
    ) -> tuple[str, tuple[tuple[int, int], ...], list[int]]:
        """Encode a prompt of which some spans are to be tokens already known.

        Args:
            prompt, special_ranges: as of ``encode_prompt``.
            spans: ascending, disjoint (start, end, ids), each bounded by template tokens: ``ids``
                replace ``prompt[start:end]``.

        Returns:
            The prompt as changed, its template ranges, and its ids. Raises as ``encode_prompt``.
        """
        texts: list[str] = []
        ranges: list[tuple[int, int]] = []
        ids: list[int] = []
        begin = length = 0

        def append(text: str, marks: Iterable[tuple[int, int]], tokens: Sequence[int]) -> None:
            nonlocal length
            ranges.extend((start + length, end + length) for start, end in marks)
            texts.append(text)
            ids.extend(tokens)
            length += len(text)

        for start, end, tokens in [*spans, (len(prompt), len(prompt), ())]:
            first, last = (bisect_left(special_ranges, (at,)) for at in (begin, start))
            inner = [(a - begin, b - begin) for a, b in special_ranges[first:last]]
            append(prompt[begin:start], inner, self.encode_prompt(prompt[begin:start], inner))
            append(*self._spelled(tokens), tokens)
            begin = end
        return "".join(texts), tuple(ranges), ids

    def _spelled(self, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text of ``ids`` and where in it added tokens stand."""
        special = self.special_ids
        text, ranges, plain = "", [], 0
        for at, token in enumerate(ids):
            if token in special:
                text += self.decode(ids[plain:at])
                ranges.append((len(text), len(text) + len(self.decode([token]))))
                text += self.decode([token])
                plain = at + 1
        return text + self.decode(ids[plain:]), ranges

    # ---- decoding -----------------------------------------------------------------------------
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; a template token's are its spelling in UTF-8."""
        return self._bytes[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, template tokens spelled out, broken UTF-8 as U+FFFD."""
        return b"".join([self._bytes[i] for i in ids]).decode("utf-8", "replace")


def cut_tokenizer(full_tokenizer_json: Path, vocab_size: int, out: Path) -> None:
    """Write the official vocabulary cut to ``vocab_size`` ids as ``out`` (a ``tokenizer.json``).

    The first ``vocab_size - NUM_TEMPLATE_IDS`` entries keep their ids (so bos 0, eos 1, pad 2);
    ``TEMPLATE_TOKENS`` and reserved tokens take the last ``NUM_TEMPLATE_IDS`` ids. A merge stays
    where its two parts and its result stay. Every byte string remains encodable.

    Raises:
        ConfigError: the file is not such a tokenizer, or ``vocab_size`` is too small or too large.
    """
    raw = _read_json(full_tokenizer_json)
    try:
        model = raw["model"]
        kept = vocab_size - NUM_TEMPLATE_IDS
        vocab = {t: i for t, i in model["vocab"].items() if i < kept}
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        added = {t["content"]: t for t in raw["added_tokens"]}
        low = [t for t in raw["added_tokens"] if t["id"] < kept]
        template = [added[content] for content in TEMPLATE_TOKENS]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{full_tokenizer_json}: not the official tokenizer: {error!r}") from None
    smallest = len(low) + 256
    if len(vocab) != kept or kept < smallest:
        raise ConfigError(
            f"vocab_size must be in [{smallest + NUM_TEMPLATE_IDS}, "
            f"{len(model['vocab']) + NUM_TEMPLATE_IDS}], got {vocab_size}"
        )
    merges = [[a, b] for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    num_reserved = NUM_TEMPLATE_IDS - len(template)
    template += [
        {**template[0], "content": f"<｜place▁holder▁no▁{n}｜>"} for n in range(num_reserved)
    ]
    added_tokens = low + [{**token, "id": kept + n} for n, token in enumerate(template)]
    cut = {
        **raw,
        "added_tokens": added_tokens,
        "model": {**model, "vocab": vocab, "merges": merges},
    }
    Tokenizer(cut)
    out.write_text(json.dumps(cut, ensure_ascii=False, separators=(",", ":")), "utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return cast("dict[str, Any]", raw)


def _bytes_by_id(vocab: dict[str, int], added: dict[str, int], size: int) -> list[bytes]:
    """Bytes of every id. BPE entries are spelled in GPT-2's printable byte alphabet."""
    alphabet = _byte_alphabet()
    table = [b""] * size
    for token, token_id in vocab.items():
        try:
            table[token_id] = bytes([alphabet[char] for char in token])
        except KeyError:
            table[token_id] = token.encode("utf-8")
    for token, token_id in added.items():
        table[token_id] = token.encode("utf-8")
    return table


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte, inverted (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return alphabet
