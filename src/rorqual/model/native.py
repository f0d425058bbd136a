"""The network on the native CPU engine: the mathematics of ``Transformer``, one call per step.

Collects a Transformer's weights, computes the memory layout and wraps ``step`` and ``draft``.
Arrays in and out are numpy; PyTorch is only read from while loading. It allocates states and slabs
but knows no sequence: positions, block tables and lifetimes belong to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rorqual.errors import ConfigError
from rorqual.kernels import cpu
from rorqual.kernels.layout import CacheLayout, EntryFormat, KeyFormat, cache_layout
from rorqual.model.config import ModelConfig
from rorqual.model.linear import FP8_TILE, Linear
from rorqual.model.transformer import Transformer

NativeWeightFormat = Literal["as stored", "fp32", "bf16", "int8"]
"""``as stored`` keeps every weight as the model has it. The others convert floating-point weights
of linear layers and the head; ``fp32`` also expands FP8 and FP4. Routers and stream mixing, where
a small error changes a choice, are never rounded."""

_MAX_THREADS = 1024

REPLAY = 1
"""Segment flag: refresh windows and unfinished groups, write no compressed entry."""
ADVANCE_DRAFT = 2
"""Segment flag: also feed the MTP block, so that ``draft`` can follow."""


@dataclass(frozen=True)
class NativeSegment:
    """Consecutive tokens of one sequence in a step."""

    num_tokens: int
    start: int
    """Position of the first token. It may lie up to ``layout.MAX_REWIND`` tokens before the last
    one fed: those are taken back."""
    state: NDArray[np.uint8]
    """From ``new_state``; zeroed for an empty sequence."""
    blocks: NDArray[np.int32]
    """Block ids in the order of the sequence, one per ``layout.BLOCK_TOKENS`` tokens."""
    flags: int = 0


class NativeNetwork:
    """A V4 model on the native engine. One call at a time; the GIL is released inside.

    Results of a token are the same bits whatever else is in the batch, however its sequence was cut
    into segments, and for any number of threads.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        entry_format: EntryFormat = "fp32",
        key_format: KeyFormat = "int8",
        weight_format: NativeWeightFormat = "as stored",
        num_threads: int = 1,
        slab_blocks: int = 64,
    ) -> None:
        """Packs the weights (a copy); ``model`` is not needed afterwards.

        Raises:
            ConfigError: an option is unknown, or the native engine cannot hold this config.
            NativeMissingError: the extension was not built.
        """
        for name, value, known in (
            ("entry_format", entry_format, get_args(EntryFormat)),
            ("key_format", key_format, get_args(KeyFormat)),
            ("weight_format", weight_format, get_args(NativeWeightFormat)),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 1 <= num_threads <= _MAX_THREADS:
            raise ConfigError(f"num_threads must be in 1..{_MAX_THREADS}, got {num_threads}")
        config = model.config
        self.config = config
        self.weight_format: NativeWeightFormat = weight_format
        try:
            self.layout: CacheLayout = cache_layout(
                ratios=config.compress_ratios[: config.num_hidden_layers + _mtp_layers(config)],
                head_dim=config.head_dim,
                rope_dim=config.qk_rope_head_dim,
                index_dim=config.index_head_dim,
                window=config.sliding_window,
                streams=config.hc_mult,
                hidden=config.hidden_size,
                entry_format=entry_format,
                key_format=key_format,
                slab_blocks=slab_blocks,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        native = cpu.native()
        packer = _Packer(native.Matrix, config, weight_format)
        embedding = model.embed.weight.detach()
        if config.numerics == "official":
            embedding = embedding.bfloat16()
        self._network = native.Network(
            _shape(config),
            self.layout,
            dict(packer.matrices(model)),
            dict(_arrays(model)),
            dict(_tables(model)),
            _numpy(embedding).ravel(),
            _numpy(model.rope_plain.frequencies),
            _numpy(model.rope_compressing.frequencies),
            num_threads,
        )

    def new_state(self) -> NDArray[np.uint8]:
        """Memory of an empty sequence: ``layout.state_nbytes`` zeros."""
        return np.zeros(self.layout.state_nbytes, np.uint8)

    def new_slab(self) -> NDArray[np.uint8]:
        """Allocates and registers memory for the next ``layout.slab_blocks`` block ids."""
        slab = np.zeros(self.layout.slab_nbytes, np.uint8)
        self.add_slab(slab)
        return slab

    def add_slab(self, slab: NDArray[np.uint8]) -> None:
        """Registers the caller's memory for the next block ids; it is kept alive, not copied.

        Raises:
            ValueError: it is smaller than ``layout.slab_nbytes``.
            TypeError: it is not contiguous uint8.
        """
        self._network.add_slab(slab)

    def step(
        self,
        tokens_N: NDArray[np.int32],
        segments: Sequence[NativeSegment],
        logit_rows_R: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Feed the segments' tokens, one after another in ``tokens_N``; logits [R, vocab].

        Args:
            logit_rows_R: ascending flat token numbers.

        Mutates the segments' states and blocks.

        Raises:
            ValueError: token counts, ids, block ids or sizes do not fit; nothing was changed.
            TypeError: a state is not contiguous uint8; nothing was changed.
        """
        logits = np.empty((len(logit_rows_R), self.config.vocab_size), np.float32)
        self._network.step(
            np.ascontiguousarray(tokens_N, np.int32),
            *_flattened(segments),
            np.ascontiguousarray(logit_rows_R, np.int64),
            logits,
        )
        return logits

    def draft(
        self, tokens_S: NDArray[np.int32], segments: Sequence[NativeSegment]
    ) -> NDArray[np.float32]:
        """MTP logits [S, vocab] of the token after ``tokens_S``, one per segment.

        Each sequence's last step must have had ``ADVANCE_DRAFT``.

        Args:
            tokens_S: the token chosen to follow each sequence.
            segments: one token each, starting at the position of the last token fed.
        """
        logits = np.empty((len(segments), self.config.vocab_size), np.float32)
        self._network.draft(np.ascontiguousarray(tokens_S, np.int32), *_flattened(segments), logits)
        return logits


def _flattened(
    segments: Sequence[NativeSegment],
) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]], NDArray[np.int32]]:
    """Numbers [S, 4], states, and all block tables one after another."""
    numbers = np.empty((len(segments), 4), np.int64)
    first = 0
    for row, segment in zip(numbers, segments, strict=True):
        row[:] = segment.num_tokens, segment.start, segment.flags, first
        first += len(segment.blocks)
    tables = [np.asarray(segment.blocks, np.int32) for segment in segments]
    blocks = np.concatenate(tables) if tables else np.empty(0, np.int32)
    return numbers, [segment.state for segment in segments], blocks


# ---- weights ---------------------------------------------------------------------------------


def _mtp_layers(config: ModelConfig) -> int:
    """MTP blocks in use: predictions deeper than one token are not drafted from."""
    return min(config.num_nextn_predict_layers, 1)


def _shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mtp_layers": _mtp_layers(config),
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "rope_dim": config.qk_rope_head_dim,
        "q_lora": config.q_lora_rank,
        "o_groups": config.o_groups,
        "o_lora": config.o_lora_rank,
        "index_heads": config.index_n_heads,
        "index_dim": config.index_head_dim,
        "index_topk": config.index_topk,
        "window": config.sliding_window,
        "experts": config.n_routed_experts,
        "topk": config.num_experts_per_tok,
        "hash_layers": config.num_hash_layers,
        "expert_width": config.moe_intermediate_size,
        "shared_width": config.moe_intermediate_size * config.n_shared_experts,
        "streams": config.hc_mult,
        "sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hc_eps": float(config.hc_eps),
        "norm_eps": float(config.rms_norm_eps),
        "route_scale": float(config.routed_scaling_factor),
        "swiglu_limit": float(config.swiglu_limit),
        "official": config.numerics == "official",
    }


def _numpy(tensor: Tensor) -> NDArray[Any]:
    """float32 as it is, BF16 as uint16 and FP8, FP4 and scales as uint8 bits, others as float32."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.element_size() == 1:
        return tensor.view(torch.uint8).numpy()
    return tensor.float().numpy()


_FLOAT_MATRICES = ("hc_attn_fn", "hc_ffn_fn", "hc_head_fn")


class _Packer:
    """Turns a model's matrices into the native ones, by name."""

    def __init__(self, matrix: Any, config: ModelConfig, weight_format: NativeWeightFormat) -> None:
        self._matrix = matrix
        self._format = weight_format
        self._official = config.numerics == "official"
        self._groups = config.o_groups

    def matrices(self, model: Transformer) -> Iterator[tuple[str, Any]]:
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                if name.endswith(".wo_a"):
                    yield from self._grouped(name, module)
                else:
                    yield name, self._linear(name, module)
        yield "head", self._plain(model.head.weight)
        for name, parameter in model.named_parameters():
            if name.endswith(_FLOAT_MATRICES):
                yield name, self._matrix.from_fp32(_numpy(parameter.float()))
            elif name.endswith(".gate.weight"):
                yield (
                    name.removesuffix(".weight"),
                    self._matrix.from_fp32(_numpy(parameter.float())),
                )

    def _linear(self, name: str, linear: Linear) -> Any:
        if linear.scale is None:
            weight = linear.weight
            # Official activations are BF16, and so is every plain weight they meet; a compressor
            # works in float32.
            if self._official and ".compressor." not in name:
                weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
            return self._plain(weight)
        if self._format == "fp32":
            return self._matrix.from_fp32(_numpy(linear.dequantized()))
        make = self._matrix.from_fp8 if linear.weight_format == "fp8" else self._matrix.from_fp4
        return make(_numpy(linear.weight), _numpy(linear.scale))

    def _plain(self, weight: Tensor) -> Any:
        if self._format == "int8":
            return self._matrix.to_int8(_numpy(weight.float()))
        if self._format == "bf16":
            return self._matrix.from_bf16(_numpy(weight.bfloat16()))
        if self._format == "as stored" and weight.dtype == torch.bfloat16:
            return self._matrix.from_bf16(_numpy(weight))
        return self._matrix.from_fp32(_numpy(weight.float()))

    def _grouped(self, name: str, linear: Linear) -> Iterator[tuple[str, Any]]:
        """One matrix per output group; a group that cuts an FP8 tile is expanded."""
        rows = linear.out_features // self._groups
        for group in range(self._groups):
            part = Linear(linear.in_features, rows, weight_format=linear.weight_format)
            here = slice(group * rows, (group + 1) * rows)
            if linear.scale is not None and (linear.weight_format != "fp8" or rows % FP8_TILE == 0):
                per = FP8_TILE if linear.weight_format == "fp8" else 1
                part.scale = linear.scale[here.start // per : here.stop // per]
                part.weight = nn.Parameter(linear.weight[here], requires_grad=False)
            else:
                part = Linear(linear.in_features, rows)
                part.weight = nn.Parameter(linear.dequantized()[here].detach())
            yield f"{name}.{group}", self._linear(name, part)


def _arrays(model: Transformer) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every parameter and buffer that is not a matrix, float32 and flat."""
    linear = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        skip = owner in linear or name in ("embed.weight", "head.weight")
        if not skip and tensor.is_floating_point() and not name.endswith(_FLOAT_MATRICES):
            yield name, _numpy(tensor.float()).ravel()


def _tables(model: Transformer) -> Iterator[tuple[str, NDArray[np.int32]]]:
    for name, tensor in model.state_dict().items():
        if name.endswith(".tid2eid"):
            yield name, tensor.to(torch.int32).cpu().contiguous().numpy().ravel()
