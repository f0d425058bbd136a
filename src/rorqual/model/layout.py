"""The official checkpoint's tensors, derived from a config alone: names, shapes, dtypes, roles.

``tensor_table`` is the one description of what a checkpoint holds; reading, writing, converting
and counting all walk it. It opens no file and builds no module. Source: the tensor list of the
released V4 checkpoints (46 shards, 69,187 names for V4-Flash).

Storage formats:
    fp8    weight float8_e4m3fn ``[out, in]`` and scale float8_e8m0fnu, one per 128x128 tile,
           ``[ceil(out/128), ceil(in/128)]``; value = weight * scale
    fp4    weight int8 ``[out, in/2]``, two e2m1 codes per byte along the input, low nibble first,
           and scale float8_e8m0fnu ``[out, ceil(in/32)]``, one per 32 inputs of a row
    plain  one floating-point dtype for the whole file
FP32 whatever the format: ``hc_*``, ``attn_sink``, ``ape`` and ``gate.bias``; ``tid2eid`` is int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig, is_overlapping
from rorqual.model.linear import FP4_BLOCK, FP8_TILE, WeightFormat

Role = Literal[
    "embedding",
    "head",
    "norm",
    "hyper_connection",
    "attention",
    "compressor",
    "indexer",
    "router",
    "hash_table",
    "routed_expert",
    "shared_expert",
    "mtp_projection",
]
Layout = Literal["official", "transformers"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the official layout, as stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    num_parameters: int
    """Learned values it stands for: two per packed FP4 byte, none for scales and hash tables."""

    @property
    def is_mtp(self) -> bool:
        """Whether it belongs to a multi-token-prediction block, which totals leave out."""
        return self.name.startswith("mtp.")

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: the row-major concatenation of one or more official tensors.

    In the official layout each holds one part. The transformers layout stacks the experts of a
    layer, which is a concatenation of their bytes too, so converting never reorders values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class ParameterCount(NamedTuple):
    """Learned values without MTP; ``active`` counts only the experts one token is routed to."""

    total: int
    active: int


def tensor_table(
    config: ModelConfig, *, float_dtype: torch.dtype = torch.bfloat16
) -> tuple[TensorSpec, ...]:
    """Every tensor of a checkpoint of ``config`` in the official order: globals, layers, MTP.

    Args:
        config: decides shapes and, by ``linear_dtype`` and ``expert_dtype``, storage formats.
        float_dtype: dtype of the plain floating-point tensors (official checkpoints: BF16).

    Raises:
        ConfigError: a width that FP4 experts cannot pack (odd).
    """
    table = _Table(config, float_dtype)
    return tuple(table.globals_()) + tuple(
        spec
        for index in range(len(config.compress_ratios))
        for spec in table.block(index, is_mtp=index >= config.num_hidden_layers)
    )


def count_parameters(
    config: ModelConfig, table: Iterable[TensorSpec] | None = None
) -> ParameterCount:
    """Total and active parameters of ``config``, MTP excluded, embedding and head included.

    total  = sum over the table
    active = total - routed * (1 - num_experts_per_tok / n_routed_experts)

    Args:
        table: ``tensor_table(config)`` where the caller already has it.
    """
    main = [spec for spec in table or tensor_table(config) if not spec.is_mtp]
    total = sum(spec.num_parameters for spec in main)
    routed = sum(spec.num_parameters for spec in main if spec.role == "routed_expert")
    used = routed // config.n_routed_experts * config.num_experts_per_tok
    return ParameterCount(total=total, active=total - routed + used)


def official_tensors(specs: Iterable[TensorSpec]) -> tuple[StoredTensor, ...]:
    """The official layout's files hold each tensor under its own name."""
    return tuple(StoredTensor(s.name, s.shape, s.dtype, (s,)) for s in specs)


class _Table:
    """Generates specs; ``d`` hidden, ``c`` head width, ``n`` residual streams."""

    def __init__(self, config: ModelConfig, float_dtype: torch.dtype) -> None:
        self.config = config
        self.float_dtype = float_dtype

    def globals_(self) -> Iterator[TensorSpec]:
        config, d = self.config, self.config.hidden_size
        yield self._float("embed.weight", (config.vocab_size, d), "embedding")
        yield self._float("head.weight", (config.vocab_size, d), "head")
        yield self._float("norm.weight", (d,), "norm")
        yield from self._hyper_head("")

    def block(self, index: int, *, is_mtp: bool) -> Iterator[TensorSpec]:
        config, d = self.config, self.config.hidden_size
        layers = config.num_hidden_layers
        at = f"mtp.{index - layers}." if is_mtp else f"layers.{index}."
        yield self._float(at + "attn_norm.weight", (d,), "norm")
        yield self._float(at + "ffn_norm.weight", (d,), "norm")
        n = config.hc_mult
        for site in ("attn", "ffn"):
            yield self._fp32(f"{at}hc_{site}_fn", ((2 + n) * n, n * d), "hyper_connection")
            yield self._fp32(f"{at}hc_{site}_base", ((2 + n) * n,), "hyper_connection")
            yield self._fp32(f"{at}hc_{site}_scale", (3,), "hyper_connection")
        yield from self._attention(at + "attn.", config.compress_ratios[index])
        yield from self._ffn(at + "ffn.", is_hash=index < config.num_hash_layers)
        if is_mtp:
            for name in ("e_proj", "h_proj"):
                yield from self._linear(at + name, d, d, "mtp_projection", config.linear_dtype)
            for name in ("enorm", "hnorm", "norm"):
                yield self._float(f"{at}{name}.weight", (d,), "norm")
            yield from self._hyper_head(at)

    def _attention(self, at: str, ratio: int) -> Iterator[TensorSpec]:
        config, d, c = self.config, self.config.hidden_size, self.config.head_dim
        heads, rank, groups = config.num_attention_heads, config.q_lora_rank, config.o_groups
        latent = groups * config.o_lora_rank
        fmt = config.linear_dtype
        yield from self._linear(at + "wq_a", rank, d, "attention", fmt)
        yield self._float(at + "q_norm.weight", (rank,), "norm")
        yield from self._linear(at + "wq_b", heads * c, rank, "attention", fmt)
        yield from self._linear(at + "wkv", c, d, "attention", fmt)
        yield self._float(at + "kv_norm.weight", (c,), "norm")
        yield self._fp32(at + "attn_sink", (heads,), "attention")
        yield from self._linear(at + "wo_a", latent, heads * c // groups, "attention", fmt)
        yield from self._linear(at + "wo_b", d, latent, "attention", fmt)
        if ratio:
            yield from self._compressor(at + "compressor.", ratio, c, "compressor")
        if is_overlapping(ratio):
            width, num = config.index_head_dim, config.index_n_heads
            yield from self._linear(at + "indexer.wq_b", num * width, rank, "indexer", fmt)
            yield self._float(at + "indexer.weights_proj.weight", (num, d), "indexer")
            yield from self._compressor(at + "indexer.compressor.", ratio, width, "indexer")

    def _compressor(self, at: str, ratio: int, width: int, role: Role) -> Iterator[TensorSpec]:
        columns = (2 if is_overlapping(ratio) else 1) * width
        yield self._fp32(at + "ape", (ratio, columns), role)
        yield self._float(at + "wkv.weight", (columns, self.config.hidden_size), role)
        yield self._float(at + "wgate.weight", (columns, self.config.hidden_size), role)
        yield self._float(at + "norm.weight", (width,), "norm")

    def _ffn(self, at: str, *, is_hash: bool) -> Iterator[TensorSpec]:
        config, d, inner = self.config, self.config.hidden_size, self.config.moe_intermediate_size
        experts = config.n_routed_experts
        yield self._float(at + "gate.weight", (experts, d), "router")
        if is_hash:
            shape = (config.vocab_size, config.num_experts_per_tok)
            yield TensorSpec(at + "gate.tid2eid", shape, torch.int64, "hash_table", 0)
        else:
            yield self._fp32(at + "gate.bias", (experts,), "router")
        shared = inner * config.n_shared_experts
        for name, rows, columns in (("w1", shared, d), ("w2", d, shared), ("w3", shared, d)):
            yield from self._linear(
                f"{at}shared_experts.{name}", rows, columns, "shared_expert", config.linear_dtype
            )
        for expert in range(experts):
            for name, rows, columns in (("w1", inner, d), ("w2", d, inner), ("w3", inner, d)):
                yield from self._linear(
                    f"{at}experts.{expert}.{name}",
                    rows,
                    columns,
                    "routed_expert",
                    config.expert_dtype,
                )

    def _hyper_head(self, at: str) -> Iterator[TensorSpec]:
        n, d = self.config.hc_mult, self.config.hidden_size
        yield self._fp32(at + "hc_head_fn", (n, n * d), "hyper_connection")
        yield self._fp32(at + "hc_head_base", (n,), "hyper_connection")
        yield self._fp32(at + "hc_head_scale", (1,), "hyper_connection")

    def _linear(
        self, name: str, rows: int, columns: int, role: Role, fmt: WeightFormat
    ) -> Iterator[TensorSpec]:
        weight, size = name + ".weight", rows * columns
        if fmt == "plain":
            yield TensorSpec(weight, (rows, columns), self.float_dtype, role, size)
            return
        if fmt == "fp8":
            yield TensorSpec(weight, (rows, columns), torch.float8_e4m3fn, role, size)
            shape = (-(-rows // FP8_TILE), -(-columns // FP8_TILE))
        else:
            if columns % 2:
                raise ConfigError(f"{name}: FP4 packs two inputs a byte, got {columns} inputs")
            yield TensorSpec(weight, (rows, columns // 2), torch.int8, role, size)
            shape = (rows, -(-columns // FP4_BLOCK))
        yield TensorSpec(name + ".scale", shape, torch.float8_e8m0fnu, role, 0)

    def _float(self, name: str, shape: tuple[int, ...], role: Role) -> TensorSpec:
        return TensorSpec(name, shape, self.float_dtype, role, math.prod(shape))

    def _fp32(self, name: str, shape: tuple[int, ...], role: Role) -> TensorSpec:
        return TensorSpec(name, shape, torch.float32, role, math.prod(shape))
