"""Packed rows hold every sample once, aligned, apart, with the next token as target."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from rorqual.model.packed import ALIGNMENT
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.batches import BatchMaker, BatchState, Prefetcher
from rorqual.train.conversation import Encoded
from rorqual.train.losses import mtp_targets
from rorqual.train.packing import NO_TARGET, Pack, first_fit, pack, target_weights

from .conftest import EASY, HARD

PAD = 2


def samples_of(lengths: list[int], seed: int = 0) -> list[Encoded]:
    """Random tokens above ``PAD``, about half of them answers."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        answer = np.where(rng.random(length) < 0.5, 0, -1).astype(np.int32)
        answer[0] = -1
        tokens = rng.integers(PAD + 1, 90, length).astype(np.int32)
        made.append(Encoded(task="tool", tokens=tokens, answer=answer, kinds=("call",)))
    return made


def lengths_for(seed: int) -> list[int]:
    rng = Random(seed)
    return [rng.randint(1, 700) for _ in range(rng.randint(1, 30))]


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_is_placed_once_or_kept_for_later(seed: int) -> None:
    samples = samples_of(lengths_for(seed))
    packed, rest = pack(samples, num_rows=3, row_tokens=1280, pad_id=PAD)
    placed = [id(p.sample) for p in packed.placed]
    assert sorted(placed + [id(s) for s in rest]) == sorted(map(id, samples))
    assert [id(s) for s in samples if id(s) not in set(placed)] == [id(s) for s in rest]  # in order
    # What is left over had no room: no row has enough free blocks at its end.
    used = [0, 0, 0]
    for p in packed.placed:
        used[p.row] = max(used[p.row], p.offset + -(-len(p.sample) // ALIGNMENT) * ALIGNMENT)
    assert all(1280 - u < len(s) for s in rest for u in used)


@pytest.mark.parametrize("seed", range(20))
def test_samples_are_aligned_apart_and_complete(seed: int) -> None:
    packed, _ = pack(samples_of(lengths_for(seed)), num_rows=3, row_tokens=1280, pad_id=PAD)
    batch = packed.batch
    owned = np.zeros((3, 1280), dtype=bool)
    for p in packed.placed:
        at = slice(p.offset, p.offset + len(p.sample))
        assert p.offset % ALIGNMENT == 0
        assert not owned[p.row, at].any()
        owned[p.row, at] = True
        assert (batch.tokens_BT[p.row, at].numpy() == p.sample.tokens).all()
        assert (batch.position_BT[p.row, at].numpy() == np.arange(len(p.sample))).all()
        assert len(batch.sample_BT[p.row, at].unique()) == 1
    assert ((batch.sample_BT >= 0).numpy() == owned).all()
    assert (batch.tokens_BT.numpy()[~owned] == PAD).all()
    for row in range(3):
        names = [int(batch.sample_BT[p.row, p.offset]) for p in packed.placed if p.row == row]
        assert sorted(names) == list(range(len(names)))
    assert packed.num_tokens == owned.sum()
    assert packed.padding_fraction == pytest.approx(1 - owned.mean())


@pytest.mark.parametrize("seed", range(20))
def test_targets_are_the_next_generated_token_of_the_same_sample(seed: int) -> None:
    packed, _ = pack(samples_of(lengths_for(seed)), num_rows=3, row_tokens=1280, pad_id=PAD)
    expected, further = (np.full((3, 1280), NO_TARGET) for _ in range(2))
    for p in packed.placed:
        for t in range(len(p.sample) - 1):
            if p.sample.answer[t + 1] >= 0:
                expected[p.row, p.offset + t] = p.sample.tokens[t + 1]
        for t in range(len(p.sample) - 2):
            if p.sample.answer[t + 2] >= 0:
                further[p.row, p.offset + t] = p.sample.tokens[t + 2]
    assert (packed.batch.targets_BT.numpy() == expected).all()
    assert (mtp_targets(packed.batch).numpy() == further).all()


def test_targets_do_not_wrap_around_a_full_row() -> None:
    (sample,) = samples_of([256])
    sample.answer[1:] = 0
    packed, _ = pack([sample], num_rows=1, row_tokens=256, pad_id=PAD)
    assert packed.batch.targets_BT[0, -1] == NO_TARGET
    assert (mtp_targets(packed.batch)[0, -2:] == NO_TARGET).all()
    assert mtp_targets(packed.batch)[0, -3] == sample.tokens[-1]


def test_largest_items_go_first_into_the_first_row_with_room() -> None:
    assert first_fit([2, 5, 3, 4, 1], num_rows=2, capacity=7) == [
        (0, 5), (0, 0), (1, 4), (1, 0), None,
    ]  # fmt: skip


def packs_equal(a: Pack, b: Pack) -> bool:
    pairs = (
        (a.batch.tokens_BT, b.batch.tokens_BT),
        (a.batch.targets_BT, b.batch.targets_BT),
        (a.batch.sample_BT, b.batch.sample_BT),
        (a.task_BT, b.task_BT),
    )
    return all(x.shape == y.shape and bool((x == y).all()) for x, y in pairs)


def test_batches_continue_from_their_state_with_the_samples_left_over(tokenizer: Tokenizer) -> None:
    maker = BatchMaker(tokenizer, seed=1, tokens_per_step=2560)
    first = maker.make(EASY)
    assert first.state.waiting
    state = BatchState.from_dict(first.state.to_dict())
    resumed = BatchMaker(tokenizer, seed=1, tokens_per_step=2560, state=state)
    for _ in range(3):
        assert packs_equal(maker.make(EASY).pack, resumed.make(EASY).pack)
    assert packs_equal(maker.make(HARD).pack, resumed.make(HARD).pack)


def test_no_sample_is_lost_or_repeated_between_batches(tokenizer: Tokenizer) -> None:
    maker = BatchMaker(tokenizer, seed=1, tokens_per_step=2560)
    seen: list[int] = []
    for _ in range(5):
        batch = maker.make(EASY)
        seen += [hash(p.sample.tokens.tobytes()) for p in batch.pack.placed]
    assert len(seen) == len(set(seen))
    assert len(seen) + len(batch.state.waiting) == batch.state.stream.next_index


def test_rows_are_mostly_filled(tokenizer: Tokenizer) -> None:
    maker = BatchMaker(tokenizer, seed=1, tokens_per_step=5120)
    padding = [maker.make(EASY).pack.padding_fraction for _ in range(6)]
    assert sum(padding) / len(padding) < 0.15


def test_shorter_rows_take_none_of_the_longer_samples_left_over(tokenizer: Tokenizer) -> None:
    maker = BatchMaker(tokenizer, seed=2, tokens_per_step=2560)
    while not any(len(s) > EASY.max_sample_tokens for s in maker.make(HARD).state.waiting):
        pass
    batch = maker.make(EASY)
    assert batch.pack.num_tokens > 1500
    taken = [*(p.sample for p in batch.pack.placed), *batch.state.waiting]
    assert max(map(len, taken)) <= EASY.max_sample_tokens


def test_prefetched_batches_are_those_made_in_turn(tokenizer: Tokenizer) -> None:
    plain = BatchMaker(tokenizer, seed=4, tokens_per_step=1280)
    expected = [plain.make(EASY) for _ in range(3)]
    with Prefetcher(BatchMaker(tokenizer, seed=4, tokens_per_step=1280)) as batches:
        for batch in expected:
            assert packs_equal(batches.next(EASY, EASY).pack, batch.pack)


def test_every_process_gets_a_row_even_where_one_fills_the_step(tokenizer: Tokenizer) -> None:
    row = EASY.max_sample_tokens
    maker = BatchMaker(tokenizer, seed=5, tokens_per_step=row, min_rows=2)
    assert maker.make(EASY).pack.batch.tokens_BT.shape == (2, row)


def test_first_answers_and_refusals_count_more_and_only_in_their_own_tokens() -> None:
    answer = np.array([-1, -1, 0, 0, -1, 1, -1, 2], dtype=np.int32)
    sample = Encoded(
        task="evidence",
        tokens=np.arange(8, dtype=np.int32),
        answer=answer,
        kinds=("evidence", "evidence", "absent"),
    )
    weight = target_weights(sample)
    assert weight[2] == weight[3] > 1
    assert weight[7] > 1
    assert weight[[0, 1, 4, 5, 6]].tolist() == [1] * 5
    (made, _) = pack([sample], num_rows=1, row_tokens=ALIGNMENT, pad_id=PAD)
    weight_T, targets_T = made.batch.weight_BT, made.batch.targets_BT
    assert weight_T is not None
    for at in range(7):  # a place is weighted as the token it predicts
        if targets_T[0, at] != NO_TARGET:
            assert weight_T[0, at] == weight[at + 1]
