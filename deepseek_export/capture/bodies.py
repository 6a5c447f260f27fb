"""算子的 eager 参考实现 → ONNX 函数体。

函数体由参考实现追踪得到，不另写一份；追踪表达不了的控制流（专家循环、两种 MLA 形式的选择）只在外面包一层
``Loop`` / ``If``。函数体按参数缓存，调用方不得修改返回值。有了函数体，同一个文件不装任何插件就能在 ONNX Runtime、onnx 参考求值器、TensorRT 上运行。
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from deepseek_export.capture import blocks
from deepseek_export.capture.trace import OPSET, Spec, TracedGraph, named, trace
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops import mla_attention as mla
from deepseek_export.ops import moe_experts as experts
from deepseek_export.ops import spec_accept as accept
from deepseek_export.ops.latent_attention import latent_attention
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.table import (
    DOMAIN,
    LATENT_ATTENTION,
    MLA_ATTENTION,
    MOE_EXPERTS,
    MOE_GATE,
    OPSET_VERSION,
    OpSpec,
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
    nodes = [_scale()]
    nodes += _nodes(_trace_function(mla.update_cache, new, ["kv_cache_out"]), "cache")
    absorb = functools.partial(_nodes, _trace_function(mla.attend_absorb, query, ["o"]), "absorb")
    naive = functools.partial(_nodes, _trace_function(mla.attend_naive, query, ["o"]), "naive")
    if form == "auto":
        a, b = mla.cost_coefficients(dn, dv, r)
        nodes += _prefers_naive(a, b)
        info = helper.make_tensor_value_info("o", by_torch(dtype).onnx, ["B", "S", H, dv])
        branches = {
            name: helper.make_graph(_output(body(), "o", f"{name}/o"), name, [], [named(info, f"{name}/o")])
            for name, body in (("naive", naive), ("absorb", absorb))
        }
        nodes.append(
            helper.make_node(
                "If", ["prefers_naive"], ["o"], then_branch=branches["naive"], else_branch=branches["absorb"]
            )
        )
    else:
        nodes += naive() if form == "naive" else absorb()
    return _function(MLA_ATTENTION, nodes)


@functools.lru_cache(maxsize=16)
def latent_attention_body(
    config: ModelConfig, dtype: torch.dtype, cache_dtype: torch.dtype
) -> onnx.FunctionProto:
    """``LatentAttention`` 的函数体；参数同 :func:`mla_attention_body`。"""
    width = config.latent_cache_values
    inputs = {
        "q": Spec(("B", "S", config.num_attention_heads, width), dtype),
        "kv_cache": Spec(("B", 1, "T", width), cache_dtype),
        "past_lens": Spec(("B",), torch.int64),
        "scale": Spec((), torch.float32),
    }
    traced = _trace_function(latent_attention, inputs, ["context"], kv_lora_rank=config.kv_lora_rank)
    return _function(LATENT_ATTENTION, [_scale(), *_nodes(traced, "latent")])


@functools.lru_cache(maxsize=16)
def moe_gate_body(config: ModelConfig) -> onnx.FunctionProto:
    """``MoeGate`` 的函数体；路由属性已固化在结构里，节点属性必须与 :func:`gate_attributes` 一致。"""
    inputs = blocks.input_specs(MOE_GATE, config, torch.float32)
    body = _trace_function(moe_gate, inputs, ["topk_ids", "topk_weights"], **gate_attributes(config))
    return _function(MOE_GATE, _nodes(body, "gate"))


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
    start = _trace_function(
        experts.active_experts, routed, ["y_start", "active"], num_experts=config.n_routed_experts
    )
    step = _trace_function(
        experts.expert_step,
        {"y_in": Spec(("N", D), torch.float32), "expert": Spec((1,), torch.int64), **ports},
        ["y_out"],
    )
    loop = helper.make_graph(
        [
            helper.make_node("Reshape", ["i", "one"], ["i_1d"]),
            helper.make_node("Gather", ["active", "i_1d"], ["expert"], axis=0),
            *_nodes(step, "expert"),
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
        *_nodes(start, "start"),
        helper.make_node("Size", ["active"], ["num_active"]),
        _constant("one", np.array([1], np.int64)),
        _constant("true", np.array(True)),
        helper.make_node("Loop", ["num_active", "true", "y_start"], ["y_float"], body=loop),
        helper.make_node("Cast", ["y_float"], ["y"], to=by_torch(dtype).onnx),
    ]
    return _function(MOE_EXPERTS, nodes)


@functools.lru_cache(maxsize=16)
def moe_experts_dense_body(config: ModelConfig, dtype: torch.dtype) -> onnx.FunctionProto:
    """``MoeExperts`` 的另一个函数体：每个专家都算，没有循环与数据相关的形状。"""
    inputs = blocks.input_specs(MOE_EXPERTS, config, dtype)
    return _function(MOE_EXPERTS, _nodes(_trace_function(experts.experts_dense, inputs, ["y"]), "experts"))


@functools.lru_cache(maxsize=16)
def spec_accept_body(config: ModelConfig, dtype: torch.dtype, mode: str) -> onnx.FunctionProto:
    """``SpecAccept``（``mode="greedy"``）或 ``SpecAcceptRejection`` 的函数体。"""
    spec = blocks.accept_spec(mode)
    eager = accept.spec_accept_rejection if mode == "rejection" else accept.spec_accept
    inputs = blocks.input_specs(spec, config, dtype)
    body = _trace_function(eager, inputs, [port.name for port in spec.outputs])
    return _function(spec, _nodes(body, "accept"))


def _trace_function(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Spec],
    outputs: Sequence[str],
    **attributes: object,
) -> TracedGraph:
    """追踪一个模块级的函数；``attributes`` 是固化进图里的关键字参数。"""
    key = (function.__module__, function.__qualname__, sorted(attributes.items()))
    return trace(lambda: functools.partial(function, **attributes), inputs, outputs, key)


def _prefers_naive(a: int, b: int) -> list[onnx.NodeProto]:
    """``T*a < S*(a + T*b)`` 写成 ONNX；S、T 取自形状，得到标量 bool ``prefers_naive``。"""
    return [
        _constant("cost_a", np.array([a], np.int64)),
        _constant("cost_b", np.array([b], np.int64)),
        _constant("axis_0", np.array([0], np.int64)),
        helper.make_node("Shape", ["q_nope"], ["dim_S"], start=1, end=2),
        helper.make_node("Shape", ["kv_cache"], ["dim_T"], start=2, end=3),
        helper.make_node("Mul", ["dim_T", "cost_a"], ["expand_cost"]),
        helper.make_node("Mul", ["dim_T", "cost_b"], ["pair_saving"]),
        helper.make_node("Add", ["pair_saving", "cost_a"], ["query_saving"]),
        helper.make_node("Mul", ["dim_S", "query_saving"], ["saving"]),
        helper.make_node("Less", ["expand_cost", "saving"], ["prefers_naive_1d"]),
        helper.make_node("Squeeze", ["prefers_naive_1d", "axis_0"], ["prefers_naive"]),
    ]


def _nodes(graph: TracedGraph, prefix: str) -> list[onnx.NodeProto]:
    """追踪结果 → 可以拼进函数体的节点：中间值加前缀，常量变 ``Constant`` 节点（函数没有 initializer）。"""
    ports = {*graph.inputs, *graph.outputs}
    graph = graph.renamed(lambda name: name if name in ports else f"{prefix}/{name}")
    nodes = [_constant(name, numpy_helper.to_array(tensor)) for name, tensor in graph.constants.items()]
    for index, node in enumerate(graph.nodes):
        # 函数会被内联，名字要自己保证唯一，TensorRT 的层名才能追回来。
        node.name = f"{prefix}/{node.op_type}_{index}"
        nodes.append(node)
    return nodes


def _output(nodes: list[onnx.NodeProto], old: str, new: str) -> list[onnx.NodeProto]:
    for node in nodes:
        node.output[:] = [new if name == old else name for name in node.output]
    return nodes


def _constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def _scale() -> onnx.NodeProto:
    """节点的 ``scale`` 属性 → 值 ``scale``。"""
    node = helper.make_node("Constant", [], ["scale"])
    kind = onnx.AttributeProto.FLOAT
    node.attribute.append(onnx.AttributeProto(name="value_float", ref_attr_name="scale", type=kind))
    return node


def _function(spec: OpSpec, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    """按契约表组成 FunctionProto；声明全部属性，onnx 参考求值器要求节点带的属性都声明过。"""
    attributes = [a.name for a in spec.attributes] + ["plugin_namespace", "plugin_version"]
    return helper.make_function(
        DOMAIN,
        spec.name,
        [port.name for port in spec.inputs],
        [port.name for port in spec.outputs],
        nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        attributes,
    )
