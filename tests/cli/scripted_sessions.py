"""A tiny model's config and card, and sessions whose model recites what a test wants it to say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rorqual.cli.session import Session
from rorqual.engine.engine import Engine
from rorqual.engine.torch_backend import TorchBackend
from rorqual.model.config import TINY
from rorqual.protocol.modes import ModelCard, SamplingDefaults
from rorqual.protocol.render import Renderer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.testing.fake_model import ScriptedModel

CONFIG = TINY.replace(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_lora_rank=8,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_hash_layers=1,
    compress_ratios=(0, 4, 0),
    index_head_dim=16,
)
CARD = ModelCard(
    name="tiny",
    generation="preview",
    context_length=2048,
    default_mode="non-think",
    default_max_tokens=600,
    sampling=SamplingDefaults(temperature=0.0),
)

ScriptedSession = Callable[[Sequence[str]], AbstractContextManager[Session]]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of model output, its template tokens spelled out."""
    ids: list[int] = []
    for part in re.split("(</think>|｜DSML｜)", text):
        special = part in ("</think>", "｜DSML｜")
        ids += [tokenizer.special_id(part)] if special else tokenizer.encode_plain(part)
    return ids


@contextmanager
def scripted_session(
    tokenizer: Tokenizer, card: ModelCard, answers: Sequence[str]
) -> Iterator[Session]:
    """A session whose model gives ``answers``, one per assistant turn.

    An answer that ends with ``…`` never stops: its last token repeats.
    """
    ids = [encode(tokenizer, answer.removesuffix("…")) for answer in answers]
    endless = [answer.endswith("…") for answer in answers]

    def script(tokens: Sequence[int]) -> int:
        headers = [at for at, t in enumerate(tokens) if t == tokenizer.assistant_id]
        turn, written = len(headers) - 1, len(tokens) - headers[-1] - 2
        if written < len(ids[turn]):
            return ids[turn][written]
        return ids[turn][-1] if endless[turn] else tokenizer.eos_id

    config = TINY.replace(vocab_size=tokenizer.vocab_size)
    engine = Engine(TorchBackend(ScriptedModel(script, config)))
    try:
        yield Session(
            card=card,
            tokenizer=tokenizer,
            renderer=Renderer(card, tokenizer),
            engine=engine,
        )
    finally:
        engine.close(drain=False)
