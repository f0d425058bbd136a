"""Two layers of V4-Flash at their real size and in their real dtypes, through every program path.

9.2 GB of random codes: all 256 experts in packed FP4, FP8 attention, the full vocabulary; a CSA
layer with hash routing and an HCA layer with score routing. Written, loaded lazily, run, converted
to the transformers layout and back. Stacked tensors have more than 2^31 bytes here, and a program
that copied the model would show in its memory.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual.model.checkpoint import Checkpoint, load_model
from rorqual.model.config import V4_FLASH
from rorqual.model.convert import convert_checkpoint
from rorqual.model.layout import StoredTensor, official_tensors, tensor_table
from rorqual.model.shards import write_shards
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer
from rorqual.testing.weights import random_tensor

pytestmark = pytest.mark.slow

CONFIG = V4_FLASH.replace(
    num_hidden_layers=2, num_nextn_predict_layers=0, num_hash_layers=1, compress_ratios=(4, 128)
)
NEEDED_DISK_BYTES = 30 * 10**9
SHARD_BYTES = 2 * 10**9
POOL_BYTES = 2**27
MAX_FLOATS = 2**23
MAX_EXTRA_MEMORY_BYTES = 2**30


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory that is emptied afterwards, whatever happened."""
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED_DISK_BYTES:
        pytest.skip(f"needs 30 GB of free disk in {tmp_path}, has {free / 1e9:.0f} GB")
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


def random_pieces(seed: int) -> Callable[[StoredTensor], Iterator[Tensor]]:
    """A ``pieces`` function for ``write_shards``, fast enough for gigabytes.

    Packed FP4 codes are cut from one pool of random bytes at random places; any byte is valid.
    Large float tensors repeat one random block of rows.
    """
    rng = np.random.default_rng(seed)
    pool = torch.from_numpy(np.frombuffer(bytearray(rng.bytes(POOL_BYTES)), dtype=np.int8))

    def pieces(stored: StoredTensor) -> Iterator[Tensor]:
        (spec,) = stored.parts
        size = math.prod(spec.shape)
        if spec.dtype == torch.int8:
            start = int(rng.integers(POOL_BYTES - size))
            yield pool[start : start + size]
        elif spec.dtype == torch.bfloat16 and size > MAX_FLOATS:
            rows, columns = spec.shape
            repeats = math.ceil(size / MAX_FLOATS)
            while rows % repeats:
                repeats += 1
            block = random_tensor(replace(spec, shape=(rows // repeats, columns)), CONFIG, rng)
            for _ in range(repeats):
                yield block
        else:
            yield random_tensor(spec, CONFIG, rng)

    return pieces


def digests(directory: Path) -> dict[str, str]:
    """SHA-1 of every file."""
    found = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha1").hexdigest()
    return found


def private_memory() -> int:
    """Bytes this process has to itself, mapped files not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def few_logits(model: Transformer) -> Tensor:
    """Logits after a prefill of four tokens, which finishes a CSA entry, and one decoded token.

    Few and equal tokens, because every expert they are sent to has to be unpacked.
    """
    state = model.new_state()
    first = model(torch.tensor([7, 7, 7, 7]), [Segment(state, 4)])
    second = model(torch.tensor([129_279]), [Segment(state, 1)])
    return torch.cat((first, second))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as on Linux")
def test_real_size_layers_are_written_run_and_converted_both_ways_bit_exactly(disk: Path) -> None:
    official, stacked, back = disk / "official", disk / "stacked", disk / "back"
    table = tensor_table(CONFIG)
    written = write_shards(
        official,
        official_tensors(table),
        random_pieces(0),
        config=CONFIG.to_dict(),
        max_shard_bytes=SHARD_BYTES,
    )
    assert 9.0e9 < written == sum(spec.nbytes for spec in table)
    before = digests(official)

    baseline = private_memory()
    model = load_model(official)
    assert private_memory() - baseline < MAX_EXTRA_MEMORY_BYTES
    assert model.config.numerics == "official"
    expected = few_logits(model)
    assert expected.shape == (2, CONFIG.vocab_size)
    assert expected.isfinite().all()
    assert expected.std() > 0.1
    del model

    highest = 0

    def watch(done: int, total: int) -> None:
        nonlocal highest
        highest = max(highest, private_memory())

    baseline = private_memory()
    convert_checkpoint(official, stacked, to="transformers", progress=watch)
    shutil.rmtree(official)
    experts = Checkpoint(stacked).shards.entries["model.layers.1.mlp.experts.gate_up_proj"]
    assert experts.shape == (256, 4096, 2048)
    assert torch.equal(few_logits(load_model(stacked)), expected)

    convert_checkpoint(stacked, back, to="official", max_shard_bytes=SHARD_BYTES, progress=watch)
    shutil.rmtree(stacked)
    assert highest - baseline < MAX_EXTRA_MEMORY_BYTES
    assert digests(back) == before
