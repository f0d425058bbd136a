"""The native network against the Transformer, and against itself however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rorqual.errors import ConfigError
from rorqual.kernels import cpu
from rorqual.kernels.layout import BLOCK_TOKENS
from rorqual.model.config import ModelConfig
from rorqual.model.linear import Linear
from rorqual.model.native import ADVANCE_DRAFT, REPLAY, NativeNetwork, NativeSegment
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the extension was not built")

SMALL = ModelConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=16,
    moe_intermediate_size=48,
    n_routed_experts=6,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 16, 4, 128, 0),
    index_n_heads=2,
    index_head_dim=16,
    index_topk=8,
    sliding_window=16,
)


def random_config(seed: int) -> ModelConfig:
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 5))
    heads = int(rng.choice([2, 4, 6]))
    experts = int(rng.integers(2, 9))
    return SMALL.replace(
        hidden_size=int(rng.choice([32, 40, 96])),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=int(rng.choice([16, 24, 64])),
        q_lora_rank=int(rng.integers(8, 40)),
        o_groups=int(rng.choice([1, 2])),
        o_lora_rank=int(rng.integers(8, 30)),
        moe_intermediate_size=int(rng.integers(16, 70)),
        n_shared_experts=int(rng.integers(1, 3)),
        n_routed_experts=experts,
        num_experts_per_tok=int(rng.integers(1, min(experts, 4) + 1)),
        num_hash_layers=int(rng.integers(0, layers + 1)),
        hc_mult=int(rng.choice([2, 4])),
        compress_ratios=(*(int(r) for r in rng.choice([0, 4, 8, 32, 128], layers)), 0),
        index_n_heads=int(rng.integers(1, 5)),
        index_head_dim=int(rng.choice([8, 16, 32])),
        index_topk=int(rng.integers(1, 40)),
        sliding_window=int(rng.integers(4, 64)),
    )


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Weights large enough that every part of the network matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.element_size() == 1:
                continue
            if any(part in name for part in ("hc_", "sink", "ape")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                parameter.mul_(3)
        for name, buffer in model.named_buffers():
            if name.endswith("gate.bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def random_tokens(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, SMALL.vocab_size, count).astype(np.int32)


class Fed:
    """One sequence's memory in a native network, fed piece by piece."""

    def __init__(self, network: NativeNetwork, blocks: Sequence[int]) -> None:
        self.network = network
        self.state = network.new_state()
        self.blocks = np.array(blocks, np.int32)
        self.length = 0

    def segment(self, num_tokens: int, flags: int = 0) -> NativeSegment:
        made = NativeSegment(num_tokens, self.length, self.state, self.blocks, flags)
        self.length += num_tokens
        return made

    def feed(self, tokens: NDArray[np.int32], flags: int = 0) -> NDArray[np.float32]:
        """Logits of every token."""
        return self.network.step(
            tokens, [self.segment(len(tokens), flags)], np.arange(len(tokens), dtype=np.int64)
        )

    def draft(self, token: int) -> NDArray[np.float32]:
        last = NativeSegment(1, self.length - 1, self.state, self.blocks)
        return self.network.draft(np.array([token], np.int32), [last])[0]


def network_for(model: Transformer, *, threads: int = 1, **options: str) -> NativeNetwork:
    network = NativeNetwork(
        model,
        key_format="fp32",
        num_threads=threads,
        slab_blocks=8,
        **options,  # type: ignore[arg-type]
    )
    for _ in range(4):
        network.new_slab()
    return network


def expected(model: Transformer, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    count = len(tokens)
    with torch.inference_mode():
        return model(
            torch.from_numpy(tokens).long(), [Segment(model.new_state(), count)], all_logits=True
        ).numpy()


def cuts(total: int, seed: int) -> list[int]:
    """``total`` as a sum of pieces from single tokens to half of it."""
    rng = np.random.default_rng(seed)
    pieces: list[int] = []
    while total:
        piece = int(rng.choice([1, 1, 2, 5, 37, 130, max(1, total // 2)]))
        pieces.append(min(piece, total))
        total -= pieces[-1]
    return pieces


# ---- the same numbers as the Transformer -----------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_logits_are_the_transformers_on_random_configs(seed: int) -> None:
    model = random_model(random_config(seed), seed)
    length = int(np.random.default_rng(seed).choice([1, 3, 60, 300, 700]))
    tokens = random_tokens(length, seed)
    got = Fed(network_for(model), range(7)).feed(tokens)
    np.testing.assert_allclose(got, expected(model, tokens), atol=1e-4, rtol=1e-4)


def test_a_long_sequence_in_chunks_has_the_transformers_logits() -> None:
    model = random_model(SMALL)
    tokens = random_tokens(1500)
    sequence = Fed(network_for(model), range(12))
    got = np.concatenate([sequence.feed(part) for part in np.split(tokens, [600, 601, 602, 1300])])
    np.testing.assert_allclose(got, expected(model, tokens), atol=1e-4, rtol=1e-4)


def test_drafts_are_the_transformers() -> None:
    model = random_model(SMALL)
    tokens = random_tokens(150)
    state = model.new_state()
    inputs = torch.from_numpy(tokens).long()
    with torch.inference_mode():
        segments = [Segment(state, 149)]
        streams = model.run(inputs[:-1], segments)
        want = model.draft(streams, inputs[:-1], inputs[1:], segments).numpy()
    sequence = Fed(network_for(model), range(2))
    for start, part in enumerate(np.split(tokens[:-1], [1, 40, 41, 42, 148])):
        sequence.feed(part, ADVANCE_DRAFT)
        end = sequence.length
        got = sequence.draft(int(tokens[end]))
        np.testing.assert_allclose(got, want[end - 1], atol=1e-4, rtol=1e-4, err_msg=str(start))


def packed_model(config: ModelConfig) -> Transformer:
    """As ``random_model``, with random FP8 and FP4 weights of about the same size."""
    plain = random_model(config.replace(linear_dtype="plain", expert_dtype="plain"))
    model = Transformer(config).eval()
    theirs = plain.state_dict()
    packed = {name for name, tensor in model.state_dict().items() if tensor.element_size() == 1}
    model.load_state_dict({n: t for n, t in theirs.items() if n not in packed}, strict=False)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, Linear) and module.scale is not None:
            fp8 = module.weight_format == "fp8"
            high = 120 if fp8 else 256  # no NaN; magnitudes up to 256
            codes = torch.randint(0, high, module.weight.shape, generator=generator).byte()
            if fp8:
                codes += 128 * torch.randint(0, 2, codes.shape, generator=generator).byte()
            module.weight.data = codes.view(module.weight.dtype)
            exponent = torch.randint(-1, 2, module.scale.shape, generator=generator)
            module.scale = (
                (exponent + (127 - 8 if fp8 else 127 - 6)).byte().view(module.scale.dtype)
            )
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ratio", [0, 4, 16])
def test_official_numerics_follow_the_transformers(ratio: int, packed: bool) -> None:
    """Rounding to a few bits makes steps of last-bit differences, which deeper layers amplify; so
    one layer of each kind, and most logits close instead of all."""
    config = SMALL.replace(
        num_hidden_layers=1,
        compress_ratios=(ratio, 0),
        numerics="official",
        head_dim=64,
        index_head_dim=32,
        hidden_size=160,
        moe_intermediate_size=96,
        sliding_window=32,
        index_topk=64,
        linear_dtype="fp8" if packed else "plain",
        expert_dtype="fp4" if packed else "plain",
    )
    model = packed_model(config) if packed else random_model(config)
    tokens = random_tokens(200)
    network = NativeNetwork(model, entry_format="record", key_format="fp4")
    network.new_slab()
    got = Fed(network, range(2)).feed(tokens)
    want = expected(model, tokens)
    assert np.median(np.abs(got - want)) < 0.02 * want.std()
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("weights", ["as stored", "fp32"])
def test_packed_weights_are_computed_as_they_are(weights: str) -> None:
    config = SMALL.replace(linear_dtype="fp8", expert_dtype="fp4", hidden_size=160)
    model = packed_model(config)
    tokens = random_tokens(200)
    got = Fed(network_for(model, weight_format=weights), range(2)).feed(tokens)
    want = expected(model, tokens)
    np.testing.assert_allclose(got, want, atol=1e-3 * want.std())


# ---- the same bits however the work is cut ----------------------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_results_do_not_depend_on_chunks_neighbours_or_threads(seed: int) -> None:
    model = random_model(SMALL if seed == 0 else random_config(seed + 20), seed)
    lengths = [700, 333, 1]
    tokens = [random_tokens(length, seed + i) for i, length in enumerate(lengths)]
    network = network_for(model)
    tables = [range(6), range(6, 9), range(9, 10)]
    want = [Fed(network, table).feed(part) for table, part in zip(tables, tokens, strict=True)]
    other = network_for(model, threads=2)
    sequences = [Fed(other, list(reversed(table))) for table in tables]
    pieces = [cuts(length, seed + 7 * i) for i, length in enumerate(lengths)]
    got: list[list[NDArray[np.float32]]] = [[], [], []]
    while any(pieces):
        alive = [i for i in range(3) if pieces[i]]
        sizes = [pieces[i].pop(0) for i in alive]
        batch, segments = [], []
        for i, size in zip(alive, sizes, strict=True):
            start = sequences[i].length
            batch.append(tokens[i][start : start + size])
            segments.append(sequences[i].segment(size))
        flat = np.concatenate(batch)
        logits = other.step(flat, segments, np.arange(len(flat), dtype=np.int64))
        for i, part in zip(alive, np.split(logits, np.cumsum(sizes)[:-1]), strict=True):
            got[i].append(part)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.concatenate(mine), theirs)


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use until the test ends."""
    native = cpu.native()
    best, wanted = native.isa(), request.param
    known = ["scalar", "avx2", "avx512"]
    if known.index(wanted) > known.index(best):
        pytest.skip(f"this machine has no {wanted}")
    native.set_isa(wanted)
    yield wanted
    native.set_isa(best)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_streams_decode_and_draft_as_each_does_alone(isa: str, threads: int) -> None:
    """From one stream to more rows than any kernel works at once, some with two tokens a step."""
    model = random_model(SMALL)
    tokens = [random_tokens(3, seed) for seed in range(13)]
    alone, together = network_for(model), network_for(model, threads=threads)
    mine = [Fed(alone, [i]) for i in range(13)]
    theirs = [Fed(together, [i]) for i in range(13)]
    for count, size in ((13, 3), (1, 1), (2, 1), (5, 1), (8, 1), (11, 2)):
        parts = [own[:size] for own in tokens[:count]]
        want = [fed.feed(part, ADVANCE_DRAFT) for fed, part in zip(mine, parts, strict=False)]
        segments = [fed.segment(size, ADVANCE_DRAFT) for fed in theirs[:count]]
        flat = np.concatenate(parts)
        got = together.step(flat, segments, np.arange(len(flat), dtype=np.int64))
        np.testing.assert_array_equal(got, np.concatenate(want))
        guess = np.array([part[0] for part in parts], np.int32)
        drafted = together.draft(
            guess,
            [NativeSegment(1, fed.length - 1, fed.state, fed.blocks) for fed in theirs[:count]],
        )
        alone_drafts = [fed.draft(int(g)) for fed, g in zip(mine, guess, strict=False)]
        np.testing.assert_array_equal(drafted, np.stack(alone_drafts))


def test_avx2_and_avx512_give_the_same_bits() -> None:
    native = cpu.native()
    if native.isa() != "avx512":
        pytest.skip("this machine has no AVX-512")
    model = random_model(SMALL)
    tokens = random_tokens(300)
    network = network_for(model)
    want = Fed(network, range(3)).feed(tokens)
    native.set_isa("avx2")
    try:
        got = Fed(network, range(3)).feed(tokens)
    finally:
        native.set_isa("avx512")
    np.testing.assert_array_equal(got, want)


def test_scalar_code_agrees() -> None:
    native = cpu.native()
    best = native.isa()
    model = random_model(SMALL)
    tokens = random_tokens(200)
    native.set_isa("scalar")
    try:
        got = Fed(network_for(model), range(2)).feed(tokens)
    finally:
        native.set_isa(best)
    np.testing.assert_allclose(got, expected(model, tokens), atol=1e-4, rtol=1e-4)


def test_tokens_taken_back_leave_no_trace() -> None:
    model = random_model(SMALL)
    network = network_for(model)
    tokens = random_tokens(200)
    want = Fed(network, range(2)).feed(tokens)
    sequence = Fed(network, range(2, 4))
    sequence.feed(tokens[:130], ADVANCE_DRAFT)
    sequence.feed(random_tokens(8, seed=5), ADVANCE_DRAFT)
    sequence.length -= 8
    np.testing.assert_array_equal(sequence.feed(tokens[130:]), want[130:])


def test_a_replay_restores_a_lost_state_and_leaves_blocks_alone() -> None:
    """Windows and unfinished groups come back once every layer's window was fed again."""
    model = random_model(SMALL)
    network = network_for(model)
    tokens = random_tokens(600)
    whole = Fed(network, range(5))
    want = whole.feed(tokens)
    slabs_after = Fed(network, range(5))
    replayed = slabs_after.feed(tokens[:512], REPLAY)
    np.testing.assert_array_equal(replayed, want[:512])
    np.testing.assert_array_equal(slabs_after.feed(tokens[512:]), want[512:])


# ---- options and mistakes ---------------------------------------------------------------------
@pytest.mark.parametrize(("weights", "tolerance"), [("bf16", 0.02), ("int8", 0.05)])
def test_rounded_weights_stay_close(weights: str, tolerance: float) -> None:
    model = random_model(SMALL.replace(index_topk=400))
    tokens = random_tokens(64)
    network = network_for(model, weight_format=weights)
    got = Fed(network, range(1)).feed(tokens)
    want = expected(model, tokens)
    assert np.median(np.abs(got - want)) < tolerance * want.std()


def test_mistakes_are_named_and_change_nothing() -> None:
    model = random_model(SMALL)
    network = network_for(model)
    state, blocks = network.new_state(), np.arange(2, dtype=np.int32)
    rows = np.array([0], np.int64)
    one = np.array([1], np.int32)

    def step(tokens: NDArray[np.int32], segment: NativeSegment) -> None:
        network.step(tokens, [segment], rows)

    with pytest.raises(ValueError, match="vocabulary"):
        step(np.array([SMALL.vocab_size], np.int32), NativeSegment(1, 0, state, blocks))
    with pytest.raises(ValueError, match="block table"):
        step(one, NativeSegment(1, 2 * BLOCK_TOKENS, state, blocks))
    with pytest.raises(ValueError, match="block table"):
        step(one, NativeSegment(1, 2**63 - 1, state, blocks))
    with pytest.raises(ValueError, match="outside the slabs"):
        step(one, NativeSegment(1, 0, state, np.array([32], np.int32)))
    with pytest.raises(ValueError, match="do not match"):
        step(np.array([1, 2], np.int32), NativeSegment(1, 0, state, blocks))
    with pytest.raises(ValueError, match="state is too small"):
        step(one, NativeSegment(1, 0, state[:-1], blocks))
    segment = NativeSegment(1, 0, state, blocks)
    with pytest.raises(ValueError, match="appears twice"):
        network.step(np.array([1, 2], np.int32), [segment, segment], rows)
    assert not state.any()
    # Arrays that only a copy would make fit: written to in vain, or gone after the call.
    slab = np.zeros(network.layout.slab_nbytes, np.uint8)
    for unfit in (slab.view(np.int8), np.repeat(slab, 2)[::2]):
        with pytest.raises(TypeError):
            network.add_slab(unfit)
    with pytest.raises(TypeError):
        step(one, NativeSegment(1, 0, np.zeros(len(state), np.float32), blocks))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_threads"):
        NativeNetwork(model, num_threads=100_000)
    with pytest.raises(ConfigError, match="weight_format"):
        NativeNetwork(model, weight_format="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not divide"):
        NativeNetwork(random_model(SMALL.replace(compress_ratios=(0, 4, 3, 4, 128, 0))))
