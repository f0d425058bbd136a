"""A trajectory: a sandbox whose every command is logged, and which goes on after any crash.

A command that finished is answered from the log. One that was only intended is asked of the guest's
journal: it is waited for if it was dispatched, dispatched if it never was. If the guest is gone the
last snapshot is restored; without one the end is a typed error. Nothing is ever run a second time
on a state it has already changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import (
    DivergenceError,
    LostExecError,
    SandboxLostError,
    SandboxRequestError,
    TrajectoryError,
)
from rorqual.sandbox.agent_sandbox import AgentSandbox
from rorqual.sandbox.contract import ExecRequest, ExecResult, as_argv
from rorqual.sandbox.sandbox import SandboxOptions, Snapshot, start_sandbox
from rorqual.sandbox.trajectory.log import (
    Step,
    TrajectoryLog,
    hash_request,
    intent_data,
    last_snapshot,
    logged_request,
    result_data,
    steps_of,
    stored_result,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")

Attach = Callable[[str], Awaitable[AgentSandbox]]


class Trajectory:
    """One trajectory, open in this process; make it with `open_trajectory`."""

    def __init__(
        self, log: TrajectoryLog, name: str, options: SandboxOptions, lock: int, attach: Attach
    ) -> None:
        self.log = log
        self.name = name
        self.options = options
        self.sandbox: AgentSandbox | None = None
        self._lock = lock
        self._attach = attach
        self._place = 0

    @property
    def place(self) -> int:
        """How many commands have been answered since it was opened."""
        return self._place

    # -- the sandbox behind it
    async def _reconnect(self) -> None:
        """Find the sandbox the log speaks of, or make the one it needs."""
        records = self.log.records(self.name)
        opened = next((r for r in reversed(records) if r.kind == "opened"), None)
        if opened is not None:
            try:
                sandbox = await self._attach(opened.data["sandbox"])
            except SandboxLostError:
                pass
            else:
                if sandbox.boot_id == opened.data["boot"]:
                    self.sandbox = sandbox
                    return
                await sandbox.kill()
        snapshot = last_snapshot(records)
        steps = steps_of(records)
        if not steps and snapshot is None:
            await self._open(None, 0)
            return
        if snapshot is None:
            unfinished = [step for step in steps if step.finished is None]
            which = f"command {unfinished[0].intent.place}" if unfinished else "its state"
            raise LostExecError(
                f"the sandbox of trajectory {self.name!r} is gone with {which}, "
                "and there is no snapshot to restore"
            )
        if self._place > snapshot.place:
            raise LostExecError(
                f"the sandbox of trajectory {self.name!r} is gone; the last snapshot is of command "
                f"{snapshot.place}, but {self._place} were already answered: open it again"
            )
        await self._open(snapshot.data["id"], snapshot.place)

    async def recover(self) -> None:
        """Once, before the first command: restore the snapshot if the sandbox is lost.

        Without a snapshot nothing is done yet: what the log can answer, it still answers.
        """
        records = self.log.records(self.name)
        if records and last_snapshot(records) is not None:
            await self._reconnect()

    async def _open(self, snapshot: str | None, place: int) -> None:
        options = self.options
        if snapshot is not None:
            taken = Snapshot(id=snapshot, substrate=options.substrate, kind="files")
            options = dataclasses.replace(options, image=None, snapshot=taken)
            self.log.append(self.name, place, "restored", {"snapshot": snapshot})
        sandbox = await start_sandbox(options)
        assert isinstance(sandbox, AgentSandbox)
        opened = {"sandbox": sandbox.id, "boot": sandbox.boot_id}
        self.log.append(self.name, place, "opened", opened)
        self.sandbox = sandbox

    async def _ready(self) -> AgentSandbox:
        if self.sandbox is None or not self.sandbox.is_alive:
            self.sandbox = None
            await self._reconnect()
        assert self.sandbox is not None
        return self.sandbox

    # -- commands
    async def exec(self, command: str | Sequence[str], **options: Any) -> ExecResult:
        """The next command: from the log if it was answered there, else run and logged.

        Raises:
            DivergenceError: the log holds another request at this place.
            LostExecError: it was under way when the sandbox was lost, and no snapshot undoes it.
        """
        request = self._request(command, **options)
        digest = hash_request(request)
        step = self._logged_step(digest, request)
        if step is not None and step.finished is not None:
            self._place += 1
            return stored_result(request, step.finished)
        sandbox = await self._ready()
        step = self._logged_step(digest, request)  # a restored snapshot may have voided it
        running = None
        if step is not None:
            exec_id = step.intent.exec_id
            assert exec_id is not None
            request = dataclasses.replace(request, exec_id=exec_id)
            running = await sandbox.attach_command(request)
        else:
            exec_id = f"{self.name}:{self._place}:{os.urandom(6).hex()}"
            request = dataclasses.replace(request, exec_id=exec_id)
            intent = intent_data(request)
            self.log.append(
                self.name, self._place, "intent", intent, exec_id=exec_id, request_hash=digest
            )
        if running is None:
            running = await sandbox.dispatch(request, keep_output=True)
        self.log.append(self.name, self._place, "started", {}, exec_id=exec_id)
        result = await running.result()
        data = result_data(result) | {"files": await sandbox.change_digest()}
        self.log.append(
            self.name,
            self._place,
            "finished",
            data,
            exec_id=exec_id,
            stdout=result.stdout,
            stderr=result.stderr,
        )
        sandbox.client.forget(exec_id)
        self._place += 1
        return result

    def _request(self, command: str | Sequence[str], **options: Any) -> ExecRequest:
        if options.get("stdin", b"") is None:
            raise SandboxRequestError("a logged command's stdin is given with it")
        stdin = options.pop("stdin", b"")
        timeout = options.pop("timeout_s", None) or self.options.limits.exec_s
        env = {**self.options.env, **(options.pop("env", None) or {})}
        data = stdin.encode() if isinstance(stdin, str) else stdin
        return ExecRequest(argv=as_argv(command), stdin=data, timeout_s=timeout, env=env, **options)

    def _logged_step(self, digest: str, request: ExecRequest) -> Step | None:
        steps = self.log.steps(self.name)
        if self._place >= len(steps):
            return None
        step = steps[self._place]
        if step.intent.request_hash != digest:
            raise DivergenceError(
                f"trajectory {self.name!r} holds {step.intent.data['argv']} as command "
                f"{self._place}, not {list(request.argv)}; branch it to go another way"
            )
        return step

    async def snapshot(self) -> Snapshot:
        """Keep the present state and log it: what was lost later goes on from here."""
        steps = self.log.steps(self.name)
        existing = last_snapshot(self.log.records(self.name), self._place)
        if self._place < len(steps) and existing is not None and existing.place == self._place:
            return Snapshot(id=existing.data["id"], substrate=self.options.substrate, kind="files")
        if self._place < len(steps):
            raise TrajectoryError(
                f"the sandbox is ahead: {len(steps)} commands ran, {self._place} were asked for"
            )
        sandbox = await self._ready()
        snapshot = await sandbox.snapshot()
        self.log.append(self.name, self._place, "snapshot", {"id": snapshot.id})
        return snapshot

    async def close(self, *, kill: bool = True) -> None:
        """Let go of it; with `kill` its sandbox ends too."""
        if self.sandbox is None and kill:
            opened = [r for r in self.log.records(self.name) if r.kind == "opened"]
            if opened:
                with contextlib.suppress(SandboxLostError):
                    self.sandbox = await self._attach(opened[-1].data["sandbox"])
        if self.sandbox is not None and kill:
            await self.sandbox.kill()
        elif self.sandbox is not None:
            self.sandbox.client.close()
        os.close(self._lock)


async def open_trajectory(
    log: TrajectoryLog, name: str, options: SandboxOptions, *, linger_s: float = 600.0
) -> Trajectory:
    """Open a trajectory, new or resumed from its first command.

    Args:
        linger_s: how long its sandbox waits for a process that died.

    Raises:
        TrajectoryError: another process has it open.
        SandboxRequestError: the name or the substrate does not fit.
    """
    if not _NAME.fullmatch(name):
        raise SandboxRequestError(f"{name!r} is not a trajectory's name: A-Z a-z 0-9 _ . -, <= 32")
    if options.substrate != "container":
        raise SandboxRequestError(f"substrate {options.substrate!r} does not survive its creator")
    options = dataclasses.replace(options, linger_s=max(linger_s, options.linger_s))

    async def attach(id: str) -> AgentSandbox:
        from rorqual.sandbox.container.start import attach_container

        return await attach_container(id, root=options.root)

    path: Path = log.path.with_name(f"{log.path.name}.{name}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise TrajectoryError(f"trajectory {name!r} is open in another process") from None
    trajectory = Trajectory(log, name, options, lock, attach)
    try:
        await trajectory.recover()
    except BaseException:
        os.close(lock)
        raise
    return trajectory


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One command of a replay; `differences` names the fields that came out otherwise."""

    place: int
    argv: list[str]
    differences: tuple[str, ...]


async def replay(log: TrajectoryLog, name: str, options: SandboxOptions) -> list[Replayed]:
    """Run a trajectory's commands again in a fresh sandbox and compare each with the log.

    Raises:
        SandboxRequestError: functions are to run them.
        TrajectoryError: none has finished.
    """
    if options.substrate == "function":
        raise SandboxRequestError("functions run calls, not the commands of a trajectory")
    steps = [step for step in log.steps(name) if step.finished is not None]
    if not steps:
        raise TrajectoryError(f"trajectory {name!r} has no finished command")
    report = []
    sandbox = await start_sandbox(options)
    assert isinstance(sandbox, AgentSandbox)
    async with sandbox:
        for step in steps:
            intent, finished = step.intent.data, step.finished
            assert finished is not None
            request = logged_request(intent)
            running = await sandbox.dispatch(request, keep_output=True)
            data = result_data(await running.result()) | {"files": await sandbox.change_digest()}
            before = finished.data
            names = [n for n in ("returncode", "status", "files") if data[n] != before[n]]
            names += [n for n in ("stdout", "stderr") if data["digests"][n] != before["digests"][n]]
            report.append(Replayed(step.intent.place, intent["argv"], tuple(names)))
    return report
