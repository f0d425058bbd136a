"""The engine benchmark: the same answer everywhere, counts and caches held to their formulas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rorqual.bench import speed
from rorqual.bench.behaviour import (
    busy_rows,
    disk_rows,
    isa_rows,
    reuse_rows,
    stream_rows,
    weight_rows,
)
from rorqual.bench.engine import main
from rorqual.bench.report import read_csv
from rorqual.bench.setup import Setup, random_prompt
from rorqual.bench.speculation import document, speculation_rows
from rorqual.bench.speed import SpeedRow
from rorqual.bench.targets import PRINTED, judge
from rorqual.bench.worker import Worker
from rorqual.errors import ConfigError
from rorqual.kernels import cpu

NANO = Path(__file__).parents[2] / "models" / "nano-flash"
pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the extension was not built")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The benchmarks set the thread count; give it back to the other tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_engines_give_the_same_tokens_and_the_predicted_cache() -> None:
    pytest.importorskip("transformers")
    with speed.workers(["transformers"], pytest.fail) as peers:
        ours, compact, theirs = speed.measure(peers, 512, decode_tokens=4, repetitions=1)
    assert (ours.engine, compact.engine) == (speed.OURS, speed.COMPACT)
    assert theirs.engine == "transformers"
    assert theirs.same_tokens == ours.same_tokens == ours.answer_tokens == 5
    # 3 CSA layers of entries (64) and keys (64) per 4 tokens, 3 HCA layers of entries per 128.
    assert theirs.formula_bytes_per_token == 4 * (3 * 128 / 4 + 3 * 64 / 128)
    assert ours.formula_bytes_per_token == 3 * (4 * 64 + 64 + 4) / 4 + 3 * 4 * 64 / 128
    assert compact.formula_bytes_per_token == 3 * (88 + 34) / 4 + 3 * 88 / 128
    assert theirs.cache_bytes_per_token == pytest.approx(theirs.formula_bytes_per_token, rel=0.1)
    for row in (ours, compact):  # whole blocks: 5 for 515 tokens
        assert row.cache_bytes_per_token == pytest.approx(
            row.formula_bytes_per_token * 5 * 128 / 515
        )
    for row in (ours, compact, theirs):
        assert row.prefill_tokens_per_cpu_s > 0
        assert row.decode_tokens_per_cpu_s > 0
        assert row.rss_bytes > row.library_bytes > 0


@pytest.mark.parametrize("name", ["llama-cpp-python", "flyweight-llm"])
def test_a_peer_that_reads_gguf_agrees_or_is_left_out_with_a_reason(name: str) -> None:
    notes: list[str] = []
    with speed.workers([name], notes.append) as peers:
        rows = speed.measure(peers, 300, decode_tokens=3, repetitions=1)
    assert [row.engine for row in rows][2:] == ([] if notes else [name])
    if notes:
        assert notes[0].startswith(f"{name} is left out: ")
    else:
        assert rows[2].same_tokens == rows[2].answer_tokens == 4
        assert rows[2].cache_bytes_per_token > 0


class FailingPeer:
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("no such weights")


def test_a_peers_failure_has_a_reason() -> None:
    with pytest.raises(ConfigError, match="ValueError: no such weights"):
        Worker(FailingPeer)  # type: ignore[arg-type]


def test_reuse_is_counted_in_tokens() -> None:
    rows = reuse_rows(4096)
    branch = "branch at 50 %"
    assert [row.name for row in rows] == [
        "identical prompt",
        "next turn",
        branch,
        f"{branch}, sparse windows",
    ]
    # Whole blocks of 128 before the last token; a turn is 64 tokens after an answer of 64; windows
    # are kept every 2048 tokens, so right at the branch.
    cached = [int(row.detail.split()[0]) for row in rows]
    assert cached == [3968, 4096, 2048, 2048]
    assert rows[2].value == 50


def test_a_prompt_on_disk_is_measured() -> None:
    (row,) = disk_rows(512)
    assert row.value > 0
    assert row.detail.startswith("384 of 512")


def test_every_kind_of_instructions_is_measured_in_a_process_of_its_own() -> None:
    before = cpu.native().isa()
    rows = {row.name: row.value for row in isa_rows(64, 3)}
    assert {"prefill, scalar", "decode, scalar", f"decode, {before}"} <= set(rows)
    assert min(rows.values()) > 0
    assert cpu.native().isa() == before


def test_streams_and_a_busy_core_are_measured() -> None:
    streams = stream_rows(3, 1, 128, 8)
    one, many, ratio = (row.value for row in streams)
    assert ratio == pytest.approx(many / one)
    busy = busy_rows(1, 128, 8)
    assert [row.name for row in busy] == ["prefill with a busy core", "decode with a busy core"]
    assert all(row.value > 0 for row in busy)


def test_every_weight_format_is_measured() -> None:
    rows = weight_rows(128, 8)
    assert [row.name.split()[1] for row in rows] == ["fp32", "bf16", "int8"]
    assert rows[0].detail.endswith("8/8")


def test_guesses_are_measured_on_questions_about_a_document() -> None:
    text, questions = document(3)
    assert len(questions) == 3
    assert all("bright lab" in part for part in (text, questions[0]))
    (row,) = speculation_rows(NANO, 2)
    right, drafted = map(int, re.findall(r"\d+", row.detail)[:2])
    assert 0 <= right <= drafted
    assert drafted > 0
    same, told = re.search(r"same answers: (\d+)/(\d+)", row.detail).groups()  # type: ignore[union-attr]
    assert same == told


def test_targets_are_judged_in_both_directions() -> None:
    verdicts = {row.name: row for row in judge([], reuse_rows(4096))}
    assert not verdicts["identical prompt"].is_met  # 96.9 % of so short a prompt
    assert verdicts["branch at 50 %"].is_met
    assert "cache off the formula (rorqual)" not in verdicts


def speed_row(engine: str, length: int, prefill: float, decode: float) -> SpeedRow:
    return SpeedRow(
        engine=engine,
        prompt_tokens=length,
        prefill_tokens_per_cpu_s=prefill,
        decode_tokens_per_cpu_s=decode,
        cache_bytes_per_token=249,
        formula_bytes_per_token=249,
        rss_bytes=1,
        library_bytes=1,
        same_tokens=1,
        answer_tokens=1,
        repetitions=1,
    )


def test_a_peer_of_the_run_counts_and_a_printed_one_is_scaled_to_the_machine() -> None:
    ours = speed_row(speed.OURS, 16384, 4000, 800)
    theirs = speed_row(speed.LLAMA, 16384, 1000, 200)
    name = "decode at 16k over llama.cpp"
    here = {row.name: row for row in judge([ours, theirs], [])}
    assert here[name].measured == 4
    assert "this run" in here[name].beside
    twice = speed_row(speed.FLYWEIGHT, 16384, 1, 2 * PRINTED[speed.FLYWEIGHT]["decode", 16384])
    printed = {row.name: row for row in judge([ours, twice], [])}
    assert printed[name].measured == 800 / (2 * PRINTED[speed.LLAMA]["decode", 16384])
    assert "printed" in printed[name].beside


def test_csv_holds_the_conditions_and_one_row_per_length_and_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--lengths", "128,256", "--peers", "none", "--parts", "speed", "--decode-tokens", "3"]
    main([*argv, "--csv", str(tmp_path)])
    file = tmp_path / "engine_speed.csv"
    header = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
    assert any("commit" in line for line in header)
    assert any("--lengths 128,256" in line for line in header)
    assert [row["prompt_tokens"] for row in read_csv(file)] == ["128", "128", "256", "256"]
    out = capsys.readouterr().out
    assert all(line in out for line in header)
    assert {row["name"] for row in read_csv(tmp_path / "engine_targets.csv")} == {
        "cache off the formula (rorqual)",
        "cache off the formula (rorqual, compact)",
    }


@pytest.mark.parametrize(
    "argv",
    [
        ["--lengths", "x"],
        ["--lengths", "0"],
        ["--peers", "vllm"],
        ["--parts", "everything"],
        ["--decode-tokens", "1"],
    ],
)
def test_wrong_options_are_usage_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_prompts_of_different_seeds_share_nothing() -> None:
    config = Setup().config
    assert random_prompt(config, 64, seed=1)[:2] != random_prompt(config, 64, seed=2)[:2]
    assert random_prompt(config, 64) == random_prompt(config, 128)[:64]
