"""The engine on the native CPU network and its cache: neither company nor memory ever shows.

Every answer is compared with the same request alone on a fresh cache, token for token and
log-probability for log-probability: on this backend results are bit for bit the same.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.backend import Feed
from rorqual.engine.cache.config import CacheConfig
from rorqual.engine.cache.plan import CheckpointPolicy
from rorqual.engine.engine import Engine, EngineConfig
from rorqual.engine.handle import Handle
from rorqual.engine.native_backend import NativeBackend, NativeMemory, fingerprint_of
from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.engine.torch_backend import TorchBackend
from rorqual.errors import ConfigError, PromptTooLongError
from rorqual.kernels import cpu
from rorqual.kernels.layout import BLOCK_TOKENS
from rorqual.model.config import ModelConfig
from rorqual.model.native import NativeNetwork, NativeWeightFormat
from rorqual.model.transformer import Transformer
from rorqual.testing.weights import random_state

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the native kernels are not built")

TIMEOUT_S = 60.0
CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=8,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 128, 0),
    index_n_heads=2,
    index_head_dim=32,
    index_topk=16,
    sliding_window=32,
    max_position_embeddings=4096,
)
_names = itertools.count()


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    model.load_state_dict(random_state(CONFIG, 3))
    return model


def backend(
    model: Transformer,
    *,
    blocks: int = 400,
    running: int = 4,
    threads: int = 1,
    policy: CheckpointPolicy | None = None,
    directory: Path | None = None,
    weights: NativeWeightFormat = "as stored",
    kind: type[NativeBackend] = NativeBackend,
) -> NativeBackend:
    """With memory for so many blocks; checkpoints come out of it too."""
    network = NativeNetwork(model, num_threads=threads, slab_blocks=8, weight_format=weights)
    config = CacheConfig(
        memory_bytes=blocks * network.layout.block_nbytes,
        max_sequences=running,
        policy=policy or CheckpointPolicy(period_tokens=2 * BLOCK_TOKENS),
        directory=directory,
    )
    return kind(network, config, fingerprint=fingerprint_of(model))


def engine_on(
    backend: NativeBackend, *, running: int = 4, step: int = 96, speculate: bool = True
) -> Engine:
    limits = SchedulerLimits(max_running=running, max_step_tokens=step, min_chunk_tokens=5)
    return Engine(backend, EngineConfig(limits=limits, speculate=speculate))


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(CONFIG.vocab_size) for _ in range(length)]


def request(tokens: Sequence[int], count: int = 8, *, seed: int | None = None) -> Request:
    temperature = 0.0 if seed is None else 1.0
    sampling = SamplingParams(max_tokens=count, temperature=temperature, seed=seed, logprobs=0)
    return Request(prompt_ids=tokens, sampling=sampling, request_id=f"r{next(_names)}")


def said(output: TokenOutput) -> tuple[tuple[int, ...], list[float]]:
    assert output.finish_reason == "length", output.error
    assert output.logprobs is not None
    return output.token_ids, [entry.logprob for entry in output.logprobs]


def alone(model: Transformer, asked: Request) -> tuple[tuple[int, ...], list[float]]:
    with engine_on(backend(model), speculate=False) as engine:
        return said(engine.submit(asked).result(TIMEOUT_S))


def test_the_same_greedy_tokens_as_the_pytorch_network(model: Transformer) -> None:
    asked = request(prompt(300, 1), 30)
    with Engine(TorchBackend(model)) as engine:
        expected = engine.submit(asked).result(TIMEOUT_S)
    tokens, logprobs = alone(model, asked)
    assert tokens == expected.token_ids
    assert expected.logprobs is not None
    # Indexer keys are int8 here and float32 there.
    assert logprobs == pytest.approx([e.logprob for e in expected.logprobs], abs=0.05)


@pytest.mark.parametrize("seed", [None, 11])
def test_guessing_ahead_changes_no_token(model: Transformer, seed: int | None) -> None:
    prompts = [[*prompt(60, n), *([7, 8, 9] * 20)] for n in range(3)]
    with engine_on(backend(model)) as engine:
        handles = [engine.submit(request(p, 70, seed=seed)) for p in prompts]
        guessed = [said(handle.result(TIMEOUT_S)) for handle in handles]
        assert engine.stats().drafted_tokens > 0
    assert guessed == [alone(model, request(p, 70, seed=seed)) for p in prompts]


def test_a_guess_made_after_a_rejected_one_is_what_it_would_have_been(model: Transformer) -> None:
    """What the MTP block reads belongs to the last token kept, not to the last token fed."""
    tokens = prompt(40, 5)

    def guesses(feeds: Sequence[Sequence[int]]) -> list[int]:
        """One per feed, of which the first token is kept and the others are taken back."""
        native = backend(model)
        memory = native.begin(tokens)
        assert native.reserve(memory, 64)
        native.step([Feed(memory, tokens, 1)])
        native.commit(memory, tokens)
        made = []
        for fed in feeds:
            native.step([Feed(memory, fed, 1)])
            native.commit(memory, fed[:1])
            made += native.draft([memory], [11])
        native.finish(memory)
        return made

    assert guesses([[5, 90], [6], [7, 1, 2]]) == guesses([[5], [6], [7]])


@settings(max_examples=12, deadline=None)
@given(
    cut=st.integers(0, 700),
    more=st.integers(1, 200),
    policy=st.sampled_from(["full", "periodic", "zero"]),
)
def test_an_answer_after_any_rewind_or_branch_is_the_answer_without_a_cache(
    cut: int, more: int, policy: str
) -> None:
    model = Transformer(CONFIG)
    model.load_state_dict(random_state(CONFIG, 3))
    first = prompt(700, 21)
    second = [*first[:cut], *prompt(more, 22)]
    kept = CheckpointPolicy(kind=policy, period_tokens=2 * BLOCK_TOKENS)  # type: ignore[arg-type]
    with engine_on(backend(model, policy=kept)) as engine:
        engine.submit(request(first)).result(TIMEOUT_S)
        output = engine.submit(request(second)).result(TIMEOUT_S)
    assert said(output) == alone(model, request(second))
    assert output.usage is not None
    if policy == "full":
        assert output.usage.cached_tokens >= min(cut, len(second) - 1) - BLOCK_TOKENS + 1


def test_the_next_turn_and_the_same_prompt_are_read_from_memory(model: Transformer) -> None:
    first = prompt(600, 31)
    with engine_on(backend(model)) as engine:
        answer = engine.submit(request(first, 20)).result(TIMEOUT_S)
        again = engine.submit(request(first, 20)).result(TIMEOUT_S)
        turn = [*first, *answer.token_ids, *prompt(9, 32)]
        following = engine.submit(request(turn, 20)).result(TIMEOUT_S)
    assert said(again) == said(answer)
    assert again.usage is not None
    assert again.usage.cached_tokens == 512
    assert following.usage is not None
    assert following.usage.cached_tokens == 512
    assert said(following) == alone(model, request(turn, 20))


def test_answers_do_not_depend_on_company_or_threads(model: Transformer) -> None:
    asked = [(prompt(20 + 90 * n, n), 10 + 5 * n) for n in range(6)]
    expected = [alone(model, request(tokens, count)) for tokens, count in asked]
    for threads in (1, 2):
        with engine_on(backend(model, threads=threads)) as engine:
            handles = [engine.submit(request(tokens, count)) for tokens, count in asked]
            assert [said(handle.result(TIMEOUT_S)) for handle in handles] == expected


def test_sequences_that_lose_their_memory_answer_as_if_they_had_not(model: Transformer) -> None:
    asked = [(prompt(250, n), 200) for n in range(4)]
    expected = [alone(model, request(tokens, count)) for tokens, count in asked]
    with engine_on(backend(model, blocks=12)) as engine:
        handles = [engine.submit(request(tokens, count)) for tokens, count in asked]
        assert [said(handle.result(TIMEOUT_S)) for handle in handles] == expected
        assert engine.stats().num_preempted > 0


class _OutOfStates(NativeBackend):
    """Cannot begin what it preempted."""

    def begin(self, tokens: Sequence[int], *, is_resumed: bool = False) -> NativeMemory:
        if is_resumed:
            raise OSError("Cannot allocate memory")
        return super().begin(tokens)


def test_a_sequence_that_cannot_be_resumed_fails_alone(model: Transformer) -> None:
    with engine_on(backend(model, blocks=12, kind=_OutOfStates)) as engine:
        handles = [engine.submit(request(prompt(250, n), 200)) for n in range(4)]
        reasons = [handle.result(TIMEOUT_S).finish_reason for handle in handles]
        assert set(reasons) == {"length", "error"}
        assert engine.submit(request(prompt(50, 9))).result(TIMEOUT_S).finish_reason == "length"


def test_the_context_is_what_memory_can_hold(model: Transformer) -> None:
    with engine_on(backend(model, blocks=4)) as engine:
        with pytest.raises(PromptTooLongError, match="512"):
            engine.submit(request(prompt(900, 1)))
        # An answer that may be longer than memory ends there; it is not refused for what it may be.
        output = engine.submit(request(prompt(490, 1), 10_000)).result(TIMEOUT_S)
        small = engine.submit(request(prompt(50, 1))).result(TIMEOUT_S)
    assert output.finish_reason == small.finish_reason == "length"
    assert len(output.token_ids) == 512 - 490


def test_cancelling_under_load_frees_everything(model: Transformer) -> None:
    native = backend(model)
    rng = random.Random(5)
    begun = threading.Event()
    with engine_on(native) as engine:
        handles: list[Handle] = []
        for n in range(30):
            asked = request(prompt(rng.randrange(1, 400), n % 7), 60)
            handles.append(engine.submit(asked))
            if rng.random() < 0.5:
                rng.choice(handles).cancel()
            begun.wait(0.002)
        reasons = [handle.result(TIMEOUT_S).finish_reason for handle in handles]
        assert set(reasons) <= {"cancelled", "length"}
        assert "length" in reasons
        stats = native.cache_stats()
        assert stats.num_held_blocks == 0
        assert engine.stats().num_running == 0


_LEAVES = """
import torch
from rorqual.engine.cache.config import CacheConfig
from rorqual.engine.engine import Engine
from rorqual.engine.native_backend import NativeBackend
from rorqual.engine.request import Request, SamplingParams
from rorqual.model.config import TINY
from rorqual.model.native import NativeNetwork
from rorqual.model.transformer import Transformer

model = Transformer(TINY)
model.init_weights(torch.Generator().manual_seed(0))
backend = NativeBackend(NativeNetwork(model, num_threads=2), CacheConfig(memory_bytes=1 << 28))
asked = Request(prompt_ids=[1] * 500, sampling=SamplingParams(max_tokens=1000), request_id="r")
next(iter(Engine(backend).submit(asked)))
print("leaving")
"""


def test_a_program_may_end_without_closing_its_engine() -> None:
    child = subprocess.run(
        [sys.executable, "-c", _LEAVES], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "leaving\n", "")


def test_a_restart_reads_the_prompt_from_disk(model: Transformer, tmp_path: Path) -> None:
    tokens = prompt(1500, 41)
    with engine_on(backend(model, directory=tmp_path)) as engine:
        before = said(engine.submit(request(tokens)).result(TIMEOUT_S))
    with engine_on(backend(model, directory=tmp_path)) as engine:
        output = engine.submit(request(tokens)).result(TIMEOUT_S)
        assert said(output) == before
        assert output.usage is not None
        assert output.usage.cached_tokens == 1408
        assert engine.stats().prompt_tokens == 1500 - 1408


def test_other_weights_find_nothing_on_the_same_disk(model: Transformer, tmp_path: Path) -> None:
    tokens = prompt(300, 51)
    with engine_on(backend(model, directory=tmp_path)) as engine:
        engine.submit(request(tokens)).result(TIMEOUT_S)
    other = Transformer(CONFIG)
    other.load_state_dict(random_state(CONFIG, 4))
    with engine_on(backend(other, directory=tmp_path)) as engine:
        output = engine.submit(request(tokens)).result(TIMEOUT_S)
    assert output.usage is not None
    assert output.usage.cached_tokens == 0
    network = NativeNetwork(model)
    with pytest.raises(ConfigError, match="fingerprint"):
        NativeBackend(network, CacheConfig(memory_bytes=1 << 24, directory=tmp_path))


def test_the_same_weights_rounded_find_nothing_on_the_same_disk(
    model: Transformer, tmp_path: Path
) -> None:
    tokens = prompt(300, 61)
    with engine_on(backend(model, directory=tmp_path, weights="int8")) as engine:
        engine.submit(request(tokens)).result(TIMEOUT_S)
    with engine_on(backend(model, directory=tmp_path)) as engine:
        output = engine.submit(request(tokens)).result(TIMEOUT_S)
    assert output.usage is not None
    assert output.usage.cached_tokens == 0
    assert said(output) == alone(model, request(tokens))


def test_the_fingerprint_depends_on_every_weight(model: Transformer) -> None:
    other = Transformer(CONFIG)
    other.load_state_dict(random_state(CONFIG, 3))
    assert fingerprint_of(other) == fingerprint_of(model)
    with torch.no_grad():
        other.head.weight[-1, -1] += 1e-3
    assert fingerprint_of(other) != fingerprint_of(model)
