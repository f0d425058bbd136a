"""The ``tiny`` network as a GGUF file, for the peers that read nothing else.

Float32 throughout; names and keys are those llama.cpp gives the ``deepseek4`` architecture. The
vocabulary is a placeholder: peers are fed token ids. Needs the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.model.transformer import Transformer

_SQRT_SOFTPLUS = 4
_ROOT = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
_LAYER = {
    **{name: f"{name}.weight" for name in ("hc_attn_fn", "hc_attn_base", "hc_attn_scale")},
    **{name: f"{name}.weight" for name in ("hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale")},
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
}
_EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def write_gguf(model: Transformer, path: Path) -> None:
    """Write a plain-format model, without its MTP block.

    Raises:
        ImportError: ``gguf`` is not installed.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "deepseek4")
    for key, value in _metadata(model).items():
        _add(writer, f"deepseek4.{key}", value)
    _add_vocabulary(writer, model.config.vocab_size)
    for name, array in _tensors(model):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(model: Transformer) -> dict[str, Any]:
    """Keys below the architecture's name."""
    c = model.config
    layers = c.num_hidden_layers
    scaling = c.rope_scaling
    yarn: dict[str, Any] = {}
    if scaling is not None:
        yarn = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
    return {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "embedding_length_out": c.hidden_size * c.hc_mult,
        "block_count": layers,
        "feed_forward_length": c.moe_intermediate_size,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": _SQRT_SOFTPLUS,
        "swiglu_clamp_exp": [float(c.swiglu_limit)] * layers,
        "swiglu_clamp_shexp": [float(c.swiglu_limit)] * layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window,
        "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
        "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.compress_ratios": list(c.compress_ratios[:layers]),
        "attention.compress_rope_freq_base": float(c.compress_rope_theta),
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hyper_connection.epsilon": float(c.hc_eps),
        "hash_layer_count": c.num_hash_layers,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": float(c.rope_theta),
        **yarn,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_vocabulary(writer: Any, size: int) -> None:
    """Single characters and one merge; enough to be accepted."""
    tokens = [chr(0x4E00 + i) for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _tensors(model: Transformer) -> Iterator[tuple[str, NDArray[Any]]]:
    state = model.state_dict()
    for name, tensor in state.items():
        layer, _, rest = name.removeprefix("layers.").partition(".")
        if name in _ROOT:
            yield _ROOT[name], tensor.float().numpy()
        elif name.startswith("layers.") and rest in _LAYER:
            kind = np.int32 if rest.endswith("tid2eid") else np.float32
            yield f"blk.{layer}.{_LAYER[rest]}", tensor.numpy().astype(kind)
    for number in range(model.config.num_hidden_layers):
        for part, gguf_name in _EXPERTS.items():
            stack = [
                state[f"layers.{number}.ffn.experts.{expert}.{part}.weight"].float().numpy()
                for expert in range(model.config.n_routed_experts)
            ]
            yield f"blk.{number}.{gguf_name}.weight", np.stack(stack)
