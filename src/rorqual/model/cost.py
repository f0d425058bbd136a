"""What a config costs, by formula: parameters, weight bytes, cache bytes. Nothing is measured.

Operations are in ``flops``. Formulas are in the docstrings. Symbols: ``c`` head_dim, ``r``
qk_rope_head_dim, ``i`` index_head_dim, ``m`` a layer's compression ratio. MTP blocks are left out
of every number here, as in the published ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rorqual.model.config import ModelConfig, is_overlapping
from rorqual.model.layout import TensorSpec, count_parameters, tensor_table

FP8_KV_BLOCK = 64
"""Unrotated dims that share one scale in a packed cache entry."""
FP4_KEY_BLOCK = 32
"""Dims that share one scale in a packed indexer key."""
_TAIL_ITEM_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """Memory of one sequence, bytes."""

    entry_bytes: int
    """One key/value entry, windowed or compressed."""
    index_key_bytes: int
    """One indexer key."""
    per_token: float
    """Growth per token of context, from compressed entries and indexer keys."""
    window_bytes: int
    """Fixed: the last ``sliding_window`` entries of every layer."""
    tail_bytes: int
    """Fixed: values and scores of unfinished compression groups."""

    def entries(self, num_tokens: int) -> float:
        """Bytes of keys and values alone, without the unfinished groups: what reports compare."""
        return self.window_bytes + self.per_token * num_tokens

    def total(self, num_tokens: int) -> float:
        """Bytes of one sequence of ``num_tokens`` (at least a full window)."""
        return self.entries(num_tokens) + self.tail_bytes


@dataclass(frozen=True, kw_only=True)
class WeightReads:
    """Stored weights that decoding reads from memory, bytes."""

    dense_bytes: int
    """Read once per step whatever the batch: all but routed experts and tables."""
    routed_bytes: int
    """All routed experts of all layers."""
    row_bytes: int
    """Read per token: one row of the embedding and of each hash-routing table."""
    num_experts: int
    num_chosen: int
    """Routed experts per token."""

    def per_token(self, batch: int) -> float:
        """Bytes read per token when ``batch`` sequences decode together.

        row + (dense + routed (1 - (1 - K / E)^batch)) / batch: the power is the chance that no
        token of the batch chose an expert, each choosing K of E evenly and independently.
        """
        touched = 1.0 - (1.0 - self.num_chosen / self.num_experts) ** batch
        return self.row_bytes + (self.dense_bytes + self.routed_bytes * touched) / batch


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Size of the weights and the cache of one config."""

    total_parameters: int
    active_parameters: int
    """Per token: all but the experts it is not routed to."""
    weight_bytes: int
    """Stored weights and scales without MTP."""
    mtp_bytes: int
    reads: WeightReads
    cache: CacheCost


def model_cost(config: ModelConfig, *, cache_float_bytes: int = 4) -> ModelCost:
    """Every number of ``config``.

    weight_bytes = sum over the tensor table of elements * bytes of the stored dtype; plain
    configs are counted in BF16, the dtype of the official unquantised tensors.
    cache_float_bytes: see ``cache_cost``.
    """
    table = tensor_table(config)
    count = count_parameters(config, table)
    mtp_bytes = sum(spec.nbytes for spec in table if spec.is_mtp)
    return ModelCost(
        total_parameters=count.total,
        active_parameters=count.active,
        weight_bytes=sum(spec.nbytes for spec in table) - mtp_bytes,
        mtp_bytes=mtp_bytes,
        reads=_weight_reads(config, table),
        cache=cache_cost(config, float_bytes=cache_float_bytes),
    )


def _weight_reads(config: ModelConfig, table: Iterable[TensorSpec]) -> WeightReads:
    main = [spec for spec in table if not spec.is_mtp]
    routed = sum(spec.nbytes for spec in main if spec.role == "routed_expert")
    tables = [spec for spec in main if spec.role in ("embedding", "hash_table")]
    return WeightReads(
        dense_bytes=sum(spec.nbytes for spec in main)
        - routed
        - sum(spec.nbytes for spec in tables),
        routed_bytes=routed,
        row_bytes=sum(spec.nbytes // spec.shape[0] for spec in tables),
        num_experts=config.n_routed_experts,
        num_chosen=config.num_experts_per_tok,
    )


def cache_cost(config: ModelConfig, *, float_bytes: int = 4) -> CacheCost:
    """Cache of one sequence.

    official numerics (packed as the published FlashMLA record)
        entry     = (c - r) FP8 + 2 r BF16 + ceil((c - r) / 64) scales, scales padded to 8 bytes
                  = 448 + 128 + 8 = 584 for V4
        index key = i / 2 FP4 + ceil(i / 32) scales = 64 + 4 = 68 for V4
    plain numerics
        entry     = c * float_bytes
        index key = i * float_bytes

    per_token = sum over CSA layers of (entry + index key) / 4 + sum over HCA layers of entry / m
    window    = layers * sliding_window * entry
    tail      = FP32 values and scores: per CSA layer 2m slots of 2c, and of 2i for the indexer;
                per HCA layer m slots of c

    Args:
        float_bytes: bytes per number of the running engine in plain numerics.
    """
    c, r, i = config.head_dim, config.qk_rope_head_dim, config.index_head_dim
    if config.numerics == "official":
        scales = -(-(c - r) // FP8_KV_BLOCK)
        entry = (c - r) + 2 * r + -(-scales // 8) * 8
        key = i // 2 + -(-i // FP4_KEY_BLOCK)
    else:
        entry, key = c * float_bytes, i * float_bytes
    per_token, tail_items = 0.0, 0
    for ratio in config.compress_ratios[: config.num_hidden_layers]:
        if is_overlapping(ratio):
            per_token += (entry + key) / ratio
            tail_items += 2 * ratio * 2 * (c + i)
        elif ratio:
            per_token += entry / ratio
            tail_items += ratio * c
    return CacheCost(
        entry_bytes=entry,
        index_key_bytes=key,
        per_token=per_token,
        window_bytes=config.num_hidden_layers * config.sliding_window * entry,
        tail_bytes=2 * tail_items * _TAIL_ITEM_BYTES,
    )
