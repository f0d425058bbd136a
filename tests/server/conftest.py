"""The nano model's tokenizer and card, and ways to call an application."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from asgi_call import NANO
from starlette.applications import Starlette

from rorqual.protocol.modes import ModelCard
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.server.run import listen, server_for, url_of


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(NANO)


@pytest.fixture(scope="session")
def nano_card() -> ModelCard:
    return ModelCard.from_dir(NANO)


@pytest.fixture
def on_socket() -> Iterator[Callable[[Starlette], str]]:
    """Serves an application on a free port of a real socket; gives its base URL."""
    running = []

    def start(app: Starlette) -> str:
        server = server_for(app, drain_s=2.0)
        listener = listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread, listener))
        return url_of(listener)

    yield start
    for server, thread, listener in running:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
