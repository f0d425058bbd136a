"""The life of sandboxes: made once per client token, leased, paused, ended, found after a crash.

One event loop owns everything here. Decisions are made between two awaits, on rows that are
committed before they are acted on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from typing import Literal

from rorqual.errors import RorqualError, SandboxError
from rorqual.sandbox.control.admission import Policy, Refusal, admit, available_memory_bytes
from rorqual.sandbox.control.failures import AnswerError, bad_request, not_found, over_capacity
from rorqual.sandbox.control.hosts import Hosts, Started
from rorqual.sandbox.control.machine import MAX_LIFE_S, with_env
from rorqual.sandbox.control.metrics import Metrics
from rorqual.sandbox.control.pool import WarmPool, Watermarks
from rorqual.sandbox.control.store import Row, Store
from rorqual.sandbox.control.wants import Wanted
from rorqual.sandbox.sandbox import Sandbox

_log = logging.getLogger(__name__)
EndReason = Literal["killed", "expired", "lost", "failed", "shutdown"]

TICK_S = 0.5
"""How often leases are looked at."""
REMEMBERED_S = 86_400.0
"""How long ended sandboxes and their client tokens are remembered."""
_POOL_OWNER = "\0warm"


class Plane:
    """All sandboxes of one control plane. `open` it before use, `close` it after."""

    def __init__(
        self,
        store: Store,
        hosts: Hosts,
        policy: Policy | None = None,
        *,
        marks: Watermarks | None = None,
        clock: Callable[[], float] = time.time,
        free_bytes: Callable[[], int | None] = available_memory_bytes,
    ) -> None:
        self.policy = policy or Policy()
        self.hosts = hosts
        self.pool = WarmPool(Wanted(), marks or Watermarks())
        self.metrics = Metrics(store.active, hosts.states, self.policy.max_memory_bytes)
        self._store = store
        self._clock = clock
        self._free_bytes = free_bytes
        self._live: dict[str, Sandbox] = {}
        self._making: dict[str, asyncio.Task[Row]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._reaper: asyncio.Task[None] | None = None
        self.other_usage: Callable[[], tuple[int, int]] = lambda: (0, 0)

    # -- start and end of the control plane
    async def open(self, *, reap: bool = True) -> None:
        """Adopt or end everything an earlier control plane left, then watch the leases."""
        rows = self._store.active()
        found = await self.hosts.recover(rows)
        self.metrics.recovered.labels("orphan").inc(found.num_orphans)
        for row in rows:
            await self._recover(row, found.sandboxes.get(row.id))
        if reap:
            self._reaper = asyncio.create_task(self._watch())

    async def _recover(self, row: Row, sandbox: Sandbox | None) -> None:
        if sandbox is not None and row.state == "warm" and row.request_hash != self._shape():
            await sandbox.kill()  # the pool holds something else now
            sandbox = None
        if sandbox is None:
            self.metrics.recovered.labels("lost").inc()
            self._mark_ended(row, "lost")
            return
        self.metrics.recovered.labels("adopted").inc()
        self._live[row.id] = with_env(sandbox, row.env)
        if row.state == "warm":
            self.pool.ready.append(row.id)

    async def close(self, *, keep: bool = False) -> None:
        """End every sandbox; with `keep` containers wait for the next control plane instead."""
        if self._reaper is not None:
            self._reaper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reaper
        for task in list(self._making.values()):
            with contextlib.suppress(Exception):
                await task
        rows = {row.id: row for row in self._store.active()}
        for id, sandbox in list(self._live.items()):
            if keep and sandbox.options.linger_s > 0:
                continue
            await self._end(rows[id], "shutdown")
        self._live.clear()
        await self.hosts.close(keep=keep)
        self._store.close()

    # -- creation
    async def create(self, owner: str, wanted: Wanted) -> Row:
        """A sandbox for `owner`; the same client token twice is the same sandbox.

        Raises:
            AnswerError: 409 for a token used otherwise, 429 with a reason, 400 for a long lease.
            SandboxError: it could not be started.
        """
        self._check_lease(wanted.lease_s)
        digest = wanted.digest()
        if wanted.client_token is not None:
            row = self._store.by_client_token(owner, wanted.client_token)
            if row is not None:
                return await self._made_before(row, digest)
        row = self._claim(owner, wanted, digest)
        if row is not None:
            self.metrics.created.labels("warm").inc()
            return row
        await self._make_room(owner, wanted)
        row = self._new_row(owner, wanted, digest)
        self._store.add(row)
        task = asyncio.create_task(self._make(row, wanted))
        self._making[row.id] = task
        task.add_done_callback(lambda _: self._making.pop(row.id, None))
        made = await asyncio.shield(task)  # a caller that hangs up does not undo it: it has a lease
        self.metrics.created.labels("cold").inc()
        return made

    async def _made_before(self, row: Row, digest: str) -> Row:
        if row.request_hash != digest:
            message = "this Idempotency-Key was used for a different request"
            raise AnswerError(status=409, error_code="idempotency_mismatch", message=message)
        if (task := self._making.get(row.id)) is not None:
            return await asyncio.shield(task)
        if not row.is_live:
            message = f"the sandbox of this Idempotency-Key has ended: {row.end_reason}"
            raise AnswerError(status=409, error_code="idempotency_ended", message=message)
        return row

    def _claim(self, owner: str, wanted: Wanted, digest: str) -> Row | None:
        """One of the pool, if it fits and the caller may have one."""
        if not self.pool.fits(wanted):
            return None
        while (id := self.pool.take()) is not None:
            row, sandbox = self._store.get(id), self._live.get(id)
            if row is None or sandbox is None or not sandbox.is_alive:
                continue  # the reaper sees to it
            if (refusal := self._admission(owner, wanted, without=id)) is not None:
                self.pool.ready.insert(0, id)
                self.metrics.refused.labels(refusal.reason).inc()
                raise over_capacity(refusal)
            fresh = self._new_row(owner, wanted, digest)
            changes = {
                name: getattr(fresh, name)
                for name in ("owner", "access_token", "started_s", "lease_end_s", "metadata")
            }
            changes |= {"env": fresh.env, "client_token": fresh.client_token}
            changes |= {"pause_on_timeout": fresh.pause_on_timeout, "request_hash": digest}
            with_env(sandbox, wanted.env)
            return self._store.update(row, state="running", **changes)
        return None

    async def _make_room(self, owner: str, wanted: Wanted) -> None:
        """Admit, or raise 429; a warm sandbox gives way to one that is wanted."""
        while (refusal := self._admission(owner, wanted)) is not None:
            if refusal.reason == "quota" or not await self._end_spare():
                self.metrics.refused.labels(refusal.reason).inc()
                raise over_capacity(refusal)

    async def _end_spare(self) -> bool:
        """End a warm sandbox, if there is one."""
        spare = self.pool.take()
        row = self._store.get(spare) if spare is not None else None
        if row is not None:
            await self._end(row, "killed")
        return row is not None

    async def _start(self, row: Row, wanted: Wanted, *, warm: bool) -> Started:
        """Start it where there is room; a warm one gives way."""
        while True:
            try:
                return await self.hosts.start(row.id, wanted)
            except AnswerError as error:
                if warm:
                    raise
                if error.status != 429 or not await self._end_spare():
                    self.metrics.refused.labels(error.error_code).inc()
                    raise

    def _admission(self, owner: str, wanted: Wanted, without: str = "") -> Refusal | None:
        other_count, other_bytes = self.other_usage()
        return admit(
            self.policy,
            [row for row in self._store.active() if row.id != without],
            owner=owner,
            need_bytes=wanted.need_bytes,
            free_bytes=self._free_bytes(),
            now_s=self._clock(),
            other_count=other_count,
            other_bytes=other_bytes,
        )

    def admit_other(self, owner: str, wanted: Wanted) -> None:
        """Raise 429 if a sandbox that is not kept here would not fit."""
        if (refusal := self._admission(owner, wanted)) is not None:
            self.metrics.refused.labels(refusal.reason).inc()
            raise over_capacity(refusal)

    def _new_row(self, owner: str, wanted: Wanted, digest: str) -> Row:
        now = self._clock()
        return Row(
            id=secrets.token_hex(10),
            owner=owner,
            state="creating",
            template=wanted.template,
            substrate=wanted.substrate,
            access_token=secrets.token_urlsafe(24),
            started_s=now,
            lease_end_s=now + wanted.lease_s,
            memory_bytes=wanted.limits.memory_bytes,
            disk_bytes=wanted.limits.disk_bytes,
            cpus=wanted.limits.cpus,
            pause_on_timeout=wanted.pause_on_timeout,
            metadata=wanted.metadata,
            env=wanted.env,
            client_token=wanted.client_token,
            request_hash=digest,
        )

    async def _make(self, row: Row, wanted: Wanted, *, warm: bool = False) -> Row:
        started = time.perf_counter()
        try:
            host, sandbox = await self._start(row, wanted, warm=warm)
        except BaseException:
            self._mark_ended(row, "failed")
            raise
        self.metrics.start_s.observe(time.perf_counter() - started)
        try:
            state = "warm" if warm else "running"
            row = self._store.update(row, state=state, guest=sandbox.id, host=host)
        except BaseException:
            await sandbox.kill()
            raise
        self._live[row.id] = with_env(sandbox, row.env)
        return row

    # -- use
    def row(self, id: str, owner: str) -> Row:
        """A live sandbox of this caller; 404 for all others."""
        row = self._store.get(id)
        if row is None or not row.is_live or row.owner != owner:
            raise not_found(f"there is no sandbox {id[:80]!r}")
        return row

    def rows(self, owner: str) -> list[Row]:
        """Every live sandbox of this caller, oldest first."""
        return [row for row in self._store.active() if row.is_live and row.owner == owner]

    def by_access_token(self, id: str, token: str) -> Row | None:
        """The live sandbox whose own token this is."""
        row = self._store.get(id)
        if row is None or not row.is_live:
            return None
        same = secrets.compare_digest(row.access_token.encode(), token.encode())
        return row if same else None

    def exists(self, id: str) -> bool:
        """Whether it lives, whoever's it is."""
        row = self._store.get(id)
        return row is not None and row.is_live

    def is_guest(self, id: str, sandbox: Sandbox) -> bool:
        """Whether `sandbox` is the one of row `id`."""
        return self._live.get(id) is sandbox

    async def use(self, row: Row) -> Sandbox:
        """The running sandbox of a row; 409 while it is paused."""
        if row.state == "paused":
            message = f"sandbox {row.id} is paused; resume it first"
            raise AnswerError(status=409, error_code="paused", message=message)
        sandbox = self._live.get(row.id)
        if sandbox is None or not sandbox.is_alive:
            await self._end(row, "lost")
            raise not_found(f"sandbox {row.id} is gone")
        return sandbox

    # -- leases
    def _check_lease(self, lease_s: float) -> None:
        if lease_s > self.policy.max_lease_s:
            most = self.policy.max_lease_s
            raise bad_request(f"a lease of {lease_s:g} s is over the limit of {most:g}")

    def set_lease(self, row: Row, lease_s: float, *, only_extend: bool = False) -> Row:
        """Let it live this long from now."""
        self._check_lease(lease_s)
        end = self._clock() + lease_s
        if only_extend:
            end = max(end, row.lease_end_s)
        if end > row.started_s + MAX_LIFE_S:
            raise bad_request(f"no sandbox lives longer than {MAX_LIFE_S:g} s")
        return self._store.update(row, lease_end_s=end)

    async def pause(self, row: Row) -> Row:
        """Freeze it; it keeps its memory, and its lease becomes the longest allowed."""
        async with self._lock_of(row):
            row = self.row(row.id, row.owner)
            if row.state == "paused":
                message = f"sandbox {row.id} is paused already"
                raise AnswerError(status=409, error_code="paused", message=message)
            await (await self.use(row)).pause()
            end = min(self._clock() + self.policy.max_lease_s, row.started_s + MAX_LIFE_S)
            return self._store.update(row, state="paused", lease_end_s=end)

    async def resume(self, row: Row, lease_s: float) -> Row:
        """Let it go on, with a new lease."""
        self._check_lease(lease_s)
        async with self._lock_of(row):
            row = self.row(row.id, row.owner)
            if row.state == "paused":
                sandbox = self._live.get(row.id)
                if sandbox is None:
                    raise not_found(f"sandbox {row.id} is gone")
                await sandbox.resume()
                row = self._store.update(row, state="running", lease_end_s=0.0)
            return self.set_lease(row, lease_s, only_extend=True)

    def _lock_of(self, row: Row) -> asyncio.Lock:
        return self._locks.setdefault(row.id, asyncio.Lock())

    # -- ends
    async def kill(self, row: Row) -> None:
        """End it now."""
        await self._end(row, "killed")

    async def _end(self, row: Row, reason: EndReason) -> None:
        # First the row: if we die now, the container is nobody's and goes at the next start.
        self._mark_ended(row, reason)
        self._locks.pop(row.id, None)
        sandbox = self._live.pop(row.id, None)
        if row.id in self.pool.ready:
            self.pool.ready.remove(row.id)
        try:
            if sandbox is not None:
                if row.state == "paused":
                    with contextlib.suppress(SandboxError):
                        await sandbox.resume()
                await sandbox.kill()
            else:
                await self.hosts.end(row)
        except (SandboxError, OSError, TimeoutError) as error:
            _log.warning("sandbox %s did not end in order: %s", row.id, error)
            await self._end_remains(row)

    async def _end_remains(self, row: Row) -> None:
        try:
            await self.hosts.end(row)
        except (SandboxError, OSError) as error:
            _log.error("%s; 'rorqual sandbox sweep' tries again", error)

    def _mark_ended(self, row: Row, reason: EndReason) -> None:
        self.metrics.ended.labels(reason).inc()
        # A creation that failed, or whose sandbox never was, may be tried again under its name.
        token = None if reason == "failed" or row.guest is None else row.client_token
        self._store.update(
            row, state="ended", ended_s=self._clock(), end_reason=reason, client_token=token
        )

    # -- watching
    async def _watch(self) -> None:
        while True:
            try:
                await self.reap()
                await self.refill()
            except Exception:  # the watch itself must go on
                _log.exception("watching the leases")
            await asyncio.sleep(TICK_S)

    async def reap(self) -> None:
        """End (or pause) what is over its time, and notice what ended by itself."""
        now = self._clock()
        for row in self._store.active():
            if row.state == "creating":
                continue
            sandbox = self._live.get(row.id)
            if sandbox is None or not sandbox.is_alive:
                await self._end(row, "lost")
            elif row.lease_end_s <= now:
                can_pause = row.state == "running" and sandbox.capabilities.pause
                if row.pause_on_timeout and can_pause:
                    with contextlib.suppress(AnswerError):  # it was paused or ended meanwhile
                        await self.pause(row)
                else:
                    await self._end(row, "expired")
        self._store.forget_ended(now - REMEMBERED_S)

    def _shape(self) -> str:
        return self.pool.wanted.shape()

    async def refill(self) -> None:
        """Start warm sandboxes while the pool wants some and they fit."""
        wanted = self.pool.wanted
        while self.pool.needs_one and self._admission(_POOL_OWNER, wanted) is None:
            row = self._new_row(_POOL_OWNER, wanted, self._shape())
            life = {"lease_end_s": row.started_s + MAX_LIFE_S / 2}
            self._store.add(row)
            try:
                row = await self._make(self._store.update(row, **life), wanted, warm=True)
            except AnswerError:
                return  # no host has room now
            except RorqualError as error:
                _log.warning("no warm sandbox: %s", error)
                return
            self.pool.ready.append(row.id)
