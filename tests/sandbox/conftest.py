"""Sandboxes for tests: one directory per session, and a skip that names what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from rorqual.errors import SubstrateMissingError
from rorqual.sandbox.container.remains import sweep
from rorqual.sandbox.images import ImageStore
from rorqual.sandbox.layout import Layout
from rorqual.sandbox.sandbox import Sandbox

T = TypeVar("T")

HEAVY = "sandbox"
"""Mark of tests that take long or need what is rarely installed; ``-m sandbox`` selects them."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{HEAVY}: heavy sandbox tests; make test-sandbox")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker(HEAVY):
            item.add_marker(pytest.mark.skip(reason="heavy: make test-sandbox"))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("sandboxes")
    yield directory
    for lock in (directory / "sandboxes").glob("*/lock"):  # those that wait for a lost creator
        with contextlib.suppress(OSError, ValueError, IndexError):
            os.kill(int(lock.read_text().split()[0]), signal.SIGTERM)
    deadline = time.monotonic() + 20.0
    while any((directory / "sandboxes").glob("*")) and time.monotonic() < deadline:
        sweep(directory)
        time.sleep(0.02)
    store = ImageStore(Layout(directory).images)
    for image in store.all():
        store.remove(image.name)
    shutil.rmtree(directory, ignore_errors=True)


def run(work: Coroutine[Any, Any, T], timeout_s: float = 120.0) -> T:
    """Run to the end; a substrate that is not installed here skips the test, by name."""

    async def limited() -> T:
        return await asyncio.wait_for(work, timeout_s)

    try:
        return asyncio.run(limited())
    except SubstrateMissingError as error:
        pytest.skip(str(error))


Make = Callable[..., Coroutine[Any, Any, Sandbox]]


def maker(root: Path, isolation: str | None) -> Make:
    async def make(**options: Any) -> Sandbox:
        return await Sandbox.create("container", root=root, isolation=isolation, **options)

    return make
