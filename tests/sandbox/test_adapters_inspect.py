"""Inspect AI's own conformance checks for sandboxes, run on ours."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox.sandbox import Sandbox

from .conftest import run

pytest.importorskip("inspect_ai", reason="pip install inspect-ai")
from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.registry import registry_find_sandboxenv

from rorqual.sandbox.adapters.inspect import (
    Config,
    RorqualSandboxEnvironment,
)

Check = Callable[[Any], Awaitable[None]]
CHECKS: dict[str, Check] = {
    name: check
    for name, check in vars(self_check).items()
    if name.startswith("test_") and inspect.iscoroutinefunction(check)
}


NOT_OURS = {
    "test_exec_as_user": "adding a user changes files' owners, which needs a capability",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(reason=NOT_OURS[name], strict=True))
        if name in NOT_OURS
        else name
        for name in CHECKS
    ],
)
def test_inspects_own_check_passes(root: Path, name: str) -> None:
    async def work() -> None:
        options = {"limits": Config().options().limits}
        async with await Sandbox.create("container", root=root, **options) as sandbox:
            await CHECKS[name](RorqualSandboxEnvironment(sandbox))

    run(work())


def test_inspect_finds_it_by_name_and_a_sample_leaves_nothing() -> None:
    assert registry_find_sandboxenv("rorqual") is RorqualSandboxEnvironment
    with pytest.raises(ValueError, match="extra"):
        RorqualSandboxEnvironment.config_deserialize({"extra": 1})

    async def work() -> None:
        made = await RorqualSandboxEnvironment.sample_init("t", Config(memory_mib=64), {})
        environment = made["default"].as_type(RorqualSandboxEnvironment)
        assert (await environment.exec(["pwd"])).stdout == "/workspace\n"
        await RorqualSandboxEnvironment.sample_cleanup("t", None, made, False)
        assert not environment.sandbox.is_alive
        await asyncio.sleep(0)

    run(work())
