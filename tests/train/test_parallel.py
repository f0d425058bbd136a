"""A batch shared between processes gives the gradients of one process."""

from __future__ import annotations

import pytest
import torch

from rorqual.errors import TrainingError
from rorqual.model.packed import PackedBatch
from rorqual.train.losses import LossWeights, compute_losses
from rorqual.train.parallel import GradientWorkers
from tests.model.conftest import SMALL
from tests.model.conftest import build as build_double

WEIGHTS = LossWeights(mtp=0.0, balance=0.0, indexer=0.0)


def batch() -> tuple[PackedBatch, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SMALL.vocab_size, (3, 128), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[torch.rand(tokens.shape, generator=generator) < 0.5] = -100
    position = torch.arange(128).expand(3, 128).contiguous()
    return PackedBatch(tokens, targets, torch.zeros_like(tokens), position), torch.zeros_like(
        tokens
    )


def test_two_processes_give_the_gradients_of_one() -> None:
    model = build_double(SMALL).float()
    rows, task = batch()
    alone = compute_losses(model, rows, task, WEIGHTS)
    alone.total.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    with GradientWorkers(model, 2, bf16=False, compiled=False) as workers:
        for _ in range(2):  # the second time shows that nothing is left over from the first
            for parameter in model.parameters():
                parameter.grad = None
            together = workers.backward(rows, task, WEIGHTS)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert together.main == pytest.approx(alone.main, rel=1e-5)
        assert together.by_task == pytest.approx(alone.by_task, rel=1e-5)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
        for process in workers._processes:
            process.kill()
            process.join()
        with pytest.raises(TrainingError, match="gradient process died"):
            workers.backward(rows, task, WEIGHTS)
