"""``rorqual cost``: tables, files, and what it says about wrong input."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.cli.main import build_parser, main

DOCUMENT = Path(__file__).parents[2] / "docs" / "cost.md"


def test_default_tables_show_the_published_ratios_and_the_accounting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["cost"]) == 0
    out = capsys.readouterr().out
    (decode, cache) = [
        line
        for line in out.splitlines()
        if "1,000,000 " in line and re.search(r"1,144|48,068", line)
    ]
    assert re.findall(r"[\d.]+%", decode) == ["26.8%", "10.0%"]
    assert re.findall(r"[\d.]+%", cache) == ["10.5%", "7.3%"]
    (scores,) = [line for line in out.splitlines() if "indexer scores" in line]
    assert "999.4 x 1 = 999.4" in scores
    assert "122.9 x 0.5 = 61.44" in scores


def test_csv_holds_what_the_tables_show(tmp_path: Path) -> None:
    path = tmp_path / "cost.csv"
    arguments = ["cost", "v3.2", "tiny", "--context", "1M,4k", "--batch", "8", "--csv", str(path)]
    assert main(arguments) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["context_tokens"]) for row in rows] == [
        ("v3.2", "4000"),
        ("tiny", "4000"),
        ("v3.2", "1000000"),
        ("tiny", "1000000"),
    ]
    for row in rows:
        parts = [float(value) for name, value in row.items() if name.startswith("decode_cost_")]
        assert sum(parts) == pytest.approx(float(row["decode_cost"]))
        assert float(row["weight_bytes_batch_8"]) < float(row["weight_bytes_batch_1"])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"cost.{suffix}"
    assert main(["cost", "nano-flash", "--context", "4k,1M", "--plot", str(path)]) == 0
    start = path.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == "png" else b"<?xml")


def test_missing_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from rorqual.cli.main import main\n"
        f"main(['cost', 'tiny', '--plot', {str(tmp_path / 'x.png')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "pip install 'rorqual[train]'" in done.stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["v4-squid"], "no model 'v4-squid'"),
        (["--context", "0"], "'0' is not a number of tokens"),
        (["--context", "4k,,8k"], "'' is not a number of tokens"),
        (["--context=-5"], "'-5' is not a number of tokens"),
        (["--context", "1e6"], "'1e6' is not a number of tokens"),
        (["--context", "999999999999999M"], "context must be 1 to"),
        (["--batch", "0"], "must be >= 1"),
        (["--plot", "curve.txt"], "a plot ends in .png"),
        (["--csv", "no-such-folder/x.csv"], "no-such-folder/x.csv: No such file"),
        (["--plot", "no-such-folder/x.png"], "no-such-folder/x.png: No such file"),
    ],
)
def test_wrong_input_is_explained_and_exits_with_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cost", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.out == ""


def test_a_broken_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": "wide"}', "utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["cost", str(path)])
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_contexts_are_sorted_and_unique() -> None:
    args = build_parser().parse_args(["cost", "--context", "1M, 4k,4000,32768"])
    assert args.context == [4000, 32768, 1_000_000]


def test_the_document_prints_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["cost"]) == 0
    printed = {
        tuple(cell.strip().replace("( ", "(").replace("( ", "(") for cell in line.split("│")[1:-1])
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    }
    document = DOCUMENT.read_text("utf-8").split("\n## Accounting\n")[1]
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:-1])
        for line in document.splitlines()
        if line.startswith("| ") and not line.startswith(("| context", "| part", "|  |"))
    ]
    assert len(rows) > 35
    assert [row for row in rows if row not in printed] == []
