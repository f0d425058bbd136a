"""What ``/metrics`` says, in the Prometheus text format.

The times between tokens are counted here with a list and a lock, ten times cheaper than the
library's histogram: at a thousand streams that is the hottest path of the process. The library
writes the text.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from starlette.requests import Request
from starlette.responses import Response

from rorqual.server.bridge import Load
from rorqual.server.record import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Histogram:
    """Counts per bucket; any thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value`` as often as ``times`` says."""
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += times
            self._sum += value * times

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """As the library writes it: cumulative counts."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        buckets, so_far = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)


class Metrics:
    """Everything counted since the start. ``report`` on the event loop, times on any thread.

    Args:
        load: the engine's snapshot, taken at each reading.
        is_draining: whether new requests are refused because the server ends.
    """

    def __init__(self, load: Callable[[], Load], is_draining: Callable[[], bool]) -> None:
        self._load = load
        self._is_draining = is_draining
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._num_tool_parse_failures = 0
        self._duration = Histogram(_LONG_S)
        self._ttft = Histogram(_LONG_S)
        self._inter_token = Histogram(_LATENCY_S)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def report(self, record: RequestRecord, method: str, route: str) -> None:
        """Count a request that has ended."""
        known_method = method if method in _METHODS else "other"
        self._requests[known_method, route, str(record.status)] += 1
        self._num_tool_parse_failures += record.num_tool_parse_failures
        if record.finish is None:
            return
        self._duration.observe(record.elapsed_s())
        self._finished[record.finish] += 1
        self._tokens["prompt_hit"] += record.cached_tokens
        self._tokens["prompt_miss"] += record.prompt_tokens - record.cached_tokens
        self._tokens["reasoning"] += record.reasoning_tokens
        self._tokens["answer"] += record.completion_tokens - record.reasoning_tokens

    def first_token(self, seconds: float) -> None:
        """See ``TokenTimes``."""
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """See ``TokenTimes``."""
        self._inter_token.observe(seconds / num_tokens, num_tokens)

    async def endpoint(self, _: Request) -> Response:
        """``GET /metrics``."""
        return Response(self.text(), headers={"content-type": CONTENT_TYPE})

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the library at each reading."""
        load = self._load()
        yield _gauge("rorqual_requests_waiting", "Requests queued in the engine", load.num_waiting)
        yield _gauge("rorqual_requests_running", "Requests in the batch", load.num_running)
        yield _gauge("rorqual_draining", "1 while the server is shutting down", self._is_draining())
        kv_bytes = getattr(load, "cache_bytes", None)  # scripted engines have none
        if kv_bytes is not None:
            yield _gauge("rorqual_kv_bytes", "Memory of all running sequences", kv_bytes)
        yield _counter(
            "rorqual_http_requests",
            "HTTP requests ended; 499: the client left before the answer began",
            ("method", "route", "status"),
            self._requests,
        )
        yield _counter(
            "rorqual_tokens",
            "Tokens by class; prompt_hit were reused from the prefix cache",
            ("class",),
            {(name,): count for name, count in self._tokens.items()},
        )
        yield _counter(
            "rorqual_finished",
            "Answers by how they ended",
            ("reason",),
            {(name,): count for name, count in self._finished.items()},
        )
        yield _counter(
            "rorqual_tool_parse_failures",
            "Tool calls of the model that could not be read",
            (),
            {(): self._num_tool_parse_failures},
        )
        yield self._duration.family("rorqual_answer_seconds", "Arrival of a request to its end")
        yield self._ttft.family(
            "rorqual_time_to_first_token_seconds", "Arrival of a request to its first token"
        )
        yield self._inter_token.family(
            "rorqual_inter_token_seconds", "Time per token after an answer's first"
        )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(
    name: str,
    text: str,
    labels: tuple[str, ...],
    counts: Mapping[Any, int],
) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in list(counts.items()):
        family.add_metric(list(values), count)
    return family
