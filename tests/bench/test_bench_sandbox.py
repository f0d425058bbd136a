"""The sandbox benchmark: its rows, its file, its picture, and what it leaves out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.bench.report import read_csv, write_csv
from rorqual.bench.sandbox import summary
from rorqual.bench.sandbox_plot import plot
from rorqual.bench.sandbox_raw import private_mb
from rorqual.bench.sandbox_rows import SandboxRow
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


def test_every_target_has_a_verdict() -> None:
    rows = [row("cold to exit", "crun"), row("warm exec"), row("fork").aiming_at(10.0)]
    assert [one.verdict for one in rows] == ["met", "", "missed"]
    assert summary(rows) == "1 of 2 targets met; missed: container, crun: fork"
    assert summary(rows[:2]) == "1 of 1 targets met"


def test_private_memory_is_what_a_process_wrote_and_not_what_files_it_maps(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * (64 << 20))
    program = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); "
        "sum(m[::4096]); print(flush=True); input(); "
        "b = b'y' * (32 << 20); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        mapped = private_mb(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        written = private_mb(process.pid)
        process.communicate(b"\n")
    assert mapped < 32
    assert 33 < written - mapped < 36
