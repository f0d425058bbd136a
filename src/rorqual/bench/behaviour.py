"""What the engine does with repeated prompts, many streams, a busy core, guesses and formats.

Cached shares are counts. The others are ratios of wall-clock or CPU time within one run, ours
against ours; on a machine that others use, only the counts mean anything.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rorqual.bench.options import ISAS
from rorqual.bench.peers import RorqualPeer
from rorqual.bench.setup import Setup, random_prompt
from rorqual.bench.worker import Worker
from rorqual.engine.cache.plan import CheckpointPolicy
from rorqual.engine.engine import Engine
from rorqual.engine.handle import Handle
from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.errors import ConfigError
from rorqual.model.native import NativeWeightFormat


@dataclass(frozen=True, kw_only=True)
class BehaviourRow:
    """One figure with what it was measured on."""

    name: str
    value: float
    unit: str
    detail: str


def submit(engine: Engine, prompt: Sequence[int], num_tokens: int, name: str) -> Handle:
    """Start a greedy answer of ``num_tokens``."""
    return engine.submit(
        Request(
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
            request_id=name,
        )
    )


# ---- reuse ------------------------------------------------------------------------------------
def reuse_rows(length: int) -> list[BehaviourRow]:
    """Tokens that need no computation: the same prompt, the next turn, a branch at one half.

    The branch also where windows are kept every 2,048 tokens only, as they are on disk.
    """
    rows = _reuse(Setup(), length)
    (*_, branch) = _reuse(Setup(policy=CheckpointPolicy(dense_tokens=None)), length)
    return [*rows, replace(branch, name="branch at 50 %, sparse windows")]


def _reuse(setup: Setup, length: int) -> list[BehaviourRow]:
    first = random_prompt(setup.config, length, seed=1)
    other = random_prompt(setup.config, length, seed=2)
    rows = []
    with setup.open() as engine:
        answer = submit(engine, first, 64, "first").result().token_ids
        turn = [*first, *answer, *other[:64]]
        half = length // 2
        for name, prompt in (
            ("identical prompt", first),
            ("next turn", turn),
            ("branch at 50 %", [*first[:half], *other[half:]]),
        ):
            usage = submit(engine, prompt, 1, name).result().usage
            assert usage is not None
            rows.append(
                BehaviourRow(
                    name=name,
                    value=100 * usage.cached_tokens / len(prompt),
                    unit="% of tokens cached",
                    detail=f"{usage.cached_tokens} of {len(prompt)}",
                )
            )
    return rows


def disk_rows(length: int) -> list[BehaviourRow]:
    """How long a prompt takes that is on disk: nobody else gets a token meanwhile."""
    with tempfile.TemporaryDirectory(prefix="rorqual-bench-") as folder:
        setup = Setup(directory=Path(folder))
        prompt = random_prompt(setup.config, length, seed=5)
        with setup.open() as engine:
            submit(engine, prompt, 1, "write").result()
        with setup.open() as engine:
            submit(engine, prompt[:128], 1, "warm").result()
            start = time.perf_counter()
            usage = submit(engine, prompt, 1, "read").result().usage
            took = time.perf_counter() - start
    assert usage is not None
    return [
        BehaviourRow(
            name="first token, prompt on disk",
            value=1e3 * took,
            unit="ms",
            detail=f"{usage.cached_tokens} of {length} tokens from disk, the rest computed",
        )
    ]


# ---- many streams, a busy core ----------------------------------------------------------------
def stream_rows(num_streams: int, threads: int, length: int, num_tokens: int) -> list[BehaviourRow]:
    """Decode tokens per second of one stream and of many together, wall clock."""
    setup = Setup(threads=threads, max_running=num_streams)
    prompts = [random_prompt(setup.config, length, seed=10 + i) for i in range(num_streams)]
    with setup.open() as engine:
        one = _decode_rate(engine, prompts[:1], num_tokens)
        many = _decode_rate(engine, prompts, num_tokens)
    on = f"{threads} threads, {length} tokens of context"
    return [
        BehaviourRow(name="one stream", value=one, unit="tokens/s", detail=on),
        BehaviourRow(
            name=f"{num_streams} streams", value=many, unit="tokens/s together", detail=on
        ),
        BehaviourRow(
            name="streams over one", value=many / one, unit="x", detail=f"{num_streams} over 1"
        ),
    ]


def _decode_rate(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
    """Tokens per second while all streams decode: from the last one's first token to the first
    one's last. The prompts are read beforehand, so that all start together."""
    for prompt in prompts:
        submit(engine, prompt, 1, "warm").result()
    stamps: list[list[float]] = [[] for _ in prompts]

    handles = []
    for prompt, times in zip(prompts, stamps, strict=True):
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)

        def on_output(output: TokenOutput, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        handles.append(
            engine.submit(
                Request(
                    prompt_ids=prompt, sampling=sampling, request_id="stream", on_output=on_output
                )
            )
        )
    for handle in handles:
        handle.result()
    start, end = max(times[0] for times in stamps), min(times[-1] for times in stamps)
    counted = sum(start < at <= end for times in stamps for at in times)
    return counted / (end - start)


def busy_rows(threads: int, length: int, num_tokens: int) -> list[BehaviourRow]:
    """How many times slower prefill and decode get while another process keeps one core busy."""
    setup = Setup(threads=threads)
    rates: dict[str, list[tuple[float, float]]] = {"quiet": [], "busy": []}
    with setup.open() as engine:
        for turn in range(6):
            prompt = random_prompt(setup.config, length, seed=100 + turn)
            if turn % 2:
                with busy_core():
                    rates["busy"].append(_rates(engine, prompt, num_tokens))
            else:
                rates["quiet"].append(_rates(engine, prompt, num_tokens))
    rows = []
    for index, phase in enumerate(("prefill", "decode")):
        quiet, busy = (sorted(r[index] for r in rates[kind])[1] for kind in ("quiet", "busy"))
        rows.append(
            BehaviourRow(
                name=f"{phase} with a busy core",
                value=quiet / busy,
                unit="x slower",
                detail=f"{quiet:.0f} -> {busy:.0f} tokens/s on {threads} threads",
            )
        )
    return rows


def _rates(engine: Engine, prompt: Sequence[int], num_tokens: int) -> tuple[float, float]:
    """Prefill and decode tokens per second, wall clock."""
    start = time.perf_counter()
    stamps = [time.perf_counter() for _ in submit(engine, prompt, num_tokens, "rates")]
    return len(prompt) / (stamps[0] - start), (len(stamps) - 1) / (stamps[-1] - stamps[0])


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that never sleeps, kept to one of the cores we may use."""
    core = min(os.sched_getaffinity(0))
    program = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile 1: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


# ---- instructions ------------------------------------------------------------------------------
def isa_rows(length: int, num_tokens: int) -> list[BehaviourRow]:
    """Prefill and decode tokens per CPU-second with each kind of instructions this machine has."""
    prompt = random_prompt(Setup().config, length, seed=4)
    rows = []
    for isa in ISAS:
        try:
            with Worker(functools.partial(RorqualPeer, Setup(isa=isa))) as worker:
                measured = worker.run(prompt, num_tokens + 1)
        except ConfigError:  # not on this machine
            continue
        for phase, count, took in (
            ("prefill", length, measured.prefill_cpu_s),
            ("decode", num_tokens, measured.decode_cpu_s),
        ):
            rows.append(
                BehaviourRow(
                    name=f"{phase}, {isa}",
                    value=count / took,
                    unit="tokens/cpu-s",
                    detail=f"{length} tokens of context",
                )
            )
    return rows


# ---- weights ----------------------------------------------------------------------------------
def weight_rows(length: int, num_tokens: int) -> list[BehaviourRow]:
    """Decode tokens per CPU-second with each weight format, and what it changes of the answer."""
    rows = []
    exact: tuple[int, ...] = ()
    for weights in get_args(NativeWeightFormat):
        if weights == "as stored":
            continue
        setup = Setup(weights=weights)
        prompt = random_prompt(setup.config, length, seed=3)
        with setup.open() as engine:
            submit(engine, prompt, 1, "warm").result()
            rate, tokens = _cpu_decode(engine, prompt, num_tokens)
        exact = exact or tokens
        same = [a == b for a, b in zip(tokens, exact, strict=True)]
        count = same.index(False) if False in same else len(same)
        rows.append(
            BehaviourRow(
                name=f"decode, {weights} weights",
                value=rate,
                unit="tokens/cpu-s",
                detail=f"greedy tokens as fp32: {count}/{len(tokens)}",
            )
        )
    return rows


def _cpu_decode(
    engine: Engine, prompt: Sequence[int], num_tokens: int
) -> tuple[float, tuple[int, ...]]:
    stamps = []
    tokens: list[int] = []
    for output in submit(engine, prompt, num_tokens, "decode"):
        stamps.append(time.process_time())
        tokens += output.token_ids
    return (len(tokens) - 1) / (stamps[-1] - stamps[0]), tuple(tokens)
