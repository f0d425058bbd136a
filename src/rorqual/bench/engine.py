"""Prefill and decode tokens per CPU-second and cache bytes per token, beside peers in one run.

    python -m rorqual.bench.engine [--lengths 1024,4096,16384] [--peers transformers] [--csv FILE]

One thread, one sequence, greedy, the ``tiny`` config with random fp32 weights. Time is the CPU
time of the whole process, so that a busy machine changes the numbers little; compare numbers of
one run only. The cache column counts what grows with the context (compressed entries and indexer
keys), beside the formula of ``model/cost.py``.
"""

from __future__ import annotations

import argparse
import csv
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from rorqual.bench.peers import PEERS, PREFILL_CHUNK_TOKENS, Measurement, Peer
from rorqual.engine.engine import Engine, EngineConfig
from rorqual.engine.request import Request, SamplingParams, TokenOutput
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.model.config import TINY
from rorqual.model.cost import cache_cost
from rorqual.model.transformer import Transformer

_SEED = 20_261_123


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine at one prompt length; medians over the repetitions."""

    engine: str
    prompt_tokens: int
    prefill_tokens_per_cpu_s: float
    decode_tokens_per_cpu_s: float
    cache_bytes_per_token: float
    predicted_bytes_per_token: float
    same_tokens: int
    """Greedy tokens equal to ours, counted from the start of the answer."""
    decode_tokens: int
    repetitions: int


class RorqualPeer:
    """This project's engine, measured from outside through its public interface."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def run(self, prompt: Sequence[int], num_tokens: int) -> Measurement:
        """As ``Peer.run``."""
        limits = SchedulerLimits(max_running=1, max_step_tokens=PREFILL_CHUNK_TOKENS)
        stamps: list[float] = []
        cache: list[int] = []
        with Engine(self._model, EngineConfig(limits=limits, num_threads=1)) as engine:

            def on_output(output: TokenOutput) -> None:
                stamps.append(time.process_time())
                cache.append(engine.stats().compressed_bytes)

            sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
            request = Request(
                prompt_ids=prompt, sampling=sampling, request_id="bench", on_output=on_output
            )
            start = time.process_time()
            result = engine.submit(request).result()
        # The last output comes after its state was freed; the one before saw all but one token.
        return Measurement(
            prefill_cpu_s=stamps[0] - start,
            decode_cpu_s=stamps[-1] - stamps[0],
            cache_bytes=cache[-2],
            cache_tokens=len(prompt) + num_tokens - 2,
            token_ids=result.token_ids,
        )


def build_model(seed: int = _SEED) -> Transformer:
    """The ``tiny`` network with random fp32 weights."""
    model = Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def measure(
    peers: dict[str, Peer], length: int, *, decode_tokens: int, repetitions: int
) -> list[Row]:
    """Every engine on one random prompt of ``length`` tokens, taking turns; ours comes first."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(TINY.vocab_size, (length,), generator=generator).tolist()
    runs: dict[str, list[Measurement]] = {name: [] for name in peers}
    for _ in range(repetitions):
        for name, peer in peers.items():
            runs[name].append(peer.run(prompt, decode_tokens + 1))
    ours = next(iter(runs.values()))[0].token_ids
    return [_row(name, length, results, ours) for name, results in runs.items()]


def _row(name: str, length: int, results: list[Measurement], ours: tuple[int, ...]) -> Row:
    tokens = results[0].token_ids
    same = [a == b for a, b in zip(tokens, ours, strict=True)]
    return Row(
        engine=name,
        prompt_tokens=length,
        prefill_tokens_per_cpu_s=length / statistics.median(r.prefill_cpu_s for r in results),
        decode_tokens_per_cpu_s=(len(tokens) - 1)
        / statistics.median(r.decode_cpu_s for r in results),
        cache_bytes_per_token=results[0].cache_bytes / results[0].cache_tokens,
        predicted_bytes_per_token=cache_cost(TINY, float_bytes=4).per_token,
        same_tokens=same.index(False) if False in same else len(same),
        decode_tokens=len(tokens) - 1,
        repetitions=len(results),
    )


def conditions(argv: Sequence[str]) -> dict[str, str]:
    """What a reader needs to repeat the run."""
    return {
        "command": shlex.join(["python", "-m", "rorqual.bench.engine", *argv]),
        "commit": _commit(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PEERS},
        "threads": "1",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 unless a measured cache misses its formula by over 10 %."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m rorqual.bench.engine", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--lengths", type=_lengths, default=[1024, 4096, 16384], metavar="N,N")
    parser.add_argument(
        "--peers", default="transformers", help=f"comma-separated from: {', '.join(PEERS)}; or none"
    )
    parser.add_argument("--decode-tokens", type=int, default=32, help="tokens per decode timing")
    parser.add_argument("--repetitions", type=int, default=1, help="runs per number (median)")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    wanted = [name for name in args.peers.split(",") if name and name != "none"]
    if unknown := sorted(set(wanted) - set(PEERS)):
        parser.error(f"--peers: unknown {unknown[0]!r}; known: {', '.join(PEERS)}")
    if args.decode_tokens < 2 or args.repetitions < 1:
        parser.error("--decode-tokens must be >= 2 and --repetitions >= 1")
    torch.set_num_threads(1)
    header = conditions(argv)
    for key, value in header.items():
        print(f"# {key}: {value}")
    rows = _measure_all(args.lengths, wanted, args.decode_tokens, args.repetitions)
    if args.csv is not None:
        _write_csv(args.csv, header, rows)
    off = [r for r in rows if r.engine == "rorqual" and not _within_tenth(r)]
    for row in off:
        print(
            f"cache at {row.prompt_tokens}: {row.cache_bytes_per_token:.1f} B/token is more than "
            f"10 % from the formula's {row.predicted_bytes_per_token:.1f}"
        )
    return 1 if off else 0


def _measure_all(
    lengths: list[int], wanted: list[str], decode_tokens: int, repetitions: int
) -> list[Row]:
    model = build_model()
    peers: dict[str, Peer] = {"rorqual": RorqualPeer(model)}
    for name in wanted:
        try:
            peers[name] = PEERS[name](model)
        except ImportError as error:
            print(f"# {name} is left out: {error}")
    print(
        f"{'engine':<14}{'prompt':>8}{'prefill tok/cpu-s':>19}{'decode tok/cpu-s':>18}"
        f"{'cache B/token':>15}{'formula':>9}{'same greedy tokens':>20}"
    )
    rows: list[Row] = []
    for length in lengths:
        for row in measure(peers, length, decode_tokens=decode_tokens, repetitions=repetitions):
            rows.append(row)
            same = f"{row.same_tokens}/{row.decode_tokens + 1}"
            print(
                f"{row.engine:<14}{row.prompt_tokens:>8}{row.prefill_tokens_per_cpu_s:>19.0f}"
                f"{row.decode_tokens_per_cpu_s:>18.1f}{row.cache_bytes_per_token:>15.1f}"
                f"{row.predicted_bytes_per_token:>9.1f}{same:>20}",
                flush=True,
            )
    return rows


def _write_csv(path: Path, header: dict[str, str], rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        for key, value in header.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _within_tenth(row: Row) -> bool:
    predicted = row.predicted_bytes_per_token
    return abs(row.cache_bytes_per_token - predicted) <= 0.1 * predicted


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of token counts: {text!r}") from None
    if not lengths or min(lengths) < 1:
        raise argparse.ArgumentTypeError("lengths must be >= 1")
    return lengths


def _commit() -> str:
    """Short hash of the checkout this file is in, with ``+changes`` where it differs."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return out.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.machine()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
