"""Configs: a wrong field, an option V4 does not have, or a damaged file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.model.config import PRESETS, ModelConfig

RAW = PRESETS["v4-flash"].to_dict()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compress_ratios", 5),
        ("compress_ratios", ["a"] * 44),
        ("compress_ratios", [0] * 43 + [128.5]),
        ("rope_theta", "x"),
        ("swiglu_limit", None),
        ("rms_norm_eps", -1),
        ("hc_eps", float("nan")),
        ("routed_scaling_factor", True),
        ("rope_scaling", {**RAW["rope_scaling"], "factor": "x"}),
        ("rope_scaling", {**RAW["rope_scaling"], "original_max_position_embeddings": 1.5}),
        ("scoring_func", "sigmoid"),
        ("norm_topk_prob", False),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("num_key_value_heads", 8),
        ("topk_method", "greedy"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("quantization_config", {**RAW["quantization_config"], "weight_block_size": [64, 64]}),
        ("quantization_config", 3),
    ],
)
def test_a_wrong_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_dict(RAW | {field: value})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_way_through_a_file(name: str) -> None:
    assert ModelConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


@pytest.mark.parametrize("damage", ["directory", "nested"])
def test_an_unreadable_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if damage == "directory":
        path.mkdir()
    else:
        path.write_text("[" * 50_000)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(path)
