"""把检查点写成 llama.cpp 的 GGUF 文件（``deepseek2``、``deepseek32`` 架构，kv_b 拆成吸收式 MLA 要的两半），只为同权重地比较。

只收 perf 的形状用到的那些：deepseek_v3 与带索引器的 deepseek_v32、不带 YaRN 的 RoPE、不带偏置的线性层；别的一律拒绝，不猜。缺省没有 tokenizer，
两边都直接喂 token id；``llama-server`` 要把 token 变成文本，给它人造的词表。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import gguf
import numpy as np

from deepseek_export.checkpoint import Checkpoint, ModelConfig, TensorStore
from perf.servers.words import word

WeightType = Literal["F32", "BF16", "Q8_0", "Q4_0"]
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
}
#: 家族 → llama.cpp 的架构。
_ARCHITECTURES = {"deepseek_v3": "deepseek2", "deepseek_v32": "deepseek32"}
_INDEXER = {
    "wq_b.weight": "attn_q_b.weight",
    "wk.weight": "attn_k.weight",
    "k_norm.weight": "k_norm.weight",
    "k_norm.bias": "k_norm.bias",
    "weights_proj.weight": "proj.weight",
}
#: 这些矩阵保持 float32：dsx 一侧也是。
_FLOAT32 = (".ffn_gate_inp.", ".indexer.proj.")
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


class _Tensor(NamedTuple):
    """GGUF 里的一个张量；内容到写的时候才读。"""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_gguf(checkpoint: Path, out: Path, weights: WeightType, words: bool = False) -> Path:
    """写一个 GGUF；norm、router 与偏置校正总是 float32，其余按 ``weights``，与 llama.cpp 自己的转换相同。

    Args:
        checkpoint: 检查点目录。
        out: 写到哪里。
        weights: 矩阵存成什么。
        words: 带上人造的词表（:mod:`perf.servers.words`）。

    Raises:
        ValueError: 检查点超出上面说的范围。
    """
    opened = Checkpoint.open(checkpoint)
    config = opened.config
    _check(config)
    writer = gguf.GGUFWriter(out, _ARCHITECTURES[config.family])
    _write_metadata(writer, config)
    if words:
        _write_words(writer, config.vocab_size)
    else:
        writer.add_tokenizer_model("none")
    tensors = list(_tensors(opened.store, config))
    for tensor in tensors:
        kind = _type_of(tensor, weights)
        size = int(np.prod(gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        values = np.ascontiguousarray(tensor.read(), np.float32)
        writer.write_tensor_data(gguf.quants.quantize(values, _type_of(tensor, weights)))
    writer.close()
    return out


def _check(config: ModelConfig) -> None:
    problems = {
        "family": config.family not in _ARCHITECTURES,
        "rope": config.rope.rope_type != "default" or config.rope_layout == "half",
        "q_lora_rank": config.q_lora_rank is None,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "quantization_config": config.weight_block_size is not None,
    }
    found = [name for name, bad in problems.items() if bad]
    if found:
        raise ValueError(f"GGUF 只写 perf 的形状用到的那些 V3、V3.2 检查点，这个的 {found} 不在其中")


def _write_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """键与 llama.cpp 的 ``convert_hf_to_gguf.py`` 写的相同：吸收式 MLA 是一个 KV 头、宽 r+dr 的 MQA。"""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.latent_cache_values)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.indexer is not None:
        writer.add_indexer_head_count(config.indexer.n_heads)
        writer.add_indexer_key_length(config.indexer.head_dim)
        writer.add_indexer_top_k(config.indexer.topk)


def _write_words(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word(token) for token in range(vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab_size)
    writer.add_token_merges([f"{word(0)} {word(1)}"])  # 空的列表它不收；这一条用不到
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _tensors(store: TensorStore, config: ModelConfig) -> Iterator[_Tensor]:
    yield _plain(store, "model.embed_tokens.weight", "token_embd.weight")
    yield _plain(store, "model.norm.weight", "output_norm.weight")
    yield _plain(store, "lm_head.weight", "output.weight")
    for layer in range(config.num_hidden_layers):
        source, block = f"model.layers.{layer}", f"blk.{layer}"
        for name, renamed in _LAYER.items():
            yield _plain(store, f"{source}.{name}.weight", f"{block}.{renamed}.weight")
        yield from _kv_b(store, config, f"{source}.self_attn.kv_b_proj.weight", block)
        if config.runs_indexer(layer):
            for name, renamed in _INDEXER.items():
                yield _plain(store, f"{source}.self_attn.indexer.{name}", f"{block}.indexer.{renamed}")
        if not config.is_moe_layer(layer):
            for name, renamed in _MLP.items():
                yield _plain(store, f"{source}.mlp.{name}.weight", f"{block}.{renamed}.weight")
            continue
        yield _plain(store, f"{source}.mlp.gate.weight", f"{block}.ffn_gate_inp.weight")
        yield _plain(store, f"{source}.mlp.gate.e_score_correction_bias", f"{block}.exp_probs_b.bias")
        for name, renamed in _MLP.items():
            shared = f"{source}.mlp.shared_experts.{name}.weight"
            yield _plain(store, shared, f"{block}.{renamed}_shexp.weight")
            experts = [f"{source}.mlp.experts.{i}.{name}.weight" for i in range(config.n_routed_experts)]
            yield _stacked(store, experts, f"{block}.{renamed}_exps.weight")


def _plain(store: TensorStore, source: str, name: str) -> _Tensor:
    return _Tensor(name, store[source].shape, lambda: store.read(source))


def _stacked(store: TensorStore, sources: list[str], name: str) -> _Tensor:
    """逐个专家的矩阵叠成一个。"""
    shape = (len(sources), *store[sources[0]].shape)
    return _Tensor(name, shape, lambda: np.stack([store.read(source) for source in sources]))


def _kv_b(store: TensorStore, config: ModelConfig, source: str, block: str) -> Iterator[_Tensor]:
    """每个头的 kv_b 拆成 k_b（转置，吸收进 q）与 v_b（吸收进输出）。"""
    heads, nope, v, r = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.v_head_dim,
        config.kv_lora_rank,
    )

    def per_head() -> np.ndarray:
        return store.read(source).reshape(heads, nope + v, r)

    yield _Tensor(f"{block}.attn_k_b.weight", (heads, r, nope), lambda: per_head()[:, :nope].swapaxes(1, 2))
    yield _Tensor(f"{block}.attn_v_b.weight", (heads, v, r), lambda: per_head()[:, nope:])


def _type_of(tensor: _Tensor, weights: WeightType) -> gguf.GGMLQuantizationType:
    """一维的（norm、偏置校正）、router 与索引器各头的权重保持 float32。"""
    if len(tensor.shape) == 1 or any(part in tensor.name for part in _FLOAT32):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType[weights]
