"""Operations, cache and weight reads against published ratios, brute force and real tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import ConfigError
from rorqual.model import v32
from rorqual.model.config import NANO_FLASH, PRESETS, TINY, V4_FLASH, V4_PRO, ModelConfig
from rorqual.model.cost import WeightReads, cache_cost, model_cost
from rorqual.model.economics import MAX_CONTEXT, economics, point
from rorqual.model.flops import Span, TokenFlops, token_flops
from rorqual.model.layout import tensor_table
from rorqual.model.transformer import Transformer

MILLION = 1_000_000


def cost_of(token: TokenFlops, name: str) -> float:
    (part,) = [part for part in token.parts if part.name == name]
    return part.cost


@pytest.mark.parametrize(
    ("config", "compute_percent", "cache_percent"), [(V4_PRO, 27, 10), (V4_FLASH, 10, 7)]
)
def test_a_million_tokens_cost_the_published_share_of_v32(
    config: ModelConfig, compute_percent: int, cache_percent: int
) -> None:
    span = Span.decode(MILLION)
    compute = token_flops(config, span).cost / v32.token_flops(v32.V3_2, span).cost
    cache = cache_cost(config).entries(MILLION) / v32.cache_cost(v32.V3_2).entries(MILLION)
    assert round(100 * compute) == compute_percent
    assert round(100 * cache) == cache_percent


def test_v32_has_its_published_parameters_and_record_sizes() -> None:
    reads = v32.weight_reads(v32.V3_2)
    experts = 58 * 256 * v32.V3_2.expert_parameters
    indexer = 61 * v32.V3_2.indexer_parameters
    assert reads.routed_bytes == pytest.approx(experts, rel=1e-3)
    # 671 B in all and 37 B active, published for the same network without the indexer. Doubled
    # embedding, head and router bytes are within the tolerance.
    total = reads.dense_bytes + reads.routed_bytes - indexer
    assert total == pytest.approx(671e9, rel=0.003)
    at_start = v32.token_flops(v32.V3_2, Span.decode(1))
    assert at_start.flops / 2 == pytest.approx(37e9, rel=0.02)
    cache = v32.cache_cost(v32.V3_2)
    assert (cache.entry_bytes, cache.index_key_bytes, cache.per_token) == (656, 132, 48_068)


@given(
    first=st.integers(1, 300),
    length=st.integers(1, 300),
    ratio=st.sampled_from([1, 4, 7, 128]),
    limit=st.none() | st.integers(0, 90),
)
def test_visible_groups_equal_counting_them(
    first: int, length: int, ratio: int, limit: int | None
) -> None:
    span = Span(first, first + length - 1)
    counts = [t // ratio for t in range(span.first, span.last + 1)]
    if limit is not None:
        counts = [min(limit, count) for count in counts]
    assert span.visible(ratio, limit) == pytest.approx(sum(counts) / length, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_prefill_is_the_mean_of_decoding_every_token_without_its_head(name: str) -> None:
    config, length = PRESETS[name], 700
    tokens = [token_flops(config, Span.decode(t)) for t in range(1, length + 1)]
    head = cost_of(tokens[0], "head")
    mean = sum(token.cost for token in tokens) / length - head + head / length
    assert token_flops(config, Span.prefill(length)).cost == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_every_matrix_of_the_network_is_multiplied_once_per_token(name: str) -> None:
    config = PRESETS[name].replace(n_routed_experts=8)  # a table of all 384 takes long to make
    roles = ("attention", "compressor", "indexer", "router", "shared_expert", "head")
    tables = [spec for spec in tensor_table(config) if not spec.is_mtp and len(spec.shape) == 2]
    held = {
        role: sum(
            spec.num_parameters
            for spec in tables
            if spec.role == role and not spec.name.endswith("ape")
        )
        for role in (*roles, "routed_expert")
    }
    routed = held.pop("routed_expert") // config.n_routed_experts * config.num_experts_per_tok
    token = token_flops(config, Span.decode(1))
    counted = token.flops - cost_of(token, "mHC")
    one_key = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert counted - one_key == 2 * (sum(held.values()) + routed)


def test_operations_are_those_a_running_network_does() -> None:
    """Counted by torch on one decoded token of a network without the skipped shortcuts."""
    from torch.utils.flop_counter import FlopCounterMode

    from rorqual.model.state import Segment

    config = TINY.replace(
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4, 0),
        vocab_size=64,
        num_hash_layers=0,
        index_topk=8,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    state, length = model.new_state(), 135
    model(torch.zeros(length - 1, dtype=torch.int64), [Segment(state, length - 1)])
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, dtype=torch.int64), [Segment(state, 1)])
    assert counter.get_total_flops() == token_flops(config, Span.decode(length)).flops


def test_a_batch_shares_the_dense_weights_and_the_experts_it_meets_twice() -> None:
    reads = WeightReads(
        dense_bytes=1000, routed_bytes=400, row_bytes=3, num_experts=4, num_chosen=2
    )
    assert reads.per_token(1) == 3 + 1000 + 200
    assert reads.per_token(2) == 3 + (1000 + 400 * 0.75) / 2
    assert reads.per_token(10**6) == pytest.approx(3 + 1400 / 10**6)


def test_one_token_reads_the_bytes_of_the_active_parameters() -> None:
    table = [spec for spec in tensor_table(V4_FLASH) if not spec.is_mtp]
    spared = sum(s.nbytes for s in table if s.role == "routed_expert") * 250 / 256
    lookups = sum(s.nbytes for s in table if s.role in ("embedding", "hash_table"))
    rows = 2 * 4096 + 3 * 6 * 8
    expected = model_cost(V4_FLASH).weight_bytes - spared - lookups + rows
    assert model_cost(V4_FLASH).reads.per_token(1) == pytest.approx(expected, rel=1e-12)


def test_a_config_file_costs_what_its_preset_costs(tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(NANO_FLASH.to_dict()), "utf-8")
    for source in (tmp_path, tmp_path / "config.json"):
        found, wanted = point(economics(str(source)), 9999), point(economics("nano-flash"), 9999)
        assert (found.decode, found.prefill) == (wanted.decode, wanted.prefill)
        assert found.cache_bytes == wanted.cache_bytes


@pytest.mark.parametrize("context", [0, -1, MAX_CONTEXT + 1])
def test_a_context_out_of_range_is_refused(context: int) -> None:
    with pytest.raises(ConfigError, match="context must be"):
        point(economics("tiny"), context)
