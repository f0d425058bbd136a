"""Drawing the next token of every sequence of a batch from its logits.

A row's outcome depends on that row alone: its logits, its parameters, its seed and how many
tokens it has drawn. Randomness is a counter, not a stream: draw n of seed s is always the same
number, in a batch, alone or after a restart. The logits are the same only up to the rounding of
batched matrix products, so a token can still differ where two are all but equally likely.

Shapes: B rows of the batch, V vocabulary, K alternatives.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.request import SamplingParams, TokenLogprob


@dataclass(kw_only=True)
class SamplerRow:
    """One sequence's side of sampling; ``record`` after each accepted token."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    seed: int = field(init=False)
    num_drawn: int = field(default=0, init=False)
    counts: Counter[int] = field(default_factory=Counter, init=False)
    """Times each token was generated."""
    seen: set[int] = field(default_factory=set, init=False)
    """Tokens of prompt and answer; kept only under a repetition penalty."""

    def __post_init__(self) -> None:
        seed = self.params.seed
        self.seed = secrets.randbits(64) if seed is None else seed
        if self.params.repetition_penalty != 1.0:
            self.seen.update(self.prompt_ids)

    def record(self, token_id: int) -> None:
        """Count ``token_id`` as drawn."""
        self.num_drawn += 1
        if self.has_penalty:
            self.counts[token_id] += 1
            self.seen.add(token_id)

    @property
    def has_penalty(self) -> bool:
        """Whether earlier tokens change this row's logits."""
        p = self.params
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)


def sample(logits_BV: Tensor, rows: Sequence[SamplerRow]) -> list[int | None]:
    """One token per row; None where a row has no finite maximum (the model broke down).

    Args:
        logits_BV: float, unchanged.
        rows: unchanged; the caller records the tokens it accepts.
    """
    logits_BV = logits_BV.float()
    if any(row.has_penalty for row in rows):
        logits_BV = logits_BV.clone()
        for logits_V, row in zip(logits_BV, rows, strict=True):
            if row.has_penalty:
                _penalise(logits_V, row)
    tokens, healthy = _best(logits_BV)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        picks = _draw(logits_BV[drawn], [rows[i] for i in drawn])
        for i, token in zip(drawn, picks, strict=True):
            tokens[i] = token
    return [token if ok else None for token, ok in zip(tokens, healthy, strict=True)]


def _best(logits_BV: Tensor) -> tuple[list[int], list[bool]]:
    """The most likely token of each row, and whether its logit is finite; NaN counts as greatest.

    On a CPU through numpy, whose argmax of a row is many times faster.
    """
    if logits_BV.device.type == "cpu":
        logits = logits_BV.detach().numpy()
        ids = logits.argmax(-1)
        finite = np.isfinite(logits[np.arange(len(ids)), ids])
        return ids.tolist(), finite.tolist()
    best_B, ids_B = logits_BV.max(dim=-1)
    return ids_B.tolist(), best_B.isfinite().tolist()


def logprobs(
    logits_BV: Tensor, tokens: Sequence[int | None], rows: Sequence[SamplerRow]
) -> list[TokenLogprob | None]:
    """Log-probabilities of the drawn tokens and their best alternatives, for rows that asked.

    They are the model's own: before penalties, temperature and filters.
    """
    out: list[TokenLogprob | None] = [None] * len(rows)
    asking = [
        i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] is not None
    ]
    if not asking:
        return out
    logp_BV = logits_BV[asking].float().log_softmax(dim=-1)
    width = min(max(rows[i].params.logprobs or 0 for i in asking), logp_BV.shape[-1])
    top_BK, top_ids_BK = logp_BV.topk(width, dim=-1)
    for at, i in enumerate(asking):
        token = tokens[i]
        assert token is not None
        k = rows[i].params.logprobs or 0
        pairs = zip(top_ids_BK[at, :k].tolist(), top_BK[at, :k].tolist(), strict=True)
        out[i] = TokenLogprob(token_id=token, logprob=float(logp_BV[at, token]), top=tuple(pairs))
    return out


def uniform(seed: int, draw: int) -> float:
    """Number ``draw`` of the stream named ``seed``, in [0, 1); the same on every machine."""
    key = f"{seed}:{draw}".encode()
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def _penalise(logits_V: Tensor, row: SamplerRow) -> None:
    """Apply ``row``'s penalties to ``logits_V`` in place."""
    p = row.params
    if p.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(row.seen), device=logits_V.device, dtype=torch.int64)
        value = logits_V[ids]
        logits_V[ids] = torch.where(
            value > 0, value / p.repetition_penalty, value * p.repetition_penalty
        )
    if row.counts and (p.presence_penalty or p.frequency_penalty):
        ids = torch.tensor(list(row.counts.keys()), device=logits_V.device)
        times = torch.tensor(list(row.counts.values()), device=logits_V.device)
        logits_V[ids] -= p.presence_penalty + p.frequency_penalty * times


def _draw(logits_BV: Tensor, rows: Sequence[SamplerRow]) -> list[int]:
    """Invert the cumulative distribution, in vocabulary order, at each row's next random number.

    Float64, since a cumulative sum over 129,280 float32 probabilities loses the tail.
    """
    device = logits_BV.device
    temperature_B1 = torch.tensor(
        [[r.params.temperature] for r in rows], device=device, dtype=torch.float64
    )
    # The best logit becomes 0, so that a vanishing temperature gives 0 and -inf, not inf.
    below_best_BV = logits_BV.double() - logits_BV.amax(dim=-1, keepdim=True)
    prob_BV = (below_best_BV / temperature_B1).softmax(dim=-1)
    filtering = [i for i, r in enumerate(rows) if _filters(r.params)]
    if filtering:
        keep_BV = _kept(prob_BV[filtering], [rows[i].params for i in filtering])
        prob_BV[filtering] = prob_BV[filtering] * keep_BV
    cdf_BV = prob_BV.cumsum(dim=-1)
    u_B1 = torch.tensor(
        [[uniform(r.seed, r.num_drawn)] for r in rows], device=device, dtype=torch.float64
    )
    total_B1 = cdf_BV[:, -1:]
    # Strictly below the total, so that the first entry above it is a token with probability.
    target_B1 = torch.minimum(u_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    picks: list[int] = torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(-1).tolist()
    return [min(pick, logits_BV.shape[-1] - 1) for pick in picks]


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _kept(prob_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Boolean [B, V]: what survives top_k, then top_p, then min_p.

    Equal probabilities rank by token id. The most likely token always survives.
    """
    device, vocab = prob_BV.device, prob_BV.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor([[v] for v in values], device=device, dtype=torch.float64)

    ranked_BV, order_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(vocab, device=device)
    keep_BV = rank_V < column([p.top_k or vocab for p in params])
    ranked_BV = ranked_BV * keep_BV
    # A token stays in the nucleus while what is more likely than it has not reached top_p.
    before_BV = ranked_BV.cumsum(dim=-1) - ranked_BV
    mass_B1 = ranked_BV.sum(dim=-1, keepdim=True)
    top_p_B1 = column([p.top_p for p in params])
    keep_BV &= (before_BV < top_p_B1 * mass_B1) | (top_p_B1 == 1.0)
    keep_BV &= ranked_BV >= column([p.min_p for p in params]) * ranked_BV[:, :1]
    keep_BV[:, 0] = True
    return torch.zeros_like(keep_BV).scatter(-1, order_BV, keep_BV)
