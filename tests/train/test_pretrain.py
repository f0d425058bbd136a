"""A whole small run: what it leaves behind, and that an interrupted one goes on unchanged."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.errors import CheckpointError, ConfigError, TrainingError
from rorqual.model.checkpoint import load_model
from rorqual.train.data import Difficulty
from rorqual.train.pretrain import RUN_FILE, run
from rorqual.train.run_state import latest_run_state, load_run_state, save_run_state
from rorqual.train.schedule import Stage, TrainConfig

from .conftest import NANO, SMALL

SHORT = Difficulty(
    min_document_tokens=60,
    max_document_tokens=100,
    max_sample_tokens=1024,
    tool_share=0.3,
    chat_share=0.1,
)
LONGER = Difficulty(
    min_document_tokens=60, max_document_tokens=200, max_sample_tokens=1280, tool_share=0.3
)
NUM_STEPS = 6
CONFIG = TrainConfig(
    seed=5,
    max_steps=NUM_STEPS,
    minutes=None,
    tokens_per_step=1280,
    stages=(Stage(until=0.5, difficulty=SHORT), Stage(until=1.0, difficulty=LONGER)),
    warmup_steps=2,
    mtp_start=0.3,
    indexer_start=0.6,
    bf16=False,
    compile=False,
    num_threads=1,
    eval_minutes=0.0,
)


class Clock:
    """Seconds that pass by themselves; Ctrl-C is pressed once at ``interrupt_at`` calls."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.calls = 0
        self.interrupt_at = interrupt_at

    def __call__(self) -> float:
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return 0.01 * self.calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(SMALL, CONFIG, NANO, folder, device="cpu", now=Clock())
    return folder


def rows(folder: Path, name: str = "loss.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_loadable_model_and_its_records(whole: Path) -> None:
    model = load_model(whole / "model")
    state = load_run_state(whole / "checkpoints" / f"step-{NUM_STEPS:08d}.pt")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state["trainer"]["model"][name], atol=0, rtol=0)
    assert (whole / "model" / "tokenizer.json").read_bytes() == (
        NANO / "tokenizer.json"
    ).read_bytes()
    table = rows(whole)
    assert [int(row["step"]) for row in table] == list(range(1, NUM_STEPS + 1))
    assert [int(row["stage"]) for row in table] == [0, 0, 0, 1, 1, 1]
    assert [float(row["mtp_loss"]) > 0 for row in table] == [False, False, True, True, True, True]
    assert [float(row["indexer_loss"]) > 0 for row in table] == [False] * 4 + [True] * 2
    assert all(math.isfinite(float(row["loss"])) for row in table)
    record = json.loads((whole / RUN_FILE).read_text("utf-8"))
    assert record["steps"] == NUM_STEPS
    assert record["tokens"] == int(table[-1]["tokens"])
    assert record["train"]["seed"] == 5
    assert record["model"] == SMALL.to_dict()
    assert record["machine"]["cores"] >= 1


def test_an_interrupted_run_continues_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, CONFIG, NANO, tmp_path, device="cpu", now=Clock(interrupt_at=25))
    num_done = len(rows(tmp_path))
    assert 0 < num_done < NUM_STEPS
    assert latest_run_state(tmp_path) == tmp_path / "checkpoints" / f"step-{num_done:08d}.pt"
    run(SMALL, CONFIG, NANO, tmp_path, device="cpu", now=Clock())

    def numbers(folder: Path) -> list[dict[str, str]]:
        timed = ("tokens_per_s", "wall_s")
        return [{k: v for k, v in row.items() if k not in timed} for row in rows(folder)]

    assert numbers(tmp_path) == numbers(whole)
    ours, theirs = (load_model(folder / "model").state_dict() for folder in (tmp_path, whole))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=0, rtol=0)


def test_rows_written_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    start(tmp_path, max_steps=3)
    with (tmp_path / "loss.csv").open("a", encoding="utf-8") as file:
        file.write("4," + "," * 11 + "\n")
    start(tmp_path, max_steps=5)
    assert [int(row["step"]) for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def start(folder: Path, **changes: Any) -> None:
    run(SMALL, config(**changes), NANO, folder, device="cpu", now=Clock())


def config(**changes: Any) -> TrainConfig:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    return TrainConfig(**{**fields, **changes})


def test_changed_settings_of_a_resumed_run_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, max_steps=2)
    start(tmp_path, max_steps=3, lr_peak=1e-3)
    said = capsys.readouterr().err
    assert "resumed at step 2" in said
    assert "train.lr_peak is now 0.001; it was 0.004" in said
    assert "train.max_steps is now 3; it was 2" in said
    assert "lr_end" not in said


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        (lambda folder: start(folder, seed=6), "train.seed = 5, now it is 6"),
        (
            lambda folder: run(SMALL.replace(hidden_size=48), CONFIG, NANO, folder, device="cpu"),
            "model.hidden_size = 32, now it is 48",
        ),
    ],
    ids=["seed", "model"],
)
def test_another_model_or_seed_is_not_mixed_into_a_run(
    resume: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    start(tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match=message):
        resume(tmp_path)


def test_a_machine_without_compiler_trains_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    start(tmp_path, max_steps=1, compile=True)
    assert (
        "without torch.compile, which makes it slower: no C++ compiler" in capsys.readouterr().err
    )
    assert len(rows(tmp_path)) == 1


def test_the_record_is_drawn_where_matplotlib_is(whole: Path) -> None:
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (whole / "plot.png").is_file() == has_matplotlib


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size is 64 in the model and 4096 in"):
        run(SMALL.replace(vocab_size=64), CONFIG, NANO, tmp_path, device="cpu")


# ---- checkpoints -------------------------------------------------------------------------------
def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        save_run_state(tmp_path, step, {"step": step, "tensor": torch.ones(2)})
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000010.pt", "step-00000011.pt"]
    newest = latest_run_state(tmp_path)
    assert newest is not None
    assert load_run_state(newest)["step"] == 11


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = save_run_state(tmp_path, 1, {"tensor": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt: not a readable"):
        load_run_state(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt: not a training checkpoint"):
        load_run_state(path)


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "step-00000001.pt"
    torch.save({"trap": Trap()}, path)
    with pytest.raises(CheckpointError):
        load_run_state(path)
    assert not (tmp_path / "ran").exists()


def test_a_run_may_start_from_a_finished_model(tmp_path: Path) -> None:
    run(SMALL, CONFIG, NANO, tmp_path / "first", device="cpu", now=Clock())
    more = dataclasses.replace(CONFIG, max_steps=1)
    finished = tmp_path / "first" / "model"
    run(SMALL, more, NANO, tmp_path / "again", start=finished, device="cpu", now=Clock())
    run(SMALL, more, NANO, tmp_path / "anew", device="cpu", now=Clock())

    def first_loss(name: str) -> float:
        with (tmp_path / name / "loss.csv").open() as file:
            return float(next(csv.DictReader(file))["loss"])

    assert first_loss("again") < first_loss("anew") - 0.1
    other = SMALL.replace(routed_scaling_factor=2.0)
    with pytest.raises(ConfigError, match="another config"):
        run(other, more, NANO, tmp_path / "other", start=finished, device="cpu", now=Clock())


def test_a_run_without_time_for_a_step_is_an_error_and_leaves_no_model(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, max_steps=None, minutes=1e-9)
    with pytest.raises(TrainingError, match="no step fitted"):
        run(SMALL, config, NANO, tmp_path, device="cpu", now=Clock())
    assert not (tmp_path / "model").exists()
