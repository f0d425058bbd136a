"""The engine's behaviour from outside, with a fake model that is sensitive to every token."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.cache.config import Admission
from rorqual.engine.engine import Engine, EngineConfig
from rorqual.engine.handle import Handle
from rorqual.engine.request import Request, SamplingParams, TokenOutput, Usage
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.engine.torch_backend import TorchBackend
from rorqual.errors import (
    ConfigError,
    EngineClosedError,
    EngineOverloadedError,
    PromptTooLongError,
    RequestError,
)
from rorqual.model.config import TINY
from rorqual.model.state import Segment
from rorqual.testing.fake_model import FakeModel, FakeState

TIMEOUT_S = 30.0
SMALL = EngineConfig(
    limits=SchedulerLimits(max_running=3, max_step_tokens=16, min_chunk_tokens=4), max_waiting=4
)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
_names = itertools.count()


def request(prompt: Sequence[int], sampling: SamplingParams = GREEDY) -> Request:
    return Request(prompt_ids=prompt, sampling=sampling, request_id=f"r{next(_names)}")


def greedy(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """What the fake model answers, without any engine."""
    state, model = FakeState(), FakeModel()
    tokens: list[int] = []
    for token in prompt:
        state.push(token)
    for _ in range(count):
        tokens.append(int(model.logits_after(state).argmax()))
        state.push(tokens[-1])
    return tuple(tokens)


class Turnstile:
    """Lets the engine run one forward per ``admit``; ``reached`` waits for it to stand there."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._tickets = threading.Semaphore(0)

    def __call__(self, tokens: list[int]) -> None:
        self._arrived.release()
        assert self._tickets.acquire(timeout=TIMEOUT_S)

    def reached(self) -> None:
        assert self._arrived.acquire(timeout=TIMEOUT_S)

    def admit(self, count: int = 1) -> None:
        self._tickets.release(count)


@pytest.fixture
def turnstile() -> Turnstile:
    return Turnstile()


@pytest.fixture
def held(turnstile: Turnstile) -> Iterator[Engine]:
    """An engine that waits at ``turnstile`` before every forward."""
    engine = Engine(TorchBackend(FakeModel(before_forward=turnstile)), SMALL)
    yield engine
    turnstile.admit(10_000)
    engine.close(drain=False, timeout_s=TIMEOUT_S)


prompts = st.lists(
    st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=60), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None)
@given(prompts)
def test_batched_chunked_generation_equals_each_prompt_alone(batch: list[list[int]]) -> None:
    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        handles = [engine.submit(request(prompt)) for prompt in batch]
        results = [handle.result(TIMEOUT_S) for handle in handles]
    for prompt, result in zip(batch, results, strict=True):
        assert result.token_ids == greedy(prompt, 6)
        assert result.finish_reason == "length"
        assert result.usage is not None
        assert result.usage.prompt_tokens == len(prompt)
        assert result.usage.cached_tokens == 0
        assert result.usage.completion_tokens == 6


def test_prompt_chunks_and_decodes_share_steps_within_the_budget() -> None:
    model = FakeModel()
    with Engine(TorchBackend(model), SMALL) as engine:
        engine.submit(request(range(100))).result(TIMEOUT_S)
        handles = [engine.submit(request([1, 2], GREEDY.replace(max_tokens=40)))]
        handles += [engine.submit(request(range(50 + i))) for i in range(2)]
        for handle in handles:
            handle.result(TIMEOUT_S)
    assert max(sum(step) for step in model.batches) <= 16
    assert any(1 in step and max(step) > 1 for step in model.batches), "decode beside prefill"
    assert any(len(step) == 3 for step in model.batches)


def test_iteration_streams_one_token_at_a_time_with_usage_on_the_first_and_last() -> None:
    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        handle = engine.submit(request([5, 6, 7]))
        outputs = list(handle)
    assert [o.token_ids for o in outputs] == [(t,) for t in greedy([5, 6, 7], 6)]
    assert [o.finish_reason for o in outputs] == [None] * 5 + ["length"]
    assert outputs[0].usage == Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=1)
    assert outputs[-1].usage == Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=6)
    assert all(o.usage is None for o in outputs[1:-1])
    assert list(handle) == outputs, "a handle can be read again"


class _CachedPrefix(FakeModel):
    """Hands out states that have read token 5, as a prefix cache would."""

    def new_state(self) -> FakeState:
        state = FakeState()
        state.push(5)
        return state


def test_cache_hits_are_known_from_the_first_output() -> None:
    with Engine(TorchBackend(_CachedPrefix()), SMALL) as engine:
        first = next(iter(engine.submit(request([5, 6, 7]))))
    assert first.usage == Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=1)
    assert first.token_ids == greedy([5, 6, 7], 1)


def test_callback_gets_every_output_on_the_engines_thread() -> None:
    outputs: list[TokenOutput] = []
    threads: set[str] = set()

    def on_output(output: TokenOutput) -> None:
        outputs.append(output)
        threads.add(threading.current_thread().name)

    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        handle = engine.submit(
            Request(prompt_ids=[4], sampling=GREEDY, request_id="r", on_output=on_output)
        )
        whole = handle.result(TIMEOUT_S)
    assert tuple(t for o in outputs for t in o.token_ids) == whole.token_ids == greedy([4], 6)
    assert threads == {"rorqual-engine"}


def test_a_callback_that_raises_loses_only_its_own_request() -> None:
    def on_output(output: TokenOutput) -> None:
        raise OSError("the reader went away")

    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        bad = engine.submit(
            Request(prompt_ids=[4], sampling=GREEDY, request_id="bad", on_output=on_output)
        )
        good = engine.submit(request([9]))
        assert good.result(TIMEOUT_S).token_ids == greedy([9], 6)
        assert bad.result(TIMEOUT_S).finish_reason == "cancelled"


def test_stop_token_ends_the_answer_and_is_not_emitted() -> None:
    expected = greedy([1, 2, 3], 6)
    stop = expected[3]
    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        params = GREEDY.replace(stop_token_ids=(stop,))
        result = engine.submit(request([1, 2, 3], params)).result(TIMEOUT_S)
    assert result.token_ids == expected[: expected.index(stop)]
    assert result.finish_reason == "stop"
    assert result.usage is not None
    assert result.usage.completion_tokens == len(result.token_ids)


def test_answer_ends_with_length_where_the_context_is_full() -> None:
    config = EngineConfig(limits=SMALL.limits, max_context_tokens=10)
    with Engine(TorchBackend(FakeModel()), config) as engine:
        result = engine.submit(request(range(7))).result(TIMEOUT_S)
        with pytest.raises(PromptTooLongError, match="10"):
            engine.submit(request(range(10)))
    assert result.token_ids == greedy(range(7), 3)
    assert result.finish_reason == "length"


def test_context_never_exceeds_the_models() -> None:
    config = EngineConfig(max_context_tokens=10**9)
    with Engine(
        TorchBackend(FakeModel(TINY.replace(max_position_embeddings=100))), config
    ) as engine:
        assert engine.max_context_tokens == 100


def test_token_outside_the_vocabulary_is_the_callers_mistake() -> None:
    with (
        Engine(TorchBackend(FakeModel()), SMALL) as engine,
        pytest.raises(RequestError, match="4096"),
    ):
        engine.submit(request([1, 4096]))


def test_same_seed_same_tokens_whatever_runs_beside_it() -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.95, seed=7)
    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        alone = engine.submit(request([3, 1], params)).result(TIMEOUT_S)
        crowd = [engine.submit(request(range(30 + i), GREEDY)) for i in range(2)]
        crowded = engine.submit(request([3, 1], params)).result(TIMEOUT_S)
        other = engine.submit(request([3, 1], params.replace(seed=8))).result(TIMEOUT_S)
        for handle in crowd:
            handle.result(TIMEOUT_S)
    assert alone.token_ids == crowded.token_ids
    assert alone.token_ids != other.token_ids


def test_logprobs_come_with_their_tokens() -> None:
    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        result = engine.submit(request([8], GREEDY.replace(logprobs=2))).result(TIMEOUT_S)
        without = engine.submit(request([8])).result(TIMEOUT_S)
    assert without.logprobs is None
    assert result.logprobs is not None
    assert tuple(entry.token_id for entry in result.logprobs) == result.token_ids
    state = FakeState()
    state.push(8)
    truth = FakeModel().logits_after(state).log_softmax(-1)
    first = result.logprobs[0]
    assert first.logprob == pytest.approx(float(truth.max()), abs=1e-5)
    assert first.top[0] == (result.token_ids[0], first.logprob)
    assert len(first.top) == 2


def test_cancel_frees_the_state_at_the_next_step(held: Engine, turnstile: Turnstile) -> None:
    handle = held.submit(request(range(40), GREEDY.replace(max_tokens=1000)))
    turnstile.reached()  # first chunk
    turnstile.admit()
    turnstile.reached()  # second chunk: the first one's snapshot is out
    assert held.stats().num_running == 1
    assert held.stats().cache_bytes == 8 * 16
    handle.cancel()
    turnstile.admit()
    result = handle.result(TIMEOUT_S)
    assert result.finish_reason == "cancelled"
    assert result.token_ids == ()
    assert result.usage is not None
    stats = held.stats()
    assert (stats.num_running, stats.cache_bytes) == (0, 0)
    assert stats.finished == {"cancelled": 1}


def test_cancel_while_waiting_never_runs_and_keeps_the_order(
    held: Engine, turnstile: Turnstile
) -> None:
    first = [held.submit(request([i])) for i in range(3)]
    turnstile.reached()
    doomed, last = held.submit(request([10])), held.submit(request([11]))
    doomed.cancel()
    turnstile.admit(100)
    assert doomed.result(TIMEOUT_S).finish_reason == "cancelled"
    assert last.result(TIMEOUT_S).token_ids == greedy([11], 6)
    for i, handle in enumerate(first):
        assert handle.result(TIMEOUT_S).token_ids == greedy([i], 6)
    assert held.stats().prompt_tokens == 4, "the cancelled prompt was never fed"


def test_cancel_after_the_end_changes_nothing() -> None:
    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        handle = engine.submit(request([1]))
        before = handle.result(TIMEOUT_S)
        handle.cancel()
        engine.submit(request([2])).result(TIMEOUT_S)
        assert handle.result(TIMEOUT_S) == before
        assert engine.stats().finished == {"length": 2}


def test_full_queue_refuses_and_recovers(held: Engine, turnstile: Turnstile) -> None:
    accepted = [held.submit(request([0]))]
    turnstile.reached()  # the first one runs, so the queue is empty
    accepted += [held.submit(request([i])) for i in range(1, 5)]
    with pytest.raises(EngineOverloadedError, match="4 requests are waiting"):
        held.submit(request([9]))
    assert held.stats().num_waiting == 4
    turnstile.admit(1000)
    for i, handle in enumerate(accepted):
        assert handle.result(TIMEOUT_S).token_ids == greedy([i], 6)
    assert held.submit(request([1])).result(TIMEOUT_S).finish_reason == "length"


POISON = 666


class _Exploding(FakeModel):
    """Fails on batches that hold ``POISON``, after it has advanced all their states."""

    def __call__(self, tokens_N: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        logits = super().__call__(tokens_N, segments)
        if POISON in tokens_N.tolist():
            raise RuntimeError("kernel exploded")
        return logits


def test_failing_model_fails_its_request_and_the_engine_goes_on() -> None:
    with Engine(TorchBackend(_Exploding()), SMALL) as engine:
        bad = engine.submit(request([1, POISON])).result(TIMEOUT_S)
        good = engine.submit(request([1, 2])).result(TIMEOUT_S)
        stats = engine.stats()
    assert bad.finish_reason == "error"
    assert bad.error == "RuntimeError: kernel exploded"
    assert bad.usage is not None
    assert good.token_ids == greedy([1, 2], 6)
    assert stats.finished == {"error": 1, "length": 1}
    assert stats.cache_bytes == 0


def test_a_request_that_breaks_the_model_takes_no_other_with_it() -> None:
    sampled = SamplingParams(max_tokens=12, temperature=1.0, frequency_penalty=0.5, seed=3)
    prompts: list[list[int]] = [[1, 2], [3, 4, 5] * 9]  # one decodes, one is half read
    with Engine(TorchBackend(_Exploding()), SMALL) as engine:
        alone = [engine.submit(request(p, sampled)).result(TIMEOUT_S) for p in prompts]
    turnstile = Turnstile()
    with Engine(TorchBackend(_Exploding(before_forward=turnstile)), SMALL) as engine:
        handles = [engine.submit(request(prompts[0], sampled))]
        turnstile.reached()
        turnstile.admit(2)
        for _ in range(2):
            turnstile.reached()
        handles.append(engine.submit(request(prompts[1], sampled)))
        bad = engine.submit(request([*range(20), POISON]))
        turnstile.admit(10_000)
        results = [handle.result(TIMEOUT_S) for handle in handles]
        assert bad.result(TIMEOUT_S).error == "RuntimeError: kernel exploded"
        stats = engine.stats()
    assert stats.prompt_tokens > 2 + 27 + 21, "they shared a step with it, and were read again"
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    assert [r.usage for r in results] == [r.usage for r in alone]
    assert stats.finished == {"error": 1, "length": 2}
    assert (stats.cache_bytes, stats.num_running) == (0, 0)


def test_strangers_failures_do_not_add_up_against_a_long_request() -> None:
    turnstile = Turnstile()
    with Engine(TorchBackend(_Exploding(before_forward=turnstile)), SMALL) as engine:
        long = engine.submit(request([1, 2], GREEDY.replace(max_tokens=40)))
        turnstile.reached()
        for _ in range(8):
            bad = engine.submit(request([3, POISON]))
            while not bad.is_finished:
                turnstile.admit()
                turnstile.reached()
        turnstile.admit(10_000)
        result = long.result(TIMEOUT_S)
        stats = engine.stats()
    assert (result.finish_reason, result.token_ids) == ("length", greedy([1, 2], 40))
    assert stats.finished == {"error": 8, "length": 1}


class _NoCompany(FakeModel):
    """Fails on every batch of more than one sequence."""

    def __call__(self, tokens_N: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        if len(segments) > 1:
            raise MemoryError("too much at once")
        return super().__call__(tokens_N, segments)


def test_a_model_that_fails_again_and_again_ends_its_requests() -> None:
    with Engine(TorchBackend(_NoCompany()), SMALL) as engine:
        handles = [engine.submit(request([i], GREEDY.replace(max_tokens=200))) for i in range(2)]
        results = [handle.result(TIMEOUT_S) for handle in handles]
        steps = engine.stats().num_steps
    assert "error" in {result.finish_reason for result in results}
    assert steps < 1000


class _BrokenLogits(FakeModel):
    """Not-a-number logits for sequences of an odd number of tokens above 4."""

    def logits_after(self, state: FakeState) -> torch.Tensor:
        logits = super().logits_after(state)
        return logits * float("nan") if state.length > 4 and state.length % 2 else logits


def test_logits_that_are_not_finite_fail_only_their_own_request() -> None:
    with Engine(TorchBackend(_BrokenLogits()), SMALL) as engine:
        good = engine.submit(request([1], GREEDY.replace(max_tokens=4)))
        bad = engine.submit(request([1, 2, 3, 4, 5]))
        assert good.result(TIMEOUT_S).token_ids == greedy([1], 4)
        result = bad.result(TIMEOUT_S)
    assert result.finish_reason == "error"
    assert result.error is not None
    assert "finite" in result.error


def test_a_thread_count_no_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_threads"):
        TorchBackend(FakeModel(), num_threads=2**40)


class _Broken(TorchBackend):
    """Fails where nothing guards against it."""

    def admit(self, num_tokens: int) -> Admission:
        raise RuntimeError("a bug")


def test_a_bug_in_the_backend_closes_the_engine_and_leaves_nobody_waiting() -> None:
    engine = Engine(_Broken(FakeModel()), SMALL)
    result = engine.submit(request([1])).result(TIMEOUT_S)
    assert result.finish_reason == "error"
    assert engine.is_closed
    with pytest.raises(EngineClosedError):
        engine.submit(request([1]))
    engine.close()


def test_a_request_past_its_deadline_ends_with_an_error_wherever_it_is(
    held: Engine, turnstile: Turnstile
) -> None:
    slow = Request(prompt_ids=[1], sampling=GREEDY, request_id="slow", deadline_s=1e-9)
    others = [held.submit(request([i])) for i in range(2)]
    turnstile.reached()
    late = held.submit(slow)
    turnstile.admit(100)
    result = late.result(TIMEOUT_S)
    assert result.finish_reason == "error"
    assert "deadline of 1e-09 s" in (result.error or "")
    assert all(other.result(TIMEOUT_S).finish_reason == "length" for other in others)


def test_a_deadline_must_be_in_the_future() -> None:
    with pytest.raises(RequestError, match="deadline_s"):
        Request(prompt_ids=[1], sampling=GREEDY, request_id="r", deadline_s=0.0)


class _NoMemory(FakeModel):
    def new_state(self) -> FakeState:
        raise MemoryError("no room for a cache")


def test_a_state_that_cannot_be_made_fails_the_request() -> None:
    with Engine(TorchBackend(_NoMemory()), SMALL) as engine:
        result = engine.submit(request([1])).result(TIMEOUT_S)
    assert result.finish_reason == "error"
    assert result.error == "MemoryError: no room for a cache"


def test_closing_drains_by_default() -> None:
    engine = Engine(TorchBackend(FakeModel()), SMALL)
    handles = [engine.submit(request([i])) for i in range(4)]
    engine.close(timeout_s=TIMEOUT_S)
    assert [h.result(0).token_ids for h in handles] == [greedy([i], 6) for i in range(4)]
    with pytest.raises(EngineClosedError):
        engine.submit(request([1]))
    engine.close()  # a second time is harmless


def test_closed_from_the_moment_requests_are_refused() -> None:
    turnstile = Turnstile()
    engine = Engine(TorchBackend(FakeModel(before_forward=turnstile)), SMALL)
    handle = engine.submit(request([1]))
    turnstile.reached()
    assert not engine.is_closed
    with pytest.raises(TimeoutError):
        engine.close(timeout_s=0.01)
    assert engine.is_closed, "still finishing the request, but closed to others"
    turnstile.admit(100)
    engine.close(timeout_s=TIMEOUT_S)
    assert handle.result(0).finish_reason == "length"


def test_closing_without_drain_cancels_running_and_waiting() -> None:
    turnstile = Turnstile()
    engine = Engine(TorchBackend(FakeModel(before_forward=turnstile)), SMALL)
    handles = [engine.submit(request([i], GREEDY.replace(max_tokens=10**6))) for i in range(4)]
    turnstile.reached()
    with pytest.raises(TimeoutError):
        engine.close(drain=False, timeout_s=0.01)
    turnstile.admit(10)
    engine.close(drain=False, timeout_s=TIMEOUT_S)
    assert {h.result(0).finish_reason for h in handles} == {"cancelled"}
    assert engine.stats().num_running == 0


def test_leaving_the_block_by_an_exception_cancels() -> None:
    handles: list[Handle] = []

    def use() -> None:
        with Engine(TorchBackend(FakeModel()), SMALL) as engine:
            handles.append(engine.submit(request([1], GREEDY.replace(max_tokens=10**6))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert handles[0].result(0).finish_reason == "cancelled"


def test_result_times_out_without_disturbing_the_request(
    held: Engine, turnstile: Turnstile
) -> None:
    handle = held.submit(request([2]))
    turnstile.reached()
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    turnstile.admit(100)
    assert handle.result(TIMEOUT_S).token_ids == greedy([2], 6)


def test_stats_count_what_was_computed() -> None:
    with Engine(TorchBackend(FakeModel()), SMALL) as engine:
        engine.submit(request(range(20))).result(TIMEOUT_S)
        engine.submit(request(range(5))).result(TIMEOUT_S)
        stats = engine.stats()
    assert (stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens) == (25, 12, 0)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_steps == 2 + 5 + 1 + 5


def test_many_threads_submit_at_once() -> None:
    results: dict[int, TokenOutput] = {}
    config = EngineConfig(limits=SMALL.limits, max_waiting=64)
    with Engine(TorchBackend(FakeModel()), config) as engine:

        def client(n: int) -> None:
            results[n] = engine.submit(request([n, n + 1])).result(TIMEOUT_S)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert {n: r.token_ids for n, r in results.items()} == {
        n: greedy([n, n + 1], 6) for n in range(16)
    }
