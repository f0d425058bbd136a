"""Constraints in the engine, with toy constraints: what is masked, who ends, who is harmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import pytest
import torch

from rorqual.engine.engine import Engine
from rorqual.engine.grammar import Constraint, restrict
from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.engine.torch_backend import TorchBackend
from rorqual.errors import EngineError
from rorqual.model.config import TINY
from rorqual.testing.fake_model import FakeModel

VOCAB = TINY.vocab_size
TIMEOUT_S = 30.0


def bits(tokens: Sequence[int]) -> bytes:
    return sum(1 << token for token in set(tokens)).to_bytes((VOCAB + 7) // 8, "little")


class Toy:
    """Allows ``allowed(n)`` after n tokens; ends after ``length`` of them."""

    def __init__(
        self,
        allowed: Callable[[int], Sequence[int] | None],
        *,
        holes: Sequence[int] = (),
        length: int | None = None,
        end: Literal["stop", "length"] = "stop",
    ) -> None:
        self.accepted: list[int] = []
        self._allowed = allowed
        self._holes = holes
        self._length = length
        self._end = end

    def mask(self) -> bytes | None:
        allowed = self._allowed(len(self.accepted))
        return None if allowed is None else bits(allowed)

    def forbidden(self) -> Sequence[int]:
        return self._holes

    def accept(self, token_id: int) -> None:
        allowed = self._allowed(len(self.accepted))
        if allowed is not None and token_id not in allowed:
            raise EngineError(f"{token_id} is not allowed")
        self.accepted.append(token_id)

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        return self._end if len(self.accepted) == self._length else None


class Source:
    """Starts constraints, and remembers them."""

    def __init__(self, make: Callable[[], Constraint]) -> None:
        self.started: list[Constraint] = []
        self._make = make

    def start(self) -> Constraint:
        self.started.append(self._make())
        return self.started[-1]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(TorchBackend(FakeModel())) as engine:
        yield engine


def answer(
    engine: Engine,
    make: Callable[[], Constraint] | None,
    *,
    prompt: Sequence[int] = (3, 4, 5),
    **sampling: object,
) -> list[TokenOutput]:
    params = SamplingParams(**{"max_tokens": 12, "temperature": 2.0, "seed": 7, **sampling})  # type: ignore[arg-type]
    request = Request(
        prompt_ids=prompt,
        sampling=params,
        request_id="r",
        constraint=None if make is None else Source(make),
    )
    return list(engine.submit(request))


def tokens_of(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_only_allowed_tokens_are_drawn_at_any_temperature(engine: Engine) -> None:
    for temperature in (0.0, 0.5, 2.0):
        outputs = answer(engine, lambda: Toy(lambda at: [at + 1, at + 9]), temperature=temperature)
        drawn = tokens_of(outputs)
        assert len(drawn) == 12
        assert all(token in (n + 1, n + 9) for n, token in enumerate(drawn))
        assert outputs[-1].finish_reason == "length"


def test_filters_and_penalties_choose_among_allowed_tokens_only(engine: Engine) -> None:
    outputs = answer(
        engine,
        lambda: Toy(lambda n: [2, 6, 11]),
        top_k=2,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        repetition_penalty=3.0,
        max_tokens=40,
    )
    drawn = tokens_of(outputs)
    assert len(drawn) == 40
    assert set(drawn) <= {2, 6, 11}


def test_forbidden_tokens_are_passed_over_for_the_next_best(engine: Engine) -> None:
    free = tokens_of(answer(engine, None, temperature=0.0))
    holes = [free[4]]
    assert free[4] not in free[:4]
    held = tokens_of(answer(engine, lambda: Toy(lambda n: None, holes=holes), temperature=0.0))
    assert held[:4] == free[:4]
    assert free[4] not in held
    assert tokens_of(answer(engine, lambda: Toy(lambda n: None), temperature=0.0)) == free


def test_a_complete_answer_stops_without_a_stop_token(engine: Engine) -> None:
    outputs = answer(engine, lambda: Toy(lambda n: [8], length=3))
    assert tokens_of(outputs) == [8, 8, 8]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].usage is not None
    assert outputs[-1].usage.completion_tokens == 3


def test_a_complete_answer_of_max_tokens_stops_too(engine: Engine) -> None:
    outputs = answer(engine, lambda: Toy(lambda n: [8], length=3), max_tokens=3)
    assert outputs[-1].finish_reason == "stop"


def test_a_used_up_bound_ends_with_length(engine: Engine) -> None:
    outputs = answer(engine, lambda: Toy(lambda n: [8], length=3, end="length"))
    assert tokens_of(outputs) == [8, 8, 8]
    assert outputs[-1].finish_reason == "length"


def test_where_only_a_stop_token_is_allowed_the_answer_stops(engine: Engine) -> None:
    outputs = answer(engine, lambda: Toy(lambda n: [8] if n < 2 else [1]), stop_token_ids=(1,))
    assert tokens_of(outputs) == [8, 8]
    assert outputs[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Toy(lambda n: [8] if n < 2 else []),
        lambda: Toy(lambda n: [8] if n < 2 else [9], holes=[9]),
    ],
    ids=["empty mask", "mask with a hole for all"],
)
def test_a_constraint_that_allows_nothing_ends_its_request_with_an_error(
    engine: Engine, make: Callable[[], Constraint]
) -> None:
    outputs = answer(engine, make)
    assert tokens_of(outputs) == [8, 8]
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error == "the constraint on the answer allows no token here"
    assert tokens_of(answer(engine, None))  # and the engine goes on


class Failing(Toy):
    """Gives up in one of its methods after two tokens."""

    def __init__(self, where: str) -> None:
        super().__init__(lambda n: None)
        self._where = where

    def mask(self) -> bytes | None:
        self._maybe_fail("mask")
        return None

    def accept(self, token_id: int) -> None:
        self._maybe_fail("accept")
        super().accept(token_id)

    def _maybe_fail(self, where: str) -> None:
        if where == self._where and len(self.accepted) == 2:
            raise EngineError("too complex to go on")


@pytest.mark.parametrize("where", ["mask", "accept"])
def test_a_failing_constraint_harms_its_own_request_only(where: str) -> None:
    with Engine(TorchBackend(FakeModel())) as engine:
        params = SamplingParams(max_tokens=20, temperature=2.0, seed=1)
        alone = engine.submit(Request(prompt_ids=(9, 9), sampling=params, request_id="x"))
        expected = tokens_of(list(alone))
        bad = engine.submit(
            Request(
                prompt_ids=(3, 4),
                sampling=params,
                request_id="bad",
                constraint=Source(lambda: Failing(where)),
            )
        )
        good = engine.submit(Request(prompt_ids=(9, 9), sampling=params, request_id="good"))
        ended = list(bad)
        assert ended[-1].finish_reason == "error"
        assert ended[-1].error == "too complex to go on"
        assert len(tokens_of(ended)) == 2
        assert tokens_of(list(good)) == expected


def test_a_constraint_that_cannot_start_is_an_error_of_its_request(engine: Engine) -> None:
    def fail() -> Constraint:
        raise EngineError("no such grammar")

    outputs = answer(engine, fail)
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error == "no such grammar"
    assert tokens_of(answer(engine, None))


def test_logprobs_are_those_of_the_model_without_the_constraint(engine: Engine) -> None:
    [output, *_] = answer(engine, lambda: Toy(lambda n: [5]), max_tokens=1, logprobs=3)
    model = FakeModel()
    state = model.new_state()
    for token in (3, 4, 5):
        state.push(token)  # type: ignore[attr-defined]
    logp = model.logits_after(state).log_softmax(-1)  # type: ignore[arg-type]
    assert output.logprobs is not None
    assert output.logprobs[0].token_id == 5
    assert output.logprobs[0].logprob == pytest.approx(float(logp[5]), abs=1e-5)
    assert output.logprobs[0].top[0][0] == int(logp.argmax())
    assert output.logprobs[0].top[0][1] > output.logprobs[0].logprob


def test_a_restarted_sequence_replays_its_answer_into_a_new_constraint() -> None:
    class Model(FakeModel):
        def __init__(self) -> None:
            super().__init__(before_forward=self._maybe_fail)
            self.countdown = 6

        def _maybe_fail(self, tokens: list[int]) -> None:
            self.countdown -= 1
            if self.countdown == 0:
                raise RuntimeError("a step fails once")

    source = Source(lambda: Toy(lambda n: [n + 1, n + 9], length=10))
    params = SamplingParams(max_tokens=20, temperature=2.0, seed=3)
    with Engine(TorchBackend(Model())) as engine:
        handles = [
            engine.submit(
                Request(prompt_ids=(3, n), sampling=params, request_id=str(n), constraint=source)
            )
            for n in (1, 2)
        ]
        answers = [tokens_of(list(handle)) for handle in handles]
    assert len(source.started) == 4  # two starts, two restarts
    for drawn in answers:
        assert len(drawn) == 10
        assert all(token in (n + 1, n + 9) for n, token in enumerate(drawn))
    followed = [toy.accepted for toy in source.started if isinstance(toy, Toy)]
    assert all(drawn in followed for drawn in answers)


# ---- restrict ---------------------------------------------------------------------------------
def test_rows_without_constraint_keep_their_logits_exactly() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    allowed = [4, VOCAB - 1]
    out, errors = restrict(logits, [None, Toy(lambda n: allowed), None])
    assert torch.equal(logits, before)
    assert torch.equal(out[0], logits[0])
    assert torch.equal(out[2], logits[2])
    assert out[1].isfinite().nonzero().flatten().tolist() == allowed
    assert torch.equal(out[1, allowed], logits[1, allowed])
    assert errors == {}


def test_a_batch_without_constraints_is_not_copied() -> None:
    logits = torch.zeros(2, VOCAB)
    assert restrict(logits, [None, None]).logits_BV is logits
    assert restrict(logits, [None, Toy(lambda n: None)]).logits_BV is logits


@pytest.mark.parametrize("num_bytes", [1, (VOCAB + 7) // 8 + 9])
def test_a_mask_of_another_length_counts_as_far_as_it_reaches(num_bytes: int) -> None:
    class Short(Toy):
        def mask(self) -> bytes | None:
            return b"\xff" * num_bytes

    out, errors = restrict(torch.zeros(1, VOCAB), [Short(lambda n: None)])
    assert int(out.isfinite().sum()) == min(8 * num_bytes, VOCAB)
    assert errors == {}
