"""A short soak and a short load run; the figures themselves are for a quiet machine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.errors import EngineClosedError, EngineOverloadedError
from rorqual.qualify.load import Figure, figures, table
from rorqual.qualify.paced_engine import PacedEngine
from rorqual.qualify.soak import Verdict, run

ROOT = Path(__file__).parents[2]
NANO = ROOT / "models" / "nano-flash"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.slow
def test_server_holds_up_under_mixed_load_hang_ups_and_malformed_bodies() -> None:
    verdict = run(NANO, seconds=20, clients=16, seed=3, max_growth=0.15)
    assert verdict.problems == []
    kinds = {name.rsplit(" ", 1)[0] for name in verdict.statuses}
    assert kinds == {
        "whole",
        "stream",
        "leave_the_answer",
        "leave_while_asking",
        "malformed",
        "wrong_field",
        "look",
        "too_large",
    }
    assert verdict.statuses["stream 200"] > 10
    assert len(verdict.rss_bytes) > 10


def test_growth_is_that_after_the_warm_up() -> None:
    rising = Verdict(rss_bytes=[50, 80, 100, 100, 100, 100, 100, 100, 110, 110])
    assert rising.growth == pytest.approx(0.1)
    assert Verdict(rss_bytes=[10, 100, 100, 100, 100]).growth == 0


def test_load_measures_every_row() -> None:
    rows = asyncio.run(figures(NANO, num_requests=64, num_streams=20, stream_s=2.0))
    values = {row.name: row.value for row in rows}
    assert values["streams held and ended well"] == 20
    assert min(value for name, value in values.items() if name != "added p50, one at a time") >= 0
    assert values["requests/s, 32 at a time"] > 0
    printed = table(rows)
    assert all(row.name in printed for row in rows)


def test_a_missed_target_is_said() -> None:
    rows = [
        Figure("speed", 5.0, "/s", 6.0, is_floor=True),
        Figure("memory", 5.0, "MiB", 6.0),
        Figure("weight", 5.0, "kg"),
    ]
    assert [row.is_met for row in rows] == [False, True, True]
    first, second, third = table(rows).splitlines()
    assert first.endswith(">= 6  MISSED")
    assert second.endswith("<= 6  met")
    assert third.split() == ["weight", "5.00", "kg"]


def test_front_process_needs_no_torch() -> None:
    program = (
        "import sys, rorqual.server.run, rorqual.qualify.target; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


# ---- the engine that costs nothing ------------------------------------------------------------
def ask(engine: PacedEngine, *, max_tokens: int = 100) -> list[TokenOutput]:
    """What a request got by the time ``submit`` returned; with steps, a list still growing."""
    got: list[TokenOutput] = []
    engine.submit(
        Request(
            prompt_ids=[1, 2, 3, 4],
            sampling=SamplingParams(max_tokens=max_tokens),
            request_id="r",
            on_output=got.append,
        )
    )
    return got


def test_unpaced_engine_answers_inside_submit() -> None:
    with PacedEngine((7, 8, 9)) as engine:
        tokens, last = ask(engine)
        cut, cut_last = ask(engine, max_tokens=2)
    assert tokens.token_ids == (7, 8, 9)
    assert (last.finish_reason, cut_last.finish_reason) == ("stop", "length")
    assert cut.token_ids == (7, 8)
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 3)
    with pytest.raises(EngineClosedError):
        ask(engine)


def test_paced_engine_gives_a_token_per_step_and_ends_what_runs_when_closed() -> None:
    engine = PacedEngine((7,) * 10_000, step_s=0.001, max_running=1)
    got = ask(engine)
    with pytest.raises(EngineOverloadedError):
        ask(engine)
    while len(got) < 3:
        assert engine.stats().num_running == 1
    engine.close()
    assert [output.token_ids for output in got[:3]] == [(7,), (7,), (7,)]
    assert got[-1].finish_reason == "cancelled"
    assert engine.stats().num_running == 0
