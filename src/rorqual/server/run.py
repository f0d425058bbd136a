"""Puts the application on a socket and tells the operator how to use it.

Loopback by default: there is no authentication. Loading the model and closing the engine are the
caller's business.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from rorqual.errors import ConfigError
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.app import MAX_BODY_BYTES, create_app
from rorqual.server.bridge import ServingEngine
from rorqual.server.connection import Connection

_SHUTDOWN_S = 5
"""Time running answers get to finish after Ctrl-C."""
_MAX_CONNECTIONS = 1000
"""Connections beyond this get status 503: below the usual limit of open files."""
_IDLE_S = 5
"""Time an idle connection is kept after an answer."""
_EXAMPLE = """Document:
The river station was built in 1974.
The harbour station was built in 1981.

Question: When was the harbour station built?"""


def serve(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    card: ModelCard,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_body_bytes: int = MAX_BODY_BYTES,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted (Ctrl-C or SIGTERM), then let running answers finish for 5 s.

    Args:
        port: 0 takes a free one.
        announce: gets the start-up message once connections are accepted.

    Raises:
        ConfigError: the address cannot be listened on, or tokenizer and card do not fit.
    """
    app = create_app(engine, tokenizer, card, max_body_bytes=max_body_bytes)
    with listen(host, port) as listener, _terminating_as_interrupt():
        announce(welcome(card, url_of(listener)))
        server_for(app).run(sockets=[listener])


@contextlib.contextmanager
def _terminating_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, and both without an exception.

    uvicorn raises the signal again once it has shut down, which for SIGTERM would end the process
    on the spot. Off the main thread, where signals never arrive, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; the caller closes it. Raises ConfigError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None


def server_for(app: Starlette) -> uvicorn.Server:
    """The uvicorn server for ``app``, not yet running; setting ``should_exit`` ends it."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )


def url_of(listener: socket.socket) -> str:
    """Base URL a local client reaches ``listener`` at."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def welcome(card: ModelCard, url: str) -> str:
    """The start-up message: where the model is, and a command to try."""
    return (
        f"{card.name} is served at {url}\n"
        f"  OpenAI clients: base_url={url}/v1, model={card.name}, any api_key\n"
        "  Ctrl-C stops it. Try:\n\n"
        f"{curl_line(card, url)}\n"
    )


def curl_line(card: ModelCard, url: str) -> str:
    """A shell command that pastes a small document and streams the answer to a question."""
    body = {
        "model": card.name,
        "stream": True,
        "messages": [{"role": "user", "content": card.example or _EXAMPLE}],
    }
    return (
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
