"""What the targets should come to, from bytes, operations and the machine's roof. Measures nothing.

A token's time is the sum over three parts, each as long as its operations at the roof's speed or
its bytes at the roof's, whichever is more:

* products with weights: the stored weights a token touches, read once per step;
* attention: the entries in the windows, selected, and of the 128-token layers;
* scores: every indexer key.

Norms, rotation, pooling, Sinkhorn, top-k, sampling and everything around the network count nothing,
so a prediction is a bound: what is measured stays below it by what they take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rorqual.bench.roof import Roof
from rorqual.bench.setup import PREFILL_CHUNK_TOKENS, Setup
from rorqual.kernels.layout import BLOCK_TOKENS, entry_nbytes, key_nbytes
from rorqual.model.config import is_overlapping
from rorqual.model.cost import WeightReads, cache_cost, model_cost
from rorqual.model.flops import Span, token_flops
from rorqual.model.native import NativeWeightFormat

_COUNTED_BYTES = 2
"""``model_cost`` counts the numbers of plain configs as BF16."""
_WEIGHT_BYTES: dict[NativeWeightFormat, int] = {"fp32": 4, "bf16": 2, "int8": 1, "as stored": 4}
"""Of one weight; the networks that are measured are stored in float32."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One number said before it is measured."""

    name: str
    """That of the target or row it is about."""
    value: float
    unit: str
    formula: str
    """With the numbers put in."""


PREDICTED = ("predicted", "", "unit", "from")
"""Over the cells of ``prediction_line``."""


def prediction_line(row: Prediction) -> tuple[str, ...]:
    """Cells: name, value, unit, formula."""
    return row.name, f"{row.value:.1f}", row.unit, row.formula


class Part(NamedTuple):
    """Of one token."""

    flops: float
    nbytes: float


# ---- time per token ---------------------------------------------------------------------------
def parts(setup: Setup, span: Span, num_together: int) -> dict[str, Part]:
    """Operations and bytes of one token of ``span``, mean.

    num_together: tokens of one step, which share the weights that are read.
    """
    config = setup.config
    by_precision = {"FP8": 0.0, "BF16": 0.0, "FP4": 0.0}
    for part in token_flops(config, span).parts:
        by_precision[part.precision] += part.flops
    ratios = config.compress_ratios[: config.num_hidden_layers]
    entries = len(ratios) * span.visible(1, config.sliding_window) + sum(
        span.visible(ratio, config.index_topk if is_overlapping(ratio) else None)
        for ratio in ratios
        if ratio
    )
    keys = sum(span.visible(ratio) for ratio in ratios if is_overlapping(ratio))
    entry = entry_nbytes(config.head_dim, config.qk_rope_head_dim, setup.entries)
    key = key_nbytes(config.index_head_dim, setup.keys)
    return {
        "weights": Part(by_precision["FP8"], weight_bytes(setup, num_together)),
        "attention": Part(by_precision["BF16"], entries * entry),
        "scores": Part(by_precision["FP4"], keys * key),
    }


def weight_bytes(setup: Setup, num_together: int) -> float:
    """Bytes of weights read per token where ``num_together`` tokens share a step."""
    reads: WeightReads = model_cost(setup.config).reads
    return reads.per_token(num_together) / _COUNTED_BYTES * _WEIGHT_BYTES[setup.weights]


def all_weight_bytes(setup: Setup) -> float:
    """Bytes of the whole network as the engine keeps it, without the MTP block."""
    reads = model_cost(setup.config).reads
    stored = reads.dense_bytes + reads.routed_bytes
    return stored / _COUNTED_BYTES * _WEIGHT_BYTES[setup.weights]


def token_seconds(found: dict[str, Part], roof: Roof) -> float:
    """CPU seconds of one token."""
    return sum(roof.seconds(part.flops, part.nbytes) for part in found.values())


def decode_prediction(setup: Setup, roof: Roof, context: int, name: str = "") -> Prediction:
    """Tokens per CPU-second after ``context`` tokens, one sequence."""
    found = parts(setup, Span.decode(context), 1)
    return _rate(name or f"decode at {count(context)}", found, roof)


def prefill_prediction(setup: Setup, roof: Roof, context: int) -> Prediction:
    """Tokens per CPU-second of a prompt of ``context`` tokens, read in steps."""
    step = min(context, PREFILL_CHUNK_TOKENS, setup.policy.dense_tokens or context)
    found = parts(setup, Span.prefill(context), step)
    for name in ("attention", "scores"):  # a step reads them once for all its tokens
        found[name] = found[name]._replace(nbytes=found[name].nbytes / step)
    return _rate(f"prefill at {count(context)}", found, roof)


def _rate(name: str, found: dict[str, Part], roof: Roof) -> Prediction:
    seconds = token_seconds(found, roof)
    terms = " + ".join(f"{_term(part, roof)} ({name})" for name, part in found.items())
    return Prediction(
        name=name,
        value=1 / seconds,
        unit="tokens/cpu-s",
        formula=f"1 / {1e6 * seconds:.0f} us; {terms}",
    )


def _term(part: Part, roof: Roof) -> str:
    """The longer of a part's two times, in microseconds."""
    took = 1e6 * roof.seconds(part.flops, part.nbytes)
    if part.nbytes / roof.bytes_per_s > part.flops / roof.flops:
        return f"{part.nbytes / 1e6:.2f} MB / {roof.bytes_per_s / 1e9:.0f} GB/s = {took:.0f}"
    return f"{part.flops / 1e6:.2f} MFLOP / {roof.flops / 1e9:.0f} GFLOP/s = {took:.0f}"


# ---- the engine's benchmark -------------------------------------------------------------------
def engine_predictions(
    setup: Setup, roof: Roof, *, lengths: Sequence[int], context: int, threads: int, cores: int
) -> list[Prediction]:
    """Of everything ``rorqual bench engine`` is about to measure."""
    found = [make(setup, roof, length) for length in lengths for make in _RATES]
    found += [
        _whole_blocks(max(lengths)),
        *reuse_predictions(setup, context),
        _streams(setup, roof, 8, min(context, 4096)),
        *_busy(threads, cores),
    ]
    return found


_RATES = (prefill_prediction, decode_prediction)


def _whole_blocks(length: int) -> Prediction:
    tokens = length + 63
    blocks = -(-tokens // BLOCK_TOKENS)
    return Prediction(
        name=CACHE_OFF,
        value=100 * (blocks * BLOCK_TOKENS / tokens - 1),
        unit="%",
        formula=f"{blocks} whole blocks of {BLOCK_TOKENS} for {tokens} tokens",
    )


def reuse_predictions(setup: Setup, length: int) -> Iterator[Prediction]:
    """What a repeat, a next turn of 64 + 64 tokens and a branch at one half find."""
    turn, half = length + 128, length // 2
    dense = setup.policy.dense_tokens or setup.policy.period_tokens
    for name, total, cached, step in (
        ("identical prompt", length, (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS),
        ("next turn", turn, (length + 63) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS),
        ("branch at 50 %", length, half // dense * dense, dense),
    ):
        yield Prediction(
            name=name,
            value=100 * cached / total,
            unit="% of tokens cached",
            formula=f"{cached} / {total}: down to a multiple of {step}",
        )


def _streams(setup: Setup, roof: Roof, num_streams: int, context: int) -> Prediction:
    span = Span.decode(context)
    one, many = (token_seconds(parts(setup, span, n), roof) for n in (1, num_streams))
    read = [weight_bytes(setup, n) / 1e6 for n in (1, num_streams)]
    return Prediction(
        name=f"{num_streams} streams over one",
        value=one / many,
        unit="x",
        formula=f"{1e6 * one:.0f} us / {1e6 * many:.0f} us per token: weights read per token "
        f"{read[0]:.1f} MB alone, {read[1]:.1f} MB together",
    )


def _busy(threads: int, cores: int) -> Iterator[Prediction]:
    """The other process gets half of one core; work goes to whichever thread is free."""
    left = min(threads, cores - 0.5)
    for phase in ("prefill", "decode"):
        yield Prediction(
            name=f"{phase} with a busy core",
            value=threads / left,
            unit="x slower",
            formula=f"{threads} threads / {left:g} of {cores} cores left",
        )


# ---- the long benchmark -----------------------------------------------------------------------
def long_predictions(setup: Setup, roof: Roof, lengths: Sequence[int]) -> list[Prediction]:
    """Of ``rorqual bench long``: decode at each length, slowdown, memory, time to read the disk."""
    rates = [decode_prediction(setup, roof, length) for length in lengths]
    first, last = lengths[0], lengths[-1]
    entries = setup.bytes_per_token * last
    return [
        *rates,
        Prediction(
            name=SLOWDOWN,
            value=rates[0].value / rates[-1].value,
            unit="x slower",
            formula=f"{rates[0].value:.0f} / {rates[-1].value:.0f}: {count(first)} over "
            f"{count(last)} tokens",
        ),
        Prediction(
            name=MEMORY,
            value=1.0,
            unit="x",
            formula=f"{all_weight_bytes(setup) / 1e6:.0f} MB weights + {entries / 1e6:.0f} MB "
            "entries and keys + windows",
        ),
        Prediction(
            name=RESTART,
            value=3 * entries / roof.bytes_per_s,
            unit="s",
            formula=f"{entries / 1e6:.0f} MB read, checked and copied at "
            f"{roof.bytes_per_s / 1e9:.0f} GB/s",
        ),
    ]


CACHE_OFF = "cache off the formula"
SLOWDOWN = "decode, longest over shortest"
MEMORY = "peak memory over weights + formula"
RESTART = "first token after a restart"


def need_bytes(setup: Setup, formula_bytes: float) -> float:
    """Weights, cache by formula, windows and unfinished groups of one sequence."""
    state = cache_cost(setup.config, float_bytes=4)
    return all_weight_bytes(setup) + formula_bytes + state.window_bytes + state.tail_bytes


def count(tokens: int) -> str:
    """A length as it is said: 4k, 64k, 1M."""
    for unit, name in ((1_000_000, "M"), (1_000, "k"), (1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)
