"""The shape and numerics of one V4 network, as frozen data.

Field names are those of the official Hugging Face ``config.json`` so that a released checkpoint's
file is read unchanged. This module does not build modules and knows no tensor; see
``model/transformer.py`` for the network and ``model/cost.py`` for what a config costs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rorqual.errors import ConfigError

Numerics = Literal["plain", "official"]
ExpertDtype = Literal["fp4", "fp8", "plain"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN parameters used by every layer that compresses (ratio > 0); report 2.3."""

    factor: float
    """Context extension factor (dimensionless)."""
    original_max_position_embeddings: int
    """Context length in tokens before extension."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is fully interpolated."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = f"rope_scaling.{field.name}", getattr(self, field.name)
            _need_positive(name, value)
            if field.type == "int" and not _is_integer(value):
                raise ConfigError(f"{name} must be an integer, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One V4 network. Immutable; every field is validated on construction.

    Raises:
        ConfigError: a field is out of range or two fields disagree; the message names them.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    """Width of a query head and of the one shared key/value entry."""
    qk_rope_head_dim: int
    """Rotated dimensions, the last ones of each head."""
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    """Width of each output group's latent."""
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    """The first layers route by token id through a table instead of by score."""
    routed_scaling_factor: float
    compress_ratios: tuple[int, ...]
    """Tokens per compressed entry, one per layer then one per MTP block: 0 (window only),
    4 (CSA, overlapping, with indexer) or a larger ratio (HCA, every entry visible)."""
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    """Compressed entries a CSA query attends to, at most."""
    n_shared_experts: int = 1
    swiglu_limit: float = 10.0
    sliding_window: int = 128
    rope_theta: float = 10_000.0
    compress_rope_theta: float = 160_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 1_048_576
    hc_mult: int = 4
    """Residual streams of the manifold-constrained hyper-connections."""
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    numerics: Numerics = "plain"
    """``plain``: floating point throughout. ``official``: the reference's FP8/FP4 activation
    simulation, BF16 casts and the Hadamard rotation on the indexer path."""
    expert_dtype: ExpertDtype = "plain"
    """Stored format of routed experts."""
    linear_dtype: Literal["fp8", "plain"] = "plain"
    """Stored format of the other quantisable linears (official checkpoints: FP8 128x128)."""

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(message)

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                need(_is_integer(value), f"{field.name} must be an integer, got {value!r}")
            elif field.type == "float":
                _need_positive(field.name, value)
        ratios = self.compress_ratios
        need(
            isinstance(ratios, tuple) and all(map(_is_integer, ratios)),
            f"compress_ratios must be a list of integers, got {ratios!r}",
        )
        need(
            self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling),
            f"rope_scaling must be a RopeScaling, got {self.rope_scaling!r}",
        )
        may_be_zero = {"num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "index_topk"}
        for field in dataclasses.fields(self):
            if field.type == "int":
                low = 0 if field.name in may_be_zero else 1
                value = getattr(self, field.name)
                need(value >= low, f"{field.name} must be >= {low}, got {value}")
        blocks = self.num_hidden_layers + self.num_nextn_predict_layers
        need(
            len(self.compress_ratios) == blocks,
            f"compress_ratios needs {blocks} entries (num_hidden_layers + "
            f"num_nextn_predict_layers), got {len(self.compress_ratios)}",
        )
        need(
            all(r == 0 or r >= 2 for r in self.compress_ratios),
            f"compress_ratios entries must be 0 or >= 2, got {self.compress_ratios}",
        )
        need(
            self.qk_rope_head_dim % 2 == 0 and self.qk_rope_head_dim <= self.head_dim,
            f"qk_rope_head_dim must be even and <= head_dim, got {self.qk_rope_head_dim}",
        )
        need(
            self.num_attention_heads % self.o_groups == 0,
            f"num_attention_heads {self.num_attention_heads} must divide into o_groups "
            f"{self.o_groups}",
        )
        need(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts "
            f"{self.n_routed_experts}",
        )
        need(
            self.num_hash_layers <= self.num_hidden_layers,
            f"num_hash_layers {self.num_hash_layers} exceeds num_hidden_layers",
        )
        need(
            not self.has_indexer or self.index_head_dim >= self.qk_rope_head_dim,
            f"index_head_dim {self.index_head_dim} must be >= qk_rope_head_dim",
        )
        need(self.numerics in ("plain", "official"), f"numerics {self.numerics!r} unknown")
        need(self.expert_dtype in ("fp4", "fp8", "plain"), f"expert_dtype {self.expert_dtype!r}")
        need(self.linear_dtype in ("fp8", "plain"), f"linear_dtype {self.linear_dtype!r} unknown")

    @property
    def has_indexer(self) -> bool:
        """Whether any block selects compressed entries (ratio 4)."""
        return any(is_overlapping(r) for r in self.compress_ratios)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with ``changes`` applied and validated."""
        return dataclasses.replace(self, **changes)

    # ---- config.json ------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the official ``config.json`` object.

        Keys this project has no use for are listed in ``_IGNORED``; any other unknown key raises,
        so that an option is never silently dropped.

        Raises:
            ConfigError: wrong architecture, missing, unknown or ill-typed key.
        """
        raw = dict(raw)
        kind = raw.pop("model_type", "deepseek_v4")
        if kind != "deepseek_v4":
            raise ConfigError(f"model_type must be 'deepseek_v4', got {kind!r}")
        quant = raw.pop("quantization_config", None)
        if quant is not None:
            _check_quantization(quant)
        fields: dict[str, Any] = {"linear_dtype": "fp8" if quant else "plain"}
        if "expert_dtype" not in raw:
            fields["expert_dtype"] = "fp8" if quant else "plain"
        if "numerics" not in raw:  # our own key: released files do not have it
            fields["numerics"] = "official" if quant else "plain"
        scaling = raw.pop("rope_scaling", None)
        if scaling is not None:
            fields["rope_scaling"] = _rope_scaling(scaling)
        names = {f.name for f in dataclasses.fields(cls)}
        for key, value in raw.items():
            if key in names:
                fields[key] = tuple(value) if isinstance(value, list) else value
            elif key in _FIXED:
                if value != _FIXED[key]:
                    raise ConfigError(f"{key} must be {_FIXED[key]!r}, got {value!r}")
            elif key not in _IGNORED:
                raise ConfigError(f"config.json: unknown key {key!r}")
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.name not in fields
        ]
        if missing:
            raise ConfigError(f"config.json: missing {', '.join(missing)}")
        return cls(**fields)

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        """Read ``config.json`` at ``path``. Raises ConfigError naming the file."""
        try:
            raw = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a JSON object")
        try:
            return cls.from_dict(cast("dict[str, Any]", raw))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The official ``config.json`` object for this config (round-trips ``from_dict``)."""
        out = dataclasses.asdict(self)
        out["compress_ratios"] = list(self.compress_ratios)
        out.pop("linear_dtype")
        if self.rope_scaling is None:
            out.pop("rope_scaling")
        else:
            out["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(self.rope_scaling)}
        if self.linear_dtype == "fp8":
            out["quantization_config"] = dict(_FP8_QUANTIZATION)
            if self.expert_dtype == "fp8":
                out.pop("expert_dtype")
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            **_FIXED,
            **out,
        }


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _need_positive(name: str, value: object) -> None:
    is_number = isinstance(value, float) or _is_integer(value)
    if not is_number or not 0 < cast("float", value) < math.inf:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")


def is_overlapping(ratio: int) -> bool:
    """Whether compression at ``ratio`` overlaps groups and selects entries (CSA)."""
    return ratio == 4


def _rope_scaling(raw: object) -> RopeScaling:
    if not isinstance(raw, dict):
        raise ConfigError(f"rope_scaling must be an object, got {raw!r}")
    fields = {k: v for k, v in raw.items() if k not in ("type", "rope_type")}
    kind = raw.get("type", raw.get("rope_type", "yarn"))
    if kind != "yarn":
        raise ConfigError(f"rope_scaling type must be 'yarn', got {kind!r}")
    known = {f.name for f in dataclasses.fields(RopeScaling)}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(f"rope_scaling: unknown key {unknown[0]!r}")
    try:
        return RopeScaling(**fields)
    except TypeError as error:
        raise ConfigError(f"rope_scaling: {error}") from None


def _check_quantization(raw: object) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"quantization_config must be an object, got {raw!r}")
    if raw.get("quant_method") != "fp8":
        raise ConfigError(f"quantization_config.quant_method must be 'fp8', got {raw!r}")
    for key, wanted in _FP8_QUANTIZATION.items():
        if raw.get(key, wanted) != wanted:
            raise ConfigError(f"quantization_config.{key} must be {wanted!r}, got {raw[key]!r}")


_FP8_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}

# Options of the format that have one value in V4; any other would change the mathematics.
_FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}

# Meaningless here.
_IGNORED = frozenset(
    {
        "architectures",
        "attention_dropout",
        "dtype",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

_YARN_1M = RopeScaling(factor=16.0, original_max_position_embeddings=65_536)

V4_FLASH = ModelConfig(
    vocab_size=129_280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=6,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    rope_scaling=_YARN_1M,
    numerics="official",
    expert_dtype="fp4",
    linear_dtype="fp8",
)

V4_PRO = V4_FLASH.replace(
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    moe_intermediate_size=3072,
    n_routed_experts=384,
    routed_scaling_factor=2.5,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    index_topk=1024,
)

# The side-by-side benchmark model: 17,965,957 parameters, 20,007,320 with the MTP block.
TINY = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=2,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128, 0),
    index_n_heads=4,
    index_head_dim=64,
    index_topk=64,
    rope_scaling=_YARN_1M,
)

NANO_FLASH = ModelConfig(
    vocab_size=4096,
    hidden_size=192,
    num_hidden_layers=5,
    num_attention_heads=8,
    head_dim=128,
    qk_rope_head_dim=32,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 0, 4, 128, 4, 0),
    index_n_heads=4,
    index_head_dim=32,
    index_topk=256,
    rope_scaling=_YARN_1M,
)

NANO_PRO = NANO_FLASH.replace(
    hidden_size=320,
    num_hidden_layers=9,
    num_attention_heads=8,
    q_lora_rank=160,
    o_groups=4,
    moe_intermediate_size=192,
    n_routed_experts=16,
    routed_scaling_factor=2.5,
    compress_ratios=(128, 128, 4, 128, 4, 128, 4, 128, 4, 0),
    index_topk=512,
)

PRESETS: dict[str, ModelConfig] = {
    "v4-flash": V4_FLASH,
    "v4-pro": V4_PRO,
    "nano-flash": NANO_FLASH,
    "nano-pro": NANO_PRO,
    "tiny": TINY,
}
