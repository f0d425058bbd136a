"""Engines under measurement: ours, and others that are fed the same weights.

A peer is made in a process of its own (``worker.py``) and imports its library there; where that is
not installed, the benchmark says so and goes on. Each runs on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rorqual.bench.report import rss_bytes
from rorqual.bench.setup import PREFILL_CHUNK_TOKENS, Setup, tiny_network
from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.model.layout import tensor_table
from rorqual.model.transformer import Transformer
from rorqual.model.transformers_layout import to_transformers_config, transformers_tensors


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One prompt read and continued greedily by one engine on one thread."""

    prefill_cpu_s: float
    """CPU time of the whole process until the first token was drawn."""
    decode_cpu_s: float
    """CPU time for the tokens after the first."""
    cache_bytes: int
    """What grows with the context, for ``cache_tokens`` tokens; 0: not known."""
    cache_tokens: int
    token_ids: tuple[int, ...]
    rss_bytes: int
    """Resident memory at the end of the answer."""
    library_bytes: int
    """The part of it that was there before the weights: interpreter and libraries."""


class Peer(Protocol):
    """An engine under measurement."""

    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """Continue ``prompt`` greedily by ``num_tokens`` >= 2 tokens, from an empty cache."""
        ...


class RorqualPeer:
    """This project's engine, measured from outside through its public interface."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(1)
        self._library_bytes = rss_bytes()[0]
        self._engine = setup.open()
        self._num_runs = 0

    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """As ``Peer.run``. A prompt that was seen before would be found in the cache."""
        stamps: list[float] = []
        cache: list[int] = []

        def on_output(output: TokenOutput) -> None:
            stamps.append(time.process_time())
            cache.append(self._engine.stats().compressed_bytes)

        self._num_runs += 1
        request = Request(
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
            request_id=f"bench-{self._num_runs}",
            on_output=on_output,
        )
        start = time.process_time()
        result = self._engine.submit(request).result()
        assert result.usage is not None
        assert result.usage.cached_tokens == 0, "the prompt was seen before"
        # The last output comes after its memory was freed; the one before saw all but one token.
        return Measurement(
            prefill_cpu_s=stamps[0] - start,
            decode_cpu_s=stamps[-1] - stamps[0],
            cache_bytes=cache[-2],
            cache_tokens=len(prompt) + num_tokens - 2,
            token_ids=result.token_ids,
            rss_bytes=rss_bytes()[0],
            library_bytes=self._library_bytes,
        )


Step = Callable[[Sequence[int]], int]
"""Feeds tokens to a peer and returns the most likely next one."""


def _measure(step: Step, prompt: Sequence[int], num_tokens: int) -> Measurement:
    """Prefill in chunks, decode one by one; sizes are left to the caller."""
    start = time.process_time()
    for at in range(0, len(prompt), PREFILL_CHUNK_TOKENS):
        token = step(prompt[at : at + PREFILL_CHUNK_TOKENS])
    tokens = [token]
    prefilled = time.process_time()
    while len(tokens) < num_tokens:
        tokens.append(step(tokens[-1:]))
    done = time.process_time()
    return Measurement(
        prefill_cpu_s=prefilled - start,
        decode_cpu_s=done - prefilled,
        cache_bytes=0,
        cache_tokens=len(prompt) + num_tokens - 1,
        token_ids=tuple(tokens),
        rss_bytes=rss_bytes()[0],
        library_bytes=0,
    )


class TransformersPeer:
    """Hugging Face ``DeepseekV4ForCausalLM`` with the ``tiny`` network's weights."""

    def __init__(self) -> None:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        torch.set_num_threads(1)
        self._library_bytes = rss_bytes()[0]
        model = tiny_network()
        raw = to_transformers_config(model.config)
        self._model: Any = DeepseekV4ForCausalLM(DeepseekV4Config(**raw))
        self._model.train(False)
        self._model.load_state_dict(transformers_state(model), strict=True)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """As ``Peer.run``."""
        cache: Any = None

        def step(tokens: Sequence[int]) -> int:
            nonlocal cache
            out = self._model(
                input_ids=torch.tensor([tokens]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            return int(out.logits[0, -1].argmax())

        measured = _measure(step, prompt, num_tokens)
        return replace(
            measured, cache_bytes=_compressed_bytes(cache), library_bytes=self._library_bytes
        )


class FlyweightPeer:
    """``flyweight-llm``, from a GGUF file."""

    def __init__(self, path: Path) -> None:
        from flyweight.deepseek4 import Deepseek4Runtime
        from flyweight.v2 import V2Model

        self._library_bytes = rss_bytes()[0]
        self._runtime = Deepseek4Runtime
        self._model = V2Model(path)

    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """As ``Peer.run``; the cache column holds the whole state."""
        with self._runtime(self._model, len(prompt) + num_tokens) as runtime:

            def step(tokens: Sequence[int]) -> int:
                if len(tokens) > 1:
                    runtime.prefill(tokens[:-1])
                return int(runtime.forward(tokens[-1]).argmax())

            measured = _measure(step, prompt, num_tokens)
            return replace(
                measured,
                cache_bytes=int(runtime.info["state_bytes"]),
                library_bytes=self._library_bytes,
            )


class LlamaCppPeer:
    """llama.cpp through ``llama-cpp-python``'s C interface, from a GGUF file."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self._library_bytes = rss_bytes()[0]
        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError("llama.cpp does not load the file")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """As ``Peer.run``; the cache column is the growth of the sequence's saved state."""
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = len(prompt) + num_tokens
        params.n_batch = params.n_ubatch = PREFILL_CHUNK_TOKENS
        params.n_threads = params.n_threads_batch = 1
        params.swa_full = False
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError(f"llama.cpp makes no context of {params.n_ctx} tokens")
        sizes: list[int] = []

        def step(tokens: Sequence[int]) -> int:
            array = (lib.llama_token * len(tokens))(*tokens)
            if status := lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))):
                raise ValueError(f"llama_decode says {status}")
            if not sizes:
                sizes.append(lib.llama_state_seq_get_size(context, 0))
            logits = lib.llama_get_logits_ith(context, -1)
            return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())

        try:
            measured = _measure(step, prompt, num_tokens)
            grown = lib.llama_state_seq_get_size(context, 0) - sizes[0]
        finally:
            lib.llama_free(context)
        since = measured.cache_tokens - min(PREFILL_CHUNK_TOKENS, len(prompt))
        return replace(
            measured,
            cache_bytes=grown * measured.cache_tokens // since,
            library_bytes=self._library_bytes,
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
