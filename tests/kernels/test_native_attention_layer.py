"""The native attention sub-layer against ``model.attention`` and against itself cut differently."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.kernels import cpu
from rorqual.kernels.layout import BLOCK_TOKENS, MAX_REWIND, EntryFormat, KeyFormat, cache_layout
from rorqual.model.attention import Attention, Ragged
from rorqual.model.config import TINY, ModelConfig
from rorqual.model.rope import RotaryTable
from rorqual.model.state import LayerState

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="native kernels are not built")

REPLAY = 1
CONFIG = TINY.replace(
    hidden_size=48,
    num_attention_heads=4,
    head_dim=40,
    qk_rope_head_dim=8,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=12,
    index_n_heads=3,
    index_head_dim=32,
    index_topk=9,
    sliding_window=24,
)


@dataclass
class Sequence:
    """One sequence's native memory."""

    state: np.ndarray
    blocks: list[int]
    length: int = 0


class Native:
    """The native layer with the weights of ``model``, and memory for some sequences."""

    def __init__(
        self,
        config: ModelConfig,
        model: Attention,
        *,
        entries: EntryFormat = "fp32",
        keys: KeyFormat = "fp32",
        threads: int = 1,
    ) -> None:
        module = cpu.native()
        self.layout = cache_layout(
            ratios=(0, model.ratio),  # the layer under test is not the first
            head_dim=config.head_dim,
            rope_dim=config.qk_rope_head_dim,
            index_dim=config.index_head_dim,
            window=config.sliding_window,
            streams=1,
            hidden=config.hidden_size,
            entry_format=entries,
            key_format=keys,
            slab_blocks=2,
        )
        matrices, arrays = {}, {}
        for name, value in model.state_dict().items():
            data = value.float().contiguous().numpy()
            path = f"attn.{name}"
            if name == "wo_a.weight":
                for group, part in enumerate(np.split(data, config.o_groups)):
                    matrices[f"attn.wo_a.{group}"] = module.Matrix.from_fp32(part.copy())
            elif value.dim() == 2 and not name.endswith("ape"):
                matrices[path.removesuffix(".weight")] = module.Matrix.from_fp32(data)
            else:
                arrays[path] = data.reshape(-1).copy()
        shape = {
            "vocab": 0, "layers": 0, "mtp_layers": 0, "hidden": config.hidden_size,
            "heads": config.num_attention_heads, "head_dim": config.head_dim,
            "rope_dim": config.qk_rope_head_dim, "q_lora": config.q_lora_rank,
            "o_groups": config.o_groups, "o_lora": config.o_lora_rank,
            "index_heads": config.index_n_heads, "index_dim": config.index_head_dim,
            "index_topk": config.index_topk, "window": config.sliding_window, "experts": 0,
            "topk": 0, "hash_layers": 0, "expert_width": 0, "shared_width": 0, "streams": 1,
            "sinkhorn_iterations": 0, "hc_eps": 0.0, "norm_eps": config.rms_norm_eps,
            "route_scale": 0.0, "swiglu_limit": 0.0, "official": config.numerics == "official",
        }  # fmt: skip
        tables = [RotaryTable(config, compressing=c).frequencies.numpy() for c in (False, True)]
        self._layer = module.AttentionLayer(
            shape, self.layout, 1, matrices, arrays, tables[0], tables[1], threads
        )
        self._hidden = config.hidden_size
        self._slabs: list[np.ndarray] = []
        self._next_block = 0

    def new_sequence(self) -> Sequence:
        return Sequence(np.zeros(self.layout.state_nbytes, np.uint8), [])

    def run(
        self, parts: list[tuple[Sequence, torch.Tensor]], *, flags: int = 0
    ) -> list[torch.Tensor]:
        """One ragged batch: the next tokens of each sequence. Advances lengths."""
        segments, table = [], []
        for sequence, x in parts:
            end = sequence.length + len(x)
            while len(sequence.blocks) * BLOCK_TOKENS < end:
                sequence.blocks.append(self._new_block())
            segments.append((len(x), sequence.length, flags, len(table)))
            table += sequence.blocks
            sequence.length = end
        x = torch.cat([x for _, x in parts]).float().contiguous()
        out = np.full((len(x), self._hidden), np.nan, np.float32)
        states = [sequence.state for sequence, _ in parts]
        self._layer.run(
            x.numpy(), np.array(segments, np.int64), states, np.array(table, np.int32), out
        )
        return list(torch.from_numpy(out).split([len(x) for _, x in parts]))

    def _new_block(self) -> int:
        # Every other block belongs to nobody, so that a sequence's blocks are never neighbours.
        block, self._next_block = self._next_block, self._next_block + 2
        while block >= len(self._slabs) * self.layout.slab_blocks:
            self._slabs.append(np.full(self.layout.slab_nbytes, 0xA5, np.uint8))
            self._layer.add_slab(self._slabs[-1])
        return block


def _model(config: ModelConfig, ratio: int, seed: int = 0) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    model = Attention(config, ratio, RotaryTable(config, compressing=ratio > 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and not name.endswith("ape"):
                value *= parameter.shape[1] ** -0.5
            elif "norm" in name:
                value = 1 + 0.25 * value
            parameter.copy_(value)
    return model


def _inputs(config: ModelConfig, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def _reference(
    config: ModelConfig, model: Attention, parts: list[tuple[LayerState, int, torch.Tensor]]
) -> list[torch.Tensor]:
    """The model on one ragged batch: state, position of its first token, tokens."""
    spans, positions, at = [], [], 0
    for _, start, x in parts:
        spans.append((at, at + len(x)))
        positions.append(torch.arange(start, start + len(x)))
        at += len(x)
    flat = torch.cat(positions)
    tables = [RotaryTable(config, compressing=c)(flat) for c in (False, True)]
    with torch.no_grad():
        out = model(
            torch.cat([x for *_, x in parts]),
            Ragged(spans, flat, tables[0], tables[1]),
            [state for state, *_ in parts],
        )
    return list(out.split([len(x) for *_, x in parts]))


def _in_chunks(native: Native, x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, Sequence]:
    """Feed ``x`` in chunks of the sizes given, over and over."""
    sequence, out, step = native.new_sequence(), [], 0
    while sequence.length < len(x):
        size = sizes[step % len(sizes)]
        out += native.run([(sequence, x[sequence.length : sequence.length + size])])
        step += 1
    return torch.cat(out), sequence


RATIOS = [0, 4, 8, 16, 128]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_layer_agrees_with_the_model(ratio: int, isa: str) -> None:
    module = cpu.native()
    before = module.isa()
    if not module.set_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        model, x = _model(CONFIG, ratio), _inputs(CONFIG, 300)
        wanted = _reference(CONFIG, model, [(model.new_state(), 0, x)])[0]
        got, _ = _in_chunks(Native(CONFIG, model), x, [300])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    finally:
        module.set_isa(before)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 16, "head_dim": 64, "qk_rope_head_dim": 16},
        {"num_attention_heads": 2, "head_dim": 16, "qk_rope_head_dim": 16, "o_groups": 1},
        {"num_attention_heads": 10, "head_dim": 100, "qk_rope_head_dim": 20, "o_groups": 5},
        {"index_n_heads": 8, "index_head_dim": 64, "index_topk": 0},
        {"index_topk": 500, "sliding_window": 128},
    ],
)
def test_other_shapes_agree_with_the_model(shape: dict[str, int]) -> None:
    config = CONFIG.replace(**shape)
    for ratio in (4, 16):
        model, x = _model(config, ratio), _inputs(config, 200)
        wanted = _reference(config, model, [(model.new_state(), 0, x)])[0]
        got, _ = _in_chunks(Native(config, model), x, [64, 7])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_ragged_batches_agree_with_the_model(ratio: int) -> None:
    model = _model(CONFIG, ratio)
    native = Native(CONFIG, model, threads=2)
    rng = np.random.default_rng(ratio)
    ours = [native.new_sequence() for _ in range(4)]
    theirs = [model.new_state() for _ in ours]
    for step in range(8):
        lengths = [int(n) for n in rng.choice([1, 1, 2, 5, 40, 130], size=len(ours))]
        chunks = [_inputs(CONFIG, n, 100 * step + i) for i, n in enumerate(lengths)]
        batch = [(theirs[i], ours[i].length, chunk) for i, chunk in enumerate(chunks)]
        wanted = _reference(CONFIG, model, batch)
        got = native.run(list(zip(ours, chunks, strict=True)))
        torch.testing.assert_close(torch.cat(got), torch.cat(wanted), rtol=1e-4, atol=2e-5)


# Relative error of the output allowed per format: half a step of its mantissa, averaged over the
# entries attended. Keys are exact here, so that all formats choose the same entries.
@pytest.mark.parametrize(("entries", "limit"), [("fp32", 1e-5), ("bf16", 4e-3), ("record", 4e-2)])
@pytest.mark.parametrize("ratio", [0, 4, 16])
def test_entry_formats_stay_within_their_rounding(
    ratio: int, entries: EntryFormat, limit: float
) -> None:
    model, x = _model(CONFIG, ratio), _inputs(CONFIG, 200)
    wanted = _reference(CONFIG, model, [(model.new_state(), 0, x)])[0]
    got, _ = _in_chunks(Native(CONFIG, model, entries=entries), x, [50, 1])
    assert float((got - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize(("keys", "limit"), [("int8", 0.1), ("fp4", 0.45)])
def test_coarse_keys_change_the_output_little(keys: KeyFormat, limit: float) -> None:
    model, x = _model(CONFIG, 4), _inputs(CONFIG, 300)
    wanted = _reference(CONFIG, model, [(model.new_state(), 0, x)])[0]
    got, _ = _in_chunks(Native(CONFIG, model, keys=keys), x, [64])
    assert float((got - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("ratio", [0, 4, 16])
def test_official_numerics_agree_with_the_model_in_bf16(ratio: int) -> None:
    config = CONFIG.replace(numerics="official", head_dim=64)
    model = _model(config, ratio).bfloat16()
    x = _inputs(config, 150).bfloat16()
    wanted = _reference(config, model, [(model.new_state(), 0, x)])[0].float()
    got, _ = _in_chunks(Native(config, model, entries="record", keys="fp4"), x, [60, 3])
    # Two BF16 computations of one value; a rounding that falls the other way moves some steps of
    # 2^-8, and may swap two entries of nearly equal score.
    assert float((got - wanted).norm() / wanted.norm()) < 2e-2


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.sampled_from(RATIOS),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    entries=st.sampled_from(["fp32", "bf16", "record"]),
    keys=st.sampled_from(["fp32", "int8", "fp4"]),
    threads=st.integers(1, 3),
)
def test_chunking_and_threads_do_not_change_a_bit(
    ratio: int, sizes: list[int], entries: EntryFormat, keys: KeyFormat, threads: int
) -> None:
    model, x = _model(CONFIG, ratio), _inputs(CONFIG, 280)
    whole, one = _in_chunks(Native(CONFIG, model, entries=entries, keys=keys), x, [280])
    cut, two = _in_chunks(
        Native(CONFIG, model, entries=entries, keys=keys, threads=threads), x, sizes
    )
    assert torch.equal(whole, cut)
    assert np.array_equal(one.state, two.state)


@pytest.mark.parametrize("ratio", RATIOS)
def test_neighbours_in_a_batch_do_not_change_a_bit(ratio: int) -> None:
    model, x = _model(CONFIG, ratio), _inputs(CONFIG, 260)
    alone, _ = _in_chunks(Native(CONFIG, model), x, [65])
    native = Native(CONFIG, model, threads=2)
    mine, others = native.new_sequence(), [native.new_sequence() for _ in range(3)]
    out = []
    for step in range(4):
        batch = [(other, _inputs(CONFIG, 33 + 5 * i, step)) for i, other in enumerate(others)]
        batch.insert(step % 4, (mine, x[65 * step : 65 * step + 65]))
        out.append(native.run(batch)[step % 4])
    assert torch.equal(torch.cat(out), alone)


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.sampled_from(RATIOS),
    kept=st.integers(1, 270),
    taken_back=st.integers(1, MAX_REWIND),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
)
def test_taking_back_tokens_leaves_no_trace(
    ratio: int, kept: int, taken_back: int, sizes: list[int]
) -> None:
    model = _model(CONFIG, ratio)
    x, wrong = _inputs(CONFIG, kept + 40), _inputs(CONFIG, taken_back, seed=7)
    straight, _ = _in_chunks(Native(CONFIG, model, keys="int8"), x, sizes)
    native = Native(CONFIG, model, keys="int8")
    _, sequence = _in_chunks(native, x[:kept], sizes)
    native.run([(sequence, wrong)])
    sequence.length -= taken_back
    out = []
    for size in (1, 39):
        out += native.run([(sequence, x[sequence.length : sequence.length + size])])
    assert torch.equal(torch.cat(out), straight[kept:])


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_replay_restores_the_state_and_leaves_entries_alone(ratio: int) -> None:
    model, x = _model(CONFIG, ratio), _inputs(CONFIG, 400)
    native = Native(CONFIG, model)
    wanted, sequence = _in_chunks(native, x, [100])
    sequence.length, sequence.state = 100, np.zeros_like(sequence.state)
    native.run([(sequence, x[100:300])], flags=REPLAY)
    entries = [slab.copy() for slab in native._slabs]
    native.run([(sequence, x[300:310])], flags=REPLAY)
    assert all(np.array_equal(a, b) for a, b in zip(entries, native._slabs, strict=True))
    assert torch.equal(native.run([(sequence, x[310:])])[0], wanted[310:])


def test_memory_only_advances_as_a_full_run_does() -> None:
    model, x = _model(CONFIG, 4), _inputs(CONFIG, 150)
    native = Native(CONFIG, model)
    _, full = _in_chunks(native, x, [150])
    other = native.new_sequence()
    blocks = [native._new_block() for _ in range(2)]
    native._layer.run(
        x.numpy(),
        np.array([[150, 0, 0, 0]], np.int64),
        [other.state],
        np.array(blocks, np.int32),
        np.empty((150, CONFIG.hidden_size), np.float32),
        memory_only=True,
    )
    assert np.array_equal(other.state, full.state)


def test_far_positions_rotate_as_the_model_does() -> None:
    model, x = _model(CONFIG, 0), _inputs(CONFIG, 30)
    start = 1_048_000
    state = model.new_state()
    native = Native(CONFIG, model)
    sequence = native.new_sequence()
    # A window of earlier entries, at positions that neither side has seen the beginning of.
    before = _inputs(CONFIG, CONFIG.sliding_window, 9)
    _reference(CONFIG, model, [(state, start - len(before), before)])
    sequence.length = start - len(before)
    sequence.blocks = [native._new_block()] * (start // BLOCK_TOKENS + 1)
    native.run([(sequence, before)])
    wanted = _reference(CONFIG, model, [(state, start, x)])[0]
    torch.testing.assert_close(native.run([(sequence, x)])[0], wanted, rtol=1e-4, atol=2e-5)
