"""Wears a server out: mixed requests, clients that leave at any moment, bodies that are no bodies.

    python -m rorqual.qualify.soak [MODEL] [--minutes M] [--clients N] [--seed S]

Checks that nothing ever answers 500, that no request is stuck, that memory and open files stay flat
after the warm-up, and that the server drains in the end. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from rorqual.qualify.target import Target

MAX_GROWTH = 0.05
"""Of memory after the warm-up."""
_STUCK_S = 30.0
_WARM_UP = 0.4
"""Share of the time before memory is compared."""
_PATH = "/v1/chat/completions"
_ANSWER = " ".join(["word"] * 30)
_STEP_S = 0.01
_SPARE_FILES = 8


@dataclass
class Verdict:
    """What happened; ``problems`` is empty if the server held up."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by kind of request and status."""
    rss_bytes: list[int] = field(default_factory=list)
    """One a second or so."""
    problems: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Of resident memory from the end of the warm-up to the end, as a share."""
        later = self.rss_bytes[int(len(self.rss_bytes) * _WARM_UP) :]
        part = max(1, len(later) // 4)
        return statistics.median(later[-part:]) / statistics.median(later[:part]) - 1


class Client:
    """One client that keeps asking, one way or another, until told to stop."""

    def __init__(
        self, url: str, model: str, session: aiohttp.ClientSession, rng: random.Random
    ) -> None:
        self._url = url
        self._session = session
        self._rng = rng
        self._body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": "When was the harbour station built?"}],
        }

    async def ask(self, verdict: Verdict) -> None:
        """One request of a random kind; its outcome goes into ``verdict``."""
        kinds: Sequence[Callable[[], Awaitable[int]]] = (
            self.whole,
            self.stream,
            self.leave_the_answer,
            self.leave_while_asking,
            self.malformed,
            self.wrong_field,
            self.look,
            self.too_large,
        )
        kind = self._rng.choice(kinds)
        name = kind.__name__
        try:
            async with asyncio.timeout(_STUCK_S):
                status = await kind()
        except TimeoutError:
            verdict.problems.append(f"{name}: no end after {_STUCK_S:g} s")
        except (OSError, aiohttp.ClientError) as error:
            verdict.problems.append(f"{name}: {type(error).__name__}: {error}")
        else:
            verdict.statuses[f"{name} {status}"] += 1
            if status >= 500:
                verdict.problems.append(f"{name}: status {status}")

    async def whole(self) -> int:
        """An answer in one piece."""
        return await self._post(json.dumps(self._body).encode())

    async def stream(self) -> int:
        """A stream, read to its end."""
        body = json.dumps({**self._body, "stream": True}).encode()
        async with self._session.post(self._url + _PATH, data=body) as response:
            text = await response.read()
            is_whole = text.endswith(b"data: [DONE]\n\n")
            return response.status if is_whole else 599

    async def leave_the_answer(self) -> int:
        """Hang up somewhere in an answer, streamed or not."""
        body = json.dumps({**self._body, "stream": self._rng.random() < 0.7}).encode()
        async with self._connection(len(body)) as (reader, writer):
            writer.write(body)
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rng.random() * 0.3):
                    while await reader.read(1024):
                        pass
        return 0

    async def leave_while_asking(self) -> int:
        """Hang up in the middle of the body."""
        body = json.dumps(self._body).encode()
        async with self._connection(len(body)) as (_, writer):
            writer.write(body[: self._rng.randrange(len(body))])
            await writer.drain()
            await asyncio.sleep(self._rng.random() * 0.05)
        return 0

    async def malformed(self) -> int:
        """A body with bytes missing, added or changed."""
        body = bytearray(json.dumps(self._body).encode())
        for _ in range(self._rng.randint(1, 4)):
            at = self._rng.randrange(len(body))
            match self._rng.randrange(3):
                case 0:
                    del body[at:]
                    body += b"{"
                case 1:
                    body[at] = self._rng.randrange(256)
                case _:
                    body[at:at] = self._rng.randbytes(3)
        return await self._post(bytes(body))

    async def wrong_field(self) -> int:
        """A body whose fields are not what they should be."""
        name = self._rng.choice(("messages", "model", "max_tokens", "tools", "stream", "stop"))
        value: Any = self._rng.choice(
            (None, -1, 1e400, "x", [], {}, [[]], [{"role": "user"}], True)
        )
        return await self._post(json.dumps({**self._body, name: value}).encode())

    async def look(self) -> int:
        """Something that is only read, or is not there."""
        path = self._rng.choice(("/health", "/ready", "/metrics", "/v1/models", "/v1/nothing"))
        async with self._session.get(self._url + path) as response:
            await response.read()
            return response.status

    async def too_large(self) -> int:
        """A body that is announced to be larger than any may be."""
        async with self._connection(2**40) as (reader, _):
            line = await reader.readline()
            return int(line.split()[1])

    async def _post(self, body: bytes) -> int:
        async with self._session.post(self._url + _PATH, data=body) as response:
            await response.read()
            return response.status

    @contextlib.asynccontextmanager
    async def _connection(self, num_bytes: int) -> Any:
        """A connection on which a request for ``num_bytes`` of body has begun."""
        address = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            head = f"POST {_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {num_bytes}\r\n\r\n"
            writer.write(head.encode())
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def soak(target: Target, model: str, *, seconds: float, clients: int, seed: int) -> Verdict:
    """Wear ``target`` out for ``seconds`` and then look whether anything is left over."""
    verdict = Verdict()
    ending = asyncio.get_running_loop().time() + seconds
    await _is_idle(target)  # once it answers, it has opened what it needs
    num_files = target.num_open_files()

    async def keep_asking(client: Client) -> None:
        while asyncio.get_running_loop().time() < ending:
            await client.ask(verdict)

    async def keep_watching() -> None:
        while asyncio.get_running_loop().time() < ending:
            await asyncio.sleep(min(1.0, seconds / 30))
            verdict.rss_bytes.append(target.rss_bytes())

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(
            keep_watching(),
            *(
                keep_asking(Client(target.url, model, session, random.Random(f"{seed} {n}")))
                for n in range(clients)
            ),
        )
    if not await _comes_to_rest(target, num_files):
        verdict.problems.append("requests or connections are left after the last client left")
    return verdict


async def _comes_to_rest(target: Target, num_files: int) -> bool:
    """Whether nothing runs and files are closed within the time a stuck request is given."""
    deadline = time.monotonic() + _STUCK_S
    while time.monotonic() < deadline:
        if await _is_idle(target) and target.num_open_files() <= num_files + _SPARE_FILES:
            return True
        await asyncio.sleep(0.1)
    return False


async def _is_idle(target: Target) -> bool:
    """Whether ``target`` works on nothing; leaves no connection behind."""
    async with (
        aiohttp.ClientSession(headers={"connection": "close"}) as session,
        session.get(f"{target.url}/health") as response,
    ):
        return bool((await response.json())["num_running"] == 0)


def run(
    model: Path, *, seconds: float, clients: int, seed: int, max_growth: float = MAX_GROWTH
) -> Verdict:
    """Start a server, wear it out, stop it; everything that went wrong is in the verdict."""
    with tempfile.TemporaryFile() as log:
        with Target(model, answer=_ANSWER, step_s=_STEP_S, log=log) as target:
            verdict = asyncio.run(
                soak(target, model.name, seconds=seconds, clients=clients, seed=seed)
            )
            if (code := target.stop()) != 0:
                verdict.problems.append(f"the server ended with exit code {code}")
        log.seek(0)
        lines = log.read().splitlines()
    verdict.problems += [
        f"log: {line.decode(errors='replace')}"
        for line in lines
        if not line.startswith(b"{") or json.loads(line).get("status", 500) >= 500
    ]
    if verdict.growth > max_growth:
        verdict.problems.append(f"memory grew by {verdict.growth:.1%} after the warm-up")
    return verdict


def main() -> int:
    """Run, and say what happened; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m rorqual.qualify.soak")
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/nano-flash"))
    parser.add_argument("--minutes", type=float, default=30.0, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    verdict = run(args.model, seconds=args.minutes * 60, clients=args.clients, seed=args.seed)
    for name, count in sorted(verdict.statuses.items()):
        print(f"{name:<28}{count:>9}")
    sizes = [size / 2**20 for size in verdict.rss_bytes]
    print(f"memory {min(sizes):.1f} to {max(sizes):.1f} MiB, {verdict.growth:+.1%} after warm-up")
    for problem, count in Counter(verdict.problems).most_common(20):
        print(f"PROBLEM {count}x {problem}")
    print("failed" if verdict.problems else "held up")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
