"""Training over packed rows equals inference of each sample alone, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels import packed, reference
from rorqual.model.packed import PackedBatch
from rorqual.model.state import Segment
from tests.model.conftest import SMALL, build

CONFIG = SMALL.replace(sliding_window=32, index_topk=4096)


def pack(samples: list[Tensor], rows: list[list[int]], length: int) -> PackedBatch:
    """Place samples at multiples of 128; ``rows`` lists the samples of each row."""
    shape = (len(rows), length)
    token, sample = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    position, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for b, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members):
            ids = samples[i]
            here = slice(start, start + len(ids))
            token[b, here], sample[b, here] = ids, number
            position[b, here] = torch.arange(len(ids))
            targets[b, start : start + len(ids) - 1] = ids[1:]
            start += -(-len(ids) // 128) * 128
    return PackedBatch(token, targets, sample, position)


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 96, (n,), generator=generator) for n in (200, 77, 300, 128, 5)]


def test_packed_hidden_states_equal_inference() -> None:
    model, parts = build(CONFIG), samples()
    rows = [[0, 1, 4], [2, 3]]
    batch = pack(parts, rows, 512)
    with torch.no_grad():
        out = model.forward_packed(batch)
        assert out.mtp_hidden_BTD is not None
        for b, members in enumerate(rows):
            for number, i in enumerate(members):
                ids = parts[i]
                where = batch.sample_BT[b] == number
                state = model.new_state()
                streams = model.run(ids, [Segment(state, len(ids))])
                drafted = model.draft(streams, ids, ids.roll(-1), [Segment(state, len(ids))])
                alone = model(ids, [Segment(model.new_state(), len(ids))], all_logits=True)
                got = model.project(out.hidden_BTD[b, where])
                torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
                got = model.project(out.mtp_hidden_BTD[b, where])
                # The last token's successor is another sample's: no target is taken there.
                torch.testing.assert_close(got[:-1], drafted[:-1], atol=1e-5, rtol=1e-5)


def test_block_attention_equals_the_reference_with_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, heads, width, window, ratio = 128, 3, 8, 32, 4

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, kv, entries = leaf(1, tokens, heads, width), leaf(1, tokens, width), leaf(1, 32, width)
    sink = leaf(heads)
    sample = torch.zeros(1, tokens, dtype=torch.long)
    position = torch.arange(tokens).unsqueeze(0)
    layout = packed.AttentionLayout.build(sample, position, window, ratio)
    fast, _ = packed.attention(q, kv, entries, sink, layout, width**-0.5)

    index = torch.full((tokens, window + 32), -1)
    for t in range(tokens):
        near = torch.arange(max(0, t - window + 1), t + 1)
        far = torch.arange((t + 1) // ratio) + tokens
        index[t, : len(near)] = near
        index[t, window : window + len(far)] = far
    both = torch.cat((kv[0], entries[0]))
    slow = reference.sparse_attention(q[0], both, sink, index, width**-0.5)
    torch.testing.assert_close(fast[0], slow, atol=1e-6, rtol=1e-6)

    probe = torch.randn(slow.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((slow * probe).sum(), (q, kv, entries, sink))
    got = torch.autograd.grad((fast[0] * probe).sum(), (q, kv, entries, sink))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_indexer_loss_trains_the_indexer_alone() -> None:
    model = build(CONFIG)
    out = model.forward_packed(pack(samples(), [[2]], 384))
    assert out.indexer_loss is not None
    assert out.indexer_loss > 0
    out.indexer_loss.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached == (".indexer." in name), name


def test_router_statistics_ignore_padding() -> None:
    model = build(CONFIG)
    parts = samples()
    lonely = model.forward_packed(pack(parts, [[1]], 128)).router
    padded = model.forward_packed(pack(parts, [[1]], 512)).router
    for a, b in zip(lonely, padded, strict=True):
        torch.testing.assert_close(a.load_E, b.load_E, atol=0, rtol=0)
        torch.testing.assert_close(a.prob_E, b.prob_E, atol=1e-6, rtol=1e-5)
        assert abs(float(a.load_E.sum()) - 1) < 1e-6


def test_every_parameter_learns() -> None:
    model = build(CONFIG)
    out = model.forward_packed(pack(samples(), [[0, 1], [2]], 384))
    assert out.mtp_hidden_BTD is not None
    assert out.indexer_loss is not None
    loss = model.project(out.hidden_BTD).square().mean() + out.indexer_loss
    loss = loss + model.project(out.mtp_hidden_BTD).square().mean()
    loss.backward()
    silent = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not bool(p.grad.abs().max() > 0)
    ]
    # Six experts, few tokens: an expert nobody chose stays silent, nothing else may.
    assert [n for n in silent if ".experts." not in n] == []
