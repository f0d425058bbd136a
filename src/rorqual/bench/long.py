"""One long context, read once: speed, memory and cache over its length, and a restart at the end.

A process of its own reads a random prompt piece by piece on all threads, with the cache on disk.
Another then opens the same directory, answers the whole prompt again and, on one thread, decodes
from each length. Guesses ahead are off. Beside the measurements stand predictions from
``model/flops.py`` and ``model/cost.py``; ``fit`` says how operations become time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rorqual.bench import targets
from rorqual.bench.predict import (
    PREDICTED,
    all_weight_bytes,
    long_predictions,
    need_bytes,
    prediction_line,
)
from rorqual.bench.report import (
    conditions,
    print_conditions,
    rss_bytes,
    table,
    write_csv,
)
from rorqual.bench.roof import measure_roof
from rorqual.bench.setup import Setup, random_prompt
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.errors import ConfigError, EngineError
from rorqual.model.config import ModelConfig
from rorqual.model.flops import Span, token_flops

LENGTHS = (4_000, 16_000, 64_000, 128_000, 256_000, 512_000, 1_000_000)
_P = ParamSpec("_P")
_T = TypeVar("_T")
KINDS = ("products with weights", "attention and scores")
"""Of operations: the first are the same for every token, the second grow with the context."""
_POLL_S = 0.2
_SLACK_TOKENS = 16_384
"""Memory beyond the context: answers, and windows kept to restart from."""


@dataclass(frozen=True, kw_only=True)
class LongRow:
    """Up to one length. CPU time is that of the process: of all threads while reading, of one while
    decoding."""

    context_tokens: int
    read_tokens: int
    """Computed for this row: what the row before did not have."""
    prefill_tokens_per_cpu_s: float
    prefill_wall_s: float
    cache_bytes: int
    """Compressed entries and keys."""
    formula_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    library_bytes: int
    """Resident before any weight was there."""
    decode_tokens_per_cpu_s: float = 0.0
    predicted_prefill: float = 0.0
    predicted_decode: float = 0.0
    """Tokens per CPU-second; see ``fit``."""


@dataclass(frozen=True, kw_only=True)
class RestartRow:
    """The same prompt, asked of a new process."""

    context_tokens: int
    cached_tokens: int
    load_wall_s: float
    """To load the weights and open the cache."""
    answer_wall_s: float
    """From the request to its first token."""
    same_tokens: int
    answer_tokens: int
    peak_rss_bytes: int


def run(args: argparse.Namespace, argv: Sequence[str], model: Path | None) -> int:
    """Measure, print and draw; 0 if the restarted process gave the same answer.

    model: a checkpoint directory; None: the ``tiny`` config.

    Raises:
        ConfigError: an option is out of range, or the plot cannot be drawn.
    """
    lengths = [length for length in LENGTHS if length < args.to] + [args.to]
    compact = args.cache_precision == "compact"
    setup = Setup(
        model=model,
        threads=args.threads or len(os.sched_getaffinity(0)),
        weights="as stored",
        entries="record" if compact else "fp32",
        keys="fp4" if compact else "int8",
    )
    longest = args.to + args.decode_tokens
    if longest > setup.config.max_position_embeddings:
        raise ConfigError(f"--to: the network ends at {setup.config.max_position_embeddings}")
    if args.decode_tokens < 3:
        raise ConfigError("--decode-tokens must be >= 3")
    header = conditions(["rorqual", "bench", "long"], argv) | {"threads": str(setup.threads)}
    print_conditions(header)
    roof = measure_roof(int(all_weight_bytes(setup)))
    header["roof"] = roof.words
    print(f"# roof: {roof.words}", flush=True)
    predictions = long_predictions(replace(setup, threads=1), roof, lengths)
    print(table(PREDICTED, [prediction_line(p) for p in predictions], words_last=True))
    memory = int(setup.bytes_per_token * (longest + _SLACK_TOKENS))
    with tempfile.TemporaryDirectory(prefix="rorqual-bench-") as folder:
        setup = replace(setup, memory_bytes=memory, directory=Path(folder))
        rows, told = _in_new_process(_read, setup, lengths, args.decode_tokens)
        one = replace(setup, threads=1)
        restart, rates = _in_new_process(_answer_again, one, lengths, told)
    rows = [replace(row, decode_tokens_per_cpu_s=r) for row, r in zip(rows, rates, strict=True)]
    rows, constants = fit(setup.config, rows)
    _print(rows, constants)
    need = need_bytes(setup, rows[-1].formula_bytes)
    verdicts = targets.judge_long(rows, restart, need, predictions)
    print(f"\n{table(targets.HEAD, [targets.line(row) for row in verdicts], words_last=True)}")
    if args.csv is not None:
        args.csv.mkdir(parents=True, exist_ok=True)
        name = "tiny" if model is None else model.name
        write_csv(args.csv / f"long_{name}.csv", header, rows)
        write_csv(args.csv / f"restart_{name}.csv", header, [restart])
        write_csv(args.csv / f"long_predictions_{name}.csv", header, predictions)
        write_csv(args.csv / f"long_targets_{name}.csv", header, verdicts)
    if args.plot is not None:
        from rorqual.bench.long_plot import plot

        plot(args.plot, rows)
    return int(restart.same_tokens != restart.answer_tokens)


def _in_new_process(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


# ---- in processes of their own ----------------------------------------------------------------
def _read(
    setup: Setup, lengths: Sequence[int], decode_tokens: int
) -> tuple[list[LongRow], tuple[int, ...]]:
    """Read up to each length and answer from there; the rows, and the last answer."""
    torch.set_num_threads(1)
    library = rss_bytes()[0]
    prompt = random_prompt(setup.config, lengths[-1])
    rows: list[LongRow] = []
    with setup.open() as engine, _progress(engine, lengths[-1]):
        for length in lengths:
            answer = _ask(engine, prompt[:length], decode_tokens)
            first = answer.stamps[0]
            now, peak = rss_bytes()
            rows.append(
                LongRow(
                    context_tokens=length,
                    read_tokens=length - answer.cached_tokens,
                    prefill_tokens_per_cpu_s=(length - answer.cached_tokens)
                    / (first.cpu_s - answer.start.cpu_s),
                    prefill_wall_s=first.wall_s - answer.start.wall_s,
                    cache_bytes=answer.cache_bytes,
                    formula_bytes=round(setup.bytes_per_token * (length + decode_tokens)),
                    rss_bytes=now,
                    peak_rss_bytes=peak,
                    library_bytes=library,
                )
            )
    return rows, answer.token_ids


def _answer_again(
    setup: Setup, lengths: Sequence[int], told: tuple[int, ...]
) -> tuple[RestartRow, list[float]]:
    """Answer the whole prompt of ``_read`` again; then decode tokens per CPU-second per length."""
    torch.set_num_threads(1)
    prompt = random_prompt(setup.config, lengths[-1])
    start = time.perf_counter()
    with setup.open() as engine:
        answer = _ask(engine, prompt, len(told))
        peak = rss_bytes()[1]
        rates = [_decode_rate(_ask(engine, prompt[:length], len(told))) for length in lengths]
    same = [a == b for a, b in zip(answer.token_ids, told, strict=True)]
    row = RestartRow(
        context_tokens=lengths[-1],
        cached_tokens=answer.cached_tokens,
        load_wall_s=answer.start.wall_s - start,
        answer_wall_s=answer.stamps[0].wall_s - answer.start.wall_s,
        same_tokens=same.index(False) if False in same else len(same),
        answer_tokens=len(told),
        peak_rss_bytes=peak,
    )
    return row, rates


class _Stamp(NamedTuple):
    wall_s: float
    cpu_s: float


class _Answer(NamedTuple):
    start: _Stamp
    stamps: list[_Stamp]
    """Of every token."""
    token_ids: tuple[int, ...]
    cached_tokens: int
    cache_bytes: int
    """Before the last token, after which the memory is freed."""


def _ask(engine: Engine, prompt: Sequence[int], num_tokens: int) -> _Answer:
    stamps: list[_Stamp] = []
    cache: list[int] = []

    def on_output(output: TokenOutput) -> None:
        stamps.append(_stamp())
        cache.append(engine.stats().compressed_bytes)

    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    request = Request(prompt_ids=prompt, sampling=sampling, request_id="long", on_output=on_output)
    start = _stamp()
    result = engine.submit(request).result()
    if result.usage is None or len(stamps) < 2:
        raise EngineError(result.error or "no answer")
    return _Answer(start, stamps, result.token_ids, result.usage.cached_tokens, cache[-2])


def _decode_rate(answer: _Answer) -> float:
    """Tokens after the first per CPU-second."""
    seconds = answer.stamps[-1].cpu_s - answer.stamps[0].cpu_s
    return (len(answer.stamps) - 1) / seconds


def _stamp() -> _Stamp:
    return _Stamp(time.perf_counter(), time.process_time())


@contextmanager
def _progress(engine: Engine, total: int) -> Iterator[None]:
    """A bar over the tokens that were read, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = threading.Event()

    def watch(bar: Progress) -> None:
        task = bar.add_task("", total=total)
        while not done.wait(_POLL_S):
            bar.update(task, completed=engine.stats().prompt_tokens)

    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        watcher = threading.Thread(target=watch, args=(bar,))
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


# ---- predicted --------------------------------------------------------------------------------
Constants = dict[str, tuple[float, ...]]
"""CPU nanoseconds per FP8 operation of each of ``KINDS``, for prefill and decode."""


def fit(config: ModelConfig, rows: Sequence[LongRow]) -> tuple[list[LongRow], Constants]:
    """The rows with predictions, and the constants.

    Time per token = sum over kinds of (cost by ``token_flops``, in FP8 operations) x (a constant of
    the kind). The constants are those >= 0 with the least squared relative error over all rows: the
    shape of the curve is predicted, its scale is not.
    """
    prefill = [Span(row.context_tokens - row.read_tokens + 1, row.context_tokens) for row in rows]
    decode = [Span.decode(row.context_tokens) for row in rows]
    prefill_s, prefill_fit = _fit(config, prefill, [1 / r.prefill_tokens_per_cpu_s for r in rows])
    decode_s, decode_fit = _fit(config, decode, [1 / r.decode_tokens_per_cpu_s for r in rows])
    fitted = [
        replace(row, predicted_prefill=float(1 / p), predicted_decode=float(1 / d))
        for row, p, d in zip(rows, prefill_s, decode_s, strict=True)
    ]
    return fitted, {"prefill": prefill_fit, "decode": decode_fit}


def _fit(
    config: ModelConfig, spans: Sequence[Span], seconds: Sequence[float]
) -> tuple[NDArray[np.float64], tuple[float, ...]]:
    """Predicted seconds per token, and nanoseconds per operation of each kind."""
    flops = np.array([_by_kind(config, span) for span in spans])
    constants = np.zeros(len(KINDS))
    active = list(range(len(KINDS)))
    while active:  # drop what would come out negative
        weighted = flops[:, active] / np.array(seconds)[:, None]
        found = np.linalg.lstsq(weighted, np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            constants[active] = found
            break
        active.pop(int(found.argmin()))
    return flops @ constants, tuple(float(c) for c in 1e9 * constants)


def _by_kind(config: ModelConfig, span: Span) -> list[float]:
    parts = token_flops(config, span).parts
    growing = sum(part.cost for part in parts if part.precision != "FP8")
    return [sum(part.cost for part in parts) - growing, growing]


# ---- printed ----------------------------------------------------------------------------------
def _print(rows: Sequence[LongRow], constants: Constants) -> None:
    head = [
        *("context", "prefill/cpu-s", "predicted", "decode/cpu-s", "predicted"),
        *("cache MB", "formula", "RSS MB", "peak", "wall s"),
    ]
    lines = [
        (
            f"{row.context_tokens:,}",
            f"{row.prefill_tokens_per_cpu_s:.0f}",
            f"{row.predicted_prefill:.0f}",
            f"{row.decode_tokens_per_cpu_s:.0f}",
            f"{row.predicted_decode:.0f}",
            f"{row.cache_bytes / 1e6:.1f}",
            f"{row.formula_bytes / 1e6:.1f}",
            f"{row.rss_bytes / 1e6:.0f}",
            f"{row.peak_rss_bytes / 1e6:.0f}",
            f"{row.prefill_wall_s:.1f}",
        )
        for row in rows
    ]
    print(table(head, lines))
    for phase, found in constants.items():
        named = ", ".join(f"{kind} {ns:.4f}" for kind, ns in zip(KINDS, found, strict=True))
        print(f"{phase}, fitted CPU ns per FP8 operation: {named}")
