"""How tests are shared out when several processes run them (``pytest -n 2 --dist loadgroup``)."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, for its fixtures, and all sandboxes in one.

    Sandbox tests count what the whole machine has of mounts, processes and control groups.
    """
    for item in items:
        path = item.nodeid.partition("::")[0]
        group = "sandbox" if path.startswith("tests/sandbox/") else path
        item.add_marker(pytest.mark.xdist_group(group))
