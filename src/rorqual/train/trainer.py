"""One training step: batch -> loss -> update, on a model with its optimiser."""

from __future__ import annotations

from typing import Any

import torch

from rorqual.errors import TrainingError
from rorqual.model.gate import Gate
from rorqual.model.packed import RouterStats
from rorqual.model.transformer import Transformer
from rorqual.train.batches import Batch
from rorqual.train.losses import Losses, LossWeights, backward
from rorqual.train.optim import Optimizer
from rorqual.train.parallel import GradientWorkers
from rorqual.train.schedule import TrainConfig, learning_rate, loss_weights


class Trainer:
    """A model with its optimiser and place in the run. ``state_dict`` holds all of it."""

    def __init__(self, model: Transformer, config: TrainConfig, device: str) -> None:
        self.model = model.to(device)
        self.config = config
        self.device = device
        self.optimizer = Optimizer(
            model.named_parameters(),
            config.optim,
            newton_schulz_dtype=torch.bfloat16 if config.bf16 else torch.float32,
        )
        self._gates = [m for m in model.modules() if isinstance(m, Gate) and not m.hashed]
        self.workers: GradientWorkers | None = None
        """Other processes to share each batch with; None to compute it here."""
        self.num_steps = 0
        self.num_tokens = 0
        self.num_skipped = 0
        self._num_bad_in_a_row = 0

    def step(self, batch: Batch, progress: float) -> tuple[Losses, float, float]:
        """Loss and update for one batch; returns losses, gradient norm and learning rate.

        A non-finite loss or gradient leaves the weights alone and is counted.

        Raises:
            TrainingError: ``max_bad_steps`` such steps in a row.
        """
        config = self.config
        rate = learning_rate(config, progress, self.num_steps)
        self.optimizer.zero_grad()
        losses = self._backward(batch, loss_weights(config, progress))
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        self.num_steps += 1
        self.num_tokens += batch.pack.num_tokens
        if self._is_good(losses, norm):
            self.optimizer.step(rate)
            self._balance(losses.router)
        return losses, norm, rate

    def _backward(self, batch: Batch, weights: LossWeights) -> Losses:
        pack = batch.pack
        if self.workers is not None:
            return self.workers.backward(pack.batch, pack.task_BT, weights)
        return backward(
            self.model,
            pack.batch.to(self.device),
            pack.task_BT.to(self.device),
            weights,
            bf16=self.config.bf16,
        )

    def _is_good(self, losses: Losses, norm: float) -> bool:
        if bool(torch.isfinite(losses.total)) and norm < float("inf"):
            self._num_bad_in_a_row = 0
            return True
        self.num_skipped += 1
        self._num_bad_in_a_row += 1
        if self._num_bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"training diverged: {self._num_bad_in_a_row} steps in a row with a non-finite "
                f"loss or gradient (step {self.num_steps}); resume from an earlier checkpoint "
                f"with a lower lr_peak"
            )
        return False

    @torch.no_grad()
    def _balance(self, router: list[RouterStats]) -> None:
        """Move each routing bias against its expert's load (auxiliary-loss-free balancing)."""
        for gate, stats in zip(self._gates, router, strict=False):
            gate.bias += self.config.bias_speed * torch.sign(stats.load_E.mean() - stats.load_E)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data that ``load_state_dict`` continues from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_steps = int(state["num_steps"])
        self.num_tokens = int(state["num_tokens"])
        self.num_skipped = int(state["num_skipped"])
