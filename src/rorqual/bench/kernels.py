"""The native CPU kernels against what this machine's arithmetic and memory allow.

    python -m rorqual.bench.kernels [--isa avx2] [--contexts 1024,16384] [--csv FILE]

A kernel is predicted to take as long as its multiply-adds at the speed of numpy's large float32
product, or its bytes at the speed of reading a large array, whichever is more; a small matrix may
beat that by staying in a cache. Network rows run the ``tiny`` config with random weights on one
thread; their prediction counts the matrices and not attention, so the gap grows with the context.
Time is the CPU time of the process.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from rorqual.bench.options import add_kernel_options
from rorqual.bench.roof import Roof, cpu_time, measure_roof
from rorqual.errors import ConfigError
from rorqual.kernels import cpu
from rorqual.kernels.layout import BLOCK_TOKENS
from rorqual.model.config import TINY
from rorqual.model.native import NativeNetwork, NativeSegment
from rorqual.model.transformer import Transformer

_CHUNK_TOKENS = 512
_DECODE_TOKENS = 100


@dataclass(frozen=True)
class Row:
    """One kernel at one size."""

    kernel: str
    size: str
    gflop_per_cpu_s: float
    gbyte_per_cpu_s: float
    ms: float
    predicted_ms: float


def _row(roof: Roof, kernel: str, size: str, flops: float, nbytes: float, took: float) -> Row:
    predicted = roof.seconds(flops, nbytes)
    return Row(kernel, size, flops / took / 1e9, nbytes / took / 1e9, took * 1e3, predicted * 1e3)


# ---- single kernels -----------------------------------------------------------------------------
def _matrices(
    native: Any, outputs: int, inputs: int, rng: np.random.Generator
) -> Iterator[tuple[str, Any]]:
    w = rng.standard_normal((outputs, inputs), dtype=np.float32)
    yield "fp32", native.Matrix.from_fp32(w)
    yield "bf16", native.Matrix.to_bf16(w)
    yield "int8", native.Matrix.to_int8(w)
    codes = rng.integers(0, 120, (outputs, inputs)).astype(np.uint8)
    tiles = np.full((-(-outputs // 128), -(-inputs // 128)), 127, np.uint8)
    yield "fp8", native.Matrix.from_fp8(codes, tiles)
    scales = np.full((outputs, -(-inputs // 32)), 127, np.uint8)
    yield "fp4", native.Matrix.from_fp4(codes[:, : inputs // 2].copy(), scales)


def product_rows(native: Any, roof: Roof, seconds: float) -> Iterator[Row]:
    """Every weight format: one row out of memory and out of a cache, a few, and many."""
    rng = np.random.default_rng(0)
    for rows, outputs, inputs in (
        (1, 8192, 4096),
        (1, 256, 256),
        (16, 1024, 1024),
        (256, 1024, 1024),
    ):
        x = rng.standard_normal((rows, inputs), dtype=np.float32)
        y = np.empty((rows, outputs), np.float32)
        for kind, matrix in _matrices(native, outputs, inputs, rng):
            run = functools.partial(native.matmul, matrix, x, y, 1)
            took = cpu_time(run, seconds)
            yield _row(
                roof,
                f"product {kind}",
                f"{rows} x {inputs} by {outputs}",
                2 * rows * outputs * inputs,
                matrix.nbytes,
                took,
            )


def stream_rows(native: Any, roof: Roof, seconds: float) -> Iterator[Row]:
    """Reading the residual streams: projection, Sinkhorn, weighted sum and norm."""
    rng = np.random.default_rng(0)
    m, hidden, columns = TINY.hc_mult, TINY.hidden_size, TINY.hc_mult * (2 + TINY.hc_mult)
    matrix = native.Matrix.from_fp32(rng.standard_normal((columns, m * hidden), dtype=np.float32))
    scale, base, norm = (np.ones(n, np.float32) for n in (3, columns, hidden))
    for rows in (1, 256):
        streams = rng.standard_normal((rows, m, hidden), dtype=np.float32)
        read = np.empty((rows, hidden), np.float32)
        mixing = np.empty((rows, m + m * m), np.float32)

        run = functools.partial(
            native.enter_streams, matrix, scale, base, norm, streams,
            TINY.hc_sinkhorn_iters, TINY.hc_eps, TINY.rms_norm_eps, read, mixing, 1,
        )  # fmt: skip
        flops = rows * (2 * columns * m * hidden + 4 * m * hidden)
        yield _row(
            roof,
            "enter streams",
            f"{rows} x {m} x {hidden}",
            flops,
            streams.nbytes,
            cpu_time(run, seconds),
        )


# ---- the network --------------------------------------------------------------------------------
def _matrix_elements(model: Transformer) -> float:
    """Matrix elements one token meets: chosen experts only, without the embedding and the MTP."""
    share = TINY.num_experts_per_tok / TINY.n_routed_experts
    return sum(
        p.numel() * (share if ".experts." in name else 1)
        for name, p in model.named_parameters()
        if p.ndim == 2 and not name.startswith(("embed", "mtp"))
    )


def network_rows(roof: Roof, contexts: Sequence[int]) -> Iterator[Row]:
    """Prefill up to each context, and decode from there; times per token."""
    model = Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    elements = _matrix_elements(model)
    network = NativeNetwork(model)
    blocks = np.arange(-(-(max(contexts) + _DECODE_TOKENS) // BLOCK_TOKENS), dtype=np.int32)
    for _ in range(-(-len(blocks) // network.layout.slab_blocks)):
        network.new_slab()
    state = network.new_state()
    rng = np.random.default_rng(0)

    def feed(start: int, count: int) -> float:
        tokens = rng.integers(0, TINY.vocab_size, count).astype(np.int32)
        last = np.array([count - 1], np.int64)
        before = time.process_time()
        network.step(tokens, [NativeSegment(count, start, state, blocks)], last)
        return time.process_time() - before

    length, prefilled, spent = 0, 0, 0.0
    for context in sorted(contexts):
        while length < context:
            count = min(_CHUNK_TOKENS, context - length)
            spent += feed(length, count)
            length, prefilled = length + count, prefilled + count
        yield _row(roof, "tiny: prefill", f"{context}", 2 * elements, 0, spent / prefilled)
        took = sum(feed(length + i, 1) for i in range(_DECODE_TOKENS)) / _DECODE_TOKENS
        length += _DECODE_TOKENS
        yield _row(roof, "tiny: decode", f"{context}", 2 * elements, 4 * elements, took)


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; the last is how near to the prediction a kernel comes."""
    head = ("kernel", "size", "GFLOP/s", "GB/s", "ms", "predicted", "reached", "per second")
    lines = [
        (
            row.kernel,
            row.size,
            f"{row.gflop_per_cpu_s:.1f}",
            f"{row.gbyte_per_cpu_s:.1f}",
            f"{row.ms:.4f}",
            f"{row.predicted_ms:.4f}",
            f"{row.predicted_ms / row.ms:.0%}",
            f"{1e3 / row.ms:.0f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *lines)
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        ConfigError: this machine lacks the instructions asked for.
        NativeMissingError: the kernels were not built.
    """
    native = cpu.native()
    if args.isa and not native.set_isa(args.isa):
        raise ConfigError(f"this machine has no {args.isa}")
    roof = measure_roof(seconds=args.seconds)
    print(f"{native.isa()}; {roof.words}")
    rows = [
        *product_rows(native, roof, args.seconds),
        *stream_rows(native, roof, args.seconds),
        *network_rows(roof, args.contexts),
    ]
    print(table(rows))
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return 0


def main(argv: Sequence[str]) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m rorqual.bench.kernels", description=__doc__)
    add_kernel_options(parser)
    try:
        return run(parser.parse_args(argv))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
