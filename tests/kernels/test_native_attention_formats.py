"""Stored entries, indexer keys and the selection over them, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.kernels import cpu, layout, reference

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="native kernels are not built")


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def native(request: pytest.FixtureRequest) -> Iterator[object]:
    """The module on each instruction set this machine has."""
    module = cpu.native()
    before = module.isa()
    if not module.set_isa(request.param):
        pytest.skip(f"no {request.param} here")
    yield module
    module.set_isa(before)


def _wide_range(rows: int, width: int, seed: int) -> torch.Tensor:
    """Values over many magnitudes, with exact zeros and a row of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= 2.0 ** torch.randint(-20, 12, (rows, 1), generator=generator)
    x[torch.rand(rows, width, generator=generator) < 0.05] = 0.0
    x[0] = 0.0
    return x


def _through_entries(native: object, x: torch.Tensor, rope: int, kind: str) -> torch.Tensor:
    nbytes = layout.entry_nbytes(x.shape[1], rope, kind)
    stored = np.zeros((len(x), nbytes), np.uint8)
    native.encode_entries(kind, x.numpy(), rope, stored)
    out = np.empty(x.shape, np.float32)
    native.decode_entries(kind, stored, rope, out)
    return torch.from_numpy(out)


def _encode_keys(native: object, x: torch.Tensor, kind: str) -> np.ndarray:
    blocks = -(-len(x) // 32)
    stored = np.zeros((blocks, 32 * layout.key_nbytes(x.shape[1], kind)), np.uint8)
    native.encode_keys(kind, x.contiguous().numpy(), stored)
    return stored


def _through_keys(native: object, x: torch.Tensor, kind: str) -> torch.Tensor:
    out = np.empty(x.shape, np.float32)
    native.decode_keys(kind, _encode_keys(native, x, kind), out)
    return torch.from_numpy(out)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.contiguous().view(torch.int32))


WIDTHS = [(512, 64), (64, 16), (128, 32), (24, 8), (100, 4), (16, 16)]


@pytest.mark.parametrize(("dim", "rope"), WIDTHS)
def test_entries_read_back_as_their_format_says(native: object, dim: int, rope: int) -> None:
    x = _wide_range(70, dim, 0)
    assert _same_bits(_through_entries(native, x, rope, "fp32"), x)
    assert _same_bits(_through_entries(native, x, rope, "bf16"), x.bfloat16().float())
    record = _through_entries(native, x, rope, "record")
    rounded = reference.round_entry(x, rope)
    keep = dim - rope
    assert _same_bits(record[:, :keep], rounded[:, :keep])
    assert _same_bits(record[:, keep:], x[:, keep:].bfloat16().float())


def test_a_record_of_rounded_values_keeps_them_exactly(native: object) -> None:
    x = reference.round_entry(_wide_range(50, 512, 1).bfloat16(), 64).float()
    assert _same_bits(_through_entries(native, x, 64, "record"), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_record_does_not_hide_what_is_not_finite(native: object, bad: float) -> None:
    x = torch.ones(1, 128)
    x[0, 3] = bad
    assert not torch.isfinite(_through_entries(native, x, 64, "record")[0, 3])


@pytest.mark.parametrize(("dim", "rope"), WIDTHS)
def test_official_rounding_is_the_reference_bit_for_bit(
    native: object, dim: int, rope: int
) -> None:
    x = _wide_range(60, dim, 2)
    got = x.clone().numpy()
    native.round_entry(got, rope)
    assert _same_bits(torch.from_numpy(got), reference.round_entry(x, rope))


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_index_rounding_is_the_reference_bit_for_bit(native: object, dim: int) -> None:
    x = _wide_range(60, dim, 3)
    got = x.clone().numpy()
    native.round_index(got, False)
    assert _same_bits(torch.from_numpy(got), reference.round_index(x))
    got = x.bfloat16().float().numpy()
    native.round_index(got, True)
    assert _same_bits(torch.from_numpy(got), reference.round_index(x.bfloat16()).float())


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_keys_read_back_as_their_format_says(native: object, dim: int) -> None:
    x = _wide_range(75, dim, 4)
    assert _same_bits(_through_keys(native, x, "fp32"), x)
    assert _same_bits(_through_keys(native, x, "fp4"), reference.simulate_fp4(x, 32))
    error = (_through_keys(native, x, "int8") - x).abs()
    assert bool((error <= x.abs().amax(-1, keepdim=True) / 127 * 0.5001).all())
    rounded = reference.round_index(x)
    assert _same_bits(_through_keys(native, rounded, "fp4"), rounded)


def _select(
    native: object,
    keys: torch.Tensor,
    q: torch.Tensor,
    weight: torch.Tensor,
    kind: str,
    topk: int,
    *,
    official: bool = False,
    threads: int = 1,
) -> list[list[int]]:
    """What each of the last queries chooses; the last sees all keys."""
    start = 4 * len(keys) - len(q)
    stored = _encode_keys(native, keys, kind)
    indices = np.full((len(q), topk), -1, np.int32)
    counts = np.zeros(len(q), np.int64)
    native.select_entries(
        kind, q.numpy(), weight.numpy(), stored, start, topk, official, threads, indices, counts
    )
    return [row[:count].tolist() for row, count in zip(indices, counts, strict=True)]


def _queries(rows: int, heads: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, dim, generator=generator)
    return q, torch.randn(rows, heads, generator=generator) + 0.5


def _visible(num_keys: int, rows: int) -> torch.Tensor:
    return (torch.arange(4 * num_keys - rows, 4 * num_keys) + 1) // 4


@settings(max_examples=25, deadline=None)
@given(
    num_keys=st.integers(1, 400),
    rows=st.integers(1, 4),
    heads=st.integers(1, 9),
    topk=st.integers(0, 70),
    seed=st.integers(0, 1000),
)
def test_exact_keys_are_chosen_as_by_the_reference(
    num_keys: int, rows: int, heads: int, topk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: float32 sums are exact in any order, and ties abound.
    keys = torch.randint(-2, 3, (num_keys, 32), generator=generator).float()
    q = torch.randint(-2, 3, (rows, heads, 32), generator=generator).float()
    weight = torch.randint(-2, 3, (rows, heads), generator=generator).float()
    visible = _visible(num_keys, rows)
    scores = reference.indexer_scores(q, weight, keys)
    wanted = reference.select_entries(scores, visible, topk)
    got = _select(cpu.native(), keys, q, weight, "fp32", topk)
    assert got == [sorted(i for i in row.tolist() if i >= 0) for row in wanted]


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1), (-1, 1, -1), (-1, -1, 0)])
def test_far_keys_are_chosen_as_by_the_reference(native: object, signs: tuple[int, ...]) -> None:
    """So many keys per wanted one that most are ruled out by their heads of positive weight."""
    generator = torch.Generator().manual_seed(11)
    keys = torch.randint(-2, 3, (3000, 32), generator=generator).float()
    q = torch.randint(-2, 3, (3, len(signs), 32), generator=generator).float()
    weight = torch.randint(1, 4, q.shape[:2], generator=generator) * torch.tensor(signs).float()
    scores = reference.indexer_scores(q, weight, keys)
    wanted = reference.select_entries(scores, _visible(3000, 3), 5)
    got = _select(native, keys, q, weight, "fp32", 5)
    assert got == [sorted(row.tolist()) for row in wanted]


@pytest.mark.parametrize("heads", [1, 4, 6])
def test_fp4_values_are_scored_exactly(native: object, heads: int) -> None:
    generator = torch.Generator().manual_seed(5)
    keys = reference.round_index(torch.randn(300, 64, generator=generator))
    q, weight = _queries(20, heads, 64, 6)
    q = reference.round_index(q)
    fp4 = _select(native, keys, q, weight, "fp4", 40, official=True)
    scores = reference.indexer_scores(q.double(), weight.double(), keys.double()).float()
    visible = _visible(300, 20)
    for t, chosen in enumerate(fp4):
        row = scores[t, : int(visible[t])]
        least = float(row[chosen].min())
        others = np.setdiff1d(np.arange(len(row)), chosen)
        # Only rounding of nearly equal scores may swap two.
        assert float(row[others].max()) <= least + 1e-5 * float(row.abs().max())


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.97), ("fp4", 0.80)])
def test_coarse_keys_choose_nearly_the_same(native: object, kind: str, least: float) -> None:
    generator = torch.Generator().manual_seed(7)
    keys = torch.randn(3000, 64, generator=generator)
    q, weight = _queries(32, 4, 64, 8)
    exact = _select(native, keys, q, weight, "fp32", 64)
    coarse = _select(native, keys, q, weight, kind, 64)
    shared = [len(set(a) & set(b)) for a, b in zip(exact, coarse, strict=True)]
    assert sum(shared) / (64 * len(shared)) >= least


@pytest.mark.parametrize("kind", ["fp32", "int8", "fp4"])
def test_every_instruction_set_and_thread_count_chooses_alike(kind: str) -> None:
    native = cpu.native()
    generator = torch.Generator().manual_seed(9)
    keys = torch.randn(20_000, 32, generator=generator)
    keys[5000:] = keys[:15_000].clone()  # equal scores far apart
    q, weight = _queries(2, 4, 32, 10)
    before = native.isa()
    try:
        results = []
        for isa in ("avx2", "avx512"):
            if native.set_isa(isa):
                results += [
                    _select(native, keys, q, weight, kind, 100, threads=n) for n in (1, 2, 3)
                ]
    finally:
        native.set_isa(before)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("rising", [True, False])
def test_sorted_scores_do_not_confuse_the_running_threshold(native: object, rising: bool) -> None:
    keys = torch.zeros(2000, 32)
    keys[:, 0] = torch.arange(2000) if rising else torch.arange(2000, 0, -1)
    q, weight = torch.zeros(1, 1, 32), torch.ones(1, 1)
    q[0, 0, 0] = 1.0
    best = list(range(1950, 2000)) if rising else list(range(50))
    assert _select(native, keys, q, weight, "fp32", 50) == [best]
    # All equal: the earliest win.
    assert _select(native, torch.ones(2000, 32), q, weight, "int8", 50) == [list(range(50))]
