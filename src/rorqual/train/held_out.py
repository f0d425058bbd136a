"""Cheap held-out check during training: are all tokens of an answer the model's first choice?

Teacher-forced, so an answer counts as exact here just where greedy generation would give it token
for token (up to rounding). ``evaluate`` measures by real generation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.model.transformer import Transformer
from rorqual.protocol.tokenizer import Tokenizer
from rorqual.train.conversation import Encoded
from rorqual.train.data import Difficulty, SampleStream
from rorqual.train.packing import NO_TARGET, Pack, pack
from rorqual.train.progress_log import EvalRow

LENGTH_BUCKETS = ((60, 512), (512, 1024), (1024, 2048), (2048, 4096))
_EVAL_SEED = 7


class HeldOutSet:
    """A fixed small set of held-out conversations, packed once."""

    def __init__(self, tokenizer: Tokenizer, *, samples_per_slice: int = 12) -> None:
        self._packs: list[tuple[str, Pack]] = []
        for low, high in LENGTH_BUCKETS:
            difficulty = Difficulty(
                min_document_tokens=low,
                max_document_tokens=high,
                max_sample_tokens=high + 1024,
                tool_share=0.0,
                chat_share=0.0,
            )
            count = max(2, min(samples_per_slice, 12 * 512 // low))
            self._add(tokenizer, f"evidence<={high}", difficulty, count)
        tools = Difficulty(
            min_document_tokens=60,
            max_document_tokens=120,
            max_sample_tokens=1536,
            tool_share=1.0,
            chat_share=0.0,
        )
        self._add(tokenizer, "tool", tools, samples_per_slice)

    def _add(self, tokenizer: Tokenizer, name: str, difficulty: Difficulty, count: int) -> None:
        stream = SampleStream(tokenizer, seed=_EVAL_SEED, split="held-out")
        rest: list[Encoded] = [stream.draw(difficulty) for _ in range(count)]
        while rest:
            packed, rest = pack(
                rest,
                num_rows=1,
                row_tokens=difficulty.max_sample_tokens,
                pad_id=tokenizer.pad_id,
            )
            self._packs.append((name, packed))

    @torch.inference_mode()
    def evaluate(self, model: Transformer, device: str, *, bf16: bool) -> list[EvalRow]:
        """Accuracy by slice: documents by length, tools by answer kind."""
        hits: dict[str, list[tuple[bool, int, int]]] = defaultdict(list)
        for name, packed in self._packs:
            batch = packed.batch.to(device)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                out = model.forward_packed(batch, mtp=False, indexer_loss=False)
                where = batch.targets_BT != NO_TARGET
                logits = model.project(out.hidden_BTD[where])
            right = torch.zeros_like(where)
            right[where] = logits.argmax(-1) == batch.targets_BT[where]
            for placed in packed.placed:
                row = right[placed.row, placed.offset : placed.offset + len(placed.sample)]
                for kind, correct, total in answer_hits(placed.sample, row):
                    key = f"tool {kind}" if name == "tool" else name
                    hits[key].append((correct == total, correct, total))
        return [
            EvalRow(
                slice=name,
                num_answers=len(rows),
                exact=sum(r[0] for r in rows) / len(rows),
                token_accuracy=sum(r[1] for r in rows) / sum(r[2] for r in rows),
            )
            for name, rows in hits.items()
        ]


def answer_hits(sample: Encoded, right: Tensor) -> Sequence[tuple[str, int, int]]:
    """(kind, tokens right, tokens) of each answer; ``right[t]`` is about predicting token t+1."""
    answer = torch.from_numpy(sample.answer[1:].astype("int64"))
    right = right[: len(sample) - 1].cpu()
    hits = []
    for turn, kind in enumerate(sample.kinds):
        mine = right[answer == turn]
        hits.append((kind, int(mine.sum()), len(mine)))
    return hits
