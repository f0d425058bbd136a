"""Predictions follow from bytes and operations, and pages hold what the CSV files say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rorqual.bench.page import fill, main, number, stale
from rorqual.bench.predict import (
    SLOWDOWN,
    count,
    decode_prediction,
    engine_predictions,
    long_predictions,
    prefill_prediction,
)
from rorqual.bench.report import table
from rorqual.bench.roof import Roof, measure_roof
from rorqual.bench.setup import Setup
from rorqual.errors import ConfigError

ROOT = Path(__file__).parents[2]
ROOF = Roof(flops=1e11, bytes_per_s=2e10, working_set_bytes=1)


def test_committed_pages_are_what_the_committed_files_give() -> None:
    pages = [ROOT / "docs" / "performance.md", ROOT / "README.md"]
    assert not stale(pages, ROOT / "docs" / "measurements"), "run: make report"


def test_a_page_keeps_its_words_and_gets_its_tables(tmp_path: Path) -> None:
    folder = tmp_path / "measurements"
    shutil.copytree(ROOT / "docs" / "measurements", folder)
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- measured: long -->\nold\n<!-- end -->\n\nafter\n")
    assert main(["--from", str(folder), "--check", str(page)]) == 1
    assert "old" in page.read_text()
    pytest.importorskip("matplotlib")
    assert main(["--from", str(folder), str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 1,000,000 |" in text
    assert "old" not in text
    assert main(["--from", str(folder), "--check", str(page)]) == 0
    assert "<svg" in (tmp_path / "decode-engines.svg").read_text("utf-8")


def test_a_page_that_cannot_be_filled_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no table 'other'"):
        fill("<!-- measured: other -->\n<!-- end -->", tmp_path)
    with pytest.raises(ConfigError, match="engine_speed"):
        fill("<!-- measured: speed -->\n<!-- end -->", tmp_path)


def test_decoding_is_bound_by_bytes_and_reading_by_operations() -> None:
    setup = Setup()
    decode = decode_prediction(setup, ROOF, 4096)
    # 25.3 MB of weights at 20 GB/s; what attention and scores add is less than a tenth of it.
    assert 0.9 * 2e10 / 25.33e6 < decode.value < 2e10 / 25.33e6
    doubled = Roof(flops=2 * ROOF.flops, bytes_per_s=ROOF.bytes_per_s, working_set_bytes=1)
    gains = [
        make(setup, doubled, 4096).value / make(setup, ROOF, 4096).value
        for make in (decode_prediction, prefill_prediction)
    ]
    assert gains[0] < 1.1
    assert gains[1] > 1.8


def test_fewer_bytes_per_weight_decode_faster() -> None:
    rates = [
        decode_prediction(Setup(weights=kind), ROOF, 1024).value
        for kind in ("fp32", "bf16", "int8")  # type: ignore[arg-type]
    ]
    assert rates == sorted(rates)
    assert rates[1] < 2 * rates[0]


def test_every_target_is_predicted() -> None:
    found = {
        row.name: row.value
        for row in engine_predictions(
            Setup(), ROOF, lengths=[1024, 4096], context=16_000, threads=2, cores=2
        )
    }
    assert found["identical prompt"] == 99.2
    assert found["branch at 50 %"] == 49.6
    assert found["decode with a busy core"] == pytest.approx(4 / 3)
    assert 2 < found["8 streams over one"] < 8
    assert {f"{phase} at {n}k" for phase in ("prefill", "decode") for n in (1, 4)} < set(found)
    long = {row.name: row.value for row in long_predictions(Setup(), ROOF, [4000, 1_000_000])}
    assert long[SLOWDOWN] == long["decode at 4k"] / long["decode at 1M"] > 1


def test_a_roof_is_measured_and_takes_the_longer_of_two_times() -> None:
    roof = measure_roof(1 << 20, 0.01)
    assert roof.flops > 0
    assert roof.bytes_per_s > 0
    assert ROOF.seconds(1e11, 0) == ROOF.seconds(0, 2e10) == ROOF.seconds(1e11, 2e10) == 1


def test_numbers_and_lengths_are_said_briefly() -> None:
    assert [number(x) for x in ("", "0.1984", 12.34, "5345.6")] == ["", "0.20", "12.3", "5,346"]
    lengths = (1024, 128_000, 16_384, 1_000_000, 1 << 20, 999)
    assert [count(n) for n in lengths] == ["1k", "128k", "16k", "1M", "1M", "999"]
    assert table(("a", "b"), [("x", "word")], words_last=True) == "a  b\nx  word"
