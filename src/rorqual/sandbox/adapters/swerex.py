"""Containers as a deployment of SWE-ReX: `RorqualDeployment` where `DockerDeployment` was.

SWE-ReX's own server runs in the machine it controls and types into a terminal. Here every session
is a bash whose commands come over the agent's channel, one marker per command, so that output is
exact and an exit code always known. Interactive programs (`is_interactive_command`, `expect`) are
refused. Needs the package `swe-rex`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from typing import Any

from swerex.deployment.abstract import AbstractDeployment
from swerex.deployment.hooks.abstract import CombinedDeploymentHook, DeploymentHook
from swerex.exceptions import (
    CommandTimeoutError,
    DeploymentNotStartedError,
    NonZeroExitCodeError,
    SessionDoesNotExistError,
    SessionExistsError,
)
from swerex.runtime.abstract import (
    AbstractRuntime,
    Action,
    BashAction,
    BashObservation,
    CloseBashSessionResponse,
    CloseResponse,
    CloseSessionRequest,
    CloseSessionResponse,
    Command,
    CommandResponse,
    CreateBashSessionResponse,
    CreateSessionRequest,
    CreateSessionResponse,
    IsAliveResponse,
    Observation,
    ReadFileRequest,
    ReadFileResponse,
    UploadRequest,
    UploadResponse,
    WriteFileRequest,
    WriteFileResponse,
)

from rorqual.errors import SandboxFailedError, UnsupportedError
from rorqual.sandbox.sandbox import RunningCommand, Sandbox, SandboxOptions, start_sandbox

_FOREVER_S = 86_400.0


@dataclasses.dataclass
class _Session:
    """A shell that reads one command after the other from its stdin."""

    shell: RunningCommand
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    async def run(self, command: str) -> tuple[str, int]:
        """Output (both streams) and exit code of a command."""
        mark = f"rorqual-{secrets.token_hex(12)}"
        line = f"{command}\nprintf '%s%d\\n' {mark} $?\n"
        await self.shell.write(line.encode())
        held = bytearray()
        async for piece in self.shell:
            held += piece.data
            before, found, after = bytes(held).partition(mark.encode())
            if found and after.endswith(b"\n"):
                return before.decode("utf-8", "replace"), int(after)
        return bytes(held).decode("utf-8", "replace"), (await self.shell.result()).returncode


class RorqualRuntime(AbstractRuntime):
    """Sessions, commands and files of one sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.logger = logging.getLogger(__name__)
        self.sandbox = sandbox
        self._sessions: dict[str, _Session] = {}

    async def is_alive(self, *, timeout: float | None = None) -> IsAliveResponse:
        """Whether the sandbox has not ended."""
        return IsAliveResponse(is_alive=self.sandbox.is_alive)

    # -- sessions
    async def create_session(self, request: CreateSessionRequest) -> CreateSessionResponse:
        """Start a shell."""
        if request.session in self._sessions:
            raise SessionExistsError(f"session {request.session!r} exists")
        shell = await self.sandbox.start(
            ["bash", "--norc"], stdin=None, merge=True, timeout_s=_FOREVER_S
        )
        session = _Session(shell)
        self._sessions[request.session] = session
        output = ""
        for file in request.startup_source:
            said, _ = await session.run(f"source {file}")
            output += said
        return CreateBashSessionResponse(output=output)

    async def run_in_session(self, action: Action) -> Observation:
        """Run a command in a shell; a command over its time ends the shell with it."""
        session = self._sessions.get(action.session)
        if session is None:
            raise SessionDoesNotExistError(f"session {action.session!r} does not exist")
        if not isinstance(action, BashAction):
            session.shell.send_signal(2)
            return BashObservation(exit_code=None)
        if action.is_interactive_command or action.expect:
            raise UnsupportedError("interactive programs are not run in sessions")
        async with session.lock:
            try:
                async with asyncio.timeout(action.timeout):
                    output, code = await session.run(action.command)
            except TimeoutError:
                session.shell.kill()
                del self._sessions[action.session]
                message = f"{action.command!r} took longer than {action.timeout} s"
                raise CommandTimeoutError(message) from None
        if action.check == "raise" and code != 0:
            raise NonZeroExitCodeError(
                f"{action.error_msg or action.command!r} ended with {code}: {output}"
            )
        return BashObservation(output=output, exit_code=None if action.check == "ignore" else code)

    async def close_session(self, request: CloseSessionRequest) -> CloseSessionResponse:
        """End a shell and what it started."""
        session = self._sessions.pop(request.session, None)
        if session is None:
            raise SessionDoesNotExistError(f"session {request.session!r} does not exist")
        session.shell.kill()
        return CloseBashSessionResponse()

    # -- commands and files
    async def execute(self, command: Command) -> CommandResponse:
        """Run a command of its own."""
        argv = command.command
        if isinstance(argv, list) and command.shell:
            argv = argv[0] if argv else ""
        elif isinstance(argv, str) and not command.shell:
            argv = [argv]
        result = await self.sandbox.exec(
            argv,
            timeout_s=command.timeout or _FOREVER_S,
            env=command.env,
            cwd=command.cwd,
            merge=command.merge_output_streams,
        )
        if result.status == "timed-out":
            raise CommandTimeoutError(f"{command.command!r} took longer than {command.timeout} s")
        response = CommandResponse(
            stdout=result.text,
            stderr=result.stderr.decode("utf-8", "replace"),
            exit_code=result.returncode,
        )
        if command.check and not result.ok:
            raise NonZeroExitCodeError(f"{command.error_msg or command.command!r}: {response}")
        return response

    async def read_file(self, request: ReadFileRequest) -> ReadFileResponse:
        """A file as text."""
        data = await self.sandbox.read(request.path)
        content = data.decode(request.encoding or "utf-8", request.errors or "strict")
        return ReadFileResponse(content=content)

    async def write_file(self, request: WriteFileRequest) -> WriteFileResponse:
        """Write a file."""
        await self.sandbox.write(request.path, request.content)
        return WriteFileResponse()

    async def upload(self, request: UploadRequest) -> UploadResponse:
        """Copy a file or a directory into the sandbox."""
        await self.sandbox.upload(request.source_path, request.target_path)
        return UploadResponse()

    async def close(self) -> CloseResponse:
        """End every session and the sandbox."""
        self._sessions.clear()
        await self.sandbox.kill()
        return CloseResponse()


class RorqualDeployment(AbstractDeployment):
    """One sandbox; `start` makes it and `stop` ends it."""

    def __init__(self, options: SandboxOptions | None = None) -> None:
        self.logger = logging.getLogger(__name__)
        self._options = options or SandboxOptions()
        self._hooks = CombinedDeploymentHook()
        self._runtime: RorqualRuntime | None = None

    def add_hook(self, hook: DeploymentHook) -> None:
        """Tell `hook` of each step."""
        self._hooks.add_hook(hook)

    async def is_alive(self, *, timeout: float | None = None) -> IsAliveResponse:
        """Whether the sandbox runs; raises `DeploymentNotStartedError` before `start`."""
        return await self.runtime.is_alive(timeout=timeout)

    async def start(self, *args: Any, **kwargs: Any) -> None:
        """Make the sandbox."""
        if self._runtime is not None:
            raise SandboxFailedError("the deployment is started already")
        self._hooks.on_custom_step("Starting sandbox")
        self._runtime = RorqualRuntime(await start_sandbox(self._options))

    async def stop(self, *args: Any, **kwargs: Any) -> None:
        """End the sandbox; does nothing the second time."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await runtime.close()

    @property
    def runtime(self) -> RorqualRuntime:
        """The sandbox's sessions."""
        if self._runtime is None:
            raise DeploymentNotStartedError("Deployment not started")  # type: ignore[no-untyped-call]
        return self._runtime
