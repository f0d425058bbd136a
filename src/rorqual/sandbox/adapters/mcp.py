"""One sandbox as tools of the Model Context Protocol: exec, read_file, write_file, list_files.

A command's bad end is a result the model reads; a refusal or a mistake is a tool error that says
why; a failure of the sandbox is one that does not, and is on standard error. Needs `mcp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

from rorqual.errors import SandboxRefusedError, SandboxRequestError
from rorqual.sandbox.contract import ExecResult
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, start_sandbox

WORKSPACE = "/workspace"
SHOWN_CHARS = 50_000
"""Of each stream, beginning and end; a model's context is not for floods."""


class Executed(BaseModel):
    """How a command ended."""

    returncode: int
    status: str
    stdout: str
    stderr: str


class Listed(BaseModel):
    """A name in a directory."""

    name: str
    kind: str
    size_bytes: int


async def serve_stdio(options: SandboxOptions) -> None:
    """Serve one fresh sandbox on standard input and output until the client leaves."""
    async with await start_sandbox(options) as sandbox:
        await server_for(sandbox).run_stdio_async()


def server_for(sandbox: Sandbox) -> MCPServer:
    """The tools over a sandbox, which stays the caller's to end."""
    server = MCPServer(
        "rorqual-sandbox",
        instructions="A Linux sandbox. Relative paths and commands start in /workspace.",
    )

    @server.tool()
    async def exec(command: str, timeout_s: float = 120.0, stdin: str = "") -> Executed:
        """Run a shell command in the sandbox and wait for its end.

        The whole process tree is killed after timeout_s seconds.
        """
        with _told():
            result = await sandbox.exec(command, cwd=WORKSPACE, timeout_s=timeout_s, stdin=stdin)
        return _executed(result)

    @server.tool()
    async def read_file(path: str) -> str:
        """Read a text file of the sandbox."""
        with _told():
            data = await sandbox.read(_absolute(path))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ToolError(f"{path} is not a UTF-8 text file") from None

    @server.tool()
    async def write_file(path: str, content: str) -> str:
        """Write a text file in the sandbox, making its directories."""
        with _told():
            await sandbox.write(_absolute(path), content)
        return f"wrote {len(content.encode())} bytes to {_absolute(path)}"

    @server.tool()
    async def list_files(path: str = ".") -> list[Listed]:
        """List a directory of the sandbox."""
        with _told():
            entries = await sandbox.list(_absolute(path))
        return [Listed(name=e.name, kind=e.kind, size_bytes=e.size_bytes) for e in entries]

    return server


@contextmanager
def _told() -> Iterator[None]:
    """The model's own mistakes, and what it may not do, are its to read."""
    try:
        yield
    except (SandboxRequestError, SandboxRefusedError) as error:
        raise ToolError(str(error)) from error


def _absolute(path: str) -> str:
    return str(PurePosixPath(WORKSPACE) / path)


def _executed(result: ExecResult) -> Executed:
    return Executed(
        returncode=result.returncode,
        status=result.status,
        stdout=_shown(result.stdout, result.stdout_bytes),
        stderr=_shown(result.stderr, result.stderr_bytes),
    )


def _shown(data: bytes, num_bytes: int) -> str:
    text = data.decode("utf-8", "replace")
    if len(text) > SHOWN_CHARS:
        half = SHOWN_CHARS // 2
        text = f"{text[:half]}\n[... {len(text) - SHOWN_CHARS} characters ...]\n{text[-half:]}"
    return text + f"\n[... {num_bytes - len(data)} bytes more ...]" * (num_bytes > len(data))
