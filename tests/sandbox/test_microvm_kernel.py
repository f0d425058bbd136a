"""Building, finding and removing guest kernels, on a tree that only looks like a kernel's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rorqual.cli.main import main
from rorqual.errors import SandboxFailedError, SandboxRequestError, SubstrateMissingError
from rorqual.sandbox.microvm.kernel import (
    build_kernel,
    find_kernel,
    kernels,
    missing_settings,
    remove_kernel,
)
from rorqual.sandbox.tools import KERNEL_TOOLS, missing_tools

# What `build_kernel` asks of a kernel's tree; the "kernel" holds what a build tells about itself.
MAKEFILE = """
kernelversion: ; @echo 6.1.{version}
tinyconfig: ; @: > .config
olddefconfig: ; @true
vmlinux:
\t@echo '  CC      a.o'
\t@{work}
\t@echo '  CC      b.o'
\t@printf 'char who[] = "%s %s";int main(){{}}' \\
\t "$$KBUILD_BUILD_HOST" "$$KBUILD_BUILD_TIMESTAMP" > a.c && gcc -o vmlinux a.c
"""
MERGE = '#!/bin/sh\ncat rorqual.config >> .config\nsed -i "/=n$/d" .config\n'


def tree(folder: Path, *, version: int = 1, work: str = "true") -> Path:
    (folder / "scripts" / "kconfig").mkdir(parents=True)
    (folder / "Kconfig").touch()
    (folder / "Makefile").write_text(MAKEFILE.format(version=version, work=work))
    merge = folder / "scripts" / "kconfig" / "merge_config.sh"
    merge.write_text(MERGE)
    merge.chmod(0o755)
    return folder


def runs(process: Path) -> bool:
    """Whether a process of this directory in /proc does; a dead one may still be listed."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _needs_tools() -> None:
    if missing := missing_tools(tools=KERNEL_TOOLS):
        pytest.skip(f"needs {', '.join(tool.packages[0] for tool in missing)}")


def test_stages_are_told_and_the_same_source_gives_the_same_kernel(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    scratch.mkdir()

    def build(name: str) -> str:
        source = tree(tmp_path / name)
        kernel = build_kernel(
            source=source, cache=cache, scratch=scratch, progress=lambda *now: told.append(now)
        )
        return kernel.name

    assert build("here") == build("there")  # elsewhere, later: not another kernel in the cache
    assert [kernel.version for kernel in kernels(cache)] == ["6.1.1"]
    assert [stage for stage, _, _ in told[:3]] == ["configuring", "compiling", "compiling"]
    assert [done for _, done, _ in told[1:3]] == [1, 2]
    assert list(scratch.iterdir()) == []


def test_the_newest_is_used_and_others_can_be_removed(tmp_path: Path) -> None:
    old = build_kernel(source=tree(tmp_path / "old", version=9), cache=tmp_path / "cache")
    os.utime(old.file.with_name("kernel.json"), (1, 1))
    new = build_kernel(source=tree(tmp_path / "new", version=10), cache=tmp_path / "cache")
    assert find_kernel(tmp_path / "cache") == new
    with pytest.raises(SandboxRequestError, match=new.name):  # the names there are
        remove_kernel("../cache", tmp_path / "cache")
    assert remove_kernel(new.name, tmp_path / "cache") == new
    assert find_kernel(tmp_path / "cache") == old
    remove_kernel(old.name, tmp_path / "cache")
    with pytest.raises(SubstrateMissingError, match="kernel build"):
        find_kernel(tmp_path / "cache")


def test_an_ended_build_leaves_nothing(tmp_path: Path) -> None:
    class EndedError(BaseException):
        pass

    started = tmp_path / "started"

    def end(stage: str, done: int, total: int) -> None:
        if stage == "compiling":
            deadline = time.monotonic() + 20
            while not started.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise EndedError

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    work = f"echo $$$$ > {started}.new && mv {started}.new {started} && sleep 600"
    source = tree(tmp_path / "source", work=work)
    with pytest.raises(EndedError):
        build_kernel(source=source, cache=tmp_path / "cache", scratch=scratch, progress=end)
    assert not (tmp_path / "cache").exists()
    assert list(scratch.iterdir()) == []
    compiler = Path("/proc", started.read_text().strip())
    deadline = time.monotonic() + 20
    while runs(compiler) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(compiler)


def test_a_failed_build_ends_with_its_last_words(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", work="echo a.c is wrong; false")
    with pytest.raises(SandboxFailedError, match=r"a\.c is wrong"):
        build_kernel(source=source, cache=tmp_path / "cache")


def test_without_a_terminal_progress_is_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["sandbox", "kernel"]
    assert main([*command, "build", "--source", str(tree(tmp_path / "source"))]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == ["kernel: configuring", "kernel: compiling 0 %"]
    assert "6.1.1 for microvm" in said.out
    assert main([*command, "ls"]) == 0
    name = capsys.readouterr().out.split()[0]
    assert main([*command, "rm"]) != 0
    assert "name a kernel" in capsys.readouterr().err
    assert main([*command, "rm", "--unused"]) == 0
    assert main([*command, "rm", name]) == 0
    assert capsys.readouterr().out == f"removed {name}\n"


def test_settings_a_source_refuses_are_named() -> None:
    wanted = "# why\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=16\n"
    assert missing_settings(wanted, "CONFIG_A=y\nCONFIG_C=16\n# CONFIG_B is not set\n") == []
    assert missing_settings(wanted, "CONFIG_B=y\nCONFIG_C=8\n") == wanted.split("\n")[1:4]
