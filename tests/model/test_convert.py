"""Conversion between layouts: bit exact there and back, and what transformers itself reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from rorqual.errors import CheckpointError, ConfigError
from rorqual.kernels import reference
from rorqual.model.checkpoint import Checkpoint, load_model, save_model
from rorqual.model.config import PRESETS, ModelConfig, RopeScaling
from rorqual.model.convert import convert_checkpoint, fp4_to_fp8
from rorqual.model.layout import tensor_table
from rorqual.model.state import Segment
from rorqual.model.transformer import Transformer
from rorqual.model.transformers_layout import (
    from_transformers_config,
    to_transformers_config,
    transformers_tensors,
)
from rorqual.testing.weights import random_state

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    moe_intermediate_size=256,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 128, 0),
    index_n_heads=4,
    index_head_dim=64,
    index_topk=64,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65_536),
)
INSTRUCT = CONFIG.replace(linear_dtype="fp8", expert_dtype="fp4", numerics="official")
BASE = INSTRUCT.replace(expert_dtype="fp8")
FORMATS = {
    "plain": CONFIG,
    "fp8 and fp4": INSTRUCT,
    "fp8": BASE,
    "plain without mtp": CONFIG.replace(num_nextn_predict_layers=0, compress_ratios=(0, 4, 128)),
}


def write_random(config: ModelConfig, path: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of random bits, in the official layout."""
    model = Transformer(config)
    model.load_state_dict(random_state(config, 0, float_dtype=dtype), assign=True)
    save_model(model, path, max_shard_bytes=300_000)
    return path


def logits(model: Transformer) -> Tensor:
    tokens_N = torch.arange(150) % model.config.vocab_size
    return model(tokens_N, [Segment(model.new_state(), 150)], all_logits=True)


def transformers_logits(path: Path) -> Tensor:
    model, loading = DeepseekV4ForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        output: Tensor = model.eval()((torch.arange(150) % 61)[None]).logits[0]
    return output


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_there_and_back_gives_the_same_files(kind: str, tmp_path: Path) -> None:
    official = write_random(FORMATS[kind], tmp_path / "a")
    written = convert_checkpoint(official, tmp_path / "b", to="transformers", max_shard_bytes=99)
    back = convert_checkpoint(
        tmp_path / "b", tmp_path / "c", to="official", max_shard_bytes=300_000
    )
    assert written == back == sum(spec.nbytes for spec in tensor_table(FORMATS[kind]))
    assert files(tmp_path / "c") == files(official)
    assert Checkpoint(tmp_path / "b").layout == "transformers"


@pytest.mark.parametrize("kind", FORMATS)
def test_either_layout_loads_as_the_same_model(kind: str, tmp_path: Path) -> None:
    official = write_random(FORMATS[kind], tmp_path / "a")
    convert_checkpoint(official, tmp_path / "b", to="transformers")
    first, second = load_model(official), load_model(tmp_path / "b")
    assert first.config == second.config
    assert torch.equal(logits(first), logits(second))


def test_stacked_experts_keep_their_codes_and_scales(tmp_path: Path) -> None:
    official = write_random(INSTRUCT, tmp_path / "a")
    convert_checkpoint(official, tmp_path / "b", to="transformers")
    source, shards = Checkpoint(official), Checkpoint(tmp_path / "b").shards
    stem = "model.layers.2.mlp.experts."
    for stack, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
        for suffix, leaf in (("", "weight"), ("_scale_inv", "scale")):
            expected = torch.stack(
                [
                    torch.cat(
                        [
                            source.read(f"layers.2.ffn.experts.{e}.{w}.{leaf}").view(torch.uint8)
                            for w in parts
                        ]
                    )
                    for e in range(4)
                ]
            )
            assert torch.equal(shards.read(stem + stack + suffix).view(torch.uint8), expected)
    assert shards.entries[stem + "gate_up_proj"].shape == (4, 512, 64)
    assert shards.entries[stem + "down_proj_scale_inv"].shape == (4, 128, 8)


def test_other_files_travel_along_and_weights_of_other_formats_do_not(tmp_path: Path) -> None:
    official = write_random(CONFIG, tmp_path / "a")
    for name in ("tokenizer.json", "MODEL_CARD.md", "LICENSE", "pytorch_model.bin"):
        (official / name).write_text(name)
    convert_checkpoint(official, tmp_path / "b", to="transformers")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    expected = {"tokenizer.json", "MODEL_CARD.md", "LICENSE", "config.json", "model.safetensors"}
    assert names == expected
    assert (tmp_path / "b" / "LICENSE").read_text() == "LICENSE"


def test_a_failed_conversion_leaves_the_other_files_as_they_were(tmp_path: Path) -> None:
    official = write_random(CONFIG, tmp_path / "a")
    (official / "tokenizer.json").write_text("new")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_text("old")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(official, tmp_path / "b", to="transformers", progress=stop)
    assert files(tmp_path / "b") == {"tokenizer.json": b"old"}
    convert_checkpoint(official, tmp_path / "b", to="transformers")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "new"


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8 and fp4", "fp8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_expanded_weights_are_those_transformers_computes(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    source = Checkpoint(write_random(FORMATS[kind], tmp_path / "a"))
    convert_checkpoint(source.directory, tmp_path / "b", to="official", dtype=dtype)  # type: ignore[arg-type]
    plain = Checkpoint(tmp_path / "b")
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert [s.name for s in plain.specs] == [
        s.name for s in source.specs if not s.name.endswith(".scale")
    ]
    expand = Fp8Dequantize(None)._dequantize_one
    for spec in source.specs:
        if spec.dtype in (torch.int8, torch.float8_e4m3fn):
            scale = source.read(spec.name.removesuffix("weight") + "scale")
            expected = expand(source.read(spec.name), scale, output_dtype=torch_dtype)
            assert torch.equal(plain.read(spec.name), expected), spec.name
            exact = expand(source.read(spec.name), scale, output_dtype=torch.float32)
            assert torch.equal(expected.float(), exact), "the wider dtype rounded a value"


def test_an_expanded_checkpoint_gives_transformers_the_same_logits(tmp_path: Path) -> None:
    official = write_random(INSTRUCT, tmp_path / "a", dtype=torch.float32)
    convert_checkpoint(official, tmp_path / "b", to="transformers", dtype="fp32")
    convert_checkpoint(official, tmp_path / "c", to="official", dtype="fp32")
    expected = logits(load_model(official, numerics="plain"))
    for path in (tmp_path / "b", tmp_path / "c"):
        ours = logits(load_model(path, numerics="plain"))
        assert (ours - expected).abs().max() <= 1e-4
        assert (transformers_logits(path) - expected).abs().max() <= 1e-4


def test_plain_checkpoints_of_both_layouts_load_in_transformers(tmp_path: Path) -> None:
    official = write_random(CONFIG, tmp_path / "a", dtype=torch.float32)
    convert_checkpoint(official, tmp_path / "b", to="transformers")
    expected = logits(load_model(official))
    for path in (official, tmp_path / "b"):
        assert (transformers_logits(path) - expected).abs().max() <= 1e-4


def test_a_model_saved_by_transformers_loads_without_its_mtp_block(tmp_path: Path) -> None:
    official = write_random(CONFIG, tmp_path / "a", dtype=torch.float32)
    model = DeepseekV4ForCausalLM.from_pretrained(official, dtype=torch.float32)
    model.save_pretrained(tmp_path / "b", save_original_format=False)
    loaded = load_model(tmp_path / "b")
    assert loaded.config.compress_ratios == (0, 4, 128)
    assert torch.equal(logits(loaded), logits(load_model(official)))
    convert_checkpoint(tmp_path / "b", tmp_path / "c", to="official")
    assert torch.equal(logits(load_model(tmp_path / "c")), logits(loaded))


def test_fp4_experts_become_fp8_without_loss(tmp_path: Path) -> None:
    source = Checkpoint(write_random(INSTRUCT, tmp_path / "a"))
    convert_checkpoint(source.directory, tmp_path / "b", to="official", experts="fp8")
    result = Checkpoint(tmp_path / "b")
    assert result.config == BASE
    for spec in result.specs:
        if spec.role == "routed_expert" and spec.name.endswith(".weight"):
            scale_name = spec.name.removesuffix("weight") + "scale"
            before = reference.dequantize_fp4(source.read(spec.name), source.read(scale_name))
            after = reference.dequantize_fp8(result.read(spec.name), result.read(scale_name))
            assert torch.equal(before, after)
        elif spec.role != "routed_expert":
            before, after = source.read(spec.name), result.read(spec.name)
            assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))
    assert logits(load_model(tmp_path / "b")).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 5), st.integers(0, 240), st.integers(0, 14), st.integers()
)
def test_fp4_to_fp8_is_exact_for_scales_up_to_2_to_the_14_apart(
    rows: int, blocks: int, lowest: int, spread: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    packed = torch.randint(-128, 128, (rows, blocks * 16), generator=generator, dtype=torch.int8)
    codes = torch.randint(lowest, lowest + spread + 1, (rows, blocks), generator=generator)
    scale = codes.to(torch.uint8).view(torch.float8_e8m0fnu)
    weight, tile_scale = fp4_to_fp8(packed, scale)
    assert tile_scale.shape == (-(-rows // 128), -(-blocks // 4))
    expected = reference.dequantize_fp4(packed, scale)
    assert torch.equal(reference.dequantize_fp8(weight, tile_scale), expected)


def test_fp4_scales_too_far_apart_for_fp8_are_refused() -> None:
    packed = torch.full((1, 32), 0x11, dtype=torch.int8)  # all 0.5
    scale = torch.tensor([[100, 116]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match=r"2\^14"):
        fp4_to_fp8(packed, scale)


# ---- names and configs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_are_those_of_transformers_own_model(name: str) -> None:
    config = PRESETS[name].replace(linear_dtype="plain", expert_dtype="plain")
    hf_config = DeepseekV4Config.from_dict(to_transformers_config(config))
    with torch.device("meta"):
        state = DeepseekV4ForCausalLM(hf_config).state_dict()
    ours = {
        tensor.name: tensor.shape
        for tensor in transformers_tensors(tensor_table(config))
        if not tensor.name.startswith("mtp.")
    }
    assert ours == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_the_way_through_transformers(name: str) -> None:
    config = PRESETS[name]
    raw = to_transformers_config(config)
    assert from_transformers_config(raw) == config
    plain = config.replace(linear_dtype="plain", expert_dtype="plain")
    rewritten = DeepseekV4Config.from_dict(to_transformers_config(plain)).to_json_string()
    assert from_transformers_config(json.loads(rewritten)) == plain


def test_a_config_without_mtp_ratios_gets_window_blocks() -> None:
    raw = to_transformers_config(CONFIG)
    raw.pop("compress_ratios")
    assert from_transformers_config(raw) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "hash_moe layers must come first"),
        ({"rope_parameters": {"main": {}}}, "compress"),
        ({"compress_ratios": [4, 4, 4, 0]}, "contradicts"),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, "CSA needs rate 4"),
        ({"some_new_option": 1}, "some_new_option"),
    ],
)
def test_what_a_transformers_config_says_and_we_cannot_do_is_named(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_transformers_config(to_transformers_config(CONFIG) | change)


# ---- refusals -----------------------------------------------------------------------------------


def test_two_hca_ratios_have_no_transformers_config(tmp_path: Path) -> None:
    official = write_random(CONFIG.replace(compress_ratios=(8, 4, 16, 0)), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"one HCA ratio, got \[8, 16\]"):
        convert_checkpoint(official, tmp_path / "b", to="transformers")


def test_wrong_requests_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    official = write_random(CONFIG, tmp_path / "a")
    before = files(official)
    with pytest.raises(CheckpointError, match="onto itself"):
        convert_checkpoint(official, official, to="transformers")
    with pytest.raises(CheckpointError, match="only fp4 can become fp8"):
        convert_checkpoint(official, tmp_path / "b", to="official", experts="fp8")
    with pytest.raises(CheckpointError, match="needs dtype='keep'"):
        convert_checkpoint(official, tmp_path / "b", to="official", experts="fp8", dtype="bf16")
    assert files(official) == before
    assert not (tmp_path / "b").exists()


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    official = write_random(CONFIG, tmp_path / "a")
    shard = sorted(official.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated: tensor"):
        convert_checkpoint(official, tmp_path / "b", to="transformers")


def test_progress_counts_the_bytes_written(tmp_path: Path) -> None:
    official = write_random(INSTRUCT, tmp_path / "a")
    calls: list[tuple[int, int]] = []
    written = convert_checkpoint(
        official,
        tmp_path / "b",
        to="transformers",
        dtype="bf16",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (written, written)
