"""What is missing is named with its package, and nothing that is there is asked for."""

from __future__ import annotations

from rorqual.sandbox.tools import TOOLS, install, install_command, missing_tools


def test_only_what_is_missing_is_asked_for() -> None:
    missing = missing_tools(lambda name: None if name in ("crun", "cc", "gcc") else f"/bin/{name}")
    # musl-gcc stands in for cc
    assert [tool.programs[0] for tool in missing] == ["crun"]
    assert install_command(missing)[-2:] == ["--no-install-recommends", "crun"]
    everything = missing_tools(lambda name: None)
    assert everything == list(TOOLS)
    assert missing_tools(lambda name: f"/bin/{name}") == []
    assert install([]) == []
