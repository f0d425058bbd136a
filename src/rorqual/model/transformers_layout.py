"""The Hugging Face ``transformers`` names, stacking and config of the same network.

Checked against ``transformers`` 5.23 (``models/deepseek_v4`` and ``conversion_mapping.py``).

Tensors
    - The main model's tensors are renamed by ``_MODULES``; ``x.scale`` becomes
      ``x.weight_scale_inv`` (the same values: a factor to multiply by, despite the name).
    - A layer's experts are stacked: ``experts.gate_up_proj [E, 2I, D]`` holds w1 above w3 for each
      expert, ``experts.down_proj [E, D, I]`` holds w2. Packed FP4 codes and FP8 codes stay packed;
      their scales are stacked alike in ``experts.gate_up_proj_scale_inv`` and
      ``experts.down_proj_scale_inv``.
    - ``mtp.*`` keeps its official names: transformers has no such block and ignores them.

Config: ``compress_ratios`` becomes ``layer_types`` and ``compress_rates``, ``num_hash_layers``
becomes ``mlp_layer_types``, the two rotary bases and YaRN become ``rope_parameters``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig, is_overlapping
from rorqual.model.layout import StoredTensor, TensorSpec

_GLOBALS = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
_STACKS = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}

_SLIDING, _CSA, _HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)


def transformers_name(official: str) -> str:
    """The transformers name of one unstacked official tensor, e.g. ``layers.3.attn.wq_a.scale``.

    Raises KeyError for a name that is not in the official layout or belongs to an expert.
    """
    if official.startswith("mtp."):
        return official
    stem, leaf = official, ""
    if official.endswith(".weight"):
        stem, leaf = official.removesuffix(".weight"), ".weight"
    elif official.endswith(".scale"):
        stem, leaf = official.removesuffix(".scale"), ".weight_scale_inv"
    if not stem.startswith("layers."):
        return _GLOBALS[stem] + leaf
    _, layer, module = stem.split(".", 2)
    return f"model.layers.{layer}.{_MODULES[module]}{leaf}"


def transformers_tensors(specs: Iterable[TensorSpec]) -> tuple[StoredTensor, ...]:
    """What a transformers file stores for the official tensors ``specs``, in their order.

    A stack stands where its first part stood; parts are ordered by expert, w1 before w3.
    """
    stored: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in specs:
        path = spec.name.split(".")
        if path[0] == "layers" and path[2:4] == ["ffn", "experts"]:
            _, layer, _, _, _, matrix, leaf = path
            suffix = "_scale_inv" if leaf == "scale" else ""
            stored[f"model.layers.{layer}.mlp.experts.{_STACKS[matrix]}{suffix}"].append(spec)
        else:
            stored[transformers_name(spec.name)].append(spec)
    return tuple(_stored(name, parts) for name, parts in stored.items())


def _stored(name: str, parts: list[TensorSpec]) -> StoredTensor:
    first = parts[0]
    rows, *columns = first.shape
    if name.rpartition(".")[2].startswith("gate_up_proj"):
        shape: tuple[int, ...] = (len(parts) // 2, 2 * rows, *columns)
    elif name.rpartition(".")[2] in ("down_proj", "down_proj_scale_inv"):
        shape = (len(parts), rows, *columns)
    else:
        shape = first.shape
    return StoredTensor(name, shape, first.dtype, tuple(parts))


# ---- config.json --------------------------------------------------------------------------------


def is_transformers_config(raw: dict[str, Any]) -> bool:
    """Whether a ``config.json`` object was written by transformers rather than by DeepSeek."""
    return "layer_types" in raw or "rope_parameters" in raw


def to_transformers_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` object that transformers reads for ``config``.

    ``compress_ratios`` is kept beside ``layer_types``: transformers ignores it there, and it alone
    holds the MTP block's ratio.

    Raises:
        ConfigError: more than one HCA ratio, which transformers cannot express.
    """
    raw = config.to_dict()
    raw.pop("rope_scaling", None)
    main = config.compress_ratios[: config.num_hidden_layers]
    heavy = sorted({r for r in main if r and not is_overlapping(r)})
    if len(heavy) > 1:
        raise ConfigError(f"compress_ratios: transformers allows one HCA ratio, got {heavy}")
    raw["layer_types"] = [_SLIDING if not r else _CSA if is_overlapping(r) else _HCA for r in main]
    raw["compress_rates"] = {_CSA: 4, _HCA: heavy[0] if heavy else 128}
    hashed = raw.pop("num_hash_layers")
    raw["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (config.num_hidden_layers - hashed)
    fraction = raw.pop("qk_rope_head_dim") / config.head_dim
    raw["partial_rotary_factor"] = fraction
    common = {"partial_rotary_factor": fraction}
    scaling = config.rope_scaling
    raw["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": config.rope_theta, **common},
        "compress": {"rope_theta": config.compress_rope_theta, **common}
        | (
            {"rope_type": "default"}
            if scaling is None
            else {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": 1.0,
            }
        ),
    }
    if "quantization_config" in raw:
        raw["quantization_config"]["expert_dtype"] = config.expert_dtype
    return raw


def from_transformers_config(raw: dict[str, Any]) -> ModelConfig:
    """The config of a transformers ``config.json`` object; inverse of ``to_transformers_config``.

    A file that transformers itself wrote holds no MTP ratio; its MTP blocks get 0 (window only).

    Raises:
        ConfigError: a missing, contradictory or unknown entry.
    """
    raw = {key: value for key, value in raw.items() if key not in _RUN_TIME_KEYS}
    try:
        kinds, rates = raw.pop("layer_types"), raw.pop("compress_rates", {})
        ratio_of = {_SLIDING: 0, _CSA: rates.get(_CSA, 4), _HCA: rates.get(_HCA, 128)}
        ratios = [ratio_of[kind] for kind in kinds]
        raw["num_hash_layers"] = _count_hash_layers(raw.pop("mlp_layer_types"))
        rope = raw.pop("rope_parameters")
        main, compress = rope["main"], rope["compress"]
        raw["rope_theta"], raw["compress_rope_theta"] = main["rope_theta"], compress["rope_theta"]
        fraction = raw.pop("partial_rotary_factor", main.get("partial_rotary_factor"))
        raw["qk_rope_head_dim"] = round(raw["head_dim"] * fraction)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"transformers config: {type(error).__name__} on {error}") from None
    if is_overlapping(ratio_of[_HCA]) or not is_overlapping(ratio_of[_CSA]):
        raise ConfigError(f"compress_rates: CSA needs rate 4 and HCA another, got {rates}")
    given = raw.get("compress_ratios")
    if given is not None and list(given[: len(ratios)]) != ratios:
        raise ConfigError("compress_ratios contradicts layer_types and compress_rates")
    raw["compress_ratios"] = given or [*ratios, *[0] * raw.get("num_nextn_predict_layers", 1)]
    if compress.get("rope_type", "default") == "yarn":
        raw["rope_scaling"] = {
            key: value
            for key, value in compress.items()
            if key not in ("rope_theta", "partial_rotary_factor", "attention_factor", "truncate")
        }
    quantization = dict(raw.get("quantization_config") or {})
    if "expert_dtype" in quantization:
        raw["expert_dtype"] = quantization["expert_dtype"]
    return ModelConfig.from_dict(raw)


def _count_hash_layers(kinds: list[str]) -> int:
    count = sum(kind == "hash_moe" for kind in kinds)
    if kinds != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
        raise ConfigError("mlp_layer_types: hash_moe layers must come first")
    return count


# Written by transformers, decided elsewhere here (training) or fixed by the architecture.
_RUN_TIME_KEYS = frozenset(
    {
        "mlp_bias",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    }
)
