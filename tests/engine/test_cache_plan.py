"""Plans recompute the least, and the tree gives up what is worth least."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.engine.cache.plan import (
    CheckpointPolicy,
    checkpoint_share,
    last_boundary,
    next_stop,
    plan_reuse,
)
from rorqual.engine.cache.prefix_tree import Node, PrefixTree
from rorqual.errors import ConfigError
from rorqual.kernels.layout import BLOCK_TOKENS

BLOCK_NBYTES = 1000


def plan(prompt: int, matched: int, checkpoint: int = 0, replay: int = 1024):
    return plan_reuse(
        prompt_tokens=prompt, matched_tokens=matched, checkpoint=checkpoint, replay_tokens=replay
    )


@pytest.mark.parametrize(
    ("prompt", "matched", "checkpoint", "restart", "exact_from"),
    [
        (1000, 0, 0, 0, 0),
        (4000, 3968, 3968, 3968, 3968),
        (4000, 3968, 0, 2944, 3968),  # windows rebuilt
        (4000, 3968, 2048, 2944, 3968),  # the checkpoint is further back than a replay
        (4000, 3968, 3072, 3072, 3072),
        (4000, 3968, 2944, 2944, 2944),  # equal: the checkpoint is exact sooner
        (1000, 896, 0, 0, 0),  # a replay from the start
    ],
)
def test_the_restart_that_computes_least(
    prompt: int, matched: int, checkpoint: int, restart: int, exact_from: int
) -> None:
    got = plan(prompt, matched, checkpoint)
    assert (got.restart, got.exact_from) == (restart, exact_from)
    assert got.cached_tokens + got.replayed_tokens + got.missed_tokens == prompt
    assert got.from_checkpoint == (restart > 0 and restart == checkpoint)


@given(st.integers(1, 10_000))
def test_the_last_token_is_always_computed(num_tokens: int) -> None:
    boundary = last_boundary(num_tokens)
    assert boundary < num_tokens <= boundary + BLOCK_TOKENS
    assert boundary % BLOCK_TOKENS == 0


policies = st.builds(
    CheckpointPolicy,
    kind=st.sampled_from(["full", "periodic", "zero"]),
    period_tokens=st.integers(1, 6).map(lambda n: n * BLOCK_TOKENS),
    dense_tokens=st.none() | st.integers(1, 4).map(lambda n: n * BLOCK_TOKENS),
    at_ends=st.booleans(),
)


@given(policies, st.data())
def test_stops_are_exactly_the_boundaries_where_something_is_kept(
    policy: CheckpointPolicy, data: st.DataObject
) -> None:
    prompt = data.draw(st.integers(1, 3000))
    matched = data.draw(st.integers(0, last_boundary(prompt) // BLOCK_TOKENS)) * BLOCK_TOKENS
    checkpoint = data.draw(st.integers(0, matched // BLOCK_TOKENS)) * BLOCK_TOKENS
    chosen = plan(prompt, matched, checkpoint, replay=300)
    position = data.draw(st.integers(chosen.restart, prompt + 500))
    stop = next_stop(policy, chosen, position)
    end = prompt + 2000
    due = [
        boundary
        for boundary in range(0, end, BLOCK_TOKENS)
        if boundary > position
        and boundary >= chosen.exact_from
        and (
            checkpoint_share(policy, chosen, boundary) > 0
            or (policy.at_ends and boundary > last_boundary(prompt))
        )
    ]
    assert stop == (due[0] if due else None)


@pytest.mark.parametrize("name", ["period_tokens", "dense_tokens"])
def test_a_period_that_is_no_multiple_of_a_block_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        CheckpointPolicy(**{name: 100})  # type: ignore[arg-type]


def test_dense_checkpoints_count_for_half_of_those_twice_as_far_apart() -> None:
    policy = CheckpointPolicy(period_tokens=2048, dense_tokens=256)
    shares = {at: checkpoint_share(policy, plan(9999, 0), at) for at in range(128, 9984, 128)}
    assert {at for at, share in shares.items() if share} == set(range(256, 9984, 256))
    period = [shares[256 * n] for n in range(1, 9)]
    assert period == [1 / 8, 1 / 4, 1 / 8, 1 / 2, 1 / 8, 1 / 4, 1 / 8, 1]
    assert shares[4096] == 1
    assert checkpoint_share(policy, plan(9999, 0), 9984) == 1, "the prompt's last boundary"


def tokens_of(*blocks: int) -> bytes:
    return np.repeat(np.array(blocks, np.int32), BLOCK_TOKENS).tobytes()


def grow(tree: PrefixTree, *path: int, first_block: int, now: float = 0.0) -> list[Node]:
    """Add what is missing of a path of blocks, numbered from ``first_block`` on."""
    nodes = tree.match(tokens_of(*path), len(path))
    for i, value in enumerate(path[len(nodes) :]):
        parent = nodes[-1] if nodes else tree.root
        nodes.append(tree.add(parent, tokens_of(value), first_block + i, now))
    return nodes


def test_the_longest_prefix_is_found_through_branches() -> None:
    tree = PrefixTree(b"root", 60.0)
    grow(tree, 1, 2, 3, first_block=0)
    grow(tree, 1, 2, 4, 5, first_block=10)

    def found(*path: int) -> list[int]:
        return [node.block for node in tree.match(tokens_of(*path), len(path))]

    assert found(1, 2, 3, 9) == [0, 1, 2]
    assert found(1, 2, 4, 5) == [0, 1, 10, 11]
    assert found(1, 9) == [0]
    assert found(9) == []
    assert [node.block for node in tree.match(tokens_of(1, 2, 3), 2)] == [0, 1]
    assert tree.num_nodes == 5


def test_digests_name_the_whole_prefix_and_the_model() -> None:
    tree, other = PrefixTree(b"root", 60.0), PrefixTree(b"other", 60.0)
    digests = {node.digest for node in grow(tree, 1, 1, 2, first_block=0)}
    digests |= {node.digest for node in grow(tree, 2, 1, first_block=3)}
    digests |= {node.digest for node in grow(other, 1, 1, 2, first_block=0)}
    assert len(digests) == 8


def shed_blocks(tree: PrefixTree, now: float, held: set[int] = frozenset()) -> list[int]:
    def is_held(node: Node) -> bool:
        return node.block in held

    return [shed.block for shed in tree.shed(now, is_held, BLOCK_NBYTES)]


def test_leaves_go_first_and_what_is_used_goes_last() -> None:
    tree = PrefixTree(b"root", 60.0)
    used = grow(tree, 1, 2, 3, first_block=0)
    grow(tree, 1, 4, 5, first_block=10)
    tree.use(used, 0.0)
    assert shed_blocks(tree, 0.0) == [11, 10, 2, 1, 0]
    assert tree.num_nodes == 0


def test_old_uses_count_less() -> None:
    tree = PrefixTree(b"root", 60.0)
    old = grow(tree, 1, first_block=1)
    for _ in range(3):
        tree.use(old, 0.0)
    grow(tree, 2, first_block=2, now=300.0)
    assert shed_blocks(tree, 300.0) == [1, 2]


def test_nothing_a_sequence_holds_is_shed() -> None:
    tree = PrefixTree(b"root", 60.0)
    grow(tree, 1, 2, 3, first_block=0)
    grow(tree, 1, 2, 4, first_block=10)
    assert shed_blocks(tree, 0.0, held={0, 1, 10}) == [2]
    assert tree.num_nodes == 3


def test_checkpoints_go_before_entries_unless_used_much_more() -> None:
    tree = PrefixTree(b"root", 60.0)
    first, second = grow(tree, 1, 2, first_block=0)
    tree.keep_checkpoint(second, np.zeros(8 * BLOCK_NBYTES, np.uint8), 1.0)
    tree.keep_checkpoint(first, np.zeros(8 * BLOCK_NBYTES, np.uint8), 1.0)
    for _ in range(20):
        tree.use([first], 0.0)
    order = [
        (shed.checkpoint is not None, shed.block)
        for shed in tree.shed(0.0, lambda _: False, BLOCK_NBYTES)
    ]
    assert order == [(True, -1), (False, 1), (True, -1), (False, 0)]
