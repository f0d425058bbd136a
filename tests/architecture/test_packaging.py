"""What ``pip install`` of the project, without a checkout beside it, brings along."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL_FILES = {
    f"rorqual/models/{path.relative_to(ROOT / 'models')}"
    for path in (ROOT / "models").rglob("*")
    if path.is_file()
}


NATIVE = "rorqual/kernels/cpu/"  # of which only Python and the built module are shipped
BUILD = """
import sys
from scikit_build_core.build import build_wheel

print(build_wheel(sys.argv[1], {"wheel.cmake": "false", "wheel.py-api": ""}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a machine without a C++ compiler; with one, the native module is added."""
    directory = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return directory / done.stdout.split()[-1]


def test_wheel_holds_the_package_and_the_built_in_models_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    source = ROOT / "src"
    files = [path for path in (source / "rorqual").rglob("*") if path.is_file()]
    package = {str(f.relative_to(source)) for f in files if "__pycache__" not in f.parts}
    package = {f for f in package if not (f.startswith(NATIVE) and not f.endswith(".py"))}
    assert "rorqual/models/nano-flash/tokenizer.json" in MODEL_FILES
    assert "rorqual/py.typed" in package
    assert names == package | MODEL_FILES


def test_without_the_native_module_its_absence_is_explained(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from rorqual.kernels import cpu\n"
        "assert not cpu.is_available()\n"
        "try: cpu.native()\n"
        "except cpu.NativeMissingError as error: print(error)"
    )
    done = run_installed(code, tmp_path)
    assert "reinstall with a C++17 compiler" in done


# An editable install finds the checkout before it looks at the path.
WITHOUT_EDITABLE = """
import sys
sys.meta_path = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
"""


def run_installed(code: str, folder: Path) -> str:
    """Output of ``code`` with the extracted wheel in front of everything else."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_installed_package_finds_its_built_in_models(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The weights may be missing from a checkout; the folder is found by its config.
    config = tmp_path / "rorqual" / "models" / "nano-flash" / "config.json"
    config.touch()
    code = "from rorqual.cli.models import resolve_model; print(resolve_model('nano-flash'))"
    assert Path(run_installed(code, tmp_path).strip()) == config.parent
