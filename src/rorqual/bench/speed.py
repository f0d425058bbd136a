"""Prefill and decode tokens per CPU-second, cache bytes and memory, beside peers in one run.

One thread, one sequence, greedy, the ``tiny`` config with random float32 weights. Time is the CPU
time of each engine's own process, so that a busy machine changes the numbers little; compare
numbers of one run only.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rorqual.bench.gguf_file import write_gguf
from rorqual.bench.peers import (
    FlyweightPeer,
    LlamaCppPeer,
    Measurement,
    Peer,
    RorqualPeer,
    TransformersPeer,
)
from rorqual.bench.setup import Setup, random_prompt, tiny_network
from rorqual.bench.worker import Worker
from rorqual.errors import ConfigError
from rorqual.model.cost import cache_cost

OURS = "rorqual"
LLAMA = "llama-cpp-python"
FLYWEIGHT = "flyweight-llm"
_FROM_GGUF: dict[str, Callable[[Path], Peer]] = {
    LLAMA: LlamaCppPeer,
    FLYWEIGHT: FlyweightPeer,
}
COMPACT = "rorqual, compact"
"""Our engine with the released models' own cache records."""


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One engine at one prompt length; medians over the repetitions."""

    engine: str
    prompt_tokens: int
    prefill_tokens_per_cpu_s: float
    decode_tokens_per_cpu_s: float
    cache_bytes_per_token: float
    """0: not known."""
    formula_bytes_per_token: float
    """For the precision the engine keeps; 0: no formula."""
    rss_bytes: int
    library_bytes: int
    same_tokens: int
    """Greedy tokens equal to ours, counted from the start of the answer."""
    answer_tokens: int
    repetitions: int


@contextmanager
def workers(
    wanted: Sequence[str], report: Callable[[str], None]
) -> Iterator[dict[str, tuple[Peer, float]]]:
    """Ours and those peers of ``wanted`` that are installed, each with its cache formula.

    report: told why one is left out.
    """
    with ExitStack() as stack:
        peers: dict[str, tuple[Peer, float]] = {}
        full, compact = Setup(), Setup(entries="record", keys="fp4")
        for name, setup in ((OURS, full), (COMPACT, compact)):
            worker = stack.enter_context(Worker(functools.partial(RorqualPeer, setup)))
            peers[name] = worker, setup.bytes_per_token
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rorqual-bench-")))
        file = folder / "tiny.gguf"
        for name in wanted:
            try:
                if name in _FROM_GGUF and not file.exists():
                    write_gguf(tiny_network(), file)
                worker = stack.enter_context(Worker(_maker(name, file)))
            except (ImportError, ConfigError) as error:
                report(f"{name} is left out: {error}")
                continue
            peers[name] = worker, _formula(name)
        yield peers


def _maker(name: str, file: Path) -> Callable[[], Peer]:
    if name in _FROM_GGUF:
        return functools.partial(_FROM_GGUF[name], file)
    return TransformersPeer


def _formula(name: str) -> float:
    """transformers keeps float32 entries and keys; what the others keep is their business."""
    return cache_cost(Setup().config, float_bytes=4).per_token if name == "transformers" else 0.0


def measure(
    peers: Mapping[str, tuple[Peer, float]], length: int, *, decode_tokens: int, repetitions: int
) -> list[SpeedRow]:
    """Every engine on the same random prompts of ``length`` tokens, taking turns; ours first."""
    runs: dict[str, list[Measurement]] = {name: [] for name in peers}
    for repetition in range(repetitions):
        prompt = random_prompt(Setup().config, length, seed=1000 * repetition + length)
        for name, (peer, _) in peers.items():
            runs[name].append(peer.run(prompt, decode_tokens + 1))
    ours = next(iter(runs.values()))[0].token_ids
    return [_row(name, length, runs[name], ours, formula) for name, (_, formula) in peers.items()]


def _row(
    name: str, length: int, results: list[Measurement], ours: tuple[int, ...], formula: float
) -> SpeedRow:
    tokens = results[0].token_ids
    same = [a == b for a, b in zip(tokens, ours, strict=True)]
    return SpeedRow(
        engine=name,
        prompt_tokens=length,
        prefill_tokens_per_cpu_s=length / statistics.median(r.prefill_cpu_s for r in results),
        decode_tokens_per_cpu_s=(len(tokens) - 1)
        / statistics.median(r.decode_cpu_s for r in results),
        cache_bytes_per_token=results[0].cache_bytes / results[0].cache_tokens,
        formula_bytes_per_token=formula,
        rss_bytes=results[0].rss_bytes,
        library_bytes=results[0].library_bytes,
        same_tokens=same.index(False) if False in same else len(same),
        answer_tokens=len(tokens),
        repetitions=len(results),
    )


HEAD = (
    "engine",
    "prompt",
    "prefill tok/cpu-s",
    "decode tok/cpu-s",
    "cache B/token",
    "formula",
    "RSS MB",
    "of it libraries",
    "same greedy tokens",
)


def line(row: SpeedRow) -> tuple[str, ...]:
    """Cells under ``HEAD``."""
    return (
        row.engine,
        f"{row.prompt_tokens}",
        f"{row.prefill_tokens_per_cpu_s:.0f}",
        f"{row.decode_tokens_per_cpu_s:.1f}",
        f"{row.cache_bytes_per_token:.1f}" if row.cache_bytes_per_token else "-",
        f"{row.formula_bytes_per_token:.1f}" if row.formula_bytes_per_token else "-",
        f"{row.rss_bytes / 1e6:.0f}",
        f"{row.library_bytes / 1e6:.0f}",
        f"{row.same_tokens}/{row.answer_tokens}",
    )
