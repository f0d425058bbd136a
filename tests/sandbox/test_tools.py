"""What is missing is named with its package, and nothing that is there is asked for."""

from __future__ import annotations

from pathlib import Path

from rorqual.sandbox.tools import (
    TOOLS,
    Tool,
    install,
    install_command,
    missing_tools,
    wanted_tools,
)


def test_only_what_is_missing_is_asked_for() -> None:
    missing = missing_tools(lambda name: None if name in ("crun", "cc", "gcc") else f"/bin/{name}")
    # musl-gcc stands in for cc
    assert [tool.programs[0] for tool in missing] == ["crun"]
    assert install_command(missing)[-2:] == ["--no-install-recommends", "crun"]
    everything = missing_tools(lambda name: None)
    assert everything == list(TOOLS)
    assert missing_tools(lambda name: f"/bin/{name}") == []
    assert install([]) == []


def test_a_tool_can_be_a_file(tmp_path: Path) -> None:
    header = tmp_path / "header.h"
    tools = [Tool((str(header),), ("libheader-dev",), "compiling")]
    assert missing_tools(tools=tools) == tools
    header.touch()
    assert missing_tools(tools=tools) == []


def test_what_few_need_is_asked_for_only_by_name() -> None:
    def asked(*, kernel: bool = False, tests: bool = False) -> list[str]:
        tools = missing_tools(lambda name: None, tools=wanted_tools(kernel=kernel, tests=tests))
        return install_command(tools)[4:]

    assert not {"flex", "libelf-dev", "grub-pc-bin"} & set(asked())
    assert {"flex", "libelf-dev"} < set(asked(kernel=True))
    assert {"grub-pc-bin", "busybox-static"} < set(asked(tests=True))
    everything = asked(kernel=True, tests=True)
    assert len(everything) == len(set(everything))  # gcc is needed twice and asked for once
