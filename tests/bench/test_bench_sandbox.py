"""The sandbox benchmark: its rows, its file, its picture, and what it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.bench.report import read_csv, write_csv
from rorqual.bench.sandbox import SandboxRow
from rorqual.bench.sandbox_plot import plot
from rorqual.cli.main import main
from rorqual.errors import ConfigError


def row(measure: str, raw: str = "") -> SandboxRow:
    return SandboxRow(
        substrate="container, crun",
        measure=measure,
        unit="ms",
        median=20.0,
        worst=30.0,
        raw=raw,
        raw_median=18.0 if raw else 0.0,
        target=27.0 if raw else 0.0,
        repetitions=20,
    )


def test_rows_are_written_and_drawn(tmp_path: Path) -> None:
    rows = [row("cold to exit", "crun"), row("warm exec")]
    write_csv(tmp_path / "a.csv", {"command": "rorqual bench sandbox"}, rows)
    assert [line["raw"] for line in read_csv(tmp_path / "a.csv")] == ["crun", ""]
    pytest.importorskip("matplotlib")
    plot(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="a plot ends in"):
        plot(tmp_path / "a.txt", rows)


def test_counts_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sandbox", "--repetitions", "0"]) != 0
    assert "--repetitions is at least 1" in capsys.readouterr().err
