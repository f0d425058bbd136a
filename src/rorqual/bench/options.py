"""The benchmarks' command-line options, for ``rorqual bench`` and for ``python -m``; no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

PEERS = ("llama-cpp-python", "flyweight-llm", "transformers")
"""Other engines, by the names of their packages."""
PARTS = ("speed", "reuse", "disk", "streams", "busy", "isa", "weights", "guesses")
"""Of the engine's benchmark."""
ISAS = ("scalar", "avx2", "avx512")
"""Instructions the kernels are built for."""
_LENGTHS = (1024, 4096, 16384, 32768)
_UNITS = {"k": 1_000, "m": 1_000_000}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Of ``engine.run``."""
    parser.add_argument(
        "--parts",
        type=_names(PARTS),
        default=list(PARTS),
        metavar="A,B",
        help=f"of {','.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--lengths",
        type=token_counts,
        default=list(_LENGTHS),
        metavar="N,N",
        help=f"prompts of speed (default: {','.join(map(str, _LENGTHS))})",
    )
    parser.add_argument(
        "--peers",
        type=_names((*PEERS, "none")),
        default=list(PEERS),
        metavar="A,B",
        help=f"of speed, where installed: {','.join(PEERS)} (default: all), or none",
    )
    parser.add_argument(
        "--context",
        type=token_count,
        default=16_000,
        metavar="N",
        help="prompt tokens of the other parts (default: %(default)s)",
    )
    parser.add_argument(
        "--decode-tokens",
        type=token_count,
        default=64,
        metavar="N",
        help="tokens per decode timing, at least 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--repetitions",
        type=token_count,
        default=1,
        metavar="N",
        help="runs per speed; their median counts (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=token_count, metavar="N", help="of streams and busy (default: all cores)"
    )
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="also write the rows there")


def add_kernel_options(parser: argparse.ArgumentParser) -> None:
    """Of ``kernels.run``."""
    parser.add_argument("--isa", choices=ISAS, help="instead of the best")
    parser.add_argument("--contexts", type=token_counts, default=[1024, 4096, 16384], metavar="N,N")
    parser.add_argument("--seconds", type=float, default=0.6, help="CPU time per kernel")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows there")


def add_long_options(parser: argparse.ArgumentParser) -> None:
    """Of ``long.run``, without the model."""
    parser.add_argument(
        "--to",
        type=token_count,
        default=1_000_000,
        metavar="TOKENS",
        help="longest context, such as 64k or 1M (default: 1M)",
    )
    parser.add_argument(
        "--decode-tokens",
        type=token_count,
        default=64,
        metavar="N",
        help="tokens per decode timing, at least 3 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=token_count, metavar="N", help="default: all cores")
    parser.add_argument(
        "--cache-precision",
        choices=("full", "compact"),
        default="full",
        help="compact is the released models' own: FP8 entries, FP4 keys (default: %(default)s)",
    )
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="also write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them: .svg or .png")


def token_count(text: str) -> int:
    """argparse type: an integer >= 1 with an optional k or M (thousand, million)."""
    digits = text.strip().lower()
    unit = _UNITS.get(digits[-1:], 1)
    digits = digits if unit == 1 else digits[:-1]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 12 and int(digits)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1, such as 4096, 64k or 1M")
    return int(digits) * unit


def token_counts(text: str) -> list[int]:
    """argparse type: several, comma-separated."""
    return [token_count(item) for item in text.split(",")]


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
        return names

    return parse
