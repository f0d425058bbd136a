"""Names and directories of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.cli.models import available_models, model_folders, resolve_model
from rorqual.errors import ConfigError


def test_a_directory_with_a_config_is_taken_as_it_is(model_dir: Path) -> None:
    assert resolve_model(str(model_dir)) == model_dir


def test_built_in_models_resolve_by_name() -> None:
    for name in available_models():
        path = resolve_model(name)
        assert path.name == name
        assert path.parent in model_folders()


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model("nano-squid")
    message = str(caught.value)
    assert "nano-squid" in message
    for name in available_models():
        assert name in message


def test_directory_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(tmp_path)


def test_a_path_is_never_mistaken_for_a_name() -> None:
    with pytest.raises(ConfigError):
        resolve_model("../models/nano-flash-that-is-not-there")
