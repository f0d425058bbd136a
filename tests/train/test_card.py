"""The model card says what the files of run and evaluation say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import CheckpointError
from rorqual.model.cost import model_cost
from rorqual.train.card import main, read_run, write_card
from rorqual.train.run_state import save_run_state
from rorqual.train.schedule import TrainConfig

from .conftest import NANO, SMALL

SETTINGS = TrainConfig(minutes=50.0, lr_peak=0.0123, seed=31)
MACHINE = {
    "processor": "Testor 9000", "cores": 2, "memory_gib": 7.5, "threads": 2, "torch": "2.13.0",
}  # fmt: skip
LOSSES = """\
step,tokens,loss,loss_evidence,mtp_loss,indexer_loss,tokens_per_s,wall_s
1,4000,8.25,8.25,0.00000,0.00000,900,5.0
2,8000,4.00,4.00,0.00000,0.50000,1000,300.0
3,12345,0.50,0.50,0.70000,0.40000,1100,7200.0
"""


def share(right: int, total: int) -> dict[str, float]:
    return {"right": right, "total": total, "rate": right / total, "low": 0.11, "high": 0.99}


REPORT: dict[str, Any] = {
    "parameters": 123_456,
    "seed": 17,
    "seconds": 90.0,
    "machine": {**MACHINE, "processor": "Grader 1"},
    "overall": {"evidence proven": share(15, 20), "tool round_trip": share(9, 10)},
    "slices": [
        {
            "task": "evidence", "tokens": 512, "mode": "think", "turn": "first",
            "measures": {"proven": share(15, 20)},
        },
        {
            "task": "tool", "tokens": 0, "mode": "non-think", "turn": "first",
            "measures": {"round_trip": share(9, 10)},
        },
    ],
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Model folder, run directory and report, as training and evaluation leave them."""
    model, run, report = tmp_path / "model", tmp_path / "run", tmp_path / "eval.json"
    model.mkdir()
    run.mkdir()
    shutil.copy2(NANO / "card.json", model)
    (model / "config.json").write_text(json.dumps(SMALL.to_dict()), "utf-8")
    record = {"train": SETTINGS.to_dict(), "machine": MACHINE}
    (run / "run.json").write_text(json.dumps(record), "utf-8")
    (run / "loss.csv").write_text(LOSSES, "utf-8")
    (run / "plot.png").write_bytes(b"picture")
    report.write_text(json.dumps(REPORT), "utf-8")
    return model, run, report


def test_every_number_comes_from_a_file(folders: tuple[Path, Path, Path]) -> None:
    model, _, _ = folders
    text = write_card(*folders).read_text("utf-8")
    assert text.startswith("# nano-flash\n")
    for line in (
        f"| parameters | {model_cost(SMALL).total_parameters:,} (123,456 with MTP) |",
        "| steps | 3 |",
        "| tokens | 12,345 without padding |",
        "| wall time | 120 minutes, held-out checks included |",
        "| speed | 1,000 tokens/s (median step) |",
        "| seed | 31 |",
        "| learning rate | 0.0123, cosine to 0.00025 |",
        "| indexers trained | from step 2 |",
        "| MTP block trained | from step 3 |",
        "| 80 - 100 % | 60 - 4096 | 5120 | 20 % | 5 % |",
        "| think | first | <= 512 | 20 | 75.0 (11.0-99.0) |",
        "| both | first | all | 20 | 75.0 (11.0-99.0) |",
        "| non-think | first | 10 | 90.0 (11.0-99.0) |",
        "![loss and held-out accuracy over tokens](learning_curve.png)",
    ):
        assert line in text.splitlines()
    assert "Testor 9000, cores: 2" in text
    assert "30 questions and requests in 1.5 minutes on Grader 1" in text
    assert "evidence, up to 512 tokens, think, first proven 75.0 (11.0-99.0) %" in text
    assert "MIT" in text
    assert (model / "learning_curve.png").read_bytes() == b"picture"


def test_what_was_not_recorded_is_said_to_be_so(folders: tuple[Path, Path, Path]) -> None:
    _, run, _ = folders
    (run / "run.json").unlink()
    (run / "plot.png").unlink()
    save_run_state(run, 3, {"settings": {"train": SETTINGS.to_dict()}})
    text = write_card(*folders).read_text("utf-8")
    assert "| hardware | not recorded |" in text
    assert "| seed | 31 |" in text
    assert "learning_curve" not in text


def test_a_run_that_recorded_nothing_is_refused(folders: tuple[Path, Path, Path]) -> None:
    _, run, _ = folders
    (run / "loss.csv").write_text(LOSSES.splitlines()[0] + "\n", "utf-8")
    with pytest.raises(CheckpointError, match=r"loss\.csv: no step is recorded"):
        read_run(run)
    (run / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither run\.json nor a checkpoint"):
        read_run(run)


def test_the_command_writes_the_card_or_says_why_not(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder) for folder in folders]) == 0
    assert "MODEL_CARD.md" in capsys.readouterr().out
    folders[2].write_text("no json", "utf-8")
    assert main([str(folder) for folder in folders]) == 1
    assert "eval.json: not JSON" in capsys.readouterr().err
