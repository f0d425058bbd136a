"""A peer in a process of its own, so that memory and CPU time are its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType

from rorqual.bench.peers import Measurement, Peer
from rorqual.errors import ConfigError


class Worker:
    """Makes a peer in a new process and passes calls to it. Use as a context manager.

    make: importable from the new process, with its arguments bound.

    Raises:
        ImportError: the peer is not installed.
        ConfigError: it cannot be made.
    """

    def __init__(self, make: Callable[[], Peer]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """As ``Peer.run``. Raises ConfigError with the reason if the peer fails."""
        self._pipe.send((list(prompt), num_tokens))
        measurement = self._receive()
        assert measurement is not None
        return measurement

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> Measurement | None:
        try:
            error, measurement = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ConfigError(f"it ended with exit code {self._process.exitcode}") from None
        if error is not None:
            raise error
        assert measurement is None or isinstance(measurement, Measurement)
        return measurement


def _serve(make: Callable[[], Peer], pipe: Connection) -> None:
    """The other side: one answer (error, measurement) for making the peer and for each call."""
    try:
        peer = make()
    except ImportError as error:
        pipe.send((ImportError(str(error)), None))
        return
    except Exception as error:
        pipe.send((ConfigError(f"{type(error).__name__}: {error}"), None))
        return
    pipe.send((None, None))
    while True:
        try:
            prompt, num_tokens = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, peer.run(prompt, num_tokens)))
        except Exception as error:
            pipe.send((ConfigError(f"{type(error).__name__}: {error}"), None))
