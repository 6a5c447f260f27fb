"""每种块的追踪，按参数缓存：换目标、换方案再导出，没变的块不必重来。

返回的 :class:`~deepseek_export.capture.trace.TracedGraph` 是只读的，实例化时用 ``renamed`` 得到副本。
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import nn

from deepseek_export.capture.trace import Spec, TracedGraph, trace
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec, Port
from deepseek_export.ops.table import SPEC_ACCEPT, SPEC_ACCEPT_REJECTION
from deepseek_export.reference.indexer import HeadWeights
from deepseek_export.reference.model import CacheTensor, DecoderLayer, Embed, Forms, Head, cache_tensors
from deepseek_export.reference.moe import Gate
from deepseek_export.reference.mtp import DraftHead, MtpModule
from deepseek_export.reference.weights import torch_dtype


def _meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """在 meta 设备上建模块；router 与索引器各头的权重保持 float32，其余转成模型 dtype。"""
    with torch.device("meta"):
        module = build().to(dtype)
        for child in module.modules():
            if isinstance(child, Gate | HeadWeights):
                child.to(torch.float32)
    return module


@lru_cache(maxsize=16)
def embed_block(config: ModelConfig, dtype: torch.dtype, position_offset: int = 0) -> TracedGraph:
    """词嵌入与 cos/sin；第 k 个 MTP 模块的位置平移 ``k+1``。"""
    inputs = {"input_ids": Spec(("B", "S"), torch.int64), "past_lens": Spec(("B",), torch.int64)}
    build = partial(_meta, lambda: Embed(config, position_offset), dtype)
    return trace(build, inputs, ["x", "cos", "sin"], ("embed", config, position_offset, dtype))


@lru_cache(maxsize=64)
def layer_block(
    config: ModelConfig,
    is_moe: bool,
    runs_indexer: bool,
    forms: Forms,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> TracedGraph:
    """一层解码层；dense 层与 MoE 层、自己挑 key 的与沿用的，各一种。"""
    inputs = {
        "x_in": Spec(("B", "S", config.hidden_size), dtype),
        "cos": Spec(("B", "S", config.qk_rope_head_dim // 2), dtype),
        "sin": Spec(("B", "S", config.qk_rope_head_dim // 2), dtype),
        "past_lens": Spec(("B",), torch.int64),
    }
    chosen: list[str] = []
    if config.indexer is not None:
        selection = {
            "indices": Spec(("B", "S", config.indexer.topk), torch.int32),
            "counts": Spec(("B", "S"), torch.int32),
        }
        chosen, inputs = list(selection), inputs if runs_indexer else inputs | selection
    # 一种块的各层缓存相同，随便取一层。
    alike = next(i for i in range(config.num_hidden_layers) if config.runs_indexer(i) == runs_indexer)
    caches = cache_tensors(config, forms, cache_dtype, dtype, alike)
    inputs |= cache_specs(caches)
    outputs = ["attn_residual", "x", *(f"{cache.name}_out" for cache in caches)]
    build = partial(_meta, lambda: DecoderLayer(config, is_moe, forms, runs_indexer), dtype)
    return trace(
        build,
        inputs,
        outputs + (chosen if runs_indexer else []),
        ("layer", config, is_moe, runs_indexer, forms, dtype),
    )


def cache_specs(caches: list[CacheTensor]) -> dict[str, Spec]:
    """缓存输入的名字 → 形状与 dtype。"""
    return {cache.name: Spec(("B", cache.heads, "T", cache.width), cache.dtype) for cache in caches}


@lru_cache(maxsize=16)
def head_block(config: ModelConfig, dtype: torch.dtype) -> TracedGraph:
    """最终 norm 与 lm_head。"""
    inputs = {
        "x_in": Spec(("B", "S", config.hidden_size), dtype),
        "logits_positions": Spec(("B", "L"), torch.int64),
    }
    build = partial(_meta, lambda: Head(config), dtype)
    return trace(build, inputs, ["logits", "hidden"], ("head", config, dtype))


@lru_cache(maxsize=16)
def accept_block(config: ModelConfig, dtype: torch.dtype, mode: str) -> TracedGraph:
    """主模型末尾的草稿验证：一个 ``dsx::`` 节点。"""
    spec = accept_spec(mode)
    op = getattr(torch.ops.dsx, spec.torch_name)
    inputs = input_specs(spec, config, dtype)
    outputs = [port.name for port in spec.outputs]
    return trace(lambda: lambda *arguments: op(*arguments), inputs, outputs, ("accept", spec.name))


@lru_cache(maxsize=16)
def mtp_block(
    config: ModelConfig, index: int, forms: Forms, dtype: torch.dtype, cache_dtype: torch.dtype
) -> TracedGraph:
    """第 ``index`` 个 MTP 模块：合并、一层解码层、``shared_head.norm``。"""
    hidden = Spec(("B", "S", config.hidden_size), dtype)
    angle = Spec(("B", "S", config.qk_rope_head_dim // 2), dtype)
    inputs = {"embedding": hidden, "prev_hidden": hidden, "cos": angle, "sin": angle}
    inputs["past_lens"] = Spec(("B",), torch.int64)
    caches = cache_tensors(config, forms, cache_dtype, dtype, config.num_hidden_layers + index)
    inputs |= cache_specs(caches)
    outputs = ["combined", "attn_residual", "x", "hidden", *(f"{cache.name}_out" for cache in caches)]
    build = partial(_meta, lambda: MtpModule(config, index, forms), dtype)
    return trace(build, inputs, outputs, ("mtp", config, index, forms, dtype))


@lru_cache(maxsize=16)
def draft_head_block(config: ModelConfig, dtype: torch.dtype) -> TracedGraph:
    """草稿模型的 lm_head 与 argmax。"""
    inputs = {
        "hidden": Spec(("B", "S", config.hidden_size), dtype),
        "logits_positions": Spec(("B", "L"), torch.int64),
    }
    build = partial(_meta, lambda: DraftHead(config), dtype)
    return trace(build, inputs, ["logits", "draft_id"], ("draft head", config, dtype))


def input_specs(spec: OpSpec, config: ModelConfig, dtype: torch.dtype) -> dict[str, Spec]:
    """MoE 与草稿验证算子的输入，次序、维度、类型按契约表；``dtype`` 是类型变量 T。"""
    sizes = {
        "D": config.hidden_size,
        "I": config.moe_intermediate_size,
        "E": config.n_routed_experts,
        "k": config.num_experts_per_tok,
        "V": config.vocab_size,
        "1": 1,
    }

    def port_spec(port: Port) -> Spec:
        kind = dtype if port.type == "T" else torch_dtype(TYPE_CONSTRAINTS[port.type][0])
        return Spec(tuple(sizes.get(dim, dim) for dim in port.dims), kind)

    return {port.name: port_spec(port) for port in spec.inputs}


def accept_spec(mode: str) -> OpSpec:
    """验证方式对应的算子。"""
    return SPEC_ACCEPT_REJECTION if mode == "rejection" else SPEC_ACCEPT
