"""One HTTP connection: uvicorn's, with limits on what its client may take: time and memory.

uvicorn itself waits for ever for a client that connects and sends nothing, or half a header, or
does not read its answer; and it keeps headers of any size. It also loses the body of a request that
offers to switch to another protocol, as Java's HTTP client does with each: here, as RFC 9110
section 7.8 allows, the offer is not taken up and the request served as it is.
"""

from __future__ import annotations

import asyncio

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_MUCH_HEADER = b"the request's line and headers are too long"


class Connection(HttpToolsProtocol):
    """Cut off when its client holds things up; the application then sees a disconnect."""

    header_timeout_s = 30.0
    """For a request's line and headers to arrive."""
    write_timeout_s = 30.0
    """For a client that has stopped reading to read what is buffered (64 KiB)."""
    max_header_bytes = 64 * 1024
    """Of a request's line and headers, and of what came in one packet with them."""
    max_connections = 8192
    """Idle ones included; more are closed at once. Requests have a limit of their own."""

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _num_header_bytes = 0
    _in_header = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called once, by the event loop."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.abort()
        self._watch_asking()

    def data_received(self, data: bytes) -> None:
        """Called with whatever arrives, by the event loop."""
        self._parse(data)
        if self._in_header:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > self.max_header_bytes:
                self._refuse(431, _TOO_MUCH_HEADER)
        self._watch_asking()

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":
                    self.send_400_response("this is no proxy")
                    return
                data = self._without_offer() + data[offer.args[0] :]
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            else:
                return

    def _without_offer(self) -> bytes:
        """The request line and headers again, for a new parser: the old one takes what follows for
        the other protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """Called by the parser at a request's first byte."""
        super().on_message_begin()
        self._in_header = True
        self._num_header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser; trailers, which nobody asked for, are dropped."""
        if self._in_header:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._in_header = False
        if not self._is_offer():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self._is_offer():
            super().on_message_complete()

    def _is_offer(self) -> bool:
        """Whether the parser is about to stop: it knows no way to say no."""
        return self.parser.should_upgrade()

    def on_response_complete(self) -> None:
        """Called by uvicorn after an answer's last byte was handed over."""
        super().on_response_complete()
        self._watch_closing()

    def timeout_keep_alive_handler(self) -> None:
        """Called by uvicorn after an idle time."""
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def shutdown(self) -> None:
        """Called by uvicorn when the server ends."""
        super().shutdown()
        self._watch_closing()

    def pause_writing(self) -> None:
        """Called by the event loop when the client does not keep up with its answer."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Called by the event loop when it has caught up."""
        super().resume_writing()
        self._forget_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once, by the event loop."""
        self._forget_asking()
        self._forget_reading()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Hang up at once; what is buffered is lost."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP: there is no path, so no protocol to speak."""
        self._refuse(400, msg.encode())

    def _refuse(self, status: int, message: bytes) -> None:
        if self.transport.is_closing():
            return
        kind = "invalid_request_error"
        error = {"message": message.decode(), "type": kind, "param": None, "code": kind}
        body = msgspec.json.encode({"error": error})
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s"
            % (status, b"Bad Request" if status == 400 else b"Headers Too Large", len(body), body)
        )
        self.transport.close()
        self._watch_closing()

    def _watch_asking(self) -> None:
        is_asking = self.cycle is None or self.cycle.response_complete
        if not is_asking:
            self._forget_asking()
        elif self._asking is None and not self.transport.is_closing():
            self._asking = self.loop.call_later(self.header_timeout_s, self.abort)

    def _watch_reading(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(self.write_timeout_s, self.abort)

    def _watch_closing(self) -> None:
        # A closing transport stays until its client has read what is left.
        if self.transport.is_closing():
            self._watch_reading()

    def _forget_asking(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _forget_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
