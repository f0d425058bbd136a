"""The kernel benchmark measures what it says and prints every row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rorqual.bench import kernels
from rorqual.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the extension was not built")


def test_every_kernel_has_a_row_with_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.csv"
    assert kernels.main(["--seconds", "0.001", "--contexts", "64,200", "--csv", str(file)]) == 0
    printed = capsys.readouterr().out
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    named = {row["kernel"] for row in rows}
    assert {f"product {kind}" for kind in ("fp32", "bf16", "int8", "fp8", "fp4")} < named
    assert {"enter streams", "tiny: prefill", "tiny: decode"} < named
    assert [row["size"] for row in rows if row["kernel"] == "tiny: decode"] == ["64", "200"]
    for row in rows:
        assert row["kernel"] in printed
        assert float(row["ms"]) > 0
        assert float(row["predicted_ms"]) > 0
