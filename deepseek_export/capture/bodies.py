"""算子的 eager 参考实现 → ONNX 函数体。

函数体由参考实现追踪得到，不另写一份；追踪表达不了的控制流（专家循环、两种 MLA 形式的选择）只在外面包一层
``Loop`` / ``If``。函数体按参数缓存，调用方不得修改返回值。有了函数体，同一个文件不装任何插件就能在 ONNX Runtime、onnx 参考求值器、TensorRT 上运行。
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import torch
from onnx import helper

from deepseek_export.capture import blocks
from deepseek_export.capture.functions import (
    constant,
    function_of,
    nodes_of,
    scale_node,
    trace_function,
    with_output,
)
from deepseek_export.capture.trace import Spec, named
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops import mla_attention as mla
from deepseek_export.ops import moe_experts as experts
from deepseek_export.ops import spec_accept as accept
from deepseek_export.ops.latent_attention import latent_attention
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.table import (
    LATENT_ATTENTION,
    LATENT_CACHE_UPDATE,
    MLA_ATTENTION,
    MOE_EXPERTS,
    MOE_GATE,
)
from deepseek_export.reference.weights import by_torch


@functools.lru_cache(maxsize=16)
def mla_attention_body(
    config: ModelConfig, form: mla.MlaForm, dtype: torch.dtype, cache_dtype: torch.dtype
) -> onnx.FunctionProto:
    """``MlaAttention`` 的函数体。

    Args:
        config: 只用到注意力的静态维度。
        form: ``auto`` 时在图里按形状二选一（``If``），见 :func:`~deepseek_export.ops.mla_attention.cost_coefficients`。
        dtype, cache_dtype: 类型变量 T 与 C。
    """
    new, _ = mla_specs(config, dtype, cache_dtype)
    nodes = [scale_node()]
    nodes += nodes_of(trace_function(mla.update_cache, new, ["kv_cache_out"]), "cache")
    return function_of(MLA_ATTENTION, nodes + dense_nodes(config, form, dtype, cache_dtype))


def dense_nodes(
    config: ModelConfig, form: mla.MlaForm, dtype: torch.dtype, cache_dtype: torch.dtype
) -> list[onnx.NodeProto]:
    """对写好的缓存 ``kv_cache_out`` 里全部看得见的行做注意力，得到 ``o``；参数同 :func:`mla_attention_body`。"""
    H, dn, dv, r = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    query = mla_specs(config, dtype, cache_dtype)[1]
    absorb = functools.partial(nodes_of, trace_function(mla.attend_absorb, query, ["o"]), "absorb")
    naive = functools.partial(nodes_of, trace_function(mla.attend_naive, query, ["o"]), "naive")
    if form != "auto":
        return naive() if form == "naive" else absorb()
    a, b = mla.cost_coefficients(dn, dv, r)
    info = helper.make_tensor_value_info("o", by_torch(dtype).onnx, ["B", "S", H, dv])
    branches = {
        name: helper.make_graph(with_output(body(), "o", f"{name}/o"), name, [], [named(info, f"{name}/o")])
        for name, body in (("naive", naive), ("absorb", absorb))
    }
    choose = helper.make_node(
        "If", ["prefers_naive"], ["o"], then_branch=branches["naive"], else_branch=branches["absorb"]
    )
    return [*_prefers_naive(a, b), choose]


def mla_specs(
    config: ModelConfig, dtype: torch.dtype, cache_dtype: torch.dtype
) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """写缓存与做注意力这两步各要哪些输入；参数同 :func:`mla_attention_body`。"""
    H, dn, dv, r = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    dr = config.qk_rope_head_dim
    cache = Spec(("B", 1, "T", config.latent_cache_width(cache_dtype == torch.int8)), cache_dtype)
    lens = Spec(("B",), torch.int64)
    new = {
        "c_kv": Spec(("B", "S", r), dtype),
        "k_pe": Spec(("B", "S", dr), dtype),
        "kv_cache": cache,
        "past_lens": lens,
    }
    query = {
        "q_nope": Spec(("B", "S", H, dn), dtype),
        "q_pe": Spec(("B", "S", H, dr), dtype),
        "kv_cache_out": cache,
        "past_lens": lens,
        "w_kv_b": Spec((H * (dn + dv), r), dtype),
        "scale": Spec((), torch.float32),
    }
    return new, query


@functools.lru_cache(maxsize=16)
def latent_attention_body(
    config: ModelConfig, dtype: torch.dtype, cache_dtype: torch.dtype
) -> onnx.FunctionProto:
    """``LatentAttention`` 的函数体；参数同 :func:`mla_attention_body`。"""
    width = config.latent_cache_width(cache_dtype == torch.int8, aligned=True)
    inputs = {
        "q": Spec(("B", "S", config.num_attention_heads, config.latent_cache_values), dtype),
        "kv_cache": Spec(("B", 1, "T", width), cache_dtype),
        "past_lens": Spec(("B",), torch.int64),
        "scale": Spec((), torch.float32),
    }
    traced = trace_function(latent_attention, inputs, ["context"], kv_lora_rank=config.kv_lora_rank)
    return function_of(LATENT_ATTENTION, [scale_node(), *nodes_of(traced, "latent")])


@functools.lru_cache(maxsize=16)
def latent_cache_update_body(config: ModelConfig, dtype: torch.dtype) -> onnx.FunctionProto:
    """``LatentCacheUpdate`` 的函数体。"""
    new, _ = mla_specs(config, dtype, torch.int8)
    width = config.latent_cache_width(True, aligned=True)
    inputs = new | {"kv_cache": Spec(("B", 1, "T", width), torch.int8)}
    traced = trace_function(mla.update_cache, inputs, ["kv_cache_out"])
    return function_of(LATENT_CACHE_UPDATE, nodes_of(traced, "cache"))


@functools.lru_cache(maxsize=16)
def moe_gate_body(config: ModelConfig) -> onnx.FunctionProto:
    """``MoeGate`` 的函数体；路由属性已固化在结构里，节点属性必须与 :func:`gate_attributes` 一致。"""
    inputs = blocks.input_specs(MOE_GATE, config, torch.float32)
    body = trace_function(moe_gate, inputs, ["topk_ids", "topk_weights"], **gate_attributes(config))
    return function_of(MOE_GATE, nodes_of(body, "gate"))


def gate_attributes(config: ModelConfig) -> dict:
    """``MoeGate`` 节点的属性。"""
    return {
        "scoring_func": config.scoring_func,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "group_score": config.group_score,
        "top_k": config.num_experts_per_tok,
        "norm_topk_prob": int(config.norm_topk_prob),
        "routed_scaling_factor": config.routed_scaling_factor,
    }


@functools.lru_cache(maxsize=16)
def moe_experts_body(config: ModelConfig, dtype: torch.dtype) -> onnx.FunctionProto:
    """``MoeExperts`` 的函数体：对有 token 的专家做 ``Loop``，循环体是追踪出来的 ``expert_step``。"""
    D, ports = config.hidden_size, blocks.input_specs(MOE_EXPERTS, config, dtype)
    routed = {name: ports[name] for name in ("x", "topk_ids")}
    start = trace_function(
        experts.active_experts, routed, ["y_start", "active"], num_experts=config.n_routed_experts
    )
    step = trace_function(
        experts.expert_step,
        {"y_in": Spec(("N", D), torch.float32), "expert": Spec((1,), torch.int64), **ports},
        ["y_out"],
    )
    loop = helper.make_graph(
        [
            helper.make_node("Reshape", ["i", "one"], ["i_1d"]),
            helper.make_node("Gather", ["active", "i_1d"], ["expert"], axis=0),
            *nodes_of(step, "expert"),
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
        ],
        "expert",
        [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("y_in", onnx.TensorProto.FLOAT, ["N", D]),
        ],
        [
            helper.make_tensor_value_info("go_on_out", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("y_out", onnx.TensorProto.FLOAT, ["N", D]),
        ],
    )
    nodes = [
        *nodes_of(start, "start"),
        helper.make_node("Size", ["active"], ["num_active"]),
        constant("one", np.array([1], np.int64)),
        constant("true", np.array(True)),
        helper.make_node("Loop", ["num_active", "true", "y_start"], ["y_float"], body=loop),
        helper.make_node("Cast", ["y_float"], ["y"], to=by_torch(dtype).onnx),
    ]
    return function_of(MOE_EXPERTS, nodes)


@functools.lru_cache(maxsize=16)
def moe_experts_dense_body(config: ModelConfig, dtype: torch.dtype) -> onnx.FunctionProto:
    """``MoeExperts`` 的另一个函数体：每个专家都算，没有循环与数据相关的形状。"""
    inputs = blocks.input_specs(MOE_EXPERTS, config, dtype)
    return function_of(MOE_EXPERTS, nodes_of(trace_function(experts.experts_dense, inputs, ["y"]), "experts"))


@functools.lru_cache(maxsize=16)
def spec_accept_body(config: ModelConfig, dtype: torch.dtype, mode: str) -> onnx.FunctionProto:
    """``SpecAccept``（``mode="greedy"``）或 ``SpecAcceptRejection`` 的函数体。"""
    spec = blocks.accept_spec(mode)
    eager = accept.spec_accept_rejection if mode == "rejection" else accept.spec_accept
    inputs = blocks.input_specs(spec, config, dtype)
    body = trace_function(eager, inputs, [port.name for port in spec.outputs])
    return function_of(spec, nodes_of(body, "accept"))


def _prefers_naive(a: int, b: int) -> list[onnx.NodeProto]:
    """``T*a < S*(a + T*b)`` 写成 ONNX；S、T 取自形状，得到标量 bool ``prefers_naive``。"""
    return [
        constant("cost_a", np.array([a], np.int64)),
        constant("cost_b", np.array([b], np.int64)),
        constant("axis_0", np.array([0], np.int64)),
        helper.make_node("Shape", ["q_nope"], ["dim_S"], start=1, end=2),
        helper.make_node("Shape", ["kv_cache"], ["dim_T"], start=2, end=3),
        helper.make_node("Mul", ["dim_T", "cost_a"], ["expand_cost"]),
        helper.make_node("Mul", ["dim_T", "cost_b"], ["pair_saving"]),
        helper.make_node("Add", ["pair_saving", "cost_a"], ["query_saving"]),
        helper.make_node("Mul", ["dim_S", "query_saving"], ["saving"]),
        helper.make_node("Less", ["expand_cost", "saving"], ["prefers_naive_1d"]),
        helper.make_node("Squeeze", ["prefers_naive_1d", "axis_0"], ["prefers_naive"]),
    ]
