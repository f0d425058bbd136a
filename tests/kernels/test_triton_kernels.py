"""Runs ``triton_cases`` where they can run: compiled on an accelerator, else interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parent / "triton_cases.py"


@pytest.mark.slow
def test_triton_kernels_agree_with_the_reference() -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    pytest.importorskip("triton", reason="the extra 'triton' is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {**os.environ, "RORQUAL_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)],
        env=environment,
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 30
    assert "skipped" not in done.stdout
