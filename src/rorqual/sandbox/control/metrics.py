"""What ``/metrics`` says, in the Prometheus text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Count

from rorqual.sandbox.control.hosts import HostState
from rorqual.sandbox.control.store import Row

_START_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_EXEC_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Everything counted since the start; `rows` and `hosts` are read at each exposition."""

    def __init__(
        self,
        rows: Callable[[], Sequence[Row]],
        hosts: Callable[[], Sequence[HostState]],
        max_bytes: int,
    ) -> None:
        self._rows = rows
        self._hosts = hosts
        self._registry = registry = CollectorRegistry()
        self.created = Count(
            "rorqual_sandboxes_created", "Sandboxes handed out", ["how"], registry=registry
        )
        self.ended = Count(
            "rorqual_sandboxes_ended", "Sandboxes ended", ["reason"], registry=registry
        )
        self.refused = Count(
            "rorqual_sandbox_refusals", "Creations answered 429", ["reason"], registry=registry
        )
        self.recovered = Count(
            "rorqual_sandboxes_recovered", "Found at the start", ["as"], registry=registry
        )
        self.commands = Count(
            "rorqual_sandbox_commands", "Commands by how they ended", ["status"], registry=registry
        )
        self.start_s = Histogram(
            "rorqual_sandbox_start_seconds", "To start one", buckets=_START_S, registry=registry
        )
        self.command_s = Histogram(
            "rorqual_sandbox_command_seconds", "Of commands", buckets=_EXEC_S, registry=registry
        )
        self._live = Gauge("rorqual_sandboxes", "Not ended", ["state"], registry=registry)
        self._up = Gauge(
            "rorqual_sandbox_host_up", "1 if it answers", ["host", "address"], registry=registry
        )
        self._on_host = Gauge(
            "rorqual_sandboxes_on_host", "Not ended, by host", ["host"], registry=registry
        )
        self._promised = Gauge(
            "rorqual_sandbox_promised_bytes", "Memory and disk limits of all", registry=registry
        )
        Gauge("rorqual_sandbox_budget_bytes", "What may be promised", registry=registry).set(
            max_bytes
        )

    def text(self) -> bytes:
        """The exposition."""
        rows = self._rows()
        states = Counter(row.state for row in rows)
        for state in ("creating", "warm", "running", "paused"):
            self._live.labels(state).set(states[state])
        self._up.clear()  # a host that left is no series any more
        self._on_host.clear()
        on_host = Counter(row.host for row in rows)
        for host in self._hosts():
            self._up.labels(host.name, host.address).set(host.is_up)
            self._on_host.labels(host.name).set(on_host[host.name])
        self._promised.set(sum(row.memory_bytes + row.disk_bytes for row in rows))
        return generate_latest(self._registry)
