"""The reference against hand-derived values and against definitions written another way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rorqual.kernels import reference

GOLD = json.loads((Path(__file__).parents[1] / "golden" / "numeric_gold.json").read_text())


def test_yarn_and_plain_frequencies_are_the_official_ones() -> None:
    yarn = reference.rotary_frequencies(64, 160_000, factor=16, original_length=65_536)
    plain = reference.rotary_frequencies(64, 10_000)
    expected = torch.tensor(GOLD["yarn_inv_freq_compress_layers"], dtype=torch.float64)
    torch.testing.assert_close(yarn, expected, rtol=1e-12, atol=0)
    expected = torch.tensor(GOLD["plain_inv_freq_theta10000"], dtype=torch.float64)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=0)


def test_sinkhorn_matches_the_gold_matrix() -> None:
    got = reference.sinkhorn(torch.tensor(GOLD["sinkhorn_in"], dtype=torch.float64), 20, 1e-6)
    expected = torch.tensor(GOLD["sinkhorn_out"], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(got.sum(-2), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_fp4_rounding_matches_the_gold_values() -> None:
    x = torch.tensor(GOLD["fp4_in"])
    assert reference.round_fp4(x).tolist() == GOLD["fp4_out"]["values"]
    assert reference.simulate_fp4(x, 32).tolist() == GOLD["fp4_out"]["values"]


def test_fp4_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert reference.round_fp4(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert reference.round_fp4(-ties).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


@pytest.mark.parametrize("value", [1.0, 2.0, 3.0, 0.75, 447.0 / 448, 1e-30, 2.0**-100])
def test_power_of_two_rounds_up_exactly(value: float) -> None:
    got = float(reference.round_to_power_of_two(torch.tensor([value]))[0])
    exact = float(torch.tensor(value))
    assert got == 2.0 ** math.ceil(math.log2(exact))


@pytest.mark.parametrize(("width", "block"), [(128, 64), (448, 64), (24, 64), (100, 32)])
def test_simulated_fp8_error_is_within_half_a_step(width: int, block: int) -> None:
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(0)) * 3
    y = reference.simulate_fp8(x, block)
    assert y.shape == x.shape
    for start in range(0, width, block):
        part, rounded = x[:, start : start + block], y[:, start : start + block]
        scale = reference.round_to_power_of_two(part.abs().amax(-1, keepdim=True) / 448)
        # e4m3: 3 mantissa bits, smallest step 2^-9 of the scale.
        bound = (part.abs() * 2.0**-4).maximum(scale * 2.0**-10)
        assert bool(((part - rounded).abs() <= bound * (1 + 1e-6)).all())
        again = reference.simulate_fp8(rounded, block)
        torch.testing.assert_close(again, rounded, rtol=0, atol=0)


def test_zero_survives_every_quantiser() -> None:
    zero = torch.zeros(2, 64)
    assert torch.equal(reference.simulate_fp8(zero, 64), zero)
    assert torch.equal(reference.simulate_fp4(zero, 32), zero)


def test_fp4_unpacks_low_nibble_first() -> None:
    packed = torch.tensor([[0x21, 0xF7] + [0] * 14], dtype=torch.uint8)
    scale = torch.tensor([[2.0]]).to(torch.float8_e8m0fnu)
    got = reference.dequantize_fp4(packed, scale)[0, :4]
    assert got.tolist() == [1.0, 2.0, 12.0, -12.0]


def test_fp8_tiles_take_their_own_scale() -> None:
    weight = torch.ones(130, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).to(torch.float8_e8m0fnu)
    got = reference.dequantize_fp8(weight, scale)
    assert got[0, 0] == 1
    assert got[0, 128] == 2
    assert got[129, 127] == 4
    assert got[129, 199] == 8


def test_hadamard_is_orthonormal_and_symmetric() -> None:
    matrix = reference.hadamard(torch.eye(128, dtype=torch.float64))
    identity = torch.eye(128, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity)
    torch.testing.assert_close(matrix, matrix.T)
    assert bool((matrix[0] == 128**-0.5).all())
    with pytest.raises(ValueError, match="power-of-two"):
        reference.hadamard(torch.ones(12))


def test_rotation_makes_scores_relative_and_inverts() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    freq = reference.rotary_frequencies(8, 10_000)

    def at(x: torch.Tensor, position: int, *, inverse: bool = False) -> torch.Tensor:
        angle = position * freq
        return reference.rotate(x, angle.cos(), angle.sin(), inverse=inverse)

    torch.testing.assert_close(at(q, 7) @ at(k, 3), at(q, 1007) @ at(k, 1003))
    torch.testing.assert_close(at(at(q, 9), 9, inverse=True), q)
    assert torch.equal(at(q, 5)[:8], q[:8])  # only the last dims turn
    # Interleaved pairs are complex numbers.
    turned = torch.view_as_complex(q[8:].reshape(4, 2)) * torch.polar(torch.ones(4).double(), freq)
    torch.testing.assert_close(at(q, 1)[8:], torch.view_as_real(turned).flatten())


def test_streams_follow_the_written_sums() -> None:
    generator = torch.Generator().manual_seed(2)
    m, d = 4, 6
    x = torch.randn(3, m, d, generator=generator, dtype=torch.float64)
    f = torch.randn(3, d, generator=generator, dtype=torch.float64)
    fn = torch.randn(24, m * d, generator=generator, dtype=torch.float64)
    base = torch.randn(24, generator=generator, dtype=torch.float64)
    scale = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    mixing = reference.stream_mixing(x, fn, scale, base, iterations=20, eps=1e-6, norm_eps=1e-6)
    flat = x[1].flatten()
    raw = (fn @ flat) / (flat.square().mean() + 1e-6).sqrt()
    assert mixing.pre_NM[1, 2] == pytest.approx(
        float(torch.sigmoid(raw[2] * 0.5 + base[2])) + 1e-6, abs=1e-12
    )
    assert mixing.post_NM[1, 3] == pytest.approx(
        2 * float(torch.sigmoid(raw[7] * 0.7 + base[7])), abs=1e-12
    )
    written = reference.write_streams(f, x, mixing)
    k = 2
    by_hand = mixing.post_NM[1, k] * f[1]
    for j in range(m):
        by_hand = by_hand + mixing.comb_NMM[1, j, k] * x[1, j]
    torch.testing.assert_close(written[1, k], by_hand)


def test_sink_takes_weight_and_adds_nothing() -> None:
    kv = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    q = torch.zeros(1, 1, 2)
    index = torch.tensor([[0, 1, -1]])
    out = reference.sparse_attention(q, kv, torch.tensor([0.0]), index, 1.0)
    torch.testing.assert_close(out[0, 0], torch.tensor([1 / 3, 1 / 3]))
    out = reference.sparse_attention(q, kv, torch.tensor([-1e9]), index, 1.0)
    torch.testing.assert_close(out[0, 0], torch.tensor([0.5, 0.5]))
    far = reference.sparse_attention(q, kv, torch.tensor([1e4]), index, 1.0)
    assert torch.isfinite(far).all()


def test_selection_takes_the_best_visible_entries() -> None:
    scores = torch.tensor([[5.0, -1.0, 9.0, 3.0], [5.0, -1.0, 9.0, 3.0]])
    chosen = reference.select_entries(scores, torch.tensor([2, 4]), 3)
    assert sorted(chosen[0].tolist()) == [-1, 0, 1]  # a negative score is still selected
    assert sorted(chosen[1].tolist()) == [0, 2, 3]


def test_selection_prefers_the_earlier_of_equals_and_orders_negatives() -> None:
    scores = torch.tensor([[-2.0, 0.0, -0.0, 0.0, -1.0, 0.0]])
    assert sorted(reference.select_entries(scores, torch.tensor([6]), 2)[0].tolist()) == [1, 2]
    assert sorted(reference.select_entries(scores, torch.tensor([6]), 5)[0].tolist()) == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip
    random = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    chosen = reference.select_entries(random, torch.full((64,), 40), 7)
    assert torch.equal(chosen.sort(-1).values, random.topk(7, -1).indices.sort(-1).values)


def test_swiglu_clamps_one_side_of_the_gate_and_both_of_the_linear_part() -> None:
    gate, up = torch.tensor([50.0, -50.0]), torch.tensor([50.0, -50.0])
    got = reference.swiglu(gate, up, 10.0)
    assert got[0] == pytest.approx(10 * 10 / (1 + math.exp(-10)))
    assert got[1] == pytest.approx(-50 / (1 + math.exp(50)) * -10)
