"""Puts the application on a socket and tells the operator how to use it.

Loopback by default; any other address only with API keys. Loading the model and closing the engine
are the caller's business.
"""

from __future__ import annotations

import ipaddress
import json
import resource
import shlex
import socket
from collections.abc import Callable, Sequence

import uvicorn

from rorqual.errors import ConfigError
from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.access_log import AccessLog
from rorqual.server.app import MAX_BODY_BYTES, MAX_REQUESTS, Application, create_app
from rorqual.server.bridge import ServingEngine
from rorqual.server.connection import Connection
from rorqual.server.draining import DrainingServer
from rorqual.server.history import History
from rorqual.server.keys import KeyRing

DRAIN_S = 30.0
"""Time running answers get to finish once the server is told to stop."""
_MARGIN_S = 5
"""After the drain, until uvicorn itself cancels what is left; never reached in good order."""
_IDLE_S = 75
"""Time an idle connection is kept: longer than clients and balancers keep theirs, so that none
sends a request into a closing one."""
_SEND_BUFFER_BYTES = 128 * 1024
"""Of each connection, in the kernel: what a client that stopped reading can make it hold."""
_MAX_OPEN_FILES = 65_536
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
    keys: KeyRing | None = None,
    history: History | None = None,
    access_log: AccessLog | None = None,
    cors_origins: Sequence[str] = (),
    max_requests: int = MAX_REQUESTS,
    max_body_bytes: int = MAX_BODY_BYTES,
    drain_s: float = DRAIN_S,
    end_running: Callable[[], None] | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted (Ctrl-C or SIGTERM), then let running answers finish.

    Args:
        port: 0 takes a free one.
        keys, history, access_log, cors_origins, max_requests, max_body_bytes: as in ``create_app``.
        drain_s, end_running: see ``DrainingServer``.
        announce: gets the start-up message once connections are accepted.

    Raises:
        ConfigError: the address cannot be listened on, or would be open to strangers; or
            tokenizer and card do not fit.
    """
    check_exposure(host, keys)
    app = create_app(
        engine,
        tokenizer,
        card,
        keys=keys,
        history=history,
        access_log=access_log,
        cors_origins=cors_origins,
        max_requests=max_requests,
        max_body_bytes=max_body_bytes,
    )
    _allow_many_connections()
    with listen(host, port) as listener:
        announce(welcome(card, url_of(listener), with_keys=keys is not None))
        server_for(app, drain_s=drain_s, end_running=end_running).run(sockets=[listener])
    if access_log is not None:
        access_log.flush()


def check_exposure(host: str, keys: KeyRing | None) -> None:
    """Raises ConfigError if others than this machine could connect and no active key exists."""
    if (keys is None or not keys.num_active) and not is_loopback(host):
        raise ConfigError(
            f"refusing to listen on {host} without API keys: whoever reaches it could use the "
            "model. Make a key with 'rorqual keys create NAME'"
        )


def is_loopback(host: str) -> bool:
    """Whether ``host``, an address or a name, means this machine only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # not a name at all: listening on it explains why
        return False
    addresses = [str(address[4][0]).partition("%")[0] for address in found]
    return bool(host) and all(ipaddress.ip_address(a).is_loopback for a in addresses)


def _allow_many_connections() -> None:
    """Raise the soft limit of open files, usually 1,024, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; the caller closes it. Raises ConfigError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
    # Both are inherited by the connections. Without the first, asyncio's own are sent by Nagle's
    # rule, since it looks at a protocol number that create_server leaves at 0: 40 ms per answer.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return listener


def server_for(
    app: Application,
    *,
    drain_s: float = DRAIN_S,
    end_running: Callable[[], None] | None = None,
) -> DrainingServer:
    """The server for ``app``, not yet running; setting ``should_exit`` ends it."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="error",  # strangers' malformed requests must not fill a log
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=int(drain_s) + _MARGIN_S,
    )
    return DrainingServer(config, app, drain_s=drain_s, end_running=end_running)


def url_of(listener: socket.socket) -> str:
    """Base URL a local client reaches ``listener`` at."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def welcome(card: ModelCard, url: str, *, with_keys: bool = False) -> str:
    """The start-up message: where the model is, and a command to try."""
    key = "your API key as api_key" if with_keys else "any api_key"
    return (
        f"{card.name} is served at {url}\n"
        f"  OpenAI clients: base_url={url}/v1, model={card.name}, {key}\n"
        "  Ctrl-C stops it. Try:\n\n"
        f"{curl_line(card, url, with_keys=with_keys)}\n"
    )


def curl_line(card: ModelCard, url: str, *, with_keys: bool = False) -> str:
    """A shell command that pastes a small document and streams the answer to a question.

    with_keys: it takes an API key from the variable RORQUAL_KEY.
    """
    key = '-H "Authorization: Bearer $RORQUAL_KEY" ' if with_keys else ""
    body = {
        "model": card.name,
        "stream": True,
        "messages": [{"role": "user", "content": card.example or _EXAMPLE}],
    }
    return (
        f"curl -N {url}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
