"""The network against Hugging Face transformers' DeepseekV4ForCausalLM, in float32.

Each case draws a small network, random weights in which every parameter matters, and a random
prompt. The logits of every position must agree within 1e-4 whether Rorqual reads the prompt at
once, in chunks, or token by token. transformers reads it at once, without a cache.

Both programs choose experts and compressed entries by top-k over float32 scores. Where two
candidates at the border of the choice differ by less than rounding does, either choice is right and
the logits legitimately differ. The seeds below are ones where the closest call of the whole prompt
is wider than ``MIN_MARGIN``; each case measures and asserts this, so that a failure is never such a
tie. (Near ties get likelier with length, so long prompts choose nearly all entries and only the
last queries leave some out. Index heads are many enough that scores of exactly zero, which every
head's ReLU can produce, do not meet the border.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4IndexerScorer,
    DeepseekV4TopKRouter,
)

from rorqual.model.config import ModelConfig, RopeScaling
from rorqual.model.layout import tensor_table
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer
from rorqual.model.transformers_layout import to_transformers_config, transformers_tensors
from rorqual.testing.weights import random_state

TOLERANCE = 1e-4
MIN_MARGIN = 1e-5
"""Rounding moves the compared scores, which are of order one, by about 1e-6."""
MAX_STEPS = 64
"""Tokens decoded one at a time at the end of a prompt; shorter prompts are decoded whole."""


@dataclass(frozen=True)
class Case:
    length: int
    seed: int
    kinds: str = "all"
    """Layers: ``window``, ``csa``, ``hca``, or ``all`` three and more at random."""


CASES = [
    Case(1, 0),
    Case(2, 107),
    Case(3, 214),
    Case(4, 321),
    Case(5, 428),
    Case(7, 535),
    Case(8, 642),
    Case(31, 749),
    Case(33, 857),
    Case(64, 964),
    Case(100, 1070, "window"),
    Case(700, 1177, "window"),
    Case(90, 1285, "csa"),
    Case(257, 1391, "csa"),
    Case(700, 1498, "csa"),
    Case(300, 1505, "hca"),
    Case(1000, 1612, "hca"),
    Case(127, 1721),
    Case(128, 1826),
    Case(129, 1933),
    Case(200, 2040),
    Case(256, 2150),
    Case(300, 2254),
    Case(513, 2361),
    Case(1000, 2468),
    Case(1500, 2577),
    Case(3000, 2789, "csa"),
    Case(3000, 2684),
]


def draw_config(case: Case) -> ModelConfig:
    """A small network of the case's kinds of layer; everything else at random."""
    rng = random.Random(case.seed)
    heavy = rng.choice([8, 16, 32, 128])
    match case.kinds:
        case "window":
            ratios = [0, 0]
        case "csa":
            ratios = [4, 4]
        case "hca":
            ratios = [heavy, heavy]
        case _:
            ratios = rng.sample([0, 4, heavy], 3) + rng.choices([0, 4, heavy], k=rng.randint(0, 1))
    rope_dim = rng.choice([4, 8, 16])
    heads = rng.choice([2, 4])
    num_entries = case.length // 4
    return ModelConfig(
        vocab_size=67,
        hidden_size=rng.choice([32, 48, 64]),
        num_hidden_layers=len(ratios),
        num_attention_heads=heads,
        head_dim=rng.choice([16, 32, 48]),
        qk_rope_head_dim=rope_dim,
        q_lora_rank=rng.choice([16, 24]),
        o_groups=rng.choice([1, 2]),
        o_lora_rank=rng.choice([8, 12]),
        moe_intermediate_size=rng.choice([16, 24]),
        n_routed_experts=rng.randint(4, 8),
        num_experts_per_tok=rng.randint(1, 3),
        num_hash_layers=rng.randint(0, 2),
        routed_scaling_factor=rng.choice([1.0, 1.5, 2.5]),
        compress_ratios=tuple(ratios),
        index_n_heads=rng.choice([4, 8]),
        index_head_dim=rng.choice([16, 32]),
        index_topk=rng.choice([1, 3, 8]) if case.length <= 300 else num_entries - rng.randint(1, 9),
        swiglu_limit=rng.choice([1.0, 10.0]),
        sliding_window=rng.choice([4, 16, 128]),
        rope_theta=rng.choice([100.0, 10_000.0]),
        rope_scaling=rng.choice(
            [
                None,
                RopeScaling(factor=16.0, original_max_position_embeddings=65_536),
                RopeScaling(factor=4.0, original_max_position_embeddings=64, beta_fast=8.0),
            ]
        ),
        hc_mult=rng.choice([1, 2, 4]),
        hc_sinkhorn_iters=rng.choice([1, 4, 20]),
        rms_norm_eps=rng.choice([1e-6, 1e-3]),
        hc_eps=rng.choice([1e-6, 1e-3]),
        num_nextn_predict_layers=0,
    )


def transformers_model(config: ModelConfig, state: dict[str, Tensor]) -> Any:
    """transformers' model with the official tensors ``state``, renamed and stacked by our table."""
    hf_config = DeepseekV4Config.from_dict(to_transformers_config(config))
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = DeepseekV4ForCausalLM(hf_config).eval()
    table = transformers_tensors(tensor_table(config, float_dtype=torch.float32))
    model.load_state_dict(
        {
            tensor.name: torch.cat([state[part.name].flatten() for part in tensor.parts]).view(
                tensor.shape
            )
            for tensor in table
        }
    )
    return model


class Margins:
    """The smallest gap between a chosen and a rejected candidate in a transformers model's run."""

    def __init__(self, model: Any, config: ModelConfig) -> None:
        self.smallest = float("inf")
        self.num_choices = 0
        self._index_topk = config.index_topk
        for module in model.modules():
            if isinstance(module, DeepseekV4TopKRouter):
                module.register_forward_hook(self._see_router)
            elif isinstance(module, DeepseekV4IndexerScorer):
                module.register_forward_hook(self._see_indexer)

    def _see_router(self, module: Any, inputs: Any, output: Any) -> None:
        scores = module.score_fn(output[0]) + module.e_score_correction_bias
        for row in scores:
            self._see(row, module.top_k)

    def _see_indexer(self, module: Any, inputs: Any, scores_1TS: Tensor) -> None:
        for position, row in enumerate(scores_1TS[0]):
            self._see(row[: (position + 1) // 4], self._index_topk)

    def _see(self, scores: Tensor, topk: int) -> None:
        if len(scores) > topk:
            best = scores.topk(topk + 1).values
            self.smallest = min(self.smallest, (best[-2] - best[-1]).item())
            self.num_choices += 1


def read_prompt(model: Transformer, tokens_N: Tensor, chunks: Sequence[int]) -> Tensor:
    """Logits of every position when the prompt arrives in ``chunks`` of tokens."""
    state = model.new_state()
    logits = [
        model(part, [Segment(state, len(part))], all_logits=True)
        for part in tokens_N.split(list(chunks))
    ]
    return torch.cat(logits)


def uneven_chunks(length: int, seed: int) -> Iterator[int]:
    """Chunk sizes that add up to ``length``: single tokens, small primes and long stretches."""
    rng = random.Random(seed)
    while length > 0:
        size = min(length, rng.choice([1, 2, 3, 5, 7, 64, 127, 128, 129, 500]))
        yield size
        length -= size


def prepare(case: Case) -> tuple[ModelConfig, Any, Transformer, Tensor]:
    config = draw_config(case)
    state = random_state(config, case.seed)
    model = Transformer(config)
    model.load_state_dict(state)
    generator = torch.Generator().manual_seed(case.seed)
    tokens_N = torch.randint(config.vocab_size, (case.length,), generator=generator)
    return config, transformers_model(config, state), model, tokens_N


@pytest.fixture(autouse=True)
def _quiet_transformers() -> Iterator[None]:
    """No warnings about YaRN factors that differ from the ratio of context lengths."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def test_cases_cover_every_kind_of_layer_and_routing() -> None:
    configs = [draw_config(case) for case in CASES]
    assert {r for c in configs for r in c.compress_ratios} == {0, 4, 8, 16, 32, 128}
    assert {c.num_hash_layers for c in configs} == {0, 1, 2}
    assert {c.rope_scaling is None for c in configs} == {True, False}
    assert {c.hc_mult for c in configs} == {1, 2, 4}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kinds}-{c.length}-seed{c.seed}")
def test_logits_equal_transformers_at_once_in_chunks_and_token_by_token(case: Case) -> None:
    config, hf_model, model, tokens_N = prepare(case)
    margins = Margins(hf_model, config)
    with torch.no_grad():
        expected = hf_model(tokens_N[None], use_cache=False).logits[0]
    assert margins.smallest > MIN_MARGIN, "two candidates nearly tie: choose another seed"
    steps = min(case.length, MAX_STEPS)
    ways = {
        "at once": [case.length],
        "in chunks": list(uneven_chunks(case.length, case.seed)),
        "token by token": [case.length - steps] * (case.length > steps) + [1] * steps,
    }
    for way, chunks in ways.items():
        difference = (read_prompt(model, tokens_N, chunks) - expected).abs().max().item()
        assert difference <= TOLERANCE, f"{way}: {difference}"


@pytest.mark.parametrize("case", [Case(140, 2040), Case(33, 857), Case(300, 2254)])
def test_decoding_equals_transformers_decoding_with_its_own_cache(case: Case) -> None:
    _, hf_model, model, tokens_N = prepare(case)
    prefix = case.length - 20
    with torch.no_grad():
        output = hf_model(tokens_N[None, :prefix], use_cache=True)
        expected = [output.logits[0]]
        for token in tokens_N[prefix:]:
            cache = output.past_key_values
            output = hf_model(token.view(1, 1), use_cache=True, past_key_values=cache)
            expected.append(output.logits[0])
    actual = read_prompt(model, tokens_N, [prefix, *[1] * 20])
    assert (actual - torch.cat(expected)).abs().max().item() <= TOLERANCE
