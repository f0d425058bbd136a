"""Gradients of one batch computed by several processes on one machine.

A step of a small network is many short operations, which threads share badly. Here each process
takes some rows of the batch with one copy of the parameters in shared memory, and the first adds
up the gradients. The optimiser, the data and the checkpoints know nothing of it.

A batch's loss is then the mean of its parts' losses weighted by their numbers of targets: the same
cross entropy as in one process, while auxiliary means are taken per part.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

import torch
import torch.multiprocessing as mp
from torch import Tensor

from rorqual.errors import TrainingError
from rorqual.model.packed import PackedBatch, RouterStats
from rorqual.model.transformer import Transformer
from rorqual.train.allocator import keep_memory
from rorqual.train.losses import Losses, LossWeights, backward
from rorqual.train.packing import NO_TARGET

_STOP_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some rows of a batch, with their share of all targets."""

    batch: PackedBatch
    task_BT: Tensor
    weights: LossWeights
    share: float


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a worker says of its part; the gradients are in shared memory."""

    losses: Losses
    has_grad: list[bool]


class GradientWorkers:
    """``num_processes - 1`` helpers of the calling process. Use in ``with``.

    Create it before the model is compiled; parameters and buffers move to shared memory.
    """

    def __init__(
        self, model: Transformer, num_processes: int, *, bf16: bool, compiled: bool
    ) -> None:
        self._model = model.share_memory()
        self._bf16 = bf16
        context = mp.get_context("spawn")
        self._gradients: list[list[Tensor]] = []
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(num_processes - 1):
            gradients = [torch.zeros_like(p).share_memory_() for p in model.parameters()]
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(model, gradients, theirs, bf16, compiled),
                daemon=True,
                name="gradients",
            )
            process.start()
            theirs.close()
            self._gradients.append(gradients)
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_STOP_S)
            if process.is_alive():
                process.kill()

    def backward(self, batch: PackedBatch, task_BT: Tensor, weights: LossWeights) -> Losses:
        """Accumulate ``.grad`` over the whole batch; the returned total has no graph.

        Raises:
            TrainingError: a worker died.
        """
        parts = _split(batch, task_BT, weights, len(self._pipes) + 1)
        try:
            for pipe, part in zip(self._pipes, parts[1:], strict=False):
                pipe.send(part)
            losses = [_backward(self._model, parts[0], bf16=self._bf16)]
            for pipe, gradients, _ in zip(self._pipes, self._gradients, parts[1:], strict=False):
                report: _Report = pipe.recv()
                losses.append(report.losses)
                self._add(gradients, report.has_grad)
        except (EOFError, OSError):
            raise TrainingError(
                "a gradient process died (out of memory?); resume with fewer processes"
            ) from None
        return _merge(losses, [part.share for part in parts])

    @torch.no_grad()
    def _add(self, gradients: list[Tensor], has_grad: list[bool]) -> None:
        for parameter, gradient, is_there in zip(
            self._model.parameters(), gradients, has_grad, strict=True
        ):
            if not is_there:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad += gradient


def _split(
    batch: PackedBatch, task_BT: Tensor, weights: LossWeights, num_parts: int
) -> list[_Part]:
    """Rows dealt out evenly; fewer parts where there are fewer rows."""
    targets_BT = batch.targets_BT
    total = int((targets_BT != NO_TARGET).sum())
    parts = []
    for rows in torch.arange(targets_BT.shape[0]).tensor_split(num_parts):
        count = int((targets_BT[rows] != NO_TARGET).sum())
        if count == 0:
            continue
        part = PackedBatch(
            batch.tokens_BT[rows],
            targets_BT[rows],
            batch.sample_BT[rows],
            batch.position_BT[rows],
            None if batch.weight_BT is None else batch.weight_BT[rows],
        )
        parts.append(_Part(batch=part, task_BT=task_BT[rows], weights=weights, share=count / total))
    return parts


def _backward(model: Transformer, part: _Part, *, bf16: bool) -> Losses:
    return backward(model, part.batch, part.task_BT, part.weights, bf16=bf16, share=part.share)


def _merge(losses: list[Losses], shares: list[float]) -> Losses:
    """Averages weighted by ``shares``; per task over the parts that have it."""

    def mean(values: list[float]) -> float:
        return sum(v * s for v, s in zip(values, shares, strict=True))

    by_task: dict[str, float] = {}
    for task in dict.fromkeys(t for part in losses for t in part.by_task):
        having = [
            (p.by_task[task], s) for p, s in zip(losses, shares, strict=True) if task in p.by_task
        ]
        by_task[task] = sum(v * s for v, s in having) / sum(s for _, s in having)
    router = [
        RouterStats(
            sum((s.load_E * w for s, w in zip(layer, shares, strict=True)), torch.zeros(())),
            sum((s.prob_E * w for s, w in zip(layer, shares, strict=True)), torch.zeros(())),
        )
        for layer in zip(*(part.router for part in losses), strict=True)
    ]
    return Losses(
        total=sum((p.total * s for p, s in zip(losses, shares, strict=True)), torch.zeros(())),
        main=mean([p.main for p in losses]),
        by_task=by_task,
        mtp=mean([p.mtp for p in losses]),
        indexer=mean([p.indexer for p in losses]),
        router=router,
    )


def _work(
    model: Transformer, gradients: list[Tensor], pipe: Connection, bf16: bool, compiled: bool
) -> None:
    """A worker's life: parts in, gradients out, until the other end closes."""
    keep_memory()
    torch.set_num_threads(1)
    if compiled:
        model.compile_for_training()
    while True:
        try:
            part: _Part = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        for parameter in model.parameters():
            parameter.grad = None
        losses = _backward(model, part, bf16=bf16)
        has_grad = []
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            has_grad.append(parameter.grad is not None)
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
        pipe.send(_Report(losses=losses, has_grad=has_grad))
