"""The long benchmark: one context read once, a restart that finds it, predictions by formula."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rorqual.bench.long import LongRow, fit
from rorqual.bench.report import read_csv
from rorqual.cli.main import main
from rorqual.kernels import cpu
from rorqual.model.config import TINY
from rorqual.model.flops import Span, token_flops


def row_at(context: int, read: int, weights_ns: float, context_ns: float) -> LongRow:
    """A row whose times are exactly what the constants give."""

    def rate(span: Span) -> float:
        ns = {"FP8": weights_ns, "BF16": context_ns, "FP4": context_ns}
        parts = token_flops(TINY, span).parts
        return 1e9 / sum(part.cost * ns[part.precision] for part in parts)

    return LongRow(
        context_tokens=context,
        read_tokens=read,
        prefill_tokens_per_cpu_s=rate(Span(context - read + 1, context)),
        prefill_wall_s=1.0,
        decode_tokens_per_cpu_s=rate(Span.decode(context)),
        cache_bytes=1,
        formula_bytes=1,
        rss_bytes=1,
        peak_rss_bytes=1,
        library_bytes=1,
    )


def test_fit_finds_the_constants_that_made_the_times() -> None:
    rows = [row_at(n, n // 2, 0.05, 0.02) for n in (1000, 4000, 16_000, 256_000)]
    fitted, constants = fit(TINY, rows)
    assert constants == {phase: pytest.approx((0.05, 0.02)) for phase in ("prefill", "decode")}
    for row in fitted:
        assert row.predicted_prefill == pytest.approx(row.prefill_tokens_per_cpu_s)
        assert row.predicted_decode == pytest.approx(row.decode_tokens_per_cpu_s)


def test_fit_never_gives_an_operation_negative_time() -> None:
    rows = [row_at(n, n // 2, 0.05, 0.02) for n in (1000, 4000, 16_000)]
    rows[-1] = dataclasses.replace(rows[-1], decode_tokens_per_cpu_s=1e6)
    _, constants = fit(TINY, rows)
    assert min(constants["decode"]) == 0


@pytest.mark.skipif(not cpu.is_available(), reason="the extension was not built")
@pytest.mark.parametrize("precision", ["full", "compact"])
def test_a_context_is_read_once_and_found_again_after_a_restart(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "long", "--model", "tiny", "--to", "4500", "--decode-tokens", "4"]
    argv += ["--threads", "1", "--cache-precision", precision]
    plot = tmp_path / "long.svg"
    assert main([*argv, "--csv", str(tmp_path), "--plot", str(plot)]) == 0
    rows = read_csv(tmp_path / "long_tiny.csv")
    assert [row["context_tokens"] for row in rows] == ["4000", "4500"]
    assert rows[0]["read_tokens"] == "4000"
    assert int(rows[1]["read_tokens"]) <= 500 + 128  # the rest was there
    for row in rows:  # whole blocks of 128 tokens
        assert 1 <= int(row["cache_bytes"]) / int(row["formula_bytes"]) < 1.04
    (restart,) = read_csv(tmp_path / "restart_tiny.csv")
    assert int(restart["cached_tokens"]) == 4480 - 128 * (4500 % 128 == 0)
    assert restart["same_tokens"] == restart["answer_tokens"] == "4"
    assert "<svg" in plot.read_text("utf-8")
    names = {row["name"] for row in read_csv(tmp_path / "long_targets_tiny.csv")}
    assert {"decode, longest over shortest", "first token after a restart"} < names
    out = capsys.readouterr().out
    assert "peak memory over weights + formula" in out
    assert "fitted CPU ns per FP8 operation" in out


@pytest.mark.parametrize(
    ("argv", "part"),
    [(["--to", "2M"], "the network ends"), (["--to", "4k", "--decode-tokens", "1"], ">= 3")],
)
def test_what_cannot_be_measured_is_refused(
    argv: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "long", "--model", "tiny", *argv]) == 1
    assert part in capsys.readouterr().err
