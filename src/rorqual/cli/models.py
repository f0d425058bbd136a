"""Where models are: a name such as ``nano-flash``, or a directory, to the checkpoint's path."""

from __future__ import annotations

from pathlib import Path

from rorqual.errors import ConfigError

DEFAULT_MODEL = "nano-flash"
_CONFIG = "config.json"


def resolve_model(name_or_path: str | Path) -> Path:
    """The directory of a checkpoint.

    A directory that holds a ``config.json`` is taken as it is; a bare name is looked for among
    the models of the source checkout, then of the installed package.

    Raises:
        ConfigError: there is no such model; the message lists what is available.
    """
    path = Path(name_or_path).expanduser()
    if (path / _CONFIG).is_file():
        return path
    for folder in model_folders():
        if path.name == str(name_or_path) and (folder / path / _CONFIG).is_file():
            return folder / path
    if path.is_dir():
        raise ConfigError(f"{path}: no {_CONFIG} in this directory, so it is not a checkpoint")
    from rorqual.model.config import PRESETS

    if str(name_or_path) in PRESETS:
        raise ConfigError(
            f"{name_or_path} is a network without weights here; give the directory of a checkpoint"
        )
    known = ", ".join(available_models()) or "none"
    raise ConfigError(f"no model {str(name_or_path)!r}: not a directory; built-in models: {known}")


def available_models() -> list[str]:
    """Names of the built-in models that are complete enough to load."""
    found = {
        config.parent.name for folder in model_folders() for config in folder.glob(f"*/{_CONFIG}")
    }
    return sorted(found)


def model_folders() -> list[Path]:
    """Folders of built-in models, in the order they are searched."""
    import rorqual

    package = Path(rorqual.__file__).resolve().parent
    candidates = [package.parents[1] / "models", package / "models"]
    return [folder for folder in candidates if folder.is_dir()]
