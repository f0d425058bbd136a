"""What the server adds to an engine: latency, CPU, throughput, memory, and streams held.

    python -m rorqual.qualify.load [MODEL] [--requests N] [--streams N]

The engine answers at once, so that all measured time is the server's and the client's. The client's
own part is measured against a socket that answers without reading, in the same run; "added" is the
difference. Latencies are medians, CPU is the server process's. One process each; Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp

from rorqual.qualify.target import Target

_ANSWER = "The harbour station was built in 1981."
_QUESTION = [{"role": "user", "content": "When was the harbour station built?"}]
_STREAM_WORDS = 40


class Figure(NamedTuple):
    """One row: what was measured, and what is wanted of it."""

    name: str
    value: float
    unit: str
    target: float | None = None
    is_floor: bool = False
    """Whether ``target`` is the least rather than the most."""

    @property
    def is_met(self) -> bool:
        """Whether the figure is within its target, if it has one."""
        if self.target is None:
            return True
        return self.value >= self.target if self.is_floor else self.value <= self.target


class Timing(NamedTuple):
    """Requests of one run."""

    p50_ms: float
    per_s: float
    cpu_ms: float


def body_of(model: str, *, stream: bool) -> bytes:
    """A small chat request."""
    return json.dumps({"model": model, "messages": _QUESTION, "stream": stream}).encode()


async def post_many(url: str, body: bytes, *, num_requests: int, concurrency: int) -> list[float]:
    """Latencies in seconds of ``num_requests`` answers; raises unless each is 200."""
    latencies: list[float] = []
    headers = {"content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def client(count: int) -> None:
            for _ in range(count):
                start = time.perf_counter()
                async with session.post(url, data=body) as response:
                    await response.read()
                    response.raise_for_status()
                latencies.append(time.perf_counter() - start)

        await asyncio.gather(*(client(num_requests // concurrency) for _ in range(concurrency)))
    return latencies


async def client_floor_ms(num_requests: int) -> float:
    """Median latency of the same client against a socket that answers by heart."""
    answer = b'{"id":"x","object":"chat.completion","choices":[{"message":{"content":"ok"}}]}'
    reply = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"

    class Parrot(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self._transport = transport
            self._asked = b""

        def data_received(self, data: bytes) -> None:
            self._asked += data
            if self._asked.endswith(b"}"):  # the body's end; it may come after the header
                self._asked = b""
                self._transport.write(reply % (len(answer), answer))

    server = await asyncio.get_running_loop().create_server(Parrot, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        body = body_of("x", stream=False)
        url = f"http://127.0.0.1:{port}/"
        return _median_ms(await post_many(url, body, num_requests=num_requests, concurrency=1))


async def measure(target: Target, body: bytes, *, num_requests: int, concurrency: int) -> Timing:
    """One run against ``target``."""
    cpu, start = target.cpu_s(), time.perf_counter()
    url = f"{target.url}/v1/chat/completions"
    latencies = await post_many(url, body, num_requests=num_requests, concurrency=concurrency)
    elapsed = time.perf_counter() - start
    return Timing(
        _median_ms(latencies),
        len(latencies) / elapsed,
        (target.cpu_s() - cpu) * 1000 / len(latencies),
    )


async def hold_streams(target: Target, body: bytes, num_streams: int) -> tuple[int, int]:
    """Open ``num_streams`` at once and read them to the end: how many ended well, peak bytes."""
    num_whole, peak = 0, 0
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        all_open = asyncio.Barrier(num_streams)

        async def read() -> None:
            nonlocal num_whole, peak
            async with session.post(f"{target.url}/v1/chat/completions", data=body) as response:
                await response.content.readany()  # the answer has begun
                async with asyncio.timeout(120):
                    await all_open.wait()
                peak = max(peak, target.rss_bytes())
                text = await response.content.read()
                num_whole += text.endswith(b"data: [DONE]\n\n")

        await asyncio.gather(*(read() for _ in range(num_streams)), return_exceptions=True)
    return num_whole, peak


async def figures(
    model: Path, *, num_requests: int, num_streams: int, stream_s: float = 20.0
) -> list[Figure]:
    """Every row of the table; each stream lasts ``stream_s``."""
    rows: list[Figure] = []
    whole = body_of(model.name, stream=False)
    with tempfile.TemporaryFile() as log:
        with Target(model, answer=_ANSWER, step_s=0, log=log) as target:
            await measure(target, whole, num_requests=200, concurrency=1)  # warm-up
            floor_ms = await client_floor_ms(num_requests)
            alone = await measure(target, whole, num_requests=num_requests, concurrency=1)
            busy = await measure(target, whole, num_requests=num_requests, concurrency=32)
            streamed = await measure(
                target, body_of(model.name, stream=True), num_requests=num_requests, concurrency=32
            )
            rows += [
                Figure("client alone, p50", floor_ms, "ms"),
                Figure("added p50, one at a time", alone.p50_ms - floor_ms, "ms", 1.5),
                Figure("CPU per request, one at a time", alone.cpu_ms, "ms", 1.2),
                Figure("CPU per request, 32 at a time", busy.cpu_ms, "ms", 1.2),
                Figure("requests/s, 32 at a time", busy.per_s, "", 600, is_floor=True),
                Figure("streamed requests/s, 32 at a time", streamed.per_s, ""),
                Figure("memory after", target.rss_bytes() / 2**20, "MiB", 90),
            ]
        answer = " ".join(["word"] * _STREAM_WORDS)
        with Target(model, answer=answer, step_s=stream_s / _STREAM_WORDS, log=log) as target:
            cpu = target.cpu_s()
            body = body_of(model.name, stream=True)
            num_whole, peak = await hold_streams(target, body, num_streams)
            rows += [
                Figure("streams held and ended well", num_whole, "", num_streams, is_floor=True),
                Figure("memory with them", peak / 2**20, "MiB"),
                Figure(
                    "CPU per streamed token",
                    (target.cpu_s() - cpu) * 1e6 / (num_streams * _STREAM_WORDS),
                    "µs",
                ),
            ]
    return rows


def table(rows: Sequence[Figure]) -> str:
    """The rows as text, their targets beside them."""
    lines = []
    for row in rows:
        wanted = ""
        if row.target is not None:
            sign = ">=" if row.is_floor else "<="
            wanted = f"{sign} {row.target:g}  {'met' if row.is_met else 'MISSED'}"
        lines.append(f"{row.name:<36}{row.value:>10.2f} {row.unit:<4}{wanted}")
    return "\n".join(lines)


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1000


def main() -> int:
    """Measure and print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m rorqual.qualify.load")
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/nano-flash"))
    parser.add_argument("--requests", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--streams", type=int, default=1000, help="(default: %(default)s)")
    args = parser.parse_args()
    rows = asyncio.run(figures(args.model, num_requests=args.requests, num_streams=args.streams))
    print(table(rows))
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
