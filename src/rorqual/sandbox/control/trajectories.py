"""Trajectories over HTTP: run the next command, read the log, replay and compare.

A command is named by its place. One that was answered before is answered from the log, so that a
caller whose connection broke asks again without running anything twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rorqual.errors import RorqualError
from rorqual.sandbox.contract import ExecRequest, ExecResult, as_argv
from rorqual.sandbox.control.failures import AnswerError, answer_to, bad_request, not_found
from rorqual.sandbox.control.machine import MAX_LIFE_S, Machine
from rorqual.sandbox.control.plane import Plane
from rorqual.sandbox.control.rest import exec_options, result_body
from rorqual.sandbox.control.wants import Wanted, json_body
from rorqual.sandbox.sandbox import SandboxOptions
from rorqual.sandbox.trajectory.log import (
    Record,
    TrajectoryLog,
    hash_request,
    logged_request,
    stored_result,
)
from rorqual.sandbox.trajectory.session import Trajectory, open_trajectory, replay

Command = str | list[str]
"""A shell line, or program and arguments."""


class Trajectories:
    """Handlers and the trajectories that are open.

    Their sandboxes live in a directory of their own, where a restart leaves them: the log finds
    them again, or their own time (`MAX_LIFE_S`, and `linger_s` without us) ends them.
    """

    def __init__(self, plane: Plane, machine: Machine, log: TrajectoryLog) -> None:
        self._plane = plane
        self._machine = machine
        self._log = log
        self._open: dict[str, Trajectory] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._replays: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._options = SandboxOptions(
            root=machine.data / "trajectories", ttl_s=MAX_LIFE_S, linger_s=machine.linger_s
        )
        plane.other_usage = self._usage

    def routes(self) -> list[Route]:
        """Every path of this module."""
        one = "/trajectories/{name}"
        return [
            Route("/trajectories", self.list, methods=["GET"]),
            Route(one, self.get, methods=["GET"]),
            Route(one, self.end, methods=["DELETE"]),
            Route(f"{one}/exec", self.exec, methods=["POST"]),
            Route(f"{one}/snapshot", self.snapshot, methods=["POST"]),
            Route(f"{one}/replay", self.start_replay, methods=["POST"]),
            Route(f"{one}/replay", self.replay_status, methods=["GET"]),
        ]

    async def close(self, *, keep: bool) -> None:
        """Let go of all; without `keep` their sandboxes end."""
        for task in self._replays.values():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        for trajectory in self._open.values():
            await trajectory.close(kill=not keep)
        self._log.close()

    def _usage(self) -> tuple[int, int]:
        """How many sandboxes trajectories have here, and the bytes promised to them."""
        folder = self._machine.data / "trajectories" / "sandboxes"
        count = sum(1 for _ in folder.iterdir()) if folder.exists() else 0
        limits = self._options.limits
        return count, count * (limits.memory_bytes + limits.disk_bytes)

    @staticmethod
    def _name(request: Request) -> str:
        """One key's trajectories are not another's."""
        owner, name = request.scope["owner"], request.path_params["name"]
        if len(name) > 18 and owner:
            raise bad_request("a trajectory's name has at most 18 characters")
        return f"{owner}.{name}" if owner else name

    def _records(self, request: Request) -> list[Record]:
        records = self._log.records(self._name(request))
        if not records:
            raise not_found(f"there is no trajectory {request.path_params['name'][:80]!r}")
        return records

    # -- reading
    async def list(self, request: Request) -> Response:
        """Names, newest first."""
        owner = request.scope["owner"]
        prefix = f"{owner}." if owner else ""
        body = [
            {"name": name.removeprefix(prefix), "records": count, "last_s": at_s}
            for name, count, at_s in self._log.trajectories()
            if name.startswith(prefix)
        ]
        return JSONResponse(body)

    async def get(self, request: Request) -> Response:
        """The log of one, without output."""
        body = [
            {
                "sequence": record.sequence,
                "at_s": record.at_s,
                "place": record.place,
                "kind": record.kind,
                "exec_id": record.exec_id,
                "request_hash": record.request_hash,
                "data": record.data,
            }
            for record in self._records(request)
        ]
        return JSONResponse(body)

    # -- running
    async def exec(self, request: Request) -> Response:
        """Run the command of a place, or answer it from the log."""
        body = await json_body(request, limit=16 << 20)
        command, options = exec_options(body)
        place = body.get("place")
        if place is not None and (isinstance(place, bool) or not isinstance(place, int)):
            raise bad_request("place is not a whole number")
        name = self._name(request)
        async with self._locks.setdefault(name, asyncio.Lock()):
            trajectory = await self._trajectory(name, request.scope["owner"])
            result = await self._run(trajectory, place, command, options)
        self._plane.metrics.commands.labels("replayed" if result.replayed else result.status).inc()
        return JSONResponse({**result_body(result), "next_place": trajectory.place})

    async def _trajectory(self, name: str, owner: str) -> Trajectory:
        if (trajectory := self._open.get(name)) is not None:
            return trajectory
        if not self._log.records(name):
            self._plane.admit_other(owner, Wanted())
        trajectory = await open_trajectory(
            self._log, name, self._options, linger_s=self._machine.linger_s
        )
        self._open[name] = trajectory
        return trajectory

    async def _run(
        self,
        trajectory: Trajectory,
        place: int | None,
        command: Command,
        options: dict[str, Any],
    ) -> ExecResult:
        steps = self._log.steps(trajectory.name)
        wanted = len(steps) if place is None else place
        if place is None and steps and steps[-1].finished is None:
            wanted -= 1  # the last one is still to be answered
        if not 0 <= wanted <= len(steps):
            raise bad_request(f"place {wanted} is not one of 0 to {len(steps)}", "place")
        for step in steps[trajectory.place : wanted]:  # after a restart: answered from the log
            request = logged_request(step.intent.data)
            await trajectory.exec(
                request.argv,
                stdin=request.stdin or b"",
                env=dict(request.env),
                cwd=request.cwd,
                user=request.user,
                timeout_s=request.timeout_s,
                merge=request.merge,
            )
        if wanted < trajectory.place:
            return self._from_log(trajectory, wanted, command, options)
        return await trajectory.exec(command, **options)

    def _from_log(
        self,
        trajectory: Trajectory,
        place: int,
        command: Command,
        options: dict[str, Any],
    ) -> ExecResult:
        step = self._log.steps(trajectory.name)[place]
        request = _request(command, options, self._options.limits.exec_s)
        if step.finished is None or step.intent.request_hash != hash_request(request):
            message = f"place {place} of the trajectory holds {step.intent.data['argv']}"
            raise AnswerError(status=409, error_code="divergence", message=message)
        return stored_result(request, step.finished)

    async def snapshot(self, request: Request) -> Response:
        """Keep the present state; what is lost later goes on from here."""
        name = self._name(request)
        self._records(request)
        async with self._locks.setdefault(name, asyncio.Lock()):
            trajectory = await self._trajectory(name, request.scope["owner"])
            snapshot = await trajectory.snapshot()
        return JSONResponse({"id": snapshot.id, "place": trajectory.place}, 201)

    async def end(self, request: Request) -> Response:
        """End its sandbox; the log stays."""
        name = self._name(request)
        self._records(request)
        async with self._locks.setdefault(name, asyncio.Lock()):
            trajectory = await self._trajectory(name, request.scope["owner"])
            del self._open[name]
            await trajectory.close()
        return Response(status_code=204)

    # -- replay
    async def start_replay(self, request: Request) -> Response:
        """Run it again in a fresh sandbox, in the background; 202."""
        name = self._name(request)
        self._records(request)
        running = self._replays.get(name)
        if running is None or running.done():
            self._plane.admit_other(request.scope["owner"], Wanted())
            self._replays[name] = asyncio.create_task(self._replay(name))
        return JSONResponse({"state": "running"}, 202)

    async def _replay(self, name: str) -> dict[str, Any]:
        options = SandboxOptions(root=self._machine.data / "trajectories", ttl_s=MAX_LIFE_S)
        report = await replay(self._log, name, options)
        steps = [
            {"place": step.place, "argv": step.argv, "differences": list(step.differences)}
            for step in report
        ]
        num_different = sum(bool(step.differences) for step in report)
        return {"state": "done", "commands": len(steps), "differ": num_different, "steps": steps}

    async def replay_status(self, request: Request) -> Response:
        """How the last replay stands, or what it found."""
        self._records(request)
        task = self._replays.get(self._name(request))
        if task is None:
            raise not_found("no replay was started")
        if not task.done():
            return JSONResponse({"state": "running"})
        error = task.exception()
        if isinstance(error, RorqualError):
            failure = answer_to(error)
            body = {"state": "failed", "message": failure.message, "fault": failure.fault}
            return JSONResponse(body)
        return JSONResponse(task.result())


def _request(command: Command, options: dict[str, Any], exec_s: float) -> ExecRequest:
    """The request as a trajectory makes it of the same words: its hash must be the same."""
    values = dict(options)
    return ExecRequest(
        argv=as_argv(command),
        stdin=values.pop("stdin").encode(),
        timeout_s=values.pop("timeout_s") or exec_s,
        env=values.pop("env") or {},
        **values,
    )
