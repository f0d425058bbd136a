"""From a model's name and the command's options to a running session."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import msgspec
import torch

from rorqual.cli.backends import BackendOptions, make_backend
from rorqual.cli.models import resolve_model
from rorqual.cli.progress import byte_progress, status
from rorqual.cli.session import Session
from rorqual.engine.engine import Engine, EngineConfig
from rorqual.engine.scheduler import SchedulerLimits
from rorqual.errors import ConfigError
from rorqual.model.checkpoint import load_model, read_config
from rorqual.model.config import ModelConfig
from rorqual.protocol.modes import Generation, ModelCard
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@contextmanager
def open_session(
    model: str,
    *,
    context: int | None = None,
    device: str = "auto",
    backend: BackendOptions | None = None,
    generation: Generation | None = None,
    name: str | None = None,
    limits: SchedulerLimits | None = None,
    max_waiting: int = 256,
) -> Iterator[Session]:
    """Load ``model`` and run an engine on it for the length of the block.

    Args:
        context: limit in tokens, None for the most that card and network allow.
        device: see ``choose_device``. backend: what runs the network, see ``make_backend``.
        generation, name: instead of what the model's card says; see ``read_card``.
        limits, max_waiting: as in ``EngineConfig``.

    Raises:
        ConfigError, CheckpointError: the model cannot be loaded or run.
    """
    path = resolve_model(model)
    network_config = read_config(path / "config.json")
    card = read_card(path, network_config, generation=generation, name=name)
    most = min(card.context_length, network_config.max_position_embeddings)
    if context is not None and context > most:
        raise ConfigError(f"--context {context} exceeds the {most} tokens of {card.name}")
    tokenizer = Tokenizer.from_dir(path)
    if network_config.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"{path}: config.json has vocab_size {network_config.vocab_size}, tokenizer.json "
            f"{tokenizer.vocab_size}"
        )
    device = choose_device(device, has_cuda=torch.cuda.is_available())
    with byte_progress(f"Loading {card.name}") as progress:
        network = load_model(path, progress=progress).to(device)
    limits = limits or SchedulerLimits()
    with status("Preparing the engine"):
        runner = make_backend(network, device, limits.max_running, backend or BackendOptions())
    del network
    config = EngineConfig(limits=limits, max_waiting=max_waiting, max_context_tokens=context)
    engine = Engine(runner, config)
    try:
        yield Session(
            card=card,
            tokenizer=tokenizer,
            renderer=Renderer(card, tokenizer, max_context_tokens=engine.max_context_tokens),
            engine=engine,
            device=device,
        )
    finally:
        engine.close(drain=False)


def choose_device(wanted: str, *, has_cuda: bool) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where it is. Raises ConfigError where it is not."""
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    device = "cuda" if wanted == "cuda" or (wanted == "auto" and has_cuda) else "cpu"
    _log.info("the model runs on %s (asked for: %s)", device, wanted)
    return device


def read_card(
    path: Path, config: ModelConfig, *, generation: Generation | None, name: str | None
) -> ModelCard:
    """How to prompt the checkpoint at ``path``: its ``card.json``, changed as the options say.

    Released checkpoints have no such file; ``generation`` then is enough to do without.

    Raises:
        ConfigError: there is no card and no ``generation``; or the card is wrong.
    """
    if (path / "card.json").is_file():
        card = ModelCard.from_dir(path)
        given = {"generation": generation, "name": name}
        changes = {field: value for field, value in given.items() if value is not None}
        return msgspec.structs.replace(card, **changes)
    length = config.max_position_embeddings
    if generation is None:
        example = {"name": path.resolve().name, "generation": "ga", "context_length": length}
        raise ConfigError(
            f"{path}: no card.json, which says how to prompt this checkpoint; pass --generation "
            f"{' or '.join(get_args(Generation))}, or write one such as {json.dumps(example)}"
        )
    return ModelCard(name=name or path.resolve().name, generation=generation, context_length=length)
