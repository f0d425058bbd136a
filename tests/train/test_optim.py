"""Muon and AdamW against the obvious formulas, one matrix at a time."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from rorqual.model.config import NANO_FLASH
from rorqual.model.transformer import Transformer
from rorqual.train.optim import NEWTON_SCHULZ_STEPS, OptimConfig, Optimizer, newton_schulz
from rorqual.train.optim import optimizer_kind as kind_of

CONFIG = OptimConfig(weight_decay=0.1)
RATE = 0.02

# Every parameter of a V4 network, by what it is: matrices of the body, and all the rest.
MATRICES = (
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight",
    r"attn\.compressor\.(wkv|wgate)\.weight",
    r"attn\.indexer\.(wq_b|weights_proj)\.weight",
    r"attn\.indexer\.compressor\.(wkv|wgate)\.weight",
    r"ffn\.gate\.weight",
    r"ffn\.(experts\.\d+|shared_experts)\.(w1|w2|w3)\.weight",
    r"hc_(attn|ffn|head)_fn",
    r"(e_proj|h_proj)\.weight",
)
OTHERS = (
    r"(embed|head)\.weight",
    r"(.*\.)?(norm|attn_norm|ffn_norm|q_norm|kv_norm|enorm|hnorm)\.weight",
    r"attn\.attn_sink",
    r"attn\.(indexer\.)?compressor\.ape",
    r"hc_(attn|ffn|head)_(base|scale)",
)
_BLOCK = re.compile(r"(layers|mtp)\.\d+\.")


def test_every_parameter_of_a_network_has_the_update_of_its_kind() -> None:
    with torch.device("meta"):
        parameters = dict(Transformer(NANO_FLASH).named_parameters())
    kinds = {"muon": 0, "adamw": 0}
    for name, parameter in parameters.items():
        leaf = _BLOCK.sub("", name, count=1)
        is_matrix = any(re.fullmatch(pattern, leaf) for pattern in MATRICES)
        is_other = any(re.fullmatch(pattern, leaf) for pattern in OTHERS)
        assert is_matrix != is_other, f"{name} is not listed once"
        assert kind_of(name) == ("muon" if is_matrix else "adamw"), name
        assert not is_matrix or parameter.ndim == 2, name
        kinds[kind_of(name)] += 1
    assert min(kinds.values()) > 50


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16), (1, 40), (128, 192)])
def test_newton_schulz_brings_singular_values_to_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    orthogonal = newton_schulz(matrices)
    for matrix, result in zip(matrices, orthogonal, strict=True):
        values = torch.linalg.svdvals(result)
        assert values.max() < 1.02
        # A tiny singular value needs more steps; all others arrive.
        reached = torch.linalg.svdvals(matrix) / torch.linalg.matrix_norm(matrix) > 0.01
        assert values[reached].min() > 0.98
        # The nearest semi-orthogonal matrix keeps the singular vectors.
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        if reached.all():
            torch.testing.assert_close(result, u @ v, atol=0.03, rtol=0)


def test_newton_schulz_keeps_zero_and_ignores_scale() -> None:
    matrix = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
    assert not newton_schulz(torch.zeros(2, 8, 12)).any()
    torch.testing.assert_close(newton_schulz(1e-12 * matrix), newton_schulz(matrix))


def slow_muon(w: Tensor, m: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The report's algorithm 1 on one matrix, float64."""
    m = CONFIG.momentum * m + g
    x = CONFIG.momentum * m + g
    x = x / x.norm()
    for a, b, c in NEWTON_SCHULZ_STEPS:
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    o = x * max(w.shape) ** 0.5 * 0.18
    return w * (1 - RATE * CONFIG.weight_decay) - RATE * o, m


def slow_adamw(
    w: Tensor, first: Tensor, second: Tensor, g: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    first = 0.9 * first + 0.1 * g
    second = 0.95 * second + 0.05 * g * g
    update = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-20)
    return w * (1 - RATE * CONFIG.weight_decay) - RATE * update, first, second


def test_muon_steps_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {"layers.0.attn.wkv.weight": (12, 20), "layers.1.attn.wkv.weight": (12, 20)}
    shapes["layers.0.attn.wo_b.weight"] = (20, 8)
    weights = {n: torch.randn(s, generator=generator).double() for n, s in shapes.items()}
    slow = {n: (w.clone(), torch.zeros_like(w)) for n, w in weights.items()}
    optimizer = Optimizer(trainable(weights), CONFIG, newton_schulz_dtype=torch.float64)
    for _ in range(3):
        for name, weight in weights.items():
            weight.grad = torch.randn(weight.shape, generator=generator).double()
            slow[name] = slow_muon(*slow[name], weight.grad)
        optimizer.step(RATE)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), slow[name][0], atol=1e-6, rtol=1e-6)


def test_adamw_steps_are_the_formulas_from_each_parameters_first_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = {
        "norm.weight": torch.randn(9, generator=generator).double(),
        "embed.weight": torch.randn(4, 5, generator=generator).double(),
    }
    slow = {n: (w.clone(), torch.zeros_like(w), torch.zeros_like(w)) for n, w in weights.items()}
    optimizer = Optimizer(trainable(weights), CONFIG)
    for step in range(1, 5):
        for late, (name, weight) in enumerate(weights.items()):
            if step > 2 * late:  # the second one gets its first gradient at step 3
                weight.grad = torch.randn(weight.shape, generator=generator).double()
                slow[name] = slow_adamw(*slow[name], weight.grad, step - 2 * late)
        optimizer.step(RATE)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), slow[name][0], atol=1e-12, rtol=1e-12)


def test_parameters_without_gradient_are_left_alone() -> None:
    weights = {n: torch.ones(4, 6) for n in ("head.weight", "mtp.0.e_proj.weight", "a.w1.weight")}
    optimizer = Optimizer(trainable(weights), CONFIG)
    weights["a.w1.weight"].grad = torch.ones(4, 6)
    optimizer.step(RATE)
    assert (weights["head.weight"] == 1).all()
    assert (weights["mtp.0.e_proj.weight"] == 1).all()
    assert not (weights["a.w1.weight"] == 1).any()


def test_restored_state_continues_the_same_updates() -> None:
    def fresh() -> tuple[dict[str, Tensor], Optimizer]:
        weights = {"norm.weight": torch.ones(5), "x.w2.weight": torch.eye(5)}
        return weights, Optimizer(trainable(weights), CONFIG)

    def run(weights: dict[str, Tensor], optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            for weight in weights.values():
                weight.grad = torch.sin(torch.arange(weight.numel()) * 1.0 + step).view_as(weight)
            optimizer.step(RATE)

    whole, optimizer = fresh()
    run(whole, optimizer, range(6))
    part, first = fresh()
    run(part, first, range(3))
    second = Optimizer(trainable(part), CONFIG)
    second.load_state_dict(first.state_dict())
    run(part, second, range(3, 6))
    for name in whole:
        torch.testing.assert_close(part[name], whole[name], atol=0, rtol=0)


def trainable(weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, weight.requires_grad_()) for name, weight in weights.items()]
