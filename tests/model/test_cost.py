"""Parameter, byte and cache numbers from configs alone, against published and measured ones."""

from __future__ import annotations

import pytest
import torch

from rorqual.model.config import PRESETS, TINY, V4_FLASH, V4_PRO, ModelConfig
from rorqual.model.cost import cache_cost, model_cost
from rorqual.model.layout import count_parameters, tensor_table
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer
from rorqual.testing.weights import random_state


@pytest.mark.parametrize(
    ("config", "total_billions", "active_billions"),
    [(V4_FLASH, 284.33, 13.80), (V4_PRO, 1573.00, 49.78)],
)
def test_published_models_have_their_published_parameter_counts(
    config: ModelConfig, total_billions: float, active_billions: float
) -> None:
    count = count_parameters(config)
    assert round(count.total / 1e9, 2) == total_billions
    assert round(count.active / 1e9, 2) == active_billions


def test_flash_has_the_number_of_tensors_of_the_released_checkpoint() -> None:
    table = tensor_table(V4_FLASH)
    assert len(table) == 69_187
    assert sum(spec.is_mtp for spec in table) == 1_575
    assert len({spec.name for spec in table}) == len(table)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_is_exactly_the_state_of_the_network(name: str) -> None:
    config = PRESETS[name].replace(n_routed_experts=8)  # modules of all 384 take long to make
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    table = tensor_table(config, float_dtype=torch.float32)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        spec.name: spec.shape for spec in table
    }
    quantised = [spec for spec in table if spec.dtype.itemsize == 1]
    assert all(state[spec.name].dtype == spec.dtype for spec in quantised)


def test_total_counts_every_learned_value_of_a_plain_network_once() -> None:
    with torch.device("meta"):
        state = Transformer(TINY).state_dict()
    learned = {
        name: value
        for name, value in state.items()
        if not name.startswith("mtp.") and not name.endswith("tid2eid")
    }
    assert count_parameters(TINY).total == sum(value.numel() for value in learned.values())


def test_active_parameters_leave_out_the_experts_a_token_is_not_sent_to() -> None:
    one = count_parameters(TINY.replace(num_experts_per_tok=1))
    two = count_parameters(TINY.replace(num_experts_per_tok=2))
    expert = 3 * TINY.hidden_size * TINY.moe_intermediate_size
    assert two.active - one.active == expert * TINY.num_hidden_layers
    every = count_parameters(TINY.replace(num_experts_per_tok=TINY.n_routed_experts))
    assert every.active == every.total


@pytest.mark.parametrize(
    ("config", "per_token", "window_megabytes", "tail_mebibytes"),
    [(V4_FLASH, 3514.25, 3.21, 11.6), (V4_PRO, 5031.44, 4.56, 17.8)],
)
def test_published_models_have_their_published_cache_sizes(
    config: ModelConfig, per_token: float, window_megabytes: float, tail_mebibytes: float
) -> None:
    cache = cache_cost(config)
    assert (cache.entry_bytes, cache.index_key_bytes) == (584, 68)
    assert round(cache.per_token, 2) == per_token
    assert round(cache.window_bytes / 1e6, 2) == window_megabytes
    assert round(cache.tail_bytes / 2**20, 1) == tail_mebibytes


def test_cache_of_a_running_plain_model_grows_by_the_formula() -> None:
    config = TINY.replace(num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), vocab_size=64)
    model = Transformer(config)
    model.load_state_dict(random_state(config, 0))
    state = model.new_state()
    cost = cache_cost(config, float_bytes=4)
    for length in (128, 384):
        model(
            torch.zeros(length - state.length, dtype=torch.int64),
            [Segment(state, length - state.length)],
        )
        assert state.compressed_nbytes == cost.per_token * length
    window = [layer.window for layer in state.layers if layer.window is not None]
    assert sum(w.numel() * w.element_size() for w in window) == cost.window_bytes


def test_total_cache_is_fixed_part_plus_growth() -> None:
    cache = model_cost(V4_FLASH).cache
    growth = cache.total(2**20) - cache.total(2**19)
    assert growth == cache.per_token * 2**19


def test_weight_bytes_match_the_released_size() -> None:
    # 46 shards of together about 160 GB were released for Flash.
    cost = model_cost(V4_FLASH)
    assert 155e9 < cost.weight_bytes + cost.mtp_bytes < 165e9
