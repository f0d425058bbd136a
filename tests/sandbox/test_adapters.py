"""The sandbox in others' shapes: an MCP client over stdio, and SWE-ReX's deployment."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from rorqual.sandbox.sandbox import Sandbox, SandboxOptions

from .conftest import run


@pytest.fixture(autouse=True)
def _needs_containers(root: Path) -> None:
    async def probe() -> None:
        async with await Sandbox.create("container", root=root):
            pass

    run(probe())


def test_an_mcp_client_runs_commands_and_moves_files(root: Path) -> None:
    mcp = pytest.importorskip("mcp", reason="pip install mcp")
    arguments = ["-m", "rorqual.cli.main", "sandbox", "--root", str(root), "mcp"]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    server = mcp.StdioServerParameters(command=sys.executable, args=arguments, env=environment)

    async def work() -> None:
        async with (
            mcp.stdio_client(server) as (reader, writer),
            mcp.ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            names = {tool.name for tool in (await session.list_tools()).tools}
            assert names == {"exec", "read_file", "write_file", "list_files"}
            wrote = await session.call_tool(
                "write_file", {"path": "d/a.py", "content": "print(42)"}
            )
            assert "9 bytes to /workspace/d/a.py" in wrote.content[0].text
            done = await session.call_tool("exec", {"command": "python3 d/a.py; exit 3"})
            assert done.structured_content == {
                "returncode": 3,
                "status": "exited",
                "stdout": "42\n",
                "stderr": "",
            }
            late = await session.call_tool("exec", {"command": "sleep 9", "timeout_s": 0.2})
            assert late.structured_content["status"] == "timed-out"
            assert (await session.call_tool("read_file", {"path": "d/a.py"})).content[
                0
            ].text == "print(42)"
            missing = await session.call_tool("read_file", {"path": "none"})
            assert missing.is_error
            assert "No such file" in missing.content[0].text
            listed = await session.call_tool("list_files", {})
            assert listed.structured_content["result"][0]["name"] == "d"

    run(work())


@pytest.mark.skipif(importlib.util.find_spec("swerex") is None, reason="pip install swe-rex")
def test_a_swe_rex_deployment_keeps_sessions_and_exit_codes(root: Path) -> None:
    from swerex.exceptions import CommandTimeoutError, NonZeroExitCodeError
    from swerex.runtime.abstract import (
        BashAction,
        CloseBashSessionRequest,
        Command,
        CreateBashSessionRequest,
        ReadFileRequest,
        WriteFileRequest,
    )

    from rorqual.sandbox.adapters.swerex import RorqualDeployment

    async def work() -> None:
        deployment = RorqualDeployment(SandboxOptions(root=root))
        await deployment.start()
        try:
            runtime = deployment.runtime
            await runtime.create_session(CreateBashSessionRequest())
            await runtime.run_in_session(BashAction(command="cd /tmp; export A=7"))
            seen = await runtime.run_in_session(BashAction(command="echo $A $PWD; echo e >&2"))
            assert (seen.output, seen.exit_code) == ("7 /tmp\ne\n", 0)
            seen = await runtime.run_in_session(BashAction(command="false", check="silent"))
            assert seen.exit_code == 1
            with pytest.raises(NonZeroExitCodeError):
                await runtime.run_in_session(BashAction(command="false"))
            with pytest.raises(CommandTimeoutError):
                await runtime.run_in_session(BashAction(command="sleep 30", timeout=0.2))
            await runtime.create_session(CreateBashSessionRequest())
            await runtime.close_session(CloseBashSessionRequest())
            await runtime.write_file(WriteFileRequest(path="/workspace/a", content="x"))
            read = await runtime.read_file(ReadFileRequest(path="/workspace/a"))
            assert read.content == "x"
            done = await runtime.execute(Command(command=["sh", "-c", "echo o; exit 2"]))
            assert (done.stdout, done.exit_code) == ("o\n", 2)
            assert await deployment.is_alive()
        finally:
            await deployment.stop()

    run(work())
