"""The report of ``rorqual inspect``: its numbers, its schedule, its errors."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rorqual.cli.inspect import render
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model.checkpoint import save_model
from rorqual.model.config import TINY
from rorqual.model.convert import convert_checkpoint
from rorqual.model.inspect import inspect_model
from rorqual.model.transformer import Transformer

SMALL = TINY.replace(
    vocab_size=32, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1
)


def text_of(source: str | Path) -> str:
    out = StringIO()
    Console(file=out, width=120).print(render(inspect_model(source)))
    return out.getvalue()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = Transformer(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "small", float_dtype=torch.bfloat16)
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("v4-flash", ["284.33 B", "13.80 B", "3,514.25 B per token", "69,187"]),
        ("v4-pro", ["1,573.00 B", "49.78 B", "5,031.44 B per token"]),
    ],
)
def test_presets_show_their_published_numbers(preset: str, expected: list[str]) -> None:
    text = text_of(preset)
    assert all(number in text for number in expected)


def test_schedule_folds_alternating_layers_into_one_run() -> None:
    runs = inspect_model("v4-flash").schedule
    assert [(r.first, r.last, r.attention, r.routing, r.is_mtp) for r in runs] == [
        (0, 1, ("window",), "hash", False),
        (2, 2, ("CSA 4",), "hash", False),
        (3, 42, ("HCA 128", "CSA 4"), "score", False),
        (43, 43, ("window",), "score", True),
    ]
    covered = [i for r in inspect_model("v4-pro").schedule for i in range(r.first, r.last + 1)]
    assert covered == list(range(62))


def test_a_checkpoint_shows_what_its_files_hold(checkpoint: Path) -> None:
    inspection = inspect_model(checkpoint)
    assert inspection.files is not None
    assert (inspection.files.layout, inspection.files.num_files) == ("official", 1)
    assert inspection.config == SMALL
    assert {total.dtype for total in inspection.dtypes} == {"BF16", "F32", "I64"}
    header = 8 + int.from_bytes((checkpoint / "model.safetensors").read_bytes()[:8], "little")
    size = (checkpoint / "model.safetensors").stat().st_size
    assert inspection.num_bytes == size - header
    assert "1 safetensors file" in text_of(checkpoint)


def test_a_transformers_checkpoint_is_recognised(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "hf", to="transformers", max_shard_bytes=100_000)
    inspection = inspect_model(tmp_path / "hf")
    assert inspection.files is not None
    assert inspection.files.layout == "transformers"
    assert inspection.files.num_files > 1
    assert inspection.dtypes == inspect_model(checkpoint).dtypes
    assert inspect_model(tmp_path / "hf" / "config.json").config == SMALL


def test_a_bare_config_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL.to_dict()))
    inspection = inspect_model(path)
    assert inspection.config == SMALL
    assert inspection.files is None


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"no-such-model.*v4-flash"):
        inspect_model("no-such-model")


def test_a_damaged_checkpoint_is_reported_by_file_and_tensor(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: tensor '"):
        inspect_model(checkpoint)
