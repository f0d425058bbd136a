"""One network, many ways to feed it: every way gives the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.model.state import Rows, Segment
from rorqual.model.transformer import Transformer

from .conftest import SMALL, build

LENGTH = 300


def tokens(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL.vocab_size, (length,), generator=generator)


def one_shot(model: Transformer, ids: Tensor) -> Tensor:
    return model(ids, [Segment(model.new_state(), len(ids))], all_logits=True)


@pytest.mark.parametrize(
    "chunks",
    [(1,) * 40, (3, 1, 4, 1, 5, 9, 2, 6), (127, 1, 1, 130), (128, 128, 44), (4,) * 75],
    ids=str,
)
def test_any_chunking_gives_the_same_logits(small: Transformer, chunks: tuple[int, ...]) -> None:
    ids = tokens(LENGTH)
    expected = one_shot(small, ids)
    state = small.new_state()
    start = 0
    for size in (*chunks, LENGTH - sum(chunks)):
        if size:
            got = small(ids[start : start + size], [Segment(state, size)], all_logits=True)
            torch.testing.assert_close(got, expected[start : start + size], atol=1e-5, rtol=1e-5)
            start += size
    assert start == LENGTH == state.length


def test_batched_sequences_get_what_they_get_alone(small: Transformer) -> None:
    lengths = (1, 37, 130, 256)
    prompts = [tokens(n, seed=n) for n in lengths]
    states = [small.new_state() for _ in lengths]
    batch = [Segment(s, n) for s, n in zip(states, lengths, strict=True)]
    together = small(torch.cat(prompts), batch)
    for row, prompt in zip(together, prompts, strict=True):
        torch.testing.assert_close(row, one_shot(small, prompt)[-1], atol=1e-5, rtol=1e-5)
    # Decode all of them together with a prefill of a newcomer in the same step.
    newcomer = tokens(50, seed=99)
    follow = torch.tensor([5, 6, 7, 8])
    mixed = [*(Segment(s, 1) for s in states), Segment(small.new_state(), 50)]
    step = small(torch.cat((follow, newcomer)), mixed)
    for i, prompt in enumerate(prompts):
        alone = one_shot(small, torch.cat((prompt, follow[i : i + 1])))[-1]
        torch.testing.assert_close(step[i], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step[4], one_shot(small, newcomer)[-1], atol=1e-5, rtol=1e-5)


def test_a_new_state_remembers_nothing_of_an_earlier_request(small: Transformer) -> None:
    short = tokens(3, seed=1)  # shorter than one compression group
    before = one_shot(small, short)
    one_shot(small, tokens(200, seed=2))
    assert torch.equal(one_shot(small, short), before)


def test_distant_tokens_still_matter(small: Transformer) -> None:
    ids = tokens(LENGTH)
    changed = ids.clone()
    changed[3] = (changed[3] + 1) % SMALL.vocab_size
    difference = (one_shot(small, ids)[-1] - one_shot(small, changed)[-1]).abs().max()
    assert difference > 1e-4  # far outside every window of 16: through compressed entries only


def test_the_future_never_matters(small: Transformer) -> None:
    ids = tokens(LENGTH)
    changed = ids.clone()
    changed[150:] = (changed[150:] + 1) % SMALL.vocab_size
    same = one_shot(small, ids)[:150], one_shot(small, changed)[:150]
    torch.testing.assert_close(*same, atol=1e-6, rtol=0)


def test_window_only_network_forgets_beyond_its_window() -> None:
    model = build(
        SMALL.replace(num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0), seed=3
    )
    ids = tokens(60)
    changed = ids.clone()
    changed[60 - SMALL.sliding_window - 1] += 1
    changed %= SMALL.vocab_size
    same = one_shot(model, ids)[-1], one_shot(model, changed)[-1]
    torch.testing.assert_close(*same, atol=1e-12, rtol=0)


def test_cache_grows_by_the_formula(small: Transformer) -> None:
    state = small.new_state()
    small(tokens(512), [Segment(state, 512)])
    fixed = sum(layer.fixed_nbytes for layer in (*state.layers, *state.mtp))
    c, i = SMALL.head_dim, SMALL.index_head_dim
    assert state.compressed_nbytes == 8 * (2 * 128 * (c + i) + 4 * c)  # float64
    small(tokens(512, seed=7), [Segment(state, 512)])
    assert sum(layer.fixed_nbytes for layer in (*state.layers, *state.mtp)) == fixed


def test_allocated_bytes_are_reported_and_stay_near_those_in_use() -> None:
    rows, buffers = Rows(), set()
    for _ in range(2000):
        rows.append(torch.ones(1, 4))
        view = rows.view()
        assert view is not None
        buffers.add(view.data_ptr())
        assert rows.nbytes == view.untyped_storage().nbytes()
        assert rows.used_nbytes == len(rows) * 16 <= rows.nbytes
        assert rows.nbytes <= max(16 * 16, rows.used_nbytes * 9 / 8)
    assert torch.equal(view, torch.ones(2000, 4))
    assert len(buffers) < 100  # amortised


def test_draft_continues_the_trunk(small: Transformer) -> None:
    """MTP logits do not depend on how the trunk was fed, and see the next token."""
    ids, following = tokens(40), tokens(40).roll(-1)
    state = small.new_state()
    whole = small.draft(small.run(ids, [Segment(state, 40)]), ids, following, [Segment(state, 40)])
    state = small.new_state()
    parts = []
    for a, b in ((0, 25), (25, 26), (26, 40)):
        segment = [Segment(state, b - a)]
        streams = small.run(ids[a:b], segment)
        parts.append(small.draft(streams, ids[a:b], following[a:b], segment))
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    other = small.new_state()
    streams = small.run(ids, [Segment(other, 40)])
    changed = small.draft(streams, ids, (following + 1) % 96, [Segment(other, 40)])
    assert (changed - whole).abs().max() > 1e-3


def test_mismatched_segments_are_refused(small: Transformer) -> None:
    with pytest.raises(ValueError, match="do not match"):
        small(tokens(5), [Segment(small.new_state(), 4)])
    state = small.new_state()
    with pytest.raises(ValueError, match="twice"):
        small(tokens(2), [Segment(state, 1), Segment(state, 1)])


def test_same_seed_same_weights() -> None:
    one, two, other = build(SMALL, 5), build(SMALL, 5), build(SMALL, 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_official_numerics_run_in_any_chunking(chunk: int) -> None:
    model = build(SMALL.replace(numerics="official"), seed=4)
    ids = tokens(140)
    expected = one_shot(model, ids)
    assert torch.isfinite(expected).all()
    state = model.new_state()
    got = [model(part, [Segment(state, len(part))], all_logits=True) for part in ids.split(chunk)]
    # BF16 activations: products of other shapes round elsewhere.
    close = (torch.cat(got) - expected).abs().mean() / expected.abs().mean()
    assert close < 0.05
    plain = build(SMALL, seed=4)
    assert (one_shot(plain, ids) - expected).abs().max() > 1e-3
