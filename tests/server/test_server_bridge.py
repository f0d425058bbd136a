"""Outputs cross from the engine's thread to the loop in order, bounded, and cancellable."""

from __future__ import annotations

import asyncio
import threading

import pytest

from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.server.bridge import Generation, SlowReaderError


class RecordingHandle:
    """Counts cancellations."""

    def __init__(self) -> None:
        self.num_cancels = 0

    def cancel(self) -> None:
        self.num_cancels += 1


class OneHandleEngine:
    """Accepts anything and does nothing."""

    def __init__(self) -> None:
        self.handle = RecordingHandle()
        self.num_waiting = self.num_running = 0
        self.is_full = False

    def submit(self, request: Request) -> RecordingHandle:
        return self.handle

    def stats(self) -> OneHandleEngine:
        return self


def start(generation: Generation, engine: OneHandleEngine) -> None:
    sampling = SamplingParams(max_tokens=5)
    generation.submit(engine, Request(prompt_ids=[1], sampling=sampling, request_id="r"))


def publish_from_thread(generation: Generation, outputs: list[TokenOutput]) -> None:
    def run() -> None:
        for output in outputs:
            generation.on_output(output)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)


def test_outputs_arrive_complete_and_in_order() -> None:
    outputs = [TokenOutput(token_ids=(n,)) for n in range(100)]

    async def scenario() -> list[TokenOutput]:
        generation = Generation()
        start(generation, OneHandleEngine())
        publish_from_thread(generation, outputs[:60])
        taken = await generation.take(5)
        publish_from_thread(generation, outputs[60:])
        return taken + await generation.take(5)

    assert asyncio.run(scenario()) == outputs


def test_take_gives_nothing_after_its_timeout() -> None:
    async def scenario() -> list[TokenOutput]:
        return await Generation().take(0.01)

    assert asyncio.run(scenario()) == []


def test_leaving_early_cancels_and_leaving_late_does_not() -> None:
    async def scenario(last: TokenOutput) -> int:
        engine = OneHandleEngine()
        with Generation() as generation:
            start(generation, engine)
            publish_from_thread(generation, [last])
            await generation.take(5)
        return engine.handle.num_cancels

    assert asyncio.run(scenario(TokenOutput(token_ids=(5,)))) == 1
    assert asyncio.run(scenario(TokenOutput(finish_reason="stop"))) == 0


def test_reader_that_falls_behind_is_given_up() -> None:
    engine = OneHandleEngine()

    async def scenario() -> None:
        generation = Generation(max_buffered=3)
        start(generation, engine)
        publish_from_thread(generation, [TokenOutput(token_ids=(n,)) for n in range(3)])
        assert len(await generation.take(5)) == 3
        publish_from_thread(generation, [TokenOutput(token_ids=(n,)) for n in range(10)])
        with pytest.raises(SlowReaderError, match="too slowly"):
            await generation.take(5)

    asyncio.run(scenario())
    assert engine.handle.num_cancels >= 1


def test_output_after_the_loop_closed_is_dropped_quietly() -> None:
    async def make() -> Generation:
        return Generation()

    generation = asyncio.run(make())
    generation.on_output(TokenOutput(token_ids=(1,)))
