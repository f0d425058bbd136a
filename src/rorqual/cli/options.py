"""Options that several subcommands share, and what they mean."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rorqual.cli.models import DEFAULT_MODEL
from rorqual.errors import ConfigError

MODES = ("non-think", "think", "think-max")
GENERATIONS = ("preview", "ga", "v4.1")
"""Both as in ``protocol.modes``, which is slow to import; a test keeps them equal."""
DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("auto", "native", "torch")
WEIGHTS = ("as-stored", "fp32", "bf16", "int8")
PRECISIONS = ("full", "compact")

_MODEL_HELP = "checkpoint directory or built-in model name (default: %(default)s)"


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """The model as the command's first word."""
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=_MODEL_HELP)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """``--model``, where the first word is something else."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help=_MODEL_HELP)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """How the model is run: device, engine, context, cache."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where the model runs (default: cuda if there is one, else cpu)",
    )
    parser.add_argument(
        "--threads", type=positive_int, help="CPU threads for the model (default: all cores)"
    )
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="TOKENS",
        help="limit prompt plus answer to this many tokens (default: what the model supports)",
    )
    parser.add_argument(
        "--generation",
        choices=GENERATIONS,
        help="which release's prompts the checkpoint knows: preview (April), ga (July and August) "
        "or v4.1 (default: its card.json, which released checkpoints lack)",
    )
    group = parser.add_argument_group("engine (the rest is for the native one)")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="native: the CPU kernels with the shared cache; torch: plain PyTorch (default: "
        "native on a CPU where it was built)",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="as-stored",
        help="convert the weights while loading; int8 and bf16 are smaller and faster and change "
        "answers a little (default: %(default)s)",
    )
    group.add_argument(
        "--cache-precision",
        choices=PRECISIONS,
        default="full",
        help="compact is the released models' own: FP8 entries, FP4 keys (default: %(default)s)",
    )
    group.add_argument(
        "--cache-memory",
        type=positive_int,
        metavar="MIB",
        help="memory for running and remembered prompts (default: an eighth of the machine's)",
    )
    group.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="remember prompts here too, so that a restart does not read them again",
    )


def loading_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What the model and loading options say, as keyword arguments of ``open_session``."""
    from rorqual.cli.backends import BackendOptions  # slow to import

    options = BackendOptions(
        engine=args.engine,
        threads=args.threads,
        weights=args.weights.replace("-", " "),
        precision=args.cache_precision,
        cache_memory_mib=args.cache_memory,
        cache_dir=args.cache_dir,
    )
    names = ("model", "device", "context", "generation")
    return {**{name: getattr(args, name) for name in names}, "backend": options}


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """``--system --tools --mode`` and the sampling options, named as on the wire."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="JSON list of tools the model may call, in OpenAI's format",
    )
    parser.add_argument("--mode", choices=MODES, help="reasoning mode (default: the model card's)")
    group = parser.add_argument_group("sampling (default: the model card's)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, at most 2")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus probability")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens below P times the most likely"
    )
    group.add_argument("--presence-penalty", type=float, metavar="X", help="-2 to 2")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="-2 to 2")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="1 changes nothing")
    group.add_argument("--seed", type=int, help="same seed, same answer")
    group.add_argument("--max-tokens", type=positive_int, metavar="N", help="longest answer")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before TEXT; repeatable"
    )


_WIRE_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "stop",
)


def wire_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The Chat Completions fields that the user's sampling options set."""
    given = {name: getattr(args, name) for name in _WIRE_FIELDS}
    return {name: value for name, value in given.items() if value is not None}


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Tools from a JSON file: a list of OpenAI tool objects, or of bare function objects.

    Raises:
        ConfigError: the file is not such a list.
    """
    try:
        raw = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        raise ConfigError(f"{path}: expected a JSON list of tools")
    return [item if "function" in item else {"type": "function", "function": item} for item in raw]


def read_text(path: Path) -> str:
    """A UTF-8 file the user named; ``-`` is standard input. Raises ConfigError naming it."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason}") from None


def with_document(document: str, text: str) -> str:
    """A user message about a document that is pasted into it."""
    return f"<document>\n{document.strip()}\n</document>\n\n{text}"


def positive_int(text: str) -> int:
    """argparse type: an integer >= 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not an integer: {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value
