"""Checkpoints: what is written is read back, lazily, and every kind of damage is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.errors import CheckpointError, ConfigError
from rorqual.model.checkpoint import Checkpoint, load_model, save_model
from rorqual.model.config import ModelConfig, RopeScaling
from rorqual.model.layout import official_tensors, tensor_table
from rorqual.model.shards import write_shards
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer
from rorqual.testing.weights import random_state

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    moe_intermediate_size=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 128, 0),
    index_n_heads=4,
    index_head_dim=64,
    index_topk=16,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65_536),
)
INSTRUCT = CONFIG.replace(linear_dtype="fp8", expert_dtype="fp4", numerics="official")
BASE = INSTRUCT.replace(expert_dtype="fp8")
FORMATS = {"plain": CONFIG, "fp8 and fp4": INSTRUCT, "fp8": BASE}


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(random_state(config, seed), assign=True)
    return model


def logits(model: Transformer) -> Tensor:
    tokens_N = torch.arange(150) % model.config.vocab_size
    return model(tokens_N, [Segment(model.new_state(), 150)], all_logits=True)


def write_single(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """A checkpoint written by the safetensors library, whatever the tensors are."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    save_model(random_model(CONFIG), tmp_path / "model", max_shard_bytes=150_000)
    return tmp_path / "model"


def shard_of(path: Path, name: str) -> Path:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return path / index["weight_map"][name]


# ---- reading and writing ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("max_shard_bytes", [100_000, 2**40])
def test_a_saved_model_loads_with_the_same_bits_and_logits(
    kind: str, max_shard_bytes: int, tmp_path: Path
) -> None:
    model = random_model(FORMATS[kind])
    written = save_model(model, tmp_path / "a", max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "a")
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        twin = loaded.state_dict()[name]
        assert twin.dtype == tensor.dtype, name
        assert torch.equal(twin.view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(logits(loaded), logits(model))
    assert written == sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_quantised_tensors_are_stored_in_the_official_dtypes(tmp_path: Path) -> None:
    save_model(random_model(INSTRUCT), tmp_path, float_dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        spec.name: (spec.shape, spec.dtype) for spec in tensor_table(INSTRUCT)
    }
    expert = "layers.0.ffn.experts.3.w2."
    assert stored[expert + "weight"].shape == (64, 32)
    assert stored[expert + "weight"].dtype == torch.int8
    assert stored[expert + "scale"].dtype == torch.float8_e8m0fnu
    assert stored["layers.0.ffn.gate.tid2eid"].dtype == torch.int64


def test_shards_stay_under_the_limit_and_the_index_covers_them(saved: Path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = sorted(saved.glob("*.safetensors"))
    assert len(files) > 3
    assert {f.name for f in files} == set(index["weight_map"].values())
    sizes = {f.name: sum(t.nbytes for t in load_file(f).values()) for f in files}
    assert max(sizes.values()) <= 150_000
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_tensors_are_aligned_to_their_dtype_and_large_ones_to_cache_lines(tmp_path: Path) -> None:
    save_model(random_model(INSTRUCT), tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            width = {"F32": 4, "BF16": 2, "I64": 8}.get(entry["dtype"], 1)
            assert start % (width if (end - start) % 64 else 64) == 0, name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_loaded_model_is_mapped_from_its_file_and_not_copied(tmp_path: Path) -> None:
    save_model(random_model(CONFIG), tmp_path)
    model = load_model(tmp_path)
    ranges = [
        (int(low, 16), int(high, 16))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line
        for low, high in [line.split()[0].split("-")]
    ]
    for name, tensor in model.state_dict().items():
        assert any(low <= tensor.data_ptr() < high for low, high in ranges), name


def test_training_a_loaded_model_leaves_the_file_alone(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = load_model(saved)
    assert model.norm.weight.requires_grad
    with torch.no_grad():
        model.norm.weight.add_(1)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_floats_can_be_stored_and_loaded_in_another_dtype(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    save_model(model, tmp_path, float_dtype=torch.bfloat16)
    mapped, cast = load_model(tmp_path), load_model(tmp_path, dtype=torch.float32)
    assert mapped.state_dict()["layers.0.attn.wq_a.weight"].dtype == torch.bfloat16
    assert mapped.state_dict()["layers.0.hc_attn_fn"].dtype == torch.float32
    assert {t.dtype for t in cast.state_dict().values()} == {torch.float32, torch.int64}
    wanted = model.state_dict()["embed.weight"].bfloat16()
    assert torch.equal(mapped.state_dict()["embed.weight"], wanted)
    assert torch.equal(cast.state_dict()["embed.weight"], wanted.float())


def test_numerics_can_be_overridden_when_loading(tmp_path: Path) -> None:
    save_model(random_model(INSTRUCT), tmp_path)
    plain = load_model(tmp_path, numerics="plain", dtype=torch.float32)
    assert plain.config == INSTRUCT.replace(numerics="plain")
    rounded, exact = logits(load_model(tmp_path)), logits(plain)
    assert not torch.equal(rounded, exact)
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).mean() > 0.8


@pytest.mark.parametrize("kind", FORMATS)
def test_a_released_config_names_no_numerics_and_runs_as_it_was_released(kind: str) -> None:
    raw = FORMATS[kind].to_dict()
    raw.pop("numerics")
    assert ModelConfig.from_dict(raw) == FORMATS[kind]


def test_progress_counts_every_byte_when_saving_and_loading(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    written = save_model(random_model(CONFIG), tmp_path, progress=progress)
    for report in (calls, []):
        calls = report
        if not report:
            load_model(tmp_path, progress=progress)
        done = [d for d, _ in calls]
        assert done == sorted(done)
        assert calls[-1] == (written, written)


def test_older_scale_names_and_shared_copies_are_accepted(tmp_path: Path) -> None:
    model = random_model(BASE)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for name in [name for name in state if name.endswith(".scale")]:
        scale = state.pop(name)
        float_scale = scale.float() if "wq_a" in name else scale
        state[name.removesuffix(".scale") + ".weight_scale_inv"] = float_scale
    state["mtp.0.embed.weight"] = state["embed.weight"].clone()
    state["mtp.0.head.weight"] = state["head.weight"].clone()
    write_single(tmp_path, BASE, state)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


# ---- replacing a checkpoint ---------------------------------------------------------------------


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    other = random_model(CONFIG, seed=1)
    save_model(other, saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert torch.equal(logits(load_model(saved)), logits(other))


def test_a_model_can_be_saved_onto_the_files_it_is_mapped_from(saved: Path) -> None:
    model = load_model(saved)
    before = logits(model)
    save_model(model, saved, max_shard_bytes=150_000)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(load_model(saved)), before)


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from test_checkpoint import CONFIG, random_model
from rorqual.model.checkpoint import save_model
def progress(done, total):
    if done > total * float(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
save_model(random_model(CONFIG, seed=1), Path(sys.argv[1]), max_shard_bytes=150_000,
           progress=progress)
"""


def test_a_killed_save_leaves_the_old_checkpoint_and_the_next_one_cleans_up(saved: Path) -> None:
    source = str(Path(__file__).parent)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([source, *sys.path]))
    command = [sys.executable, "-c", KILLED_SAVE, str(saved), "0.7"]
    run = subprocess.run(command, env=env, timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL
    assert list(saved.glob("*.partial"))
    assert torch.equal(logits(load_model(saved)), logits(random_model(CONFIG)))
    save_model(random_model(CONFIG, seed=2), saved)
    assert not list(saved.glob("*.partial"))


class Stop(BaseException):
    """Stands for the end of the process at one moment."""


class Stopper:
    """Refuses, from the n-th on, every file removal and renaming inside one directory.

    Python's audit events see them all, so stopping after each in turn visits every state that a
    kill during the commit can leave behind. Clean-up code cannot run either.
    """

    def __init__(self) -> None:
        self.directory: Path | None = None
        self.allowed = 0
        sys.addaudithook(self._see)

    def __call__(self, directory: Path, allowed: int, action: Callable[[], object]) -> bool:
        """Run ``action``, allowing that many changes; whether it came to its end."""
        self.directory, self.allowed = directory, allowed
        try:
            action()
        except Stop:
            return False
        finally:
            self.directory = None
        return True

    def _see(self, event: str, args: tuple[object, ...]) -> None:
        if self.directory is None or event not in ("os.remove", "os.rename"):
            return
        if str(args[0]).startswith(str(self.directory)):
            self.allowed -= 1
            if self.allowed < 0:
                raise Stop


def test_a_save_stopped_at_any_moment_leaves_the_old_model_the_new_one_or_none(
    tmp_path: Path,
) -> None:
    old, new = random_model(CONFIG), random_model(CONFIG, seed=1)
    save_model(old, tmp_path / "old", max_shard_bytes=250_000)
    left = {"old": logits(old), "new": logits(new)}
    stopper, outcomes, finished = Stopper(), [], False
    while not finished:
        path = tmp_path / f"after-{len(outcomes)}"
        shutil.copytree(tmp_path / "old", path)
        finished = stopper(path, len(outcomes), lambda path=path: save_model(new, path))  # type: ignore[misc]
        try:
            seen = logits(load_model(path))
        except CheckpointError:
            outcomes.append("none")
        else:
            outcomes.append(next(name for name, wanted in left.items() if wanted.equal(seen)))
    assert [name for name, _ in groupby(outcomes)] == ["old", "none", "new"]


def test_a_failing_disk_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file"):
        save_model(random_model(CONFIG), tmp_path / "file" / "model")


# ---- damage -------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Tensor]], None], path: Path) -> Path:
    state = {name: t.clone() for name, t in random_model(CONFIG).state_dict().items()}
    change(state)
    write_single(path, CONFIG, state)
    return path


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    name = "layers.1.attn.indexer.weights_proj.weight"
    path = edited(lambda state: state.__delitem__(name), tmp_path)
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is missing"):
        load_model(path)


def test_an_unexpected_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    path = edited(lambda state: state.update({"layers.7.x": torch.ones(1)}), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unexpected .* 'layers\.7\.x'"):
        load_model(path)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    path = edited(lambda state: state.update({"norm.weight": torch.ones(63)}), tmp_path)
    with pytest.raises(CheckpointError, match=r"'norm\.weight' has shape \(63,\), expected \(64,"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("norm.weight", torch.int64),
        ("embed.weight", torch.float8_e4m3fn),
        ("layers.0.ffn.gate.tid2eid", torch.float32),
    ],
)
def test_a_tensor_of_the_wrong_dtype_is_named(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = edited(lambda state: state.update({name: state[name].to(dtype)}), tmp_path)
    with pytest.raises(CheckpointError, match=rf"'{name}' has dtype {dtype}, expected"):
        load_model(path)


def test_scales_that_are_not_powers_of_two_are_refused(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in random_model(BASE).state_dict().items()}
    name = "layers.0.attn.wq_b"
    state[name + ".weight_scale_inv"] = state.pop(name + ".scale").float() * 1.5
    write_single(tmp_path, BASE, state)
    with pytest.raises(CheckpointError, match=rf"'{name}\.weight_scale_inv' is not a power of two"):
        load_model(tmp_path)


def test_a_missing_shard_is_named_with_a_tensor_it_holds(saved: Path) -> None:
    shard = shard_of(saved, "layers.1.attn.wq_b.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: shard is missing; it holds \d+ ten"):
        load_model(saved)


def test_a_truncated_shard_names_the_tensor_cut_off(saved: Path) -> None:
    shard = shard_of(saved, "layers.1.attn.wq_b.weight")
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__")
    last = max(entries, key=lambda name: entries[name]["data_offsets"][1])
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated: tensor '{last}' ends"):
        load_model(saved)


@pytest.mark.parametrize("length", [0, 5, 100])
def test_a_shard_cut_off_in_its_header_is_named(saved: Path, length: int) -> None:
    shard = shard_of(saved, "norm.weight")
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated in its header"):
        load_model(saved)


def test_a_shard_of_other_bytes_is_named(saved: Path) -> None:
    shard = shard_of(saved, "norm.weight")
    shard.write_bytes(b"\x10" + bytes(7) + b"not a safetensor" + bytes(100))
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(saved)


@pytest.mark.parametrize(
    "header",
    [b'{"norm.weight":{"dtype":"F32","shape":[64],"data_offsets":["a","b"]}}', b"[" * 50_000],
    ids=["offsets of text", "nested"],
)
def test_a_shard_with_an_odd_header_is_named(saved: Path, header: bytes) -> None:
    shard = shard_of(saved, "norm.weight")
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(saved)


def test_a_directory_in_place_of_a_shard_is_named(saved: Path) -> None:
    shard = shard_of(saved, "norm.weight")
    shard.unlink()
    shard.mkdir()
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(saved)


def test_a_directory_or_deep_nesting_in_place_of_the_index_is_named(saved: Path) -> None:
    index = saved / "model.safetensors.index.json"
    index.write_text("[" * 50_000)
    with pytest.raises(CheckpointError, match=index.name):
        load_model(saved)
    index.unlink()
    index.mkdir()
    with pytest.raises(CheckpointError, match=index.name):
        load_model(saved)


@pytest.mark.parametrize("expert", [-1, CONFIG.n_routed_experts])
def test_a_hash_table_that_names_no_expert_is_refused(expert: int, tmp_path: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"

    def change(state: dict[str, Tensor]) -> None:
        state[name][3, 1] = expert

    with pytest.raises(CheckpointError, match=rf"'{name}' names experts"):
        load_model(edited(change, tmp_path))


def edit_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_index_and_shards_must_agree(saved: Path) -> None:
    file = (saved / "model.safetensors.index.json").read_text()
    shard = shard_of(saved, "norm.weight").name
    edit_index(saved, lambda m: m.update({"ghost": shard}))
    with pytest.raises(CheckpointError, match=rf"{shard}: tensor 'ghost', listed in .* is missing"):
        load_model(saved)
    (saved / "model.safetensors.index.json").write_text(file)
    edit_index(saved, lambda m: m.__delitem__("norm.weight"))
    with pytest.raises(CheckpointError, match=rf"{shard}: tensor 'norm\.weight' is not listed"):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{"])
def test_a_broken_index_is_named(saved: Path, text: str) -> None:
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_model(saved)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "..", "", 3])
def test_an_index_may_only_name_files_beside_it(saved: Path, file: str) -> None:
    edit_index(saved, lambda m: m.update({"norm.weight": file}))
    with pytest.raises(CheckpointError, match=r"'norm\.weight' names"):
        load_model(saved)


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)


def test_a_single_file_beside_an_index_is_ambiguous(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="remove one"):
        load_model(saved)


# ---- the writer ---------------------------------------------------------------------------------


def test_a_tensor_written_short_or_in_the_wrong_dtype_is_named(tmp_path: Path) -> None:
    tensors = official_tensors(tensor_table(CONFIG))[:1]
    for piece in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3)):
        with pytest.raises(CheckpointError, match=r"'embed\.weight'"):
            write_shards(tmp_path, tensors, lambda _, piece=piece: [piece], config={})  # type: ignore[misc]
        assert list(tmp_path.iterdir()) == []


def test_opening_a_checkpoint_gives_tensors_by_official_name(saved: Path) -> None:
    checkpoint = Checkpoint(saved)
    assert checkpoint.layout == "official"
    assert [spec.name for spec in checkpoint.specs] == [s.name for s in tensor_table(CONFIG)]
    state = random_model(CONFIG).state_dict()
    assert torch.equal(
        checkpoint.read("layers.2.attn.wkv.weight"), state["layers.2.attn.wkv.weight"]
    )
