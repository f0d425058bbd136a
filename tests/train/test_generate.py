"""Batched generation with shared beginnings gives what one prompt alone gets."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer
from rorqual.train.generate import Decoder, common_beginning

from .conftest import SMALL, small_model

VOCAB = 64


@pytest.fixture(scope="module")
def model() -> Transformer:
    # Double precision: rounding must not decide between two nearly equal tokens.
    network = small_model(SMALL.replace(vocab_size=VOCAB), seed=3).double()
    with torch.no_grad():
        network.head.weight.mul_(50)
    return network


def alone(model: Transformer, prompt: list[int], stop_id: int, max_tokens: int) -> tuple[int, ...]:
    """One prompt, the whole sequence computed anew for every token."""
    ids: list[int] = []
    while len(ids) < max_tokens:
        tokens = torch.tensor([*prompt, *ids])
        token = int(model(tokens, [Segment(model.new_state(), len(tokens))])[0].argmax())
        if token == stop_id:
            break
        ids.append(token)
    return tuple(ids)


def prompts_of(seed: int) -> list[list[int]]:
    rng = Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(150)]
    ends = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(5)]
    return [*([*shared, *end] for end in ends[:3]), *ends[3:], shared[:1]]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_many_prompts_get_what_each_gets_alone(model: Transformer, batch: int) -> None:
    prompts = prompts_of(0)
    stop = alone(model, prompts[0], stop_id=-1, max_tokens=9)[4]  # ends one answer early
    expected = [alone(model, prompt, stop, 9) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 1
    done: list[None] = []
    answers = Decoder(model, stop_id=stop, batch=batch).generate(
        prompts, max_tokens=9, on_done=lambda: done.append(None)
    )
    assert [answer.ids for answer in answers] == expected
    assert [answer.stopped for answer in answers] == [len(ids) < 9 for ids in expected]
    assert len(done) == len(prompts)


def test_remembered_beginnings_change_nothing_but_the_work(model: Transformer) -> None:
    prompts = prompts_of(1)
    plain = Decoder(model, stop_id=-1).generate(prompts, max_tokens=6)
    decoder = Decoder(model, stop_id=-1)
    beginning = common_beginning(prompts[:3])
    assert len(beginning) >= 150
    decoder.remember(beginning)
    decoder.remember(prompts[0][:-1])  # itself starts from what is remembered
    decoder.remember(prompts[4])  # a whole prompt: its last token still has to be fed
    for _ in range(2):  # a second time: remembered states were not advanced
        assert decoder.generate(prompts, max_tokens=6) == plain
    decoder.forget()
    assert decoder.generate(prompts, max_tokens=6) == plain


class CountingTransformer(Transformer):
    """Counts the tokens it computes."""

    num_computed = 0

    def run(self, tokens_N: Tensor, segments: Sequence[Segment]) -> Tensor:
        self.num_computed += len(tokens_N)
        return super().run(tokens_N, segments)


def test_only_what_follows_a_remembered_beginning_is_computed() -> None:
    model = CountingTransformer(SMALL.replace(vocab_size=VOCAB))
    model.init_weights(torch.Generator().manual_seed(0))
    prompts = prompts_of(2)[:3]
    decoder = Decoder(model, stop_id=-1)
    decoder.remember(prompts[0][:150])
    assert model.num_computed == 150
    decoder.generate(prompts, max_tokens=1)
    assert model.num_computed == 150 + sum(len(p) - 150 for p in prompts)


def test_the_common_beginning_is_the_longest() -> None:
    assert common_beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == (1, 2)
    assert common_beginning([[1, 2], [1, 2]]) == (1, 2)
    assert common_beginning([[1], [2]]) == ()
