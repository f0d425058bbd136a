"""``rorqual inspect``, ``convert`` and the options of ``train``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rorqual.cli.main import build_parser, main
from rorqual.cli.train import train_fields
from rorqual.model.checkpoint import load_model


def test_inspect_counts_the_published_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "v4-flash", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["total_parameters"] == pytest.approx(284.33e9, rel=1e-4)
    assert cost["active_parameters"] == pytest.approx(13.8e9, rel=1e-3)


def test_inspect_describes_a_checkpoint(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(model_dir)]) == 0
    out = capsys.readouterr().out
    assert "CSA 4" in out
    assert "official" in out


def test_inspect_names_a_damaged_file(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model_dir.iterdir():
        data = file.read_bytes()
        is_weights = file.suffix == ".safetensors"
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if is_weights else data)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "safetensors" in capsys.readouterr().err


def test_convert_there_and_back_keeps_every_tensor(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(model_dir), str(there), "--to", "transformers"]) == 0
    assert main(["convert", str(there), str(back), "--to", "official"]) == 0
    assert "MiB" in capsys.readouterr().out
    before, after = load_model(model_dir).state_dict(), load_model(back).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_refuses_to_overwrite_its_source(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model_dir), str(model_dir), "--to", "official"]) == 1
    assert "onto itself" in capsys.readouterr().err


def test_train_options_set_only_what_was_given() -> None:
    parse = build_parser().parse_args
    assert train_fields(parse(["train", "runs/x"])) == {}
    fields = train_fields(parse(["train", "r", "--steps", "5", "--lr", "0.01", "--fp32"]))
    assert fields == {"max_steps": 5, "minutes": None, "lr_peak": 0.01, "bf16": False}


def test_train_explains_an_unknown_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "run"), "--config", "nano-squid"]) == 1
    assert "nano-squid" in capsys.readouterr().err
