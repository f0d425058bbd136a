"""One layer of each kind in official numerics against a second, slow implementation.

The second one is written from the formulas alone, token by token in float64 with BF16 rounding
where activations are stored, and shares no code with the package. Its ``Rules`` can be bent: each
bent rule must show, or the comparison would not notice the same mistake in the network.

Rounding to FP8 with power-of-two scales hardly depends on the block unless magnitudes differ, so
inputs, norm weights and scales here differ by 2^12 from one block to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from rorqual.model.attention import Attention, Ragged
from rorqual.model.config import ModelConfig, RopeScaling
from rorqual.model.moe import MoE
from rorqual.model.transformer import Transformer
from rorqual.testing.weights import random_state

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=160,
    qk_rope_head_dim=32,
    q_lora_rank=256,
    o_groups=2,
    o_lora_rank=128,
    moe_intermediate_size=256,
    n_routed_experts=6,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 16, 0),
    index_n_heads=4,
    index_head_dim=64,
    index_topk=6,
    sliding_window=8,
    swiglu_limit=1.0,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=256),
    numerics="official",
    linear_dtype="fp8",
    expert_dtype="fp4",
)
LENGTH = 90
SMALLER = 2.0**-12
TOLERANCE = 2.0**-8
"""Relative to the norm of the whole tensor: one BF16 rounding."""


@dataclass(frozen=True)
class Rules:
    """Where and how the official numerics round; a block of 0 stands for no rounding."""

    linear_block: int = 128
    kv_block: int = 64
    index_query_block: int = 32
    index_key_block: int = 32
    hadamard_queries: bool = True
    hadamard_keys: bool = True
    weight_before_w2: bool = True
    wo_a_input_block: int = 0


# ---- the second implementation ------------------------------------------------------------------


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def on_grid(y: Tensor, mantissa_bits: int, lowest_exponent: int) -> Tensor:
    """Nearest number of a small float format, ties to even."""
    exponent = (torch.frexp(y)[1] - 1).clamp_min(lowest_exponent)
    step = torch.ldexp(torch.ones_like(y), exponent - mantissa_bits)
    return torch.round(y / step) * step


def rounded(x: Tensor, block: int, largest: float, floor: float, grid: tuple[int, int]) -> Tensor:
    if block == 0:
        return x
    parts = []
    for part in x.split(block, dim=-1):
        amax = part.abs().amax(-1, keepdim=True).clamp_min(floor)
        scale = 2.0 ** torch.ceil(torch.log2(amax / largest))
        parts.append(on_grid((part / scale).clamp(-largest, largest), *grid) * scale)
    return torch.cat(parts, dim=-1)


def fp8(x: Tensor, block: int) -> Tensor:
    return rounded(x, block, 448.0, 1e-4, (3, -6))


def fp4(x: Tensor, block: int) -> Tensor:
    return rounded(x, block, 6.0, 6 * 2.0**-126, (1, 0))


@cache
def hadamard_matrix(width: int) -> Tensor:
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(width)


def normed(x: Tensor, weight: Tensor | float) -> Tensor:
    return bf16(x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight)


def turned(x: Tensor, position: int, ratio: int, direction: int = 1) -> Tensor:
    """The last dims as complex numbers times exp(i * position * frequency)."""
    dim = CONFIG.qk_rope_head_dim
    theta = 160_000.0 if ratio else 10_000.0
    angle = []
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        if ratio:

            def pair_with(turns: float) -> float:
                return dim * math.log(256 / (turns * 2 * math.pi)) / (2 * math.log(160_000.0))

            low, high = max(math.floor(pair_with(32.0)), 0), math.ceil(pair_with(1.0))
            ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
            frequency = frequency / 16 * ramp + frequency * (1 - ramp)
        angle.append(direction * position * frequency)
    rotation = torch.polar(torch.ones(dim // 2).double(), torch.tensor(angle).double())
    pairs = torch.view_as_complex(x[..., -dim:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat((x[..., :-dim], bf16(torch.view_as_real(pairs * rotation).flatten(-2))), -1)


class Layer:
    """One layer's weights under their names inside the layer, and the rules."""

    def __init__(self, state: dict[str, Tensor], index: int, rules: Rules) -> None:
        prefix = f"layers.{index}."
        self.w = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.ratio = CONFIG.compress_ratios[index]
        self.rules = rules
        self.expanded: dict[str, Tensor] = {}

    def real(self, name: str) -> Tensor:
        return self.w[name].double()

    def matrix(self, name: str) -> Tensor:
        """A quantised weight's values, element by element of its scales."""
        if name in self.expanded:
            return self.expanded[name]
        weight, scale = self.w[name + ".weight"], self.w[name + ".scale"].float().double()
        if weight.dtype == torch.float8_e4m3fn:
            values, tile = weight.float().double(), (128, 128)
        else:
            codes, tile = weight.view(torch.uint8).long(), (1, 32)
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
            values = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=torch.float64)
            for offset, code in ((0, codes % 16), (1, codes // 16)):
                values[:, offset::2] = table[code % 8] * torch.where(code >= 8, -1.0, 1.0)
        rows = torch.arange(values.shape[0]) // tile[0]
        columns = torch.arange(values.shape[1]) // tile[1]
        self.expanded[name] = values * scale[rows][:, columns]
        return self.expanded[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return bf16(fp8(x, self.rules.linear_block) @ self.matrix(name).T)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        c, heads, rules = CONFIG.head_dim, CONFIG.num_attention_heads, self.rules
        keep = c - CONFIG.qk_rope_head_dim
        latent = normed(self.linear("attn.wq_a", x), self.real("attn.q_norm.weight"))
        q = normed(self.linear("attn.wq_b", latent).unflatten(-1, (heads, c)), 1.0)
        kv = normed(self.linear("attn.wkv", x), self.real("attn.kv_norm.weight"))
        kv = torch.stack([turned(row, t, self.ratio) for t, row in enumerate(kv)])
        kv = torch.cat((fp8(kv[:, :keep], rules.kv_block), kv[:, keep:]), -1)
        found = {"window": kv[-CONFIG.sliding_window :]}
        if self.ratio:
            entries = self.compressed("attn.compressor.", x, c)
            entries = torch.cat((fp8(entries[:, :keep], rules.kv_block), entries[:, keep:]), -1)
            found["entries"] = entries
        if self.ratio == 4:
            scores, found["keys"] = self.index_scores(x, latent)
        sink, outputs = self.real("attn.attn_sink"), []
        for t in range(len(x)):
            seen = [kv[j] for j in range(max(0, t - CONFIG.sliding_window + 1), t + 1)]
            if self.ratio:
                visible = list(range((t + 1) // self.ratio))
                if self.ratio == 4:
                    visible.sort(key=lambda s, t=t: (-scores[t, s].item(), s))  # type: ignore[misc]
                    visible = visible[: CONFIG.index_topk]
                seen += [entries[s] for s in visible]
            keys, query = torch.stack(seen), turned(q[t], t, self.ratio)
            logits = query @ keys.T / math.sqrt(c)
            top = logits.amax(-1, keepdim=True)
            total = torch.exp(logits - top).sum(-1, keepdim=True) + torch.exp(sink[:, None] - top)
            o = bf16(bf16(torch.exp(logits - top) / total) @ keys)
            outputs.append(turned(o, t, self.ratio, -1).flatten())
        groups = torch.stack(outputs).unflatten(-1, (CONFIG.o_groups, -1))
        wo_a = self.matrix("attn.wo_a").unflatten(0, (CONFIG.o_groups, -1))
        z = [
            bf16(fp8(groups[:, g], rules.wo_a_input_block) @ wo_a[g].T)
            for g in range(CONFIG.o_groups)
        ]
        return found | {"output": self.linear("attn.wo_b", torch.cat(z, -1))}

    def compressed(self, name: str, x: Tensor, width: int) -> Tensor:
        values = x @ self.real(name + "wkv.weight").T
        gates = x @ self.real(name + "wgate.weight").T
        ape, rows = self.real(name + "ape"), []
        for i in range(len(x) // self.ratio):
            slots = []
            for t in range((i - 1) * self.ratio, (i + 1) * self.ratio):
                columns = slice(0, width)
                if self.ratio == 4 and t >= i * 4:
                    columns = slice(width, 2 * width)
                if t >= 0 and (self.ratio == 4 or t >= i * self.ratio):
                    score = gates[t, columns] + ape[t % self.ratio, columns]
                    slots.append((score, values[t, columns]))
            share = torch.softmax(torch.stack([score for score, _ in slots]), 0)
            pooled = (share * torch.stack([value for _, value in slots])).sum(0)
            row = normed(pooled, self.real(name + "norm.weight"))
            rows.append(turned(row, i * self.ratio, self.ratio))
        return torch.stack(rows)

    def index_scores(self, x: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        width, heads, rules = CONFIG.index_head_dim, CONFIG.index_n_heads, self.rules
        rotation = hadamard_matrix(width)
        q = self.linear("attn.indexer.wq_b", latent).unflatten(-1, (heads, width))
        q = torch.stack([turned(row, t, self.ratio) for t, row in enumerate(q)])
        q = fp4(bf16(q @ rotation) if rules.hadamard_queries else q, rules.index_query_block)
        keys = self.compressed("attn.indexer.compressor.", x, width)
        keys = fp4(bf16(keys @ rotation) if rules.hadamard_keys else keys, rules.index_key_block)
        weight = bf16(x @ self.real("attn.indexer.weights_proj.weight").T)
        weight = bf16(weight * (width * heads) ** -0.5)
        return torch.einsum("th,ths->ts", weight, (q @ keys.T).clamp_min(0)), keys

    def expert(self, name: str, x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        limit, before = CONFIG.swiglu_limit, self.rules.weight_before_w2
        gate = self.linear(name + ".w1", x).clamp(max=limit)
        up = self.linear(name + ".w3", x).clamp(-limit, limit)
        hidden = gate * torch.sigmoid(gate) * up
        out = self.linear(name + ".w2", bf16(hidden * weight if before else hidden))
        return out if before else bf16(out * weight)

    def experts(self, x: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        scores = torch.sqrt(torch.log1p(torch.exp(x @ self.real("ffn.gate.weight").T)))
        rows = []
        for t in range(len(x)):
            if "ffn.gate.tid2eid" in self.w:
                chosen = self.w["ffn.gate.tid2eid"][tokens[t]].tolist()
            else:
                ranked = scores[t] + self.real("ffn.gate.bias")
                chosen = ranked.topk(CONFIG.num_experts_per_tok).indices.tolist()
            row = self.expert("ffn.shared_experts", x[t])
            for e in chosen:
                weight = scores[t, e] / scores[t, chosen].sum() * CONFIG.routed_scaling_factor
                row = row + self.expert(f"ffn.experts.{e}", x[t], weight)
            rows.append(bf16(row))
        return {"experts": torch.stack(rows)}


# ---- the network --------------------------------------------------------------------------------


@cache
def uneven_state() -> dict[str, Tensor]:
    """Random weights whose blocks differ in magnitude, made up for where they meet ``inputs``."""
    state = random_state(CONFIG, 0, float_dtype=torch.bfloat16)
    up = -round(math.log2(SMALLER))
    for name, tensor in state.items():
        if name.endswith((".wq_a.scale", "attn.wkv.scale", ".w1.scale", ".w3.scale")):
            codes = tensor.view(torch.uint8)
            codes[:, codes.shape[1] // 2 :] += up
        elif name.endswith(("attn.kv_norm.weight", "attn.compressor.norm.weight")):
            tensor[64:128] *= SMALLER
    return state


def inputs() -> tuple[Tensor, Tensor]:
    """Layer inputs [T, D] in BF16, the second block of 128 much smaller, and token ids [T]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(LENGTH, CONFIG.hidden_size, generator=generator)
    x[:, 128:] *= SMALLER
    tokens = torch.randint(0, CONFIG.vocab_size, (LENGTH,), generator=generator)
    return x.bfloat16(), tokens


@cache
def network(index: int) -> dict[str, Tensor]:
    """What the network's layer ``index`` gives and stores for ``inputs``."""
    model = Transformer(CONFIG)
    model.load_state_dict(uneven_state(), assign=True)
    x, tokens = inputs()
    positions = torch.arange(LENGTH)
    ragged = Ragged(
        [(0, LENGTH)], positions, model.rope_plain(positions), model.rope_compressing(positions)
    )
    attention, moe = model.layers[index].attn, model.layers[index].ffn
    assert isinstance(attention, Attention)
    assert isinstance(moe, MoE)
    state = attention.new_state()
    with torch.inference_mode():
        found = {"output": attention(x, ragged, [state]), "experts": moe(x, tokens)}
    assert state.window is not None
    found["window"] = state.window
    for name, part in (("entries", state.compressed), ("keys", state.index)):
        rows = part.entries.view() if part is not None else None
        if rows is not None:
            found[name] = rows
    return {name: tensor.double() for name, tensor in found.items()}


@cache
def second(index: int, rules: Rules) -> dict[str, Tensor]:
    x, tokens = inputs()
    layer = Layer(uneven_state(), index, rules)
    return layer.attention(x.double()) | layer.experts(x.double(), tokens)


def distance(one: Tensor, other: Tensor) -> float:
    """Largest relative distance over the blocks of 64 columns, which differ in magnitude."""
    assert one.shape == other.shape
    pairs = zip(one.split(64, -1), other.split(64, -1), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def distances(index: int, rules: Rules) -> dict[str, float]:
    ours, theirs = network(index), second(index, rules)
    assert ours.keys() == theirs.keys()
    return {name: distance(ours[name], theirs[name]) for name in ours}


@pytest.mark.parametrize("index", range(3), ids=["window", "CSA", "HCA"])
def test_each_kind_of_layer_rounds_as_the_official_one(index: int) -> None:
    stored = {0: set(), 1: {"entries", "keys"}, 2: {"entries"}}[index]
    found = distances(index, Rules())
    assert found.keys() == {"output", "experts", "window"} | stored
    assert max(found.values()) < TOLERANCE, found


NOTICED: dict[str, tuple[Callable[[Rules], Rules], int, set[str]]] = {
    "linear inputs not rounded": (
        lambda r: replace(r, linear_block=0), 0, {"output", "experts", "window"},
    ),
    "linear inputs in blocks of 256": (
        lambda r: replace(r, linear_block=256), 0, {"output", "experts", "window"},
    ),
    "entries not rounded": (lambda r: replace(r, kv_block=0), 2, {"output", "entries", "window"}),
    "entries in blocks of 128": (lambda r: replace(r, kv_block=128), 2, {"entries", "window"}),
    "keys not rounded": (lambda r: replace(r, index_key_block=0), 1, {"output", "keys"}),
    "keys in blocks of 64": (lambda r: replace(r, index_key_block=64), 1, {"output", "keys"}),
    "queries not rounded": (lambda r: replace(r, index_query_block=0), 1, {"output"}),
    "queries in blocks of 64": (lambda r: replace(r, index_query_block=64), 1, {"output"}),
    "Hadamard on queries only": (lambda r: replace(r, hadamard_keys=False), 1, {"output", "keys"}),
    "Hadamard on keys only": (lambda r: replace(r, hadamard_queries=False), 1, {"output"}),
    "no Hadamard": (
        lambda r: replace(r, hadamard_queries=False, hadamard_keys=False), 1, {"output", "keys"},
    ),
    "routing weight after w2": (lambda r: replace(r, weight_before_w2=False), 2, {"experts"}),
    "input of wo_a rounded": (lambda r: replace(r, wo_a_input_block=128), 2, {"output"}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", NOTICED)
def test_a_mistake_in_rounding_shows(mistake: str) -> None:
    bend, index, where = NOTICED[mistake]
    found = distances(index, bend(Rules()))
    assert {name for name, far in found.items() if far > 2 * TOLERANCE} >= where, found
