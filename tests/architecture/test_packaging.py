"""What ``pip install`` of the project, without a checkout beside it, brings along."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
MODEL_FILES = {
    f"rorqual/models/{path.relative_to(ROOT / 'models')}"
    for path in (ROOT / "models").rglob("*")
    if path.is_file()
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(directory), versions=["standard"])
    return Path(built)


def test_wheel_holds_the_package_and_the_built_in_models_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    source = ROOT / "src"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert "rorqual/models/nano-flash/tokenizer.json" in MODEL_FILES
    assert names == modules | MODEL_FILES | {"rorqual/py.typed"}


def test_installed_package_finds_its_built_in_models(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The weights may be missing from a checkout; the folder is found by its config.
    config = tmp_path / "rorqual" / "models" / "nano-flash" / "config.json"
    config.touch()
    code = "from rorqual.cli.models import resolve_model; print(resolve_model('nano-flash'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert Path(done.stdout.strip()) == config.parent
