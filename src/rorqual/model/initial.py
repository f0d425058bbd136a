"""Starting weights for training from scratch.

Matrices are normal with std 1/sqrt(inputs), 0.15 of it where they write to the streams. Three
departures make small networks learn to look things up in thousands of steps less:

- Streams start unequal in how they are read and written, or they would stay copies of one another.
- Channels of an overlapping compressed entry start by listening to one of its tokens each, in turn.
- CSA starts as a search for entries that hold the present token, each head looking at one place in
  them, and copies what it finds ("mimetic" initialisation, Trockman & Kolter 2023, arXiv
  2305.09828): queries and keys share a projection, outputs apply its transpose, and the head starts
  as a small copy of the embedding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rorqual.model.attention import Attention
from rorqual.model.gate import Gate, balanced_table

if TYPE_CHECKING:
    from rorqual.model.transformer import Transformer

_LIKENESS = 0.95
"""Share of a mimetic matrix that is the shared projection; the rest is noise."""
_FAVOUR = 4.0
"""Pooling score a channel gives its favourite slot over the others (softmax: e^4 to 1)."""
_SHARPNESS = 2.0
"""Size of a compressed entry, and so of its scores, relative to a normalised vector."""
_BLUR = 0.08
"""Size of a head's query on the channels of other slots than its own."""


def fill(model: Transformer, generator: torch.Generator) -> None:
    """Overwrite every parameter and routing table of ``model`` in place."""

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    m = model.config.hc_mult
    even = -math.log(m - 1.0) if m > 1 else 0.0  # sigmoid(even) = 1 / m
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if name == "embed.weight":
                normal(parameter, 1.0)  # or the first sub-layers drown which token it was
            elif leaf == "ape":
                normal(parameter, 1.0)
            elif leaf.startswith("hc_") and leaf.endswith("_fn"):
                normal(parameter, 0.5 / math.sqrt(parameter.shape[1]))
            elif leaf == "hc_head_base":
                normal(parameter, 0.5, even)
            elif leaf.endswith("_base"):
                normal(parameter, 0.5)
                parameter[:m] += even
                parameter[2 * m :] += 3.0 * torch.eye(m).flatten()
            elif leaf.startswith("hc_"):
                parameter.fill_(1.0)
            elif parameter.dim() == 2:
                writes = name.endswith(("wo_b.weight", "w2.weight"))
                normal(parameter, (0.15 if writes else 1.0) / math.sqrt(parameter.shape[1]))
        model.head.weight.copy_(model.embed.weight * model.config.initializer_range)
        for module in model.modules():
            if isinstance(module, Gate) and module.hashed:
                vocab, topk = module.tid2eid.shape
                experts = module.weight.shape[0]
                module.tid2eid.copy_(balanced_table(vocab, experts, topk, generator))
            elif isinstance(module, Attention) and module.indexer is not None:
                _search_and_copy(module, generator)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal along its shorter side, [rows, columns]."""
    tall = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))
    q: Tensor = tall.Q
    return q if rows >= columns else q.T


def _search_and_copy(attention: Attention, generator: torch.Generator) -> None:
    """Set up one CSA layer: heads search one slot each, outputs copy the entry found."""
    compressor = attention.compressor
    assert compressor is not None
    inputs, width, heads = attention.wkv.in_features, attention.head_dim, attention.num_heads
    channel = torch.arange(width)
    slots = 2 * compressor.ratio
    slot_of = channel % slots  # the channel's favourite among the previous and own group's tokens
    favours = torch.zeros(slots, width)
    favours[slot_of, channel] = _FAVOUR
    halves = favours.unflatten(0, (2, compressor.ratio))
    noise = torch.randn(compressor.ape.shape, generator=generator)
    compressor.ape.copy_(torch.cat((halves[0], halves[1]), dim=1) + 0.5 * noise)

    latent = _orthonormal(attention.wq_a.out_features, inputs, generator)
    key = _orthonormal(width, inputs, generator)
    _blend(attention.wq_a.weight, latent)
    _blend(compressor.wkv.weight, key.repeat(2, 1))
    compressor.norm.weight.fill_(_SHARPNESS)
    # Rotated channels compare positions as well; search with the others.
    still = channel < width - attention.rope_dim
    for head, rows in enumerate(attention.wq_b.weight.unflatten(0, (heads, width)).unbind()):
        mine = still & (slot_of == head % slots)
        _blend(rows, key @ latent.T)
        rows[~mine] *= _BLUR
    # Each output group carries its own share of the channels back through the projection.
    groups = attention.groups
    rank = attention.wo_a.out_features // groups
    share = _orthonormal(max(width, groups * rank), width, generator)[: groups * rank]
    share = share.unflatten(0, (groups, rank))
    _blend(attention.wo_a.weight, share.repeat(1, 1, heads // groups).flatten(0, 1))
    back = torch.cat([key.T @ share[g].T for g in range(groups)], dim=1)
    _blend(attention.wo_b.weight, back)


def _blend(parameter: Tensor, wanted: Tensor) -> None:
    """Mostly ``wanted``, scaled to the noise that is already there, plus some of that noise."""
    wanted = wanted * (parameter.square().mean() / wanted.square().mean()).sqrt()
    parameter.copy_(_LIKENESS * wanted + math.sqrt(1 - _LIKENESS**2) * parameter)
