"""The indexer's choice in blocks of queries: bounded memory, the same entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.kernels import reference
from rorqual.model.indexer import Indexer

from .conftest import SMALL


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_a_long_chunk_over_a_long_context_is_scored_in_blocks() -> None:
    heads, chunk, entries = 64, 300, 4096
    config = SMALL.replace(index_n_heads=heads, index_topk=8)
    indexer = Indexer(config, 4)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(chunk, heads, config.index_head_dim, generator=generator)
    weight = torch.randn(chunk, heads, generator=generator)
    keys = torch.randn(entries, config.index_head_dim, generator=generator)
    visible = torch.arange(chunk) * entries // chunk
    with LargestTensor() as largest:
        chosen = indexer.select(q, weight, keys, visible)
    assert largest.numel <= 1 << 24 < heads * chunk * entries
    rows = (0, 1, 150, 299)
    for t in rows:
        scores = reference.indexer_scores(q[t : t + 1], weight[t : t + 1], keys)
        wanted = reference.select_entries(scores, visible[t : t + 1], 8)
        assert set(chosen[t].tolist()) == set(wanted[0].tolist())
