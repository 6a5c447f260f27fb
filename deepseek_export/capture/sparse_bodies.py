"""稀疏注意力两个算子的函数体：T 不超过名额数时走稠密的路，否则逐个 query 真的收集。

逐个 query 用一个 ``Loop``（解码只转一圈）：内存由一个 query 选中的行决定，与 S、T 无关，[S, T] 的分数与 [S, topk, cw] 的行都不会整个
出现。循环体与两个分支仍由参考实现追踪得到。下沉到 TensorRT 之后的两个核没有控制流，函数体直接追踪。
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from deepseek_export.capture.bodies import dense_nodes, mla_specs
from deepseek_export.capture.functions import (
    constant,
    function_of,
    nodes_of,
    scale_node,
    trace_function,
    with_output,
)
from deepseek_export.capture.trace import Spec
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops import lightning_indexer as indexer
from deepseek_export.ops import mla_attention as mla
from deepseek_export.ops.index_topk import index_topk
from deepseek_export.ops.mla_attention import MlaForm
from deepseek_export.ops.sparse_latent_attention import sparse_latent_attention
from deepseek_export.ops.sparse_mla_attention import attend_rows
from deepseek_export.ops.table import (
    INDEX_TOPK,
    LIGHTNING_INDEXER,
    SPARSE_LATENT_ATTENTION,
    SPARSE_MLA_ATTENTION,
)
from deepseek_export.reference.weights import by_torch


@functools.lru_cache(maxsize=16)
def lightning_indexer_body(
    config: ModelConfig, dtype: torch.dtype, cache_dtype: torch.dtype
) -> onnx.FunctionProto:
    """``LightningIndexer`` 的函数体；节点的 ``topk`` 必须与 ``config`` 的相同。

    Args:
        config: 只用到索引器。
        dtype, cache_dtype: 类型变量 T 与 C。
    """
    c = config.indexer
    assert c is not None
    lens = Spec(("B",), torch.int64)
    cache = Spec(("B", 1, "T", config.index_cache_width(cache_dtype == torch.int8)), cache_dtype)
    new = Spec(("B", "S", c.head_dim), dtype)
    written = trace_function(
        indexer.update_index_cache,
        {"k": new, "index_cache": cache, "past_lens": lens},
        ["index_cache_out"],
    )
    counted = trace_function(_counts, {"k": new, "past_lens": lens}, ["counts"], topk=c.topk)
    every = trace_function(_every, {"k": new, "past_lens": lens}, ["every/indices"], topk=c.topk)
    ranked = trace_function(
        indexer.rank_keys,
        {
            "row/q": Spec(("B", 1, c.n_heads, c.head_dim), dtype),
            "row/w": Spec(("B", 1, c.n_heads), torch.float32),
            "index_cache_out": cache,
            "row/past": lens,
        },
        ["row/indices"],
        topk=c.topk,
    )
    shape = ("B", 1, c.topk)
    loop = [
        *_row("q", "S_index"),
        *_row("w", "S_index"),
        helper.make_node("Add", ["past_lens", "S_index_1d"], ["row/past"], name="row/Add"),
        *nodes_of(ranked, "rank"),
    ]
    nodes = [
        *nodes_of(written, "cache"),
        *nodes_of(counted, "counts"),
        *_fits("index_cache", [constant("slots", np.array([c.topk], np.int64))]),
        _choose(
            "indices",
            TensorProto.INT32,
            nodes_of(every, "every"),
            "every/indices",
            _each_row("q", loop, "row/indices", TensorProto.INT32, shape, "ranked/indices"),
            "ranked/indices",
        ),
    ]
    return function_of(LIGHTNING_INDEXER, nodes)


@functools.lru_cache(maxsize=16)
def sparse_mla_attention_body(
    config: ModelConfig, form: MlaForm, dtype: torch.dtype, cache_dtype: torch.dtype
) -> onnx.FunctionProto:
    """``SparseMlaAttention`` 的函数体；参数同 :func:`~deepseek_export.capture.bodies.mla_attention_body`。"""
    c = config.indexer
    assert c is not None
    new, query = mla_specs(config, dtype, cache_dtype)
    H, dn, dr = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    gathered = trace_function(
        attend_rows,
        {
            "row/q_nope": Spec(("B", 1, H, dn), dtype),
            "row/q_pe": Spec(("B", 1, H, dr), dtype),
            "kv_cache_out": query["kv_cache_out"],
            "w_kv_b": query["w_kv_b"],
            "row/indices": Spec(("B", 1, c.topk), torch.int32),
            "row/counts": Spec(("B", 1), torch.int32),
            "scale": query["scale"],
        },
        ["row/o"],
    )
    kind = by_torch(dtype).onnx
    loop = [
        *(node for name in ("q_nope", "q_pe", "indices", "counts") for node in _row(name, "S_index")),
        *nodes_of(gathered, "gather"),
    ]
    nodes = [
        scale_node(),
        *nodes_of(trace_function(mla.update_cache, new, ["kv_cache_out"]), "cache"),
        *_fits("kv_cache", [helper.make_node("Shape", ["indices"], ["slots"], start=2, end=3)]),
        _choose(
            "o",
            kind,
            with_output(dense_nodes(config, form, dtype, cache_dtype), "o", "dense/o"),
            "dense/o",
            _each_row("q_nope", loop, "row/o", kind, ("B", 1, H, config.v_head_dim), "gathered/o"),
            "gathered/o",
        ),
    ]
    return function_of(SPARSE_MLA_ATTENTION, nodes)


@functools.lru_cache(maxsize=16)
def index_topk_body(config: ModelConfig, dtype: torch.dtype, cache_dtype: torch.dtype) -> onnx.FunctionProto:
    """``IndexTopK`` 的函数体；参数同 :func:`lightning_indexer_body`。"""
    c = config.indexer
    assert c is not None
    inputs = {
        "q": Spec(("B", "S", c.n_heads, c.head_dim), dtype),
        "w": Spec(("B", "S", c.n_heads), torch.float32),
        "index_cache": Spec(("B", 1, "T", c.head_dim), cache_dtype),
        "past_lens": Spec(("B",), torch.int64),
    }
    traced = trace_function(index_topk, inputs, ["indices", "counts"], topk=c.topk)
    return function_of(INDEX_TOPK, nodes_of(traced, "index"))


@functools.lru_cache(maxsize=16)
def sparse_latent_attention_body(
    config: ModelConfig, dtype: torch.dtype, cache_dtype: torch.dtype
) -> onnx.FunctionProto:
    """``SparseLatentAttention`` 的函数体；参数同 :func:`~deepseek_export.capture.bodies.mla_attention_body`。"""
    c, width = config.indexer, config.latent_cache_values
    assert c is not None
    inputs = {
        "q": Spec(("B", "S", config.num_attention_heads, width), dtype),
        "kv_cache": Spec(("B", 1, "T", width), cache_dtype),
        "indices": Spec(("B", "S", c.topk), torch.int32),
        "counts": Spec(("B", "S"), torch.int32),
        "scale": Spec((), torch.float32),
    }
    traced = trace_function(sparse_latent_attention, inputs, ["context"], kv_lora_rank=config.kv_lora_rank)
    return function_of(SPARSE_LATENT_ATTENTION, [scale_node(), *nodes_of(traced, "latent")])


def _counts(k: Tensor, past_lens: Tensor, topk: int) -> Tensor:
    return indexer.key_counts(past_lens, k.shape[1], topk)


def _every(k: Tensor, past_lens: Tensor, topk: int) -> Tensor:
    return indexer.every_key(past_lens, k.shape[1], topk)


def _fits(cache: str, slots: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """标量 bool ``fits``：``cache`` 的 T 不超过名额数 ``slots``（由给出的节点产生）。"""
    return [
        *slots,
        helper.make_node("Shape", [cache], ["rows"], name="fits/Shape", start=2, end=3),
        helper.make_node("LessOrEqual", ["rows", "slots"], ["fits_1d"], name="fits/LessOrEqual"),
        helper.make_node("Squeeze", ["fits_1d"], ["fits"], name="fits/Squeeze"),
    ]


def _choose(
    output: str,
    kind: int,
    dense: list[onnx.NodeProto],
    dense_output: str,
    sparse: list[onnx.NodeProto],
    sparse_output: str,
) -> onnx.NodeProto:
    """``fits`` 成立走 ``dense``，否则走 ``sparse``。"""
    branches = [
        helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(value, kind, None)])
        for name, nodes, value in (("dense", dense, dense_output), ("sparse", sparse, sparse_output))
    ]
    return helper.make_node("If", ["fits"], [output], then_branch=branches[0], else_branch=branches[1])


def _row(name: str, index: str) -> list[onnx.NodeProto]:
    """``name`` 的第 ``index`` 个 query，留着那一维：``row/<name>``。"""
    return [
        helper.make_node("Gather", [name, f"{index}_1d"], [f"row/{name}"], name=f"row/{name}/Gather", axis=1)
    ]


def _each_row(
    query: str, body: list[onnx.NodeProto], value: str, kind: int, shape: tuple[int | str, ...], output: str
) -> list[onnx.NodeProto]:
    """对 ``query`` 的每个位置执行 ``body``，把各次的 ``value`` [B, 1, ...] 沿第 1 维接起来。"""
    loop = helper.make_graph(
        [
            constant("row/shape", np.array([1], np.int64)),
            helper.make_node("Reshape", ["S_index", "row/shape"], ["S_index_1d"], name="row/Reshape"),
            *body,
            helper.make_node("Identity", ["go_on"], ["go_on_out"], name="row/Identity"),
        ],
        "row",
        [
            helper.make_tensor_value_info("S_index", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info(value, kind, shape),
        ],
    )
    order = [1, 0, *range(2, len(shape))]
    return [
        helper.make_node("Shape", [query], ["rows/S_1d"], name="rows/Shape", start=1, end=2),
        helper.make_node("Squeeze", ["rows/S_1d"], ["rows/S"], name="rows/Squeeze"),
        constant("rows/true", np.array(True)),
        helper.make_node("Loop", ["rows/S", "rows/true"], ["rows/stacked"], name="rows/Loop", body=loop),
        helper.make_node("Shape", [query], ["rows/B"], name="rows/Shape_1", start=0, end=1),
        constant("rows/rest", np.array(shape[2:], np.int64)),
        # 用 Reshape 去掉那一维，不用 Squeeze：onnx 的参考求值器把各次的值首尾相接，没有添一维。
        helper.make_node(
            "Concat", ["rows/S_1d", "rows/B", "rows/rest"], ["rows/shape"], name="rows/Concat", axis=0
        ),
        helper.make_node("Reshape", ["rows/stacked", "rows/shape"], ["rows/flat"], name="rows/Reshape"),
        helper.make_node("Transpose", ["rows/flat"], [output], name="rows/Transpose", perm=order),
    ]
