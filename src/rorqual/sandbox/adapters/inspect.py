"""Containers as a sandbox of Inspect AI: ``Task(..., sandbox="rorqual")``.

The configuration is an image's name or directory (``("rorqual", "debian")``), or a `Config`. Needs
the package `inspect-ai`, which finds this through the entry point ``inspect_ai = rorqual``.
"""

from __future__ import annotations

import errno
from pathlib import PurePosixPath
from typing import Any, Literal, NoReturn, overload

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel, ConfigDict

from rorqual.errors import SandboxRequestError, UnsupportedError
from rorqual.sandbox.contract import MIB, Limits, Network
from rorqual.sandbox.sandbox import Sandbox, SandboxOptions, start_sandbox

WORKSPACE = "/workspace"
_MAX_EXEC_S = 86_400.0
_ERRORS: dict[int, type[OSError]] = {
    errno.ENOENT: FileNotFoundError,
    errno.ENOTDIR: NotADirectoryError,
    errno.EISDIR: IsADirectoryError,
    errno.EACCES: PermissionError,
    errno.EPERM: PermissionError,
    errno.EROFS: PermissionError,
}


class Config(BaseModel, frozen=True):
    """What a sample's sandbox is made of; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    image: str | None = None
    isolation: str | None = None
    memory_mib: int = 2048
    cpus: float = 1.0
    processes: int = 512
    disk_mib: int = 1024
    allow: tuple[str, ...] = ()

    def options(self) -> SandboxOptions:
        """As the sandbox wants them."""
        limits = Limits(
            memory_bytes=self.memory_mib * MIB,
            cpus=self.cpus,
            processes=self.processes,
            disk_bytes=self.disk_mib * MIB,
            output_bytes=SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE,
        )
        return SandboxOptions(
            image=self.image,
            isolation=self.isolation,
            limits=limits,
            network=Network(allow=self.allow) if self.allow else None,
        )


@sandboxenv(name="rorqual")
class RorqualSandboxEnvironment(SandboxEnvironment):
    """One container per sample, in /workspace."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__()
        self.sandbox = sandbox

    # -- life
    @classmethod
    async def sample_init(
        cls, task_name: str, config: BaseModel | str | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """Start one; it ends with `sample_cleanup`, or with this process."""
        if isinstance(config, str):
            config = Config(image=config)
        if config is not None and not isinstance(config, Config):
            raise SandboxRequestError(f"the configuration is a {type(config).__name__}, no Config")
        sandbox = await start_sandbox((config or Config()).options())
        return {"default": cls(sandbox)}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: BaseModel | str | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        """End what `sample_init` made."""
        for environment in environments.values():
            await environment.as_type(cls).sandbox.kill()

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """A `Config` from a log."""
        return Config(**config)

    # -- commands
    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a command; never a second time, whatever `timeout_retry` says: it had effects."""
        try:
            result = await self.sandbox.exec(
                cmd,
                stdin=input if input is not None else b"",
                cwd=_absolute(cwd or "."),
                env=env,
                user=user,
                timeout_s=float(timeout) if timeout is not None else _MAX_EXEC_S,
            )
        except UnsupportedError as error:
            raise SandboxUserUnsupportedError(str(error)) from error
        except SandboxRequestError as error:
            if user is not None and str(error).startswith("user "):  # there is no such user
                raise SandboxUserUnsupportedError(str(error)) from error
            _raise(error)
        if result.status == "timed-out":
            raise TimeoutError(f"{cmd[0]} took longer than {timeout} s")
        if result.status == "not-started" and result.returncode == 126:
            raise PermissionError(result.stderr.decode("utf-8", "replace").strip())
        stdout = result.stdout.decode("utf-8", "replace")
        if result.truncated:
            shown = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR
            raise OutputLimitExceededError(limit_str=shown, truncated_output=stdout)
        stderr = result.stderr.decode("utf-8", "replace")
        return ExecResult(result.ok, result.returncode, stdout, stderr)

    # -- files
    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file, making its directories."""
        try:
            await self.sandbox.write(_absolute(file), contents, user="root")
        except SandboxRequestError as error:
            _raise(error)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """Contents of a file."""
        try:
            data = await self.sandbox.read(_absolute(file), user="root")
        except SandboxRequestError as error:
            _raise(error)
        if len(data) > SandboxEnvironmentLimits.MAX_READ_FILE_SIZE:
            shown = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR
            raise OutputLimitExceededError(limit_str=shown, truncated_output=None)
        return data.decode() if text else data

    def default_polling_interval(self) -> float:
        """Seconds between looks at a running service: it is on this machine."""
        return 0.2


def _absolute(path: str) -> str:
    return str(PurePosixPath(WORKSPACE) / path)


def _raise(error: SandboxRequestError) -> NoReturn:
    """As the exception Inspect tells the model about."""
    kind = _ERRORS.get(error.errno or 0)
    if kind is not None:
        raise kind(error.errno, str(error)) from error
    raise error
