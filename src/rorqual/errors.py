"""Every error Rorqual raises on purpose.

```
RorqualError                  caught by the CLI and the server; anything else is a bug
├── ConfigError               a config file or option is wrong; also a ValueError
├── CheckpointError           a checkpoint's files are missing, extra, misshapen or damaged
├── TrainingError             a training run cannot go on: it diverged or lost its data
├── RequestError              the client's request is wrong (HTTP 400 unless a subclass says else)
│   ├── PromptTooLongError    prompt + answer does not fit the context
│   └── UnknownModelError     no such model is served (HTTP 404)
├── EngineError               the engine cannot serve
│   ├── EngineOverloadedError the queue is full (HTTP 429)
│   └── EngineClosedError     the engine has shut down (HTTP 503)
└── SandboxError              something about a sandbox; which subclass says who is at fault
    ├── SandboxRequestError   the caller's mistake; also a ValueError
    │   └── UnsupportedError  this substrate cannot do that; its capabilities say so beforehand
    ├── SandboxRefusedError   policy: the sandbox is not allowed what was tried
    ├── SandboxFailedError    the operator's: the sandbox or what it runs on failed
    │   ├── SubstrateMissingError  the machine lacks a tool; the message names the command to get it
    │   └── SandboxLostError  the sandbox is gone: killed, expired or crashed
    ├── CommandFailedError    a command's bad end, raised only where the caller asked for it
    └── TrajectoryError       a trajectory cannot go on from its log
        ├── DivergenceError   a different request at the same place of the log
        └── LostExecError     a command began, its end is unknown and no snapshot can undo it
```
"""

from __future__ import annotations


class RorqualError(Exception):
    """Base of all deliberate errors; the message is written for the person who caused it."""


class ConfigError(RorqualError, ValueError):
    """A configuration value is missing, unknown or out of range; the message names it."""


class CheckpointError(RorqualError):
    """A checkpoint cannot be read or written; the message names the file and tensor."""


class TrainingError(RorqualError):
    """A training run cannot continue; the message says from where to resume."""


class RequestError(RorqualError):
    """A request is malformed.

    Attributes:
        status: HTTP status.
        param: dotted path of the offending field, or None.
        code: machine-readable reason.
    """

    status = 400
    code = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """Prompt and requested answer exceed the context length."""

    code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """The named model is not served here."""

    status = 404
    code = "model_not_found"


class EngineError(RorqualError):
    """The engine cannot serve a well-formed request now."""


class EngineOverloadedError(EngineError):
    """The waiting queue is full; try again later."""


class EngineClosedError(EngineError):
    """The engine has been closed."""


class SandboxError(RorqualError):
    """Something about a sandbox went wrong; the subclass says who is at fault."""


class SandboxRequestError(SandboxError, ValueError):
    """The caller's mistake: a bad option, a path that does not exist, a sandbox used after its end.

    Attributes:
        errno: the system's number for it where there is one, else None.
    """

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class UnsupportedError(SandboxRequestError):
    """The substrate cannot do this; `Sandbox.capabilities` says so beforehand."""


class SandboxRefusedError(SandboxError):
    """Policy: what was tried is outside what this sandbox is allowed."""


class SandboxFailedError(SandboxError):
    """The operator's concern: the sandbox, its runtime or the machine failed."""


class SubstrateMissingError(SandboxFailedError):
    """This machine lacks something a substrate needs; the message names the command to get it."""


class SandboxLostError(SandboxFailedError):
    """The sandbox is gone: it was killed, its time was up, or it crashed."""


class CommandFailedError(SandboxError):
    """A command ended badly; raised by `ExecResult.check` only."""


class TrajectoryError(SandboxError):
    """A trajectory cannot go on from its log; the message says at which record."""


class DivergenceError(TrajectoryError):
    """A different request came at a place of the log that already holds one."""


class LostExecError(TrajectoryError):
    """A command was started, its end is unknown, and there is no snapshot from before it."""
