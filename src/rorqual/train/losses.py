"""The pre-training loss of one packed batch and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from rorqual.model.packed import PackedBatch, RouterStats
from rorqual.model.transformer import Transformer
from rorqual.train.conversation import TASKS
from rorqual.train.packing import NO_TARGET


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the auxiliary losses; the main cross entropy has weight 1."""

    mtp: float
    balance: float
    indexer: float


@dataclass(frozen=True, kw_only=True)
class Losses:
    """One batch's losses. ``total`` has the graph; the rest is detached."""

    total: Tensor
    main: float
    """Mean cross entropy in nats per token that must be generated, each counted once."""
    by_task: dict[str, float]
    """The same per task that occurs in the batch."""
    mtp: float
    indexer: float
    router: list[RouterStats]

    def detached(self) -> Losses:
        """The same without the graph."""
        router = [RouterStats(r.load_E.detach(), r.prob_E.detach()) for r in self.router]
        return replace(self, total=self.total.detach(), router=router)


def mtp_targets(batch: PackedBatch) -> Tensor:
    """Targets of the MTP block, [B, T]: the token after the next, within the same sample."""
    targets = batch.targets_BT.roll(-1, dims=1)
    same = batch.sample_BT.roll(-1, dims=1) == batch.sample_BT
    same[:, -1] = False
    return torch.where(same, targets, NO_TARGET)


def balance_loss(router: list[RouterStats]) -> Tensor:
    """Sum over layers of E sum_e load_e prob_e; E experts used evenly give 1 per layer."""
    return torch.stack([len(r.load_E) * (r.load_E * r.prob_E).sum() for r in router]).sum()


def compute_losses(
    model: Transformer, batch: PackedBatch, task_BT: Tensor, weights: LossWeights
) -> Losses:
    """Forward ``batch`` and add up its losses; the head runs only where there is a target."""
    out = model.forward_packed(batch, mtp=weights.mtp > 0, indexer_loss=weights.indexer > 0)
    where = batch.targets_BT != NO_TARGET
    token_loss = _cross_entropy(model, out.hidden_BTD, batch.targets_BT, where)
    main = token_loss.mean()
    weighted = token_loss if batch.weight_BT is None else token_loss * batch.weight_BT[where]
    total = weighted.mean()
    mtp = torch.zeros(())
    if out.mtp_hidden_BTD is not None and weights.mtp > 0:
        further = mtp_targets(batch)
        mtp = _cross_entropy(model, out.mtp_hidden_BTD, further, further != NO_TARGET).mean()
        total = total + weights.mtp * mtp
    indexer = torch.zeros(())
    if out.indexer_loss is not None and weights.indexer > 0:
        indexer = out.indexer_loss
        total = total + weights.indexer * indexer
    if out.router and weights.balance > 0:
        total = total + weights.balance * balance_loss(out.router)
    tasks = task_BT[where]
    detached = token_loss.detach()
    by_task: dict[str, float] = {
        task: float(detached[tasks == index].mean())
        for index, task in enumerate(TASKS)
        if bool((tasks == index).any())
    }
    return Losses(
        total=total,
        main=float(main.detach()),
        by_task=by_task,
        mtp=float(mtp.detach()),
        indexer=float(indexer.detach()),
        router=out.router,
    )


def _cross_entropy(
    model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, where_BT: Tensor
) -> Tensor:
    """Per-token loss at the places marked in ``where_BT``, float32."""
    logits = model.project(hidden_BTD[where_BT])
    return functional.cross_entropy(logits.float(), targets_BT[where_BT], reduction="none")


def backward(
    model: Transformer,
    batch: PackedBatch,
    task_BT: Tensor,
    weights: LossWeights,
    *,
    bf16: bool,
    share: float = 1.0,
) -> Losses:
    """Accumulate ``share`` of the batch's gradient in ``.grad``; returns losses without graph."""
    with torch.autocast(batch.tokens_BT.device.type, torch.bfloat16, enabled=bf16):
        losses = compute_losses(model, batch, task_BT, weights)
    (losses.total * share).backward()
    return losses.detached()
