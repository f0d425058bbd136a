"""The cache on disk: nothing finished is lost by a crash, nothing damaged is ever served."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rorqual.engine.cache.directory import Directory, Segment
from rorqual.engine.cache.segment import (
    HEADER_NBYTES,
    RECORD_NBYTES,
    Payload,
    SegmentWriter,
    read_records,
)
from rorqual.engine.cache.store import Store
from rorqual.errors import ConfigError

SOURCE = Path(__file__).parents[2] / "src"
IDENTITY = b"0123456789abcdef"
BLOCK, CHECKPOINT = 100, 300


def store(path: Path, *, limit: int = 1 << 20, queue: int = 1 << 20, block: int = BLOCK) -> Store:
    return Store(
        path, identity=IDENTITY, block_nbytes=block, checkpoint_nbytes=CHECKPOINT,
        limit_bytes=limit, queue_bytes=queue,
    )  # fmt: skip


def key(chain: int, index: int) -> bytes:
    """Key of block ``index`` of a chain; -1 is the root."""
    if index < 0:
        return IDENTITY
    return hashlib.blake2b(b"%d %d" % (chain, index), digest_size=16).digest()


KEYS = [(i, key(0, i)) for i in range(8)]
"""The first chain's beginning."""


def payload(name: bytes, size: int = BLOCK) -> bytes:
    return hashlib.shake_128(name).digest(size)


def offer(target: Store, chain: int, indices: range, block: int = BLOCK) -> None:
    for i in indices:
        name = key(chain, i)
        assert target.offer("block", name, key(chain, i - 1), payload(name, block))


def write_segment(path: Path, blocks: Sequence[tuple[int, bytes]]) -> str:
    """As another process does that sees nothing of what is there; the segment's name."""
    writer = SegmentWriter(next(path.glob("v1-*")), "block", BLOCK, IDENTITY)
    writer.append([Payload(k, key(0, i - 1), payload(k)) for i, k in blocks])
    writer.close()
    return writer.name


def remove_segment(path: Path, name: str) -> None:
    for file in path.rglob(f"{name}.*"):
        file.unlink()


def length(source: Store, chain: int, block: int = BLOCK) -> int:
    """Blocks of a chain that can be read from its start on, after checking each."""
    for i in range(1 << 30):
        found = source.read("block", key(chain, i))
        if found is None:
            return i
        assert found == payload(key(chain, i), block), "a wrong block was served"
    raise AssertionError


def test_blocks_and_checkpoints_survive_a_restart(tmp_path: Path) -> None:
    first = store(tmp_path)
    offer(first, 0, range(20))
    mark = key(0, 19)
    first.offer("checkpoint", mark, mark, payload(mark, CHECKPOINT))
    first.flush()
    assert length(first, 0) == 20
    first.close()
    second = store(tmp_path)
    assert length(second, 0) == 20
    assert second.read("checkpoint", mark) == payload(mark, CHECKPOINT)
    assert second.read("checkpoint", key(0, 3)) is None
    assert second.num_known([key(0, i) for i in range(30)]) == 20
    second.close()


def test_a_block_that_continues_nothing_is_not_written(tmp_path: Path) -> None:
    target = store(tmp_path)
    target.offer("block", key(0, 1), key(0, 0), payload(key(0, 1)))
    target.flush()
    assert target.stats().num_skipped == 1
    assert not target.has("block", key(0, 1))
    offer(target, 0, range(3))
    target.flush()
    assert length(target, 0) == 3
    target.close()


def test_a_full_queue_refuses_and_never_waits(tmp_path: Path) -> None:
    target = store(tmp_path, queue=10 * BLOCK)
    gate = threading.Event()
    with target._directory.locked():  # the writer cannot make a segment meanwhile
        threading.Thread(target=gate.set).start()
        assert gate.wait(10)
        accepted = 0
        while target.offer(
            "block", key(0, accepted), key(0, accepted - 1), payload(key(0, accepted))
        ):
            accepted += 1
        assert target.stats().queued_bytes <= 10 * BLOCK
        with pytest.raises(TimeoutError):
            target.flush(timeout_s=0.01)
    target.flush()
    offer(target, 0, range(accepted, accepted + 5))
    target.flush()
    assert length(target, 0) == accepted + 5
    target.close()
    assert not target.offer("block", key(1, 0), IDENTITY, payload(key(1, 0)))


def test_another_process_is_seen_and_vanished_files_are_misses(tmp_path: Path) -> None:
    reader, writer = store(tmp_path), store(tmp_path)
    offer(writer, 0, range(5))
    writer.flush()
    assert length(reader, 0) == 0
    reader.refresh()
    assert length(reader, 0) == 5
    offer(writer, 0, range(5, 9))
    writer.flush()
    reader.refresh()
    assert length(reader, 0) == 9
    writer.close()
    for path in tmp_path.rglob("*.data"):
        path.unlink()
    assert length(reader, 0) == 0
    offer(reader, 0, range(1))  # what is found missing can be written again
    reader.flush()
    assert length(reader, 0) == 1
    reader.close()


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("is_seen", [False, True])
def test_what_processes_wrote_twice_is_read_from_any(
    tmp_path: Path, gone: int, is_seen: bool
) -> None:
    target = store(tmp_path)
    offer(target, 0, range(2))
    target.flush()
    names = [write_segment(tmp_path, KEYS[1:]) for _ in range(3)]
    target.refresh()
    assert length(target, 0) == len(KEYS)
    remove_segment(tmp_path, names[gone])
    if is_seen:
        target.refresh()
    assert length(target, 0) == len(KEYS)
    assert target.stats().num_damaged == (len(KEYS) - 1 if gone == 2 and not is_seen else 0)
    target.refresh()
    assert length(target, 0) == target.stats().num_blocks == len(KEYS)
    target.close()


def test_what_was_written_twice_is_deleted_first(tmp_path: Path) -> None:
    target = store(tmp_path, limit=60 * BLOCK)
    for _ in range(2):
        for part in (KEYS[:4], KEYS[4:]):
            write_segment(tmp_path, part)
    while target.stats().num_deleted < 2:
        num_kept = length(target, 1)
        offer(target, 1, range(num_kept, num_kept + 1))
        target.flush()
    assert length(target, 0) == len(KEYS)
    assert length(target, 1) > num_kept
    target.close()


def test_what_was_cut_off_counts_again_when_the_gap_is_filled(tmp_path: Path) -> None:
    target = store(tmp_path)
    mark = key(0, 7)
    parts = [KEYS[:2] + KEYS[6:7], KEYS[2:4], KEYS[4:6] + KEYS[7:]]
    names = [write_segment(tmp_path, part) for part in parts]
    target.refresh()
    target.offer("checkpoint", mark, mark, payload(mark, CHECKPOINT))
    target.flush()
    assert length(target, 0) == target.stats().num_blocks == 8
    remove_segment(tmp_path, names[1])
    target.refresh()
    assert length(target, 0) == target.stats().num_blocks == 2
    assert not target.has("block", key(0, 7))
    assert target.read("checkpoint", mark) is None
    written = target.stats().written_bytes
    target.offer("block", key(0, 8), mark, payload(key(0, 8)))
    target.flush()
    assert target.stats().num_skipped == 1, "what nobody can find was written"
    offer(target, 0, range(2, 9))
    target.flush()
    assert target.stats().written_bytes == written + 3 * BLOCK, "what was still there was written"
    assert length(target, 0) == target.stats().num_blocks == 9
    assert target.read("checkpoint", mark) == payload(mark, CHECKPOINT)
    target.close()
    again = store(tmp_path)
    assert length(again, 0) == again.stats().num_blocks == 9
    again.close()


def test_the_index_knows_exactly_what_can_be_walked_to(tmp_path: Path) -> None:
    rng = random.Random(5)
    directory = Directory(
        tmp_path, identity=IDENTITY, payload_nbytes={"block": 1, "checkpoint": 2}, half_life_s=1e9
    )
    parents = {key(0, i): key(0, rng.randrange(max(-1, i - 3), i)) for i in range(60)}
    held: dict[str, list[bytes]] = {}
    writers: dict[str, SegmentWriter] = {}

    def on_disk(block: bytes) -> bool:
        return block == IDENTITY or any(block in blocks for blocks in held.values())

    def walkable(block: bytes) -> bool:
        return on_disk(block) and (block == IDENTITY or walkable(parents[block]))

    def check() -> None:
        found = {block for block in parents if directory.find("block", block)}
        assert found == {block for block in parents if walkable(block)}
        assert directory.num_blocks == len(found)

    for step in range(1500):
        if not held or (step % 3 == 0 and len(held) < 9):
            writer = SegmentWriter(directory.path, "block", 1, IDENTITY)
            writers[writer.name], held[writer.name] = writer, []
        name = rng.choice(list(held))
        if rng.random() < 0.3:
            writers.pop(name).close()
            remove_segment(directory.path, name)
            del held[name]
        else:
            more = rng.sample(list(parents), rng.randint(1, 8))
            if rng.random() < 0.5:
                more.sort(key=list(parents).index)
            writers[name].append([Payload(k, parents[k], b"x") for k in more])
            held[name] += more
        if rng.random() < 0.5:
            directory.refresh()
            check()
            place = directory.find("block", rng.choice(list(parents)))
            if place is not None and rng.random() < 0.5:
                directory.forget("block", place)  # damaged
                held[place.segment.name].remove(place.record.key)
                check()
    for writer in writers.values():
        writer.close()
    directory.refresh()
    while (least := directory.take_least()) is not None:
        directory.delete(least)
        del held[least.name]
        check()


def test_what_nobody_reads_is_deleted_first(tmp_path: Path) -> None:
    target = store(tmp_path)
    spare, _, middle, rest = (
        write_segment(tmp_path, blocks) for blocks in (KEYS, KEYS[:2], KEYS[2:4], KEYS[4:])
    )
    marks = [key(0, 3), key(0, 7)]  # one will be gone, one cut off
    target.refresh()
    for mark in marks:
        assert target.offer("checkpoint", mark, mark, payload(mark, CHECKPOINT))
    target.close()
    other = store(tmp_path)  # in segments of its own, with fewer payloads
    offer(other, 1, range(1))
    assert other.offer("checkpoint", key(1, 0), key(1, 0), payload(key(1, 0), CHECKPOINT))
    other.close()
    directory = Directory(
        tmp_path, identity=IDENTITY, half_life_s=1e9,
        payload_nbytes={"block": BLOCK, "checkpoint": CHECKPOINT},
    )  # fmt: skip

    def delete() -> Segment:
        least = directory.take_least()
        assert least is not None
        directory.delete(least)
        return least

    assert delete().name == spare
    remove_segment(tmp_path, middle)
    directory.refresh()
    dead = [delete() for _ in range(2)]
    assert {segment.kind for segment in dead} == {"block", "checkpoint"}
    assert rest in {segment.name for segment in dead}
    assert all(directory.find("block", k) for k in (key(0, 1), key(1, 0)))
    assert directory.find("checkpoint", key(1, 0))


def test_a_segment_cut_off_while_it_is_written_is_left_and_deleted(tmp_path: Path) -> None:
    target = store(tmp_path, limit=60 * BLOCK)
    base = write_segment(tmp_path, KEYS[:2])
    target.refresh()
    offer(target, 0, range(2, 3))
    target.flush()
    (mine,) = {path.stem for path in tmp_path.rglob("*.index")} - {base}
    remove_segment(tmp_path, base)
    offer(target, 1, range(1))
    target.flush()
    assert len(list(tmp_path.rglob("*.index"))) == 2, "written into what is to be deleted"
    offer(target, 1, range(1, 30))
    target.flush()
    assert target.stats().num_deleted == 0
    kept = 30
    while target.stats().num_deleted == 0:
        offer(target, 1, range(kept, kept + 1))
        target.flush()
        kept += 1
    assert not list(tmp_path.rglob(f"{mine}.*"))
    assert length(target, 1) == kept
    target.close()


def test_a_segment_is_deleted_though_its_writer_lives_if_it_is_cut_off(tmp_path: Path) -> None:
    target = store(tmp_path, limit=60 * BLOCK)
    base = write_segment(tmp_path, KEYS[:2])
    target.refresh()
    offer(target, 0, range(2, 4))
    target.flush()
    (mine,) = {path.stem for path in tmp_path.rglob("*.index")} - {base}
    chain = [(i, key(0, i)) for i in range(100, 160)]
    remove_segment(tmp_path, base)
    write_segment(tmp_path, [(0, key(0, 0)), *chain])
    mark = key(0, 0)
    target.refresh()
    target.offer("checkpoint", mark, mark, payload(mark, CHECKPOINT))  # no block: none is sealed
    target.flush()
    assert target.stats().num_deleted > 0
    assert not list(tmp_path.rglob(f"{mine}.*"))
    target.close()


def test_the_limit_holds_and_what_is_used_stays(tmp_path: Path) -> None:
    limit = 200 * BLOCK
    target = store(tmp_path, limit=limit)
    offer(target, 0, range(30))
    target.flush()
    for chain in range(1, 18):
        target.use([key(0, i) for i in range(30)])
        offer(target, chain, range(20))
        target.flush()
        size = sum(path.stat().st_size for path in tmp_path.rglob("*.*"))
        assert size <= limit * 17 // 16 + BLOCK
    assert target.stats().num_deleted > 0
    assert length(target, 0) == 30
    assert length(target, 17) == 20, "the newest was deleted"
    assert length(target, 1) < 20
    target.close()
    assert length(store(tmp_path, limit=limit), 0) == 30


def test_a_prefix_longer_than_the_limit_keeps_its_beginning(tmp_path: Path) -> None:
    target = store(tmp_path, limit=100 * BLOCK)
    for begin in range(0, 400, 5):
        offer(target, 0, range(begin, begin + 5))
        target.flush()
    assert length(target, 0) >= 60
    assert target.stats().nbytes <= 110 * BLOCK
    assert target.stats().num_skipped > 100, "what can never be found again was written"
    target.close()


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact")
    target = store(path)
    offer(target, 0, range(6))
    target.close()
    return path


def copies(intact: Path, scratch: Path, suffix: str, lengths: range) -> Iterator[tuple[int, Path]]:
    """The directory with one file cut to each length in turn."""
    for size in lengths:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(intact, scratch)
        file = next(scratch.rglob(f"*.{suffix}"))
        file.write_bytes(file.read_bytes()[:size])
        yield size, scratch


def test_files_cut_anywhere_lose_only_what_is_gone(intact: Path, tmp_path: Path) -> None:
    end = HEADER_NBYTES + 6 * RECORD_NBYTES
    for size, copy in copies(intact, tmp_path / "c", "index", range(0, end, 9)):
        target = store(copy)
        assert length(target, 0) == max(0, (size - HEADER_NBYTES) // RECORD_NBYTES)
        target.close()
    for size, copy in copies(intact, tmp_path / "d", "data", range(0, 6 * BLOCK, 37)):
        target = store(copy)
        assert length(target, 0) == size // BLOCK
        target.close()


def test_flipped_bits_are_never_served(intact: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for case in range(25):
        shutil.copytree(intact, tmp_path / str(case))
        for file in (tmp_path / str(case)).rglob("*.*"):
            data = bytearray(file.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        target = store(tmp_path / str(case))
        length(target, 0)  # checks what it reads
        offer(target, 0, range(6))
        target.flush()
        assert length(target, 0) >= 1
        target.close()


def test_damage_cuts_off_what_follows_until_it_is_written_again(tmp_path: Path) -> None:
    target = store(tmp_path)
    offer(target, 0, range(8))
    target.flush()
    (data,) = tmp_path.rglob("*.data")
    whole = data.read_bytes()
    data.write_bytes(whole[: 3 * BLOCK] + bytes(BLOCK) + whole[4 * BLOCK :])
    assert target.num_known([k for _, k in KEYS]) == 8
    assert length(target, 0) == target.stats().num_blocks == 3
    assert target.stats().num_damaged == 1
    assert not target.has("block", key(0, 7))
    written = target.stats().written_bytes
    offer(target, 0, range(3, 8))
    target.flush()
    assert target.stats().written_bytes == written + BLOCK
    assert length(target, 0) == target.stats().num_blocks == 8
    target.close()


def test_a_damaged_record_is_left_out_and_its_neighbours_stay(intact: Path, tmp_path: Path) -> None:
    whole = next(intact.rglob("*.index")).read_bytes()
    slots = [record.slot for record in read_records(next(intact.rglob("*.index")), 0)[0]]
    assert slots == list(range(6))
    for at in range(HEADER_NBYTES, len(whole)):
        data = bytearray(whole)
        data[at] ^= 16
        (tmp_path / "index").write_bytes(data)
        records, num_slots = read_records(tmp_path / "index", 0)
        damaged = (at - HEADER_NBYTES) // RECORD_NBYTES
        assert [record.slot for record in records] == [i for i in slots if i != damaged]
        assert num_slots == 6


def test_half_made_segments_are_swept_but_not_those_being_written(tmp_path: Path) -> None:
    living = store(tmp_path)
    offer(living, 0, range(2))
    living.flush()
    directory = next(tmp_path.glob("v1-*"))
    (directory / "0-dead.data").write_bytes(b"x")
    (directory / "1-dead.index").write_bytes(b"torn")
    before = SegmentWriter(directory, "block", BLOCK, IDENTITY)
    other = store(tmp_path)
    names = {path.name for path in directory.iterdir()}
    assert not {name for name in names if "dead" in name}
    assert {f"{before.name}.index", f"{before.name}.data"} <= names
    assert length(other, 0) == 2
    for target in (before, living, other):
        target.close()


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_disk_that_cannot_be_written_costs_the_cache_only(
    tmp_path: Path, is_closed: bool
) -> None:
    target = store(tmp_path)
    offer(target, 0, range(2))
    target.flush()
    writer, _ = target._writers["block"]
    writer._data.close()
    if not is_closed:  # writing raises OSError; to the closed file, ValueError
        writer._data = open(os.devnull, "rb", buffering=0)  # noqa: SIM115
    offer(target, 0, range(2, 4))
    target.flush()
    assert target.stats().error is not None
    assert length(target, 0) == 2
    assert not target.offer("block", key(1, 0), IDENTITY, payload(key(1, 0)))
    target.close()


def test_a_limit_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        store(tmp_path, limit=10 * CHECKPOINT)


CHILD = """
import hashlib, random, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from rorqual.engine.cache.store import Store
path, (chain, seed, limit, at, count, block) = Path(sys.argv[2]), map(int, sys.argv[3:])
rng, end = random.Random(seed), at + count

def key(index):
    if index < 0:
        return b"0123456789abcdef"
    return hashlib.blake2b(b"%d %d" % (chain, index), digest_size=16).digest()

store = Store(path, identity=key(-1), block_nbytes=block, checkpoint_nbytes=300, limit_bytes=limit)
while at < end:
    more = rng.randint(1, 6)
    for i in range(at, at + more):
        payload = hashlib.shake_128(key(i)).digest(block)
        assert store.offer("block", key(i), key(i - 1), payload)
    store.flush()
    at += more
    print(at, flush=True)
store.close()
"""
"""Writes one chain from block ``at`` on, and says how far it is durable."""
BIG_BLOCK = 8_000
"""Large enough for a kill to fall inside a write."""


def start(path: Path, *numbers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(SOURCE), str(path), *map(str, numbers), str(BIG_BLOCK)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_loses_nothing_it_was_told_is_durable(tmp_path: Path) -> None:
    rng = random.Random(1)
    limit, found = 1 << 30, 0
    for seed in range(12):
        child = start(tmp_path, 0, seed, limit, found, 1 << 20)
        assert child.stdout is not None
        for _ in range(rng.randint(1, 6)):
            durable = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest, errors = child.communicate(timeout=60)
        assert errors == ""
        durable = max([durable, *(int(line) for line in rest.split("\n")[:-1])])
        target = store(tmp_path, limit=limit, block=BIG_BLOCK)
        found = length(target, 0, BIG_BLOCK)
        assert found >= durable
        assert target.stats().num_damaged == 0
        target.close()
    assert found > 50


def test_processes_that_share_and_outgrow_a_directory_do_not_corrupt_it(tmp_path: Path) -> None:
    limit = 60 * BIG_BLOCK
    children = [start(tmp_path, i // 2, i, limit, 0, 60) for i in range(4)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert (child.returncode, errors) == (0, "")
    target = store(tmp_path, limit=limit, block=BIG_BLOCK)
    assert length(target, 0, BIG_BLOCK) + length(target, 1, BIG_BLOCK) >= 40
    target.close()
