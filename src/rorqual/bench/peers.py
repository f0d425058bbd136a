"""Other implementations of the same network, fed the same weights, for side-by-side runs.

A peer is an optional import; without it the benchmark says so and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual.model.layout import tensor_table
from rorqual.model.transformer import Transformer
from rorqual.model.transformers_layout import to_transformers_config, transformers_tensors

PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One prompt read and continued greedily by one engine on one thread."""

    prefill_cpu_s: float
    """CPU time of the whole process until the first token was drawn."""
    decode_cpu_s: float
    """CPU time for the tokens after the first."""
    cache_bytes: int
    """Compressed entries held for ``cache_tokens`` tokens."""
    cache_tokens: int
    token_ids: tuple[int, ...]


class Peer(Protocol):
    """An engine under measurement."""

    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """Continue ``prompt`` greedily by ``num_tokens`` >= 2 tokens, from an empty cache."""
        ...


class TransformersPeer:
    """Hugging Face ``DeepseekV4ForCausalLM`` with the weights of one of our models."""

    def __init__(self, model: Transformer) -> None:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        raw = to_transformers_config(model.config)
        self._model: Any = DeepseekV4ForCausalLM(DeepseekV4Config(**raw))
        self._model.train(False)
        self._model.load_state_dict(transformers_state(model), strict=True)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """As ``Peer.run``; the prompt is read in chunks of ``PREFILL_CHUNK_TOKENS``."""
        start = time.process_time()
        cache: Any = None
        tokens: list[int] = []
        for at in range(0, len(prompt), PREFILL_CHUNK_TOKENS):
            logits, cache = self._step(prompt[at : at + PREFILL_CHUNK_TOKENS], cache)
        tokens.append(int(logits.argmax()))
        prefilled = time.process_time()
        while len(tokens) < num_tokens:
            logits, cache = self._step(tokens[-1:], cache)
            tokens.append(int(logits.argmax()))
        done = time.process_time()
        return Measurement(
            prefill_cpu_s=prefilled - start,
            decode_cpu_s=done - prefilled,
            cache_bytes=_compressed_bytes(cache),
            cache_tokens=len(prompt) + num_tokens - 1,
            token_ids=tuple(tokens),
        )

    def _step(self, tokens: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
        out = self._model(
            input_ids=torch.tensor([tokens]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1], out.past_key_values


PEERS: Mapping[str, Callable[[Transformer], Peer]] = MappingProxyType(
    {"transformers": TransformersPeer}
)


def transformers_state(model: Transformer) -> dict[str, Tensor]:
    """The weights of a plain-format model under transformers' names, experts stacked, without MTP.

    Shares storage with ``model`` except for the stacks.
    """
    own = model.state_dict()
    specs = [spec for spec in tensor_table(model.config) if not spec.is_mtp]
    state: dict[str, Tensor] = {}
    for stored in transformers_tensors(specs):
        parts = [own[part.name] for part in stored.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
        state[stored.name] = whole.reshape(stored.shape)
    return state


def _compressed_bytes(cache: Any) -> int:
    """Bytes of compressed entries and indexer keys in a transformers V4 cache."""
    entries = [
        tensor
        for layer in cache.layers
        for tensor in getattr(layer, "compressed_kv", {}).values()
        if tensor is not None
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in entries)
