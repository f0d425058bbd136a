"""Every error Rorqual raises on purpose.

```
RorqualError                  caught by the CLI and the server; anything else is a bug
├── ConfigError               a config file or option is wrong; also a ValueError
├── CheckpointError           a checkpoint's files are missing, extra, misshapen or damaged
├── TrainingError             a training run cannot go on: it diverged or lost its data
├── RequestError              the client's request is wrong (HTTP 400 unless a subclass says else)
│   ├── PromptTooLongError    prompt + answer does not fit the context
│   └── UnknownModelError     no such model is served (HTTP 404)
└── EngineError               the engine cannot serve
    ├── EngineOverloadedError the queue is full (HTTP 429)
    └── EngineClosedError     the engine has shut down (HTTP 503)
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
