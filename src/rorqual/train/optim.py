"""The optimiser of the V4 report: Muon for matrices, AdamW for everything else.

Muon, per matrix with gradient G: M = mu M + G; O' = NS(mu M + G); O = O' sqrt(max(n, m)) gamma;
W = W (1 - eta lambda) - eta O, with mu 0.95, lambda 0.1, gamma 0.18. NS is the hybrid
Newton-Schulz iteration: 8 steps with (3.4445, -4.7750, 2.0315), then 2 with (2, -1.5, 0.5).
AdamW: betas 0.9 / 0.95, eps 1e-20, decay 0.1, for embedding, head, norm weights, sinks, position
biases, and the hyper-connections' static biases and gating factors. Both updates have about the
same root mean square, so one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["muon", "adamw"]

_FAST_STEPS = ((3.4445, -4.7750, 2.0315),) * 8
_SETTLE_STEPS = ((2.0, -1.5, 0.5),) * 2
NEWTON_SCHULZ_STEPS = _FAST_STEPS + _SETTLE_STEPS
# Matrices iterated together on a CPU: 130 of 128 x 192 take 129 ms in chunks of 16 and 175 ms at
# once (fp32, two cores); in bf16 67 and 74 ms.
_CHUNK = 16

_ADAMW_NAMES = frozenset({"embed.weight", "head.weight", "norm.weight"})
_ADAMW_SUFFIXES = (
    "norm.weight",  # every RMSNorm: attn_norm, ffn_norm, q_norm, kv_norm, enorm, hnorm, ...
    "_base",  # hyper-connection static biases
    "_scale",  # hyper-connection gating factors
    ".attn_sink",
    ".ape",
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Hyper-parameters of both updates; the learning rate is given to each step."""

    momentum: float = 0.95
    muon_scale: float = 0.18
    """Target root mean square of Muon's update."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    weight_decay: float = 0.1


def optimizer_kind(name: str) -> Kind:
    """Which update the parameter with this checkpoint name gets.

    Matrices go to Muon: all linear weights, the router, and the hyper-connections' dynamic maps
    (``hc_*_fn``). Everything else, and the two vocabulary matrices, goes to AdamW.
    """
    if name in _ADAMW_NAMES or name.endswith(_ADAMW_SUFFIXES):
        return "adamw"
    return "muon"


def newton_schulz(matrices: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of each of ``matrices`` [..., n, m].

    Singular values come out within about 1e-2 of one unless they were tiny beside the Frobenius
    norm. Works on the smaller side; computes in ``dtype`` and returns the input's dtype. A zero
    matrix stays zero.
    """
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = torch.linalg.vector_norm(matrices.float(), dim=(-2, -1), keepdim=True)
    x = (x / norm.clamp_min(torch.finfo(torch.float32).tiny).to(dtype)).contiguous()
    chunks = x.reshape(-1, *x.shape[-2:]).split(_CHUNK if x.device.type == "cpu" else x.numel())
    out = torch.cat([_iterate(chunk) for chunk in chunks]).reshape(x.shape)
    return (out.mT if tall else out).to(matrices.dtype)


def _iterate(x: Tensor) -> Tensor:
    for a, b, c in NEWTON_SCHULZ_STEPS:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Optimizer:
    """Updates named parameters in place from their ``.grad``.

    Parameters of one shape are updated together. Owns the momenta; knows no schedule. A parameter
    without gradient is left alone.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: OptimConfig | None = None,
        *,
        newton_schulz_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config or OptimConfig()
        self._dtype = newton_schulz_dtype
        self._parameters = {n: p for n, p in named_parameters if p.requires_grad}
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self._adamw: list[str] = []
        for name, parameter in self._parameters.items():
            if optimizer_kind(name) == "muon":
                assert parameter.ndim >= 2, f"{name} is no matrix: {tuple(parameter.shape)}"
                groups[tuple(parameter.shape)].append(name)
            else:
                self._adamw.append(name)
        self._muon = list(groups.values())
        self._momentum = {
            n: torch.zeros_like(self._parameters[n]) for group in self._muon for n in group
        }
        self._first = {n: torch.zeros_like(self._parameters[n]) for n in self._adamw}
        self._second = {n: torch.zeros_like(self._parameters[n]) for n in self._adamw}
        self._num_steps = dict.fromkeys(self._adamw, 0)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update; gradients are left as they are."""
        decay = 1.0 - learning_rate * self.config.weight_decay
        for group in self._muon:
            if names := self._with_gradient(group):
                self._muon_step(names, learning_rate, decay)
        if names := self._with_gradient(self._adamw):
            self._adamw_step(names, learning_rate, decay)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Momenta and AdamW's step counts, as tensors and plain numbers."""
        return {
            "num_steps": dict(self._num_steps),
            "momentum": dict(self._momentum),
            "first": dict(self._first),
            "second": dict(self._second),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``; raises KeyError where a parameter is missing in it."""
        self._num_steps = {name: int(state["num_steps"][name]) for name in self._adamw}
        for own, key in (
            (self._momentum, "momentum"),
            (self._first, "first"),
            (self._second, "second"),
        ):
            for name, tensor in own.items():
                tensor.copy_(state[key][name])

    def _with_gradient(self, names: list[str]) -> list[str]:
        return [name for name in names if self._parameters[name].grad is not None]

    def _take(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and their gradients."""
        parameters = [self._parameters[name] for name in names]
        return parameters, [p.grad for p in parameters if p.grad is not None]

    def _muon_step(self, names: list[str], learning_rate: float, decay: float) -> None:
        mu = self.config.momentum
        parameters, gradients = self._take(names)
        momenta = [self._momentum[n] for n in names]
        torch._foreach_mul_(momenta, mu)
        torch._foreach_add_(momenta, gradients)
        looked_ahead = torch._foreach_add(gradients, momenta, alpha=mu)
        update = newton_schulz(torch.stack(list(looked_ahead)), dtype=self._dtype)
        scale = self.config.muon_scale * max(update.shape[-2:]) ** 0.5
        torch._foreach_mul_(parameters, decay)
        torch._foreach_add_(parameters, list(update.unbind()), alpha=-learning_rate * scale)

    def _adamw_step(self, names: list[str], learning_rate: float, decay: float) -> None:
        config = self.config
        parameters, gradients = self._take(names)
        first = [self._first[n] for n in names]
        second = [self._second[n] for n in names]
        for name in names:
            self._num_steps[name] += 1
        steps = [self._num_steps[name] for name in names]
        torch._foreach_lerp_(first, gradients, 1 - config.beta1)
        torch._foreach_mul_(second, config.beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - config.beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, [(1 - config.beta2**n) ** 0.5 for n in steps])
        torch._foreach_add_(denominator, config.eps)
        torch._foreach_mul_(parameters, decay)
        rates = [-learning_rate / (1 - config.beta1**n) for n in steps]
        torch._foreach_addcdiv_(parameters, first, denominator, rates)
