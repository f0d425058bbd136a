"""Reads the vectors in this directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def vectors(name: str) -> dict[str, Any]:
    """The object in ``tests/golden/NAME.json``."""
    loaded: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text("utf-8"))
    return loaded
