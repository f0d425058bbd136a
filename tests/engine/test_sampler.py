"""The batched sampler equals a slow, obvious one, row by row."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.request import SamplingParams
from rorqual.engine.sampler import SamplerRow, logprobs, sample, uniform

VOCAB = 37


def reference_distribution(logits: list[float], row: SamplerRow) -> list[float]:
    """The distribution a token is drawn from, in plain Python, one rule after another."""
    p = row.params
    logits = list(logits)
    if p.repetition_penalty != 1.0:
        for token in row.seen:
            value = logits[token]
            divide = value > 0
            logits[token] = value / p.repetition_penalty if divide else value * p.repetition_penalty
    for token, times in row.counts.items():
        logits[token] -= p.presence_penalty + p.frequency_penalty * times
    if p.temperature == 0:
        best = max(range(len(logits)), key=lambda t: (logits[t], -t))
        return [1.0 if t == best else 0.0 for t in range(len(logits))]
    peak = max(logits)
    weights = [math.exp((value - peak) / p.temperature) for value in logits]
    total = sum(weights)
    probs = [w / total for w in weights]
    ranked = sorted(range(len(probs)), key=lambda t: (-probs[t], t))
    if p.top_k:
        ranked = ranked[: p.top_k]
    mass = sum(probs[t] for t in ranked)
    nucleus: list[int] = []
    covered = 0.0
    for token in ranked:
        if p.top_p < 1.0 and nucleus and covered >= p.top_p * mass:
            break
        nucleus.append(token)
        covered += probs[token]
    kept = {t for t in nucleus if probs[t] >= p.min_p * probs[ranked[0]]}
    mass = sum(probs[t] for t in kept)
    return [probs[t] / mass if t in kept else 0.0 for t in range(len(probs))]


def reference_draw(logits: list[float], row: SamplerRow) -> int:
    probs = reference_distribution(logits, row)
    target, covered = uniform(row.seed, row.num_drawn), 0.0
    for token, prob in enumerate(probs):
        covered += prob
        if covered > target:
            return token
    return max(t for t, prob in enumerate(probs) if prob > 0)


@st.composite
def rows(draw: st.DrawFn) -> SamplerRow:
    unit = st.floats(0.01, 1.0)
    params = SamplingParams(
        max_tokens=1,
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_p=draw(st.one_of(st.just(1.0), unit)),
        top_k=draw(st.sampled_from([0, 1, 5, 100])),
        min_p=draw(st.one_of(st.just(0.0), unit)),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        seed=draw(st.integers(0, 2**32)),
    )
    row = SamplerRow(
        params=params, prompt_ids=draw(st.lists(st.integers(0, VOCAB - 1), max_size=5))
    )
    for token in draw(st.lists(st.integers(0, VOCAB - 1), max_size=6)):
        row.record(token)
    return row


@settings(max_examples=150, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5), st.integers(0, 2**32))
def test_batched_draw_equals_the_slow_reference(batch: list[SamplerRow], seed: int) -> None:
    logits = 3 * torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed))
    expected = [reference_draw(line.tolist(), r) for line, r in zip(logits, batch, strict=True)]
    before = logits.clone()
    assert sample(logits, batch) == expected
    assert torch.equal(logits, before), "the caller's logits are left alone"


@settings(max_examples=30, deadline=None)
@given(st.lists(rows(), min_size=2, max_size=6), st.integers(0, 2**32))
def test_a_row_draws_the_same_alone_as_in_a_batch(batch: list[SamplerRow], seed: int) -> None:
    logits = 3 * torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed))
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(batch)]
    assert sample(logits, batch) == alone


def test_draws_follow_the_filtered_distribution() -> None:
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(max_tokens=1, temperature=0.8, top_p=0.9, top_k=12, seed=11)
    row = SamplerRow(params=params, prompt_ids=(0,))
    expected = reference_distribution(logits.tolist(), row)
    num_draws = 6000
    drawn: Counter[int | None] = Counter()
    for _ in range(num_draws):
        drawn.update(sample(logits[None], [row]))
        row.record(0)
    assert set(drawn) <= {t for t, p in enumerate(expected) if p > 0}
    for token, prob in enumerate(expected):
        tolerance = 4 * math.sqrt(prob * (1 - prob) / num_draws)
        assert abs(drawn[token] / num_draws - prob) <= tolerance


def test_the_random_numbers_are_uniform_and_differ_by_seed_and_draw() -> None:
    numbers = [uniform(seed, draw) for seed in range(40) for draw in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    deciles = Counter(int(number * 10) for number in numbers)
    chi_squared = sum((deciles[d] - 400) ** 2 / 400 for d in range(10))
    assert chi_squared < 27.9  # 0.1 % point of chi-squared with 9 degrees of freedom


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(5))
    shaped = SamplingParams(
        max_tokens=1, temperature=0.1, top_k=2, repetition_penalty=2.0, logprobs=4
    )
    batch = [
        SamplerRow(params=shaped, prompt_ids=range(VOCAB)),
        SamplerRow(params=SamplingParams(max_tokens=1), prompt_ids=(0,)),
    ]
    first, second = logprobs(logits, [7, 8], batch)
    truth = logits[0].log_softmax(-1)
    assert second is None, "only rows that asked"
    assert first is not None
    assert first.token_id == 7
    assert first.logprob == pytest.approx(truth[7].item(), abs=1e-6)
    best = sorted(range(VOCAB), key=lambda t: -truth[t].item())[:4]
    assert [token for token, _ in first.top] == best
    assert [value for _, value in first.top] == pytest.approx([truth[t].item() for t in best])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_gives_none_and_leaves_its_neighbour_alone(temperature: float) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(6))
    logits[0, 3] = math.nan
    logits[2] = -math.inf
    params = SamplingParams(max_tokens=1, temperature=temperature, seed=1)
    batch = [SamplerRow(params=params, prompt_ids=(0,)) for _ in range(3)]
    first, second, third = sample(logits, batch)
    assert first is None
    assert third is None
    assert second == sample(logits[1:2], batch[1:2])[0]


def test_equal_logits_are_ranked_by_token_id_under_top_k() -> None:
    params = SamplingParams(max_tokens=1, top_k=3, seed=0)
    row = SamplerRow(params=params, prompt_ids=(0,))
    drawn = set()
    for _ in range(60):
        drawn.update(sample(torch.zeros(1, VOCAB), [row]))
        row.record(0)
    assert drawn == {0, 1, 2}


def test_requests_without_a_seed_get_different_ones() -> None:
    params = SamplingParams(max_tokens=1)
    seeds = {SamplerRow(params=params, prompt_ids=(0,)).seed for _ in range(50)}
    assert len(seeds) == 50


def test_large_vocabulary_tail_keeps_its_probability() -> None:
    """One token has half the mass, the tail the rest: a float32 sum would misplace draws."""
    vocab = 129_280
    logits = torch.zeros(1, vocab)
    logits[0, 0] = math.log(vocab - 1)
    rng = random.Random(0)
    heads = 0
    for _ in range(200):
        params = SamplingParams(max_tokens=1, seed=rng.getrandbits(32))
        heads += sample(logits, [SamplerRow(params=params, prompt_ids=(0,))]) == [0]
    assert 70 <= heads <= 130


@pytest.mark.parametrize("temperature", [1e-30, 1e-310, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.5, 3.0, -1.0, 2.9], [-7.0, -5.0, -9.0, -5.5]])
    params = SamplingParams(max_tokens=1, temperature=temperature, top_p=0.9, seed=1)
    rows = [SamplerRow(params=params, prompt_ids=[0]) for _ in range(2)]
    assert sample(logits, rows) == [1, 1]
