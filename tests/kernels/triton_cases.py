"""Triton kernels against the reference on random, ragged shapes. Run by ``test_triton_kernels``.

Not collected by itself: the interpreter has to be chosen before Triton is first imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from rorqual.kernels import dispatch, reference
from rorqual.kernels import triton as kernels
from rorqual.model.config import ModelConfig
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer
from rorqual.testing.weights import random_state

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    moe_intermediate_size=32,
    n_routed_experts=3,
    num_experts_per_tok=2,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 8, 0),
    index_n_heads=2,
    index_head_dim=32,
    index_topk=2,
    sliding_window=4,
)
DEVICE = torch.device(os.environ.get("RORQUAL_TEST_DEVICE", "cpu"))
FLOATS = [torch.float32, torch.bfloat16]
# float32 differs by the order of sums only; bfloat16 by one rounding of a result, and of
# probabilities.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.dtype == wanted.dtype
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(found.cpu(), wanted.cpu(), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("queries", "heads", "width", "entries", "chosen"),
    [(3, 5, 24, 70, 37), (2, 8, 64, 40, 32), (1, 33, 16, 9, 1)],
)
def test_sparse_attention(
    generator: torch.Generator,
    dtype: torch.dtype,
    queries: int,
    heads: int,
    width: int,
    entries: int,
    chosen: int,
) -> None:
    q = torch.randn(queries, heads, width, generator=generator).to(DEVICE, dtype)
    kv = torch.randn(entries, width, generator=generator).to(DEVICE, dtype)
    sink = torch.randn(heads, generator=generator).to(DEVICE)
    order = [torch.randperm(entries, generator=generator)[:chosen] for _ in range(queries)]
    index = torch.stack(order)
    hidden = torch.rand(queries, chosen, generator=generator) < 0.4
    hidden[:, -1] = False  # every query needs an entry, here behind masked ones
    index = index.masked_fill(hidden, -1).to(DEVICE)
    arguments = (q, kv, sink, index, width**-0.5)
    near(kernels.sparse_attention(*arguments), reference.sparse_attention(*arguments), dtype)


def test_sparse_attention_with_a_sink_far_above_and_below_the_logits(
    generator: torch.Generator,
) -> None:
    q = torch.randn(2, 4, 16, generator=generator).to(DEVICE)
    kv = torch.randn(20, 16, generator=generator).to(DEVICE)
    sink = torch.tensor([-80.0, 0.0, 30.0, 80.0], device=DEVICE)
    index = torch.arange(20, device=DEVICE).repeat(2, 1)
    found = kernels.sparse_attention(q, kv, sink, index, 0.25)
    near(found, reference.sparse_attention(q, kv, sink, index, 0.25))
    assert found[:, 3].abs().max() < 1e-20  # the sink took it all


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("queries", "heads", "width", "entries"), [(3, 5, 24, 131), (1, 4, 64, 1), (2, 16, 32, 64)]
)
def test_indexer_scores(
    generator: torch.Generator,
    dtype: torch.dtype,
    queries: int,
    heads: int,
    width: int,
    entries: int,
) -> None:
    q = torch.randn(queries, heads, width, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(queries, heads, generator=generator).to(DEVICE, dtype)
    key = torch.randn(entries, width, generator=generator).to(DEVICE, dtype)
    found = kernels.indexer_scores(q, weight, key)
    wanted = reference.indexer_scores(q, weight, key)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("groups", "slots", "width"), [(3, 8, 70), (2, 128, 16), (1, 4, 1), (2, 5, 65)]
)
def test_pool_group(generator: torch.Generator, groups: int, slots: int, width: int) -> None:
    values = torch.randn(groups, slots, width, generator=generator).to(DEVICE)
    scores = 5 * torch.randn(groups, slots, width, generator=generator).to(DEVICE)
    scores[0, : slots // 2] = -torch.inf  # as before the first group of a sequence
    near(kernels.pool_group(values, scores), reference.pool_group(values, scores))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "streams", "width"), [(17, 4, 70), (1, 3, 300), (3, 2, 16)])
def test_streams(
    generator: torch.Generator, dtype: torch.dtype, tokens: int, streams: int, width: int
) -> None:
    rows = 2 * streams + streams**2
    x = torch.randn(tokens, streams, width, generator=generator).to(DEVICE, dtype)
    fn = (torch.randn(rows, streams * width, generator=generator) * width**-0.5).to(DEVICE)
    scale = torch.tensor([0.7, 1.3, 2.0], device=DEVICE)
    base = torch.randn(rows, generator=generator).to(DEVICE)
    constants = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
    wanted = reference.stream_mixing(x, fn, scale, base, **constants)
    found = kernels.stream_mixing(x, fn, scale, base, **constants)
    for ours, theirs in zip(found, wanted, strict=True):
        near(ours, theirs)
    assert (found.comb_NMM.sum(-2) - 1).abs().max() < 1e-5
    near(kernels.read_streams(x, wanted.pre_NM), reference.read_streams(x, wanted.pre_NM), dtype)
    out = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    near(kernels.write_streams(out, x, wanted), reference.write_streams(out, x, wanted), dtype)


def packed(
    kind: str, outputs: int, inputs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes and scales of one matrix, and their float32 value."""
    if kind == "fp8":
        codes = torch.randint(0, 256, (outputs, inputs), generator=generator, dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x3C  # no NaN
        shape: tuple[int, ...] = (-(-outputs // 128), -(-inputs // 128))
    else:
        codes = torch.randint(
            0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8
        )
        shape = (outputs, -(-inputs // 32))
    exponents = torch.randint(117, 130, shape, generator=generator, dtype=torch.uint8)
    scale = exponents.view(torch.float8_e8m0fnu)
    if kind == "fp8":
        weight = codes.view(torch.float8_e4m3fn)
        return weight, scale, reference.dequantize_fp8(weight, scale)
    weight = codes.view(torch.int8)
    return weight, scale, reference.dequantize_fp4(weight, scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize(
    ("counts", "outputs", "inputs"),
    [([3, 0, 1, 5], 130, 144), ([0, 0, 40, 1], 16, 34), ([1], 7, 258)],
)
def test_grouped_linear(
    generator: torch.Generator,
    dtype: torch.dtype,
    kind: str,
    counts: list[int],
    outputs: int,
    inputs: int,
) -> None:
    matrices = [packed(kind, outputs, inputs, generator) for _ in counts]
    weights = [weight.to(DEVICE) for weight, _, _ in matrices]
    scales = [scale.to(DEVICE) for _, scale, _ in matrices]
    table = kernels.WeightTable.of(weights, scales, kind)  # type: ignore[arg-type]
    x = torch.randn(sum(counts), inputs, generator=generator).to(dtype)
    ends = torch.tensor(counts).cumsum(0)
    found = kernels.grouped_linear(x.to(DEVICE), ends.to(DEVICE), table).cpu()
    pieces = [
        (rows.double() @ value.double().T)
        for rows, (_, _, value) in zip(x.split(counts), matrices, strict=True)
    ]
    wanted = torch.cat(pieces)
    assert found.dtype == dtype
    size = wanted.abs().amax()
    # The interpreter rounds to bfloat16 by truncation.
    torch.testing.assert_close(
        found.double() / size, wanted / size, rtol=0.0, atol=TOLERANCE[dtype] / 2
    )


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_every_code_of_a_packed_weight_has_its_value(kind: str) -> None:
    inputs = 256
    every = torch.arange(256, dtype=torch.uint8)
    if kind == "fp8":
        every = every.masked_fill((every & 0x7F) == 0x7F, 0)  # NaN
        weight = every.repeat(16, 1).view(torch.float8_e4m3fn)
        scale = torch.full((1, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        value = reference.dequantize_fp8(weight, scale)
    else:
        weight = every.view(2, 128).repeat(8, 1).view(torch.int8)
        scale = torch.full((16, 8), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        value = reference.dequantize_fp4(weight, scale)
    table = kernels.WeightTable.of([weight.to(DEVICE)], [scale.to(DEVICE)], kind)  # type: ignore[arg-type]
    ends = torch.tensor([inputs], device=DEVICE)
    found = kernels.grouped_linear(torch.eye(inputs, device=DEVICE), ends, table)
    assert torch.equal(found.cpu(), value.T)


def test_no_rows_give_no_rows(generator: torch.Generator) -> None:
    weight, scale, _ = packed("fp8", 8, 16, generator)
    table = kernels.WeightTable.of([weight.to(DEVICE)], [scale.to(DEVICE)], "fp8")
    ends = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert kernels.grouped_linear(torch.empty(0, 16, device=DEVICE), ends, table).shape == (0, 8)


def test_matrices_of_different_shapes_are_refused(generator: torch.Generator) -> None:
    one, two = packed("fp8", 8, 16, generator), packed("fp8", 8, 32, generator)
    with pytest.raises(ValueError, match="differ"):
        kernels.WeightTable.of([one[0], two[0]], [one[1], two[1]], "fp8")


def test_dispatch_takes_the_reference_on_a_cpu_and_for_float64() -> None:
    for dtype in FLOATS:
        assert dispatch.kernels_for(torch.empty(1, dtype=dtype)) is reference
    assert dispatch.kernels_for(torch.empty(1, device=DEVICE, dtype=torch.float64)) is reference
    if DEVICE.type in dispatch.TRITON_DEVICES:
        assert dispatch.kernels_for(torch.empty(1, device=DEVICE)) is kernels


@pytest.mark.parametrize(
    ("numerics", "weights"), [("plain", "plain"), ("plain", "fp4"), ("official", "fp4")]
)
def test_a_network_on_these_kernels_is_the_network_on_the_reference(
    numerics: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer kind, prefill and decode; routing by token, so that no near tie decides."""
    config = SMALL.replace(
        numerics=numerics,
        expert_dtype=weights,
        linear_dtype="plain" if weights == "plain" else "fp8",
        num_hash_layers=SMALL.num_hidden_layers,
    )
    model = Transformer(config)
    model.load_state_dict(random_state(config, seed=0))
    model = model.to(DEVICE)
    tokens = torch.randint(config.vocab_size, (14,), generator=torch.Generator().manual_seed(0))

    def logits(devices: tuple[str, ...]) -> Tensor:
        monkeypatch.setattr(dispatch, "TRITON_DEVICES", devices)
        state, found = model.new_state(), []
        for part in tokens.to(DEVICE).split([11, 2, 1]):
            found.append(model(part, [Segment(state, len(part))]))
        return torch.cat(found).cpu()

    wanted, found = logits(()), logits((DEVICE.type,))
    # In official numerics a last bit moves an activation to the next FP8 or FP4 value.
    limit = 1e-5 if numerics == "plain" else 0.15
    assert (found - wanted).norm() / wanted.norm() < limit
