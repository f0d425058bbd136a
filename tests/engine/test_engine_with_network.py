"""The engine around the real network (random weights): company, chunking and memory do not show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from rorqual.engine.engine import Engine, EngineConfig
from rorqual.engine.request import Request, SamplingParams
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.engine.torch_backend import TorchBackend
from rorqual.model.config import ModelConfig
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer

TIMEOUT_S = 60.0
CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=8,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 16, 4, 0),
    index_n_heads=16,
    index_head_dim=16,
    index_topk=8,
    sliding_window=16,
)


@pytest.fixture(scope="module")
def network() -> Transformer:
    """Float64, so that a different order of sums cannot change which token is the greatest."""
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(1))
    return model.double()


@pytest.fixture(scope="module")
def engine(network: Transformer) -> Iterator[Engine]:
    limits = SchedulerLimits(max_running=4, max_step_tokens=32, min_chunk_tokens=5)
    with Engine(TorchBackend(network), EngineConfig(limits=limits)) as engine:
        yield engine


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist()


def greedy(model: Transformer, ids: Sequence[int], count: int) -> tuple[int, ...]:
    """One-shot prefill, then decode one by one, without an engine."""
    state = model.new_state()
    feed, tokens = torch.tensor(ids), []
    for _ in range(count):
        logits = model(feed, [Segment(state, len(feed))])
        tokens.append(int(logits[0].argmax()))
        feed = torch.tensor(tokens[-1:])
    return tuple(tokens)


def ask(ids: Sequence[int], sampling: SamplingParams) -> Request:
    return Request(prompt_ids=ids, sampling=sampling, request_id=f"{len(ids)}")


def test_batched_chunked_answers_equal_one_shot_answers_alone(
    engine: Engine, network: Transformer
) -> None:
    cases = [prompt(length, length) for length in (1, 3, 15, 16, 17, 40, 64, 130)]
    params = SamplingParams(max_tokens=20, temperature=0.0)
    handles = [engine.submit(ask(ids, params)) for ids in cases]
    for ids, handle in zip(cases, handles, strict=True):
        assert handle.result(TIMEOUT_S).token_ids == greedy(network, ids, 20), len(ids)


def test_seeded_draws_repeat_in_other_company(engine: Engine) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=5)
    ids = prompt(37, 0)
    alone = engine.submit(ask(ids, params)).result(TIMEOUT_S)
    neighbours = [engine.submit(ask(prompt(50, s), params.replace(seed=s))) for s in range(3)]
    again = engine.submit(ask(ids, params)).result(TIMEOUT_S)
    assert alone.token_ids == again.token_ids
    assert len({n.result(TIMEOUT_S).token_ids for n in neighbours}) == 3


def test_cancelling_frees_the_cache_while_others_go_on(
    engine: Engine, network: Transformer
) -> None:
    endless = SamplingParams(max_tokens=10**6, temperature=0.0)
    victim = engine.submit(ask(prompt(64, 1), endless))
    next(iter(victim))
    assert engine.stats().cache_bytes > 0
    ids = prompt(20, 2)
    other = engine.submit(ask(ids, SamplingParams(max_tokens=8, temperature=0.0)))
    victim.cancel()
    assert victim.result(TIMEOUT_S).finish_reason == "cancelled"
    assert other.result(TIMEOUT_S).token_ids == greedy(network, ids, 8)
    assert engine.stats().cache_bytes == 0
    assert engine.stats().num_running == 0


def test_logprobs_equal_the_networks_distribution(engine: Engine, network: Transformer) -> None:
    ids = prompt(33, 3)
    params = SamplingParams(max_tokens=1, temperature=0.5, seed=1, logprobs=3)
    result = engine.submit(ask(ids, params)).result(TIMEOUT_S)
    logits = network(torch.tensor(ids), [Segment(network.new_state(), len(ids))])
    truth = logits[0].float().log_softmax(-1)
    assert result.logprobs is not None
    (entry,) = result.logprobs
    assert entry.logprob == pytest.approx(truth[entry.token_id].item(), abs=1e-5)
    assert [value for _, value in entry.top] == pytest.approx(
        truth.topk(3).values.tolist(), abs=1e-5
    )


def test_a_forward_that_raises_fails_its_requests_and_serving_goes_on(
    network: Transformer,
) -> None:
    ids = prompt(10, 4)
    params = SamplingParams(max_tokens=4, temperature=0.0)

    def explode(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = network.layers[2].register_forward_pre_hook(explode)
    with Engine(TorchBackend(network)) as engine:
        failed = engine.submit(ask(ids, params)).result(TIMEOUT_S)
        hook.remove()
        served = engine.submit(ask(ids, params)).result(TIMEOUT_S)
    assert (failed.finish_reason, failed.error) == ("error", "RuntimeError: out of memory")
    assert served.token_ids == greedy(network, ids, 4)


def test_a_step_that_fails_half_way_changes_no_answer(network: Transformer) -> None:
    """Layers before the failing one have already advanced their part of each state."""
    params = SamplingParams(max_tokens=30, temperature=0.0)
    cases = [prompt(40, 5), prompt(21, 6), prompt(70, 7)]
    crowds: list[int] = []

    def explode_once(_: object, inputs: tuple[object, object, object, Sequence[object]]) -> None:
        crowds.append(len(inputs[3]))
        if crowds[-1] == 3 and crowds.count(3) == 9:
            raise RuntimeError("a passing fault")

    hook = network.layers[2].register_forward_pre_hook(explode_once)
    with Engine(TorchBackend(network)) as engine:
        handles = [engine.submit(ask(ids, params)) for ids in cases]
        results = [handle.result(TIMEOUT_S) for handle in handles]
    hook.remove()
    assert crowds.count(3) > 9, "it went on after the fault, all together again"
    assert [r.token_ids for r in results] == [greedy(network, ids, 30) for ids in cases]
