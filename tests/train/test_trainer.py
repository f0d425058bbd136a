"""One step and many: losses fall, bad steps are skipped, experts are balanced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.errors import TrainingError
from rorqual.model.gate import Gate
from rorqual.train.batches import Batch, BatchState
from rorqual.train.conversation import Encoded
from rorqual.train.data import StreamState
from rorqual.train.losses import LossWeights, compute_losses
from rorqual.train.packing import NO_TARGET, pack
from rorqual.train.schedule import Stage, TrainConfig
from rorqual.train.trainer import Trainer

from .conftest import EASY, SMALL, small_model

VOCAB = 64
CONFIG = TrainConfig(
    max_steps=100,
    minutes=None,
    tokens_per_step=1280,
    stages=(Stage(until=1.0, difficulty=EASY),),
    warmup_steps=5,
    lr_peak=2e-2,
    decay_start=1.0,
    bf16=False,
    compile=False,
    max_bad_steps=3,
)


def random_batch(seed: int = 0, *, task: str = "tool") -> Batch:
    rng = np.random.default_rng(seed)
    samples = []
    for length in (150, 100, 60):
        answer = np.full(length, -1, dtype=np.int32)
        answer[length // 2 :] = 0
        samples.append(
            Encoded(
                task="tool" if task == "tool" else "evidence",
                tokens=rng.integers(3, VOCAB, length).astype(np.int32),
                answer=answer,
                kinds=("call",),
            )
        )
    packed, rest = pack(samples, num_rows=1, row_tokens=512, pad_id=2)
    assert not rest
    return Batch(pack=packed, state=BatchState(stream=StreamState(), waiting=()))


def trainer(config: TrainConfig = CONFIG) -> Trainer:
    return Trainer(small_model(SMALL.replace(vocab_size=VOCAB)), config, "cpu")


def weights_of(t: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in t.model.state_dict().items()}


def test_the_loss_falls_when_one_batch_is_repeated() -> None:
    t = trainer()
    batch = random_batch()
    losses = [t.step(batch, progress=1.0)[0] for _ in range(32)]
    assert losses[0].main == pytest.approx(np.log(VOCAB), abs=0.3)
    assert losses[-1].main < 0.3
    assert losses[-1].mtp < losses[0].mtp / 2
    assert losses[-1].by_task == pytest.approx({"tool": losses[-1].main})
    assert t.num_steps == 32
    assert t.num_tokens == 32 * 310
    assert t.num_skipped == 0


def test_auxiliary_losses_before_their_start_train_nothing() -> None:
    t = trainer()
    before = weights_of(t)
    losses, _, _ = t.step(random_batch(), progress=0.1)
    assert losses.mtp == losses.indexer == 0.0
    changed = {n for n, tensor in t.model.state_dict().items() if not tensor.equal(before[n])}
    assert "layers.0.attn.wq_a.weight" in changed
    assert not [n for n in changed if n.startswith("mtp.") or ".indexer." in n]
    losses, _, _ = t.step(random_batch(), progress=0.9)
    assert losses.mtp > 0
    assert losses.indexer > 0
    changed = {n for n, tensor in t.model.state_dict().items() if not tensor.equal(before[n])}
    assert "mtp.0.e_proj.weight" in changed
    assert "layers.1.attn.indexer.wq_b.weight" in changed


def test_the_total_is_the_weighted_sum_of_its_parts() -> None:
    model = small_model(SMALL.replace(vocab_size=VOCAB))
    batch = random_batch()
    weights = LossWeights(mtp=0.3, balance=0.01, indexer=0.5)
    losses = compute_losses(model, batch.pack.batch, batch.pack.task_BT, weights)
    balance = sum(len(r.load_E) * float(r.load_E @ r.prob_E.detach()) for r in losses.router)
    expected = losses.main + 0.3 * losses.mtp + 0.01 * balance + 0.5 * losses.indexer
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-5)
    # The main loss is the mean cross entropy at the targets and nowhere else.
    hidden = model.forward_packed(batch.pack.batch).hidden_BTD
    logits = model.project(hidden.flatten(0, 1))
    targets = batch.pack.batch.targets_BT.flatten()
    by_hand = [
        float(-logits[i].log_softmax(-1)[targets[i]].detach())
        for i in (targets != NO_TARGET).nonzero().flatten()
    ]
    assert losses.main == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_weights_of_targets_change_the_total_and_not_what_is_reported() -> None:
    model = small_model(SMALL.replace(vocab_size=VOCAB))
    pack = random_batch().pack
    weights = LossWeights(mtp=0.0, balance=0.0, indexer=0.0)
    plain = compute_losses(model, replace(pack.batch, weight_BT=None), pack.task_BT, weights)
    double = replace(pack.batch, weight_BT=torch.full(pack.batch.tokens_BT.shape, 2.0))
    losses = compute_losses(model, double, pack.task_BT, weights)
    assert losses.main == pytest.approx(plain.main)
    assert float(losses.total.detach()) == pytest.approx(2 * plain.main)


def test_a_step_that_is_not_finite_leaves_the_model_alone() -> None:
    t = trainer()
    good = random_batch()
    t.step(good, progress=0.0)
    before, state = weights_of(t), t.optimizer.state_dict()
    momenta = {name: tensor.clone() for name, tensor in state["momentum"].items()}
    _poison(t)
    t.step(good, progress=0.0)
    assert t.num_skipped == 1
    for name, tensor in t.model.state_dict().items():
        if name != "norm.weight":
            torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)
    for name, tensor in t.optimizer.state_dict()["momentum"].items():
        torch.testing.assert_close(tensor, momenta[name], atol=0, rtol=0)


def test_training_that_stays_not_finite_stops_with_advice() -> None:
    t = trainer()
    _poison(t)
    for _ in range(CONFIG.max_bad_steps - 1):
        t.step(random_batch(), progress=0.0)
    with pytest.raises(TrainingError, match="resume from an earlier checkpoint"):
        t.step(random_batch(), progress=0.0)


def test_bad_steps_in_between_good_ones_do_not_add_up() -> None:
    t = trainer()
    healthy = t.model.norm.weight.detach().clone()
    for _ in range(2 * CONFIG.max_bad_steps):
        _poison(t)
        t.step(random_batch(), progress=0.0)
        with torch.no_grad():
            t.model.norm.weight.copy_(healthy)
        t.step(random_batch(), progress=0.0)
    assert t.num_skipped == 2 * CONFIG.max_bad_steps


def _poison(t: Trainer) -> None:
    with torch.no_grad():
        t.model.norm.weight.fill_(float("nan"))


def test_routing_biases_move_against_the_load() -> None:
    t = trainer()
    gate = next(m for m in t.model.modules() if isinstance(m, Gate) and not m.hashed)
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([0.2, 0.0, 0.0, -0.2]))  # prefers the first expert
    before = gate.bias.clone()
    losses, _, _ = t.step(random_batch(), progress=0.0)
    load = losses.router[0].load_E
    assert load[0] > load[3]
    moved = gate.bias - before
    torch.testing.assert_close(moved, CONFIG.bias_speed * torch.sign(load.mean() - load))
    assert moved[0] < 0 < moved[3]


def test_gradients_are_clipped_to_the_norm() -> None:
    t = trainer()
    _, norm, _ = t.step(random_batch(), progress=0.0)
    total = sum(float(p.grad.norm()) ** 2 for p in t.model.parameters() if p.grad is not None)
    assert norm > 0
    assert total**0.5 == pytest.approx(min(norm, CONFIG.grad_clip), rel=1e-3)
