"""Tables of Markdown pages, and a plot, from the CSV files of the benchmarks.

    python -m rorqual.bench.page [--from docs/measurements] [--check] [PAGE ...]

A page has its table between ``<!-- measured: NAME -->`` and ``<!-- end -->``; what lies between
them is replaced, the rest of the page is left alone. Measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rorqual.bench.options import PEERS
from rorqual.bench.predict import CACHE_OFF, count
from rorqual.bench.report import markdown_table, read_conditions, read_csv
from rorqual.bench.speed import COMPACT, LLAMA, OURS
from rorqual.bench.speed_plot import plot
from rorqual.errors import ConfigError

_BLOCK = re.compile(r"(<!-- measured: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FILES = re.compile(r" --(csv|plot) \S+")
"""Of a command: where its results went."""
_LONG = "nano-flash"
_NAMES = {OURS: "Rorqual", LLAMA: "llama.cpp"}
_PAGES = (Path("docs/performance.md"), Path("README.md"))
_PLOT = "decode-engines.svg"
Row = Mapping[str, str]


# ---- blocks -------------------------------------------------------------------------------------
def conditions(folder: Path) -> str:
    """Where and with what the numbers were measured."""
    lines = []
    for name in ("engine_speed.csv", f"long_{_LONG}.csv"):
        said = read_conditions(folder / name)
        peers = [f"{peer} {said[peer]}" for peer in PEERS if peer in said]
        with_peers = f"; beside {', '.join(peers)}" if peers else ""
        command = _FILES.sub("", said["command"])
        lines.append(
            f"- `{command}`: {said['date']}, commit {said['commit']}, {said['cpu']}, "
            f"Python {said['python']}, torch {said['torch']}{with_peers}; {said.get('roof', '')}"
        )
    return "\n".join(lines)


def target_table(folder: Path) -> str:
    """Every target: predicted, measured, met or missed."""
    rows = read_csv(folder / "engine_targets.csv")
    rows += read_csv(folder / f"long_targets_{_LONG}.csv")
    lines = []
    for row in rows:
        bound = "<=" if row["is_most"] == "True" else ">="
        measured, target = float(row["measured"]), float(row["target"])
        is_met = measured <= target if bound == "<=" else measured >= target
        unit = row["unit"].split()[0]
        lines.append(
            (
                row["name"],
                f"{bound} {target:g} {unit}",
                number(row["predicted"]),
                number(row["measured"]),
                "met" if is_met else "**missed**",
                row["beside"],
            )
        )
    return markdown_table(("target", "wanted", "predicted", "measured", "", "of"), lines)


def prediction_table(folder: Path) -> str:
    """Every prediction beside its measurement."""
    measured = _measured(folder)
    lines = []
    for name in ("engine_predictions.csv", f"long_predictions_{_LONG}.csv"):
        where = ", nano-flash" if name.startswith("long") else ""
        for row in read_csv(folder / name):
            got = measured.get(row["name"] + where)
            share = "" if got is None else f"{got / float(row['value']):.0%}"
            lines.append(
                (
                    row["name"] + where,
                    row["formula"],
                    f"{number(row['value'])} {row['unit'].split()[0]}",
                    "" if got is None else number(got),
                    share,
                )
            )
    head = ("what", "from", "predicted", "measured", "measured / predicted")
    return markdown_table(head, lines)


def _measured(folder: Path) -> dict[str, float]:
    """Measurements by the names of their predictions."""
    found: dict[str, float] = {}
    for row in read_csv(folder / "engine_speed.csv"):
        if row["engine"] == OURS:
            for phase in ("prefill", "decode"):
                at = f"{phase} at {count(int(row['prompt_tokens']))}"
                found[at] = float(row[f"{phase}_tokens_per_cpu_s"])
    for row in read_csv(folder / f"long_{_LONG}.csv"):
        at = f"decode at {count(int(row['context_tokens']))}, nano-flash"
        found[at] = float(row["decode_tokens_per_cpu_s"])
    for name, where in (("engine_targets", ""), (f"long_targets_{_LONG}", ", nano-flash")):
        for row in read_csv(folder / f"{name}.csv"):
            found[row["name"] + where] = float(row["measured"])
    found[CACHE_OFF] = found[f"{CACHE_OFF} ({OURS})"]
    return found


def speed_table(folder: Path) -> str:
    """Every engine at every length."""
    return _speed_table(folder, (OURS, COMPACT, *PEERS))


def readme_table(folder: Path) -> str:
    """Fewer of both."""
    return _speed_table(folder, (OURS, *PEERS))


def _speed_table(folder: Path, engines: Sequence[str]) -> str:
    rows = read_csv(folder / "engine_speed.csv")
    by_key = {(row["engine"], int(row["prompt_tokens"])): row for row in rows}
    present = [name for name in engines if any(name == engine for engine, _ in by_key)]
    head = ["prompt", *(f"{_NAMES.get(name, name)}" for name in present)]
    lines = []
    for phase in ("prefill", "decode"):
        for length in sorted({length for _, length in by_key}):
            cells = [by_key.get((name, length)) for name in present]
            rates = [
                "-" if row is None else number(row[f"{phase}_tokens_per_cpu_s"]) for row in cells
            ]
            lines.append((f"{phase} at {count(length)}", *rates))
    lines.append(("cache, bytes per token", *(_longest(by_key, n)[0] for n in present)))
    lines.append(("resident at the longest, MB", *(_longest(by_key, n)[1] for n in present)))
    return markdown_table(head, lines)


def _longest(by_key: Mapping[tuple[str, int], Row], engine: str) -> tuple[str, str]:
    """Cache bytes per token and megabytes at an engine's longest prompt."""
    row = by_key[engine, max(length for name, length in by_key if name == engine)]
    return number(row["cache_bytes_per_token"]), f"{int(row['rss_bytes']) / 1e6:.0f}"


def behaviour_table(folder: Path) -> str:
    """Reuse, streams, a busy core, instructions, weight formats, guesses."""
    rows = read_csv(folder / "engine_behaviour.csv")
    lines = [(r["name"], f"{number(r['value'])} {r['unit']}", r["detail"]) for r in rows]
    return markdown_table(("what", "measured", "of"), lines)


def long_table(folder: Path) -> str:
    """One context from its first tokens to a million."""
    lines = [
        (
            f"{int(row['context_tokens']):,}",
            number(row["prefill_tokens_per_cpu_s"]),
            number(row["decode_tokens_per_cpu_s"]),
            f"{int(row['cache_bytes']) / 1e6:.1f}",
            f"{int(row['formula_bytes']) / 1e6:.1f}",
            f"{int(row['peak_rss_bytes']) / 1e6:.0f}",
        )
        for row in read_csv(folder / f"long_{_LONG}.csv")
    ]
    head = ("context", "prefill", "decode", "cache, MB", "formula, MB", "peak resident, MB")
    return markdown_table(head, lines)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "conditions": conditions,
    "targets": target_table,
    "predictions": prediction_table,
    "speed": speed_table,
    "readme-speed": readme_table,
    "behaviour": behaviour_table,
    "long": long_table,
}


def number(value: str | float) -> str:
    """Three digits or so; empty stays empty."""
    if value == "":
        return ""
    amount = float(value)
    if abs(amount) >= 100:
        return f"{amount:,.0f}"
    return f"{amount:.1f}" if abs(amount) >= 10 else f"{amount:.2f}"


# ---- pages --------------------------------------------------------------------------------------
def fill(text: str, folder: Path) -> str:
    """The page with its blocks as the CSV files in ``folder`` have them.

    Raises:
        ConfigError: a block has no such name, or a file it needs is missing or has other columns.
    """

    def block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            raise ConfigError(f"no table {name!r}; known: {', '.join(BLOCKS)}")
        try:
            return f"{begin}{BLOCKS[name](folder)}\n{end}"
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None
        except KeyError as error:
            raise ConfigError(f"table {name!r}: the files in {folder} have no {error}") from None

    return _BLOCK.sub(block, text)


def stale(pages: Iterable[Path], folder: Path) -> dict[Path, str]:
    """The pages that differ from what they should be, with that."""
    found = {}
    for page in pages:
        text = page.read_text("utf-8")
        wanted = fill(text, folder)
        if wanted != text:
            found[page] = wanted
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; with ``--check`` 1 if a page is out of date."""
    parser = argparse.ArgumentParser(
        prog="python -m rorqual.bench.page", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--from", dest="folder", type=Path, default=Path("docs/measurements"))
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    parser.add_argument("pages", nargs="*", type=Path, default=list(_PAGES), metavar="PAGE")
    args = parser.parse_args(argv)
    try:
        found = stale(args.pages, args.folder)
        for page, text in found.items():
            print(f"{page} {'is out of date' if args.check else 'is written again'}")
            if not args.check:
                page.write_text(text, "utf-8")
        if not args.check:
            plot(args.folder.parent / _PLOT, read_csv(args.folder / "engine_speed.csv"))
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
