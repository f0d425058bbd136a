"""The native CPU engine's extension module, if it was built.

Building it needs a C++17 compiler; ``pip install`` goes on without one. ``native`` says what is
missing instead of failing somewhere deep. CMakeLists.txt has the command that builds in place.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class NativeMissingError(ImportError):
    """The extension module is not there or does not load; the message says why."""


def native() -> ModuleType:
    """The extension module ``_native``.

    Raises:
        NativeMissingError: it was not built, or for another Python or platform.
    """
    try:
        return importlib.import_module("rorqual.kernels.cpu._native")
    except ImportError as error:
        raise NativeMissingError(
            f"the native CPU kernels are not available ({error}); reinstall with a C++17 compiler "
            "present to get them"
        ) from error


def is_available() -> bool:
    """Whether ``native`` would succeed."""
    try:
        native()
    except NativeMissingError:
        return False
    return True
