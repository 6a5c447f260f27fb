"""两个 MoE 下沉 pass 共用的部分：能否下沉，以及 ``com.microsoft::MoE`` 节点本身。

onnxruntime 1.32 的 CPU ``MoE``（实测）：先取 router_probs 最大的 k 个；``normalize_routing_weights=1`` 时只在这 k 个上做
softmax（``=0`` 则在全部 E 个上），所以喂进去的是 **log** 权重，没选中的专家填 :data:`SENTINEL`。尺寸不限：
D、I、E 为奇数，k=1，k=E，N=0 都与逐专家计算一致（float32 误差 1e-6 以内）。
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.ort_kernels import OrtKernels
from deepseek_export.passes.base import MICROSOFT, GraphModule
from deepseek_export.records import Refusal

#: 未选中的专家的 log 权重，也是 ``MoEGroupRouter`` 的默认值；选中的不低于 ln(1e-20) ≈ -46。
SENTINEL = -1e4

#: 取对数前的下限，与 ``MoEGroupRouter`` 相同。
LOG_FLOOR = 1e-20

#: swiglu 的一般形式是 G·sigmoid(alpha·G)·(L+beta)；DeepSeek 的 SwiGLU 是 silu(G)·L。
MOE_ATTRIBUTES = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 1,
}


def port(experts: gs.Node, name: str) -> gs.Tensor:
    """``MoeExperts`` 节点的一个输入。"""
    return experts.inputs[MOE_EXPERTS.find(name)[1]]


def scope(node: gs.Node) -> str:
    """节点所在的模块路径，例如 ``layers.3.mlp``。"""
    return node.name.rpartition("/")[0]


def refuse_experts(module: GraphModule, experts: gs.Node, kernels: OrtKernels) -> Refusal | None:
    """``MoeExperts`` 不能变成 ``MoE`` 的原因；``None`` 表示可以。"""
    x = port(experts, "x")
    if x.dtype != np.float32:
        reason = "onnxruntime 的 CPU MoE 只有 float32 kernel"
        return Refusal(node=experts.name, reason=reason, value=f"{x.name} 的 dtype = {x.dtype}")
    if problem := kernels.missing("MoE", {*MOE_ATTRIBUTES, "k"}):
        return Refusal(node=experts.name, reason=problem, value=f"onnxruntime = {kernels.version}")
    for name in ("w_gate", "w_up", "w_down"):
        weight = port(experts, name)
        recipe = module.weights.get(weight.name)
        if recipe is None or recipe.op != "stack":
            reason = f"{name} 不是逐专家叠放的权重输入，无法重排成 MoE 的布局"
            value = f"{weight.name} 的配方 = {recipe.op if recipe else '无'}"
            return Refusal(node=experts.name, reason=reason, value=value)
    gate = port(experts, "w_gate")
    if gate.shape[0] != module.config.n_routed_experts:
        reason = "专家拆成了几组，而 MoE 每个 token 固定取 k 个专家，一组里未必有那么多"
        return Refusal(node=experts.name, reason=reason, value=f"{gate.name} 有 {gate.shape[0]} 个专家")
    if (size := 2 * math.prod(gate.shape)) > module.max_elements:
        reason = "gate 与 up 合成一个权重之后超过一个张量的上限"
        return Refusal(node=experts.name, reason=reason, value=f"{size} > {module.max_elements}")
    if ".gate_proj." not in port(experts, "w_gate").name:
        reason = "w_gate 的名字里没有 gate_proj，无法给重排后的权重命名"
        return Refusal(node=experts.name, reason=reason, value=port(experts, "w_gate").name)
    return None


def moe_node(module: GraphModule, experts: gs.Node, log_weights: gs.Tensor, out: gs.Variable) -> gs.Node:
    """``MoE`` 节点：gate、up 换成一个行交错的新权重，down 原样。

    Args:
        module: 新权重登记在这里。
        experts: 被替换的 ``MoeExperts``，输入还在。
        log_weights: [N, E]，未选中处为 :data:`SENTINEL`。
        out: [N, D]，按归一化权重加权的专家输出。
    """
    gate, up, down = (port(experts, name) for name in ("w_gate", "w_up", "w_down"))
    gates, ups = module.weights[gate.name], module.weights[up.name]
    E, inner, D = gates.shape
    fused = Recipe(
        op="stack_swiglu",
        sources=tuple(name for pair in zip(gates.sources, ups.sources, strict=True) for name in pair),
        shape=(E, 2 * inner, D),
        dtype=gates.dtype,
    )
    gate_up = module.add_weight(gate.name.replace(".gate_proj.", ".gate_up_proj."), fused, before=gate)
    return gs.Node(
        op="MoE",
        name=f"{scope(experts)}/MoE",
        domain=MICROSOFT,
        attrs={**MOE_ATTRIBUTES, "k": port(experts, "topk_ids").shape[1]},
        inputs=[port(experts, "x"), log_weights, gate_up, gs.Variable.empty(), down],
        outputs=[out],
    )
