"""``MoeGate`` + ``MoeExperts`` → ``com.microsoft::MoEGroupRouter`` + ``com.microsoft::MoE``。"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.ops.table import DOMAIN, MOE_EXPERTS, MOE_GATE
from deepseek_export.ort_kernels import OrtKernels, installed_kernels
from deepseek_export.passes.base import MICROSOFT, GraphModule, Pass
from deepseek_export.passes.ort_moe import SENTINEL, moe_node, port, refuse_experts, scope
from deepseek_export.records import PassResult, Refusal

#: 属性 → MoEGroupRouter 加上 MoE 的归一化唯一能表达的取值。
_REQUIRED = {"scoring_func": "sigmoid", "group_score": "top2_sum", "norm_topk_prob": 1}

_ROUTER_ATTRIBUTES = ("n_group", "topk_group", "group_topk", "top_k", "router_sentinel")


class LowerGateExpertsToOrtMoePass(Pass):
    """把一对 noaux_tc 路由与专家整个换成 onnxruntime 的两个融合 kernel。

    改写：

    1. ``MoeGate(sigmoid, top2_sum, norm_topk_prob=1)`` → ``MoeExperts``，其间没有别的消费者：
       ``y = MoE(x, MoEGroupRouter(logits, bias)) * routed_scaling_factor``。router 写出选中专家的 ``ln(max(s, 1e-20))``，
       ``MoE`` 在选中的 k 个上做 softmax，正好是 ``s / Σs``。

    不改写，逐处给出原因：

    2. 路由的 topk_ids 或 topk_weights 不是来自同一个 ``MoeGate``；
    3. 路由属性不是 noaux_tc + 归一化（V2 的 softmax、V3 的 ``norm_topk_prob=0``）：交给下一个 pass；
    4. topk_ids 或 topk_weights 还有别的消费者，或者是图的输出：删掉 ``MoeGate`` 会断开它们；
    5. 安装的 onnxruntime 没有 ``MoEGroupRouter``：交给下一个 pass；
    6. 专家本身不能变成 ``MoE``（float16、kernel 缺失、权重不是叠放的），见 :mod:`~deepseek_export.passes.ort_moe`。

    名字：``logits``、``x``、``y`` 保留；topk_ids、topk_weights 随 ``MoeGate`` 消失。

    数值（onnxruntime 1.32 实测）：分数严格相等时，专家与组的并列都取小下标，与 ``MoeGate`` 的约定一致。onnxruntime CPU 的
    sigmoid 是近似（函数体因此不用 ``Sigmoid`` 算子）：绝对误差约 5e-8，logits < -18 时直接为 0。因此**数学上**相等而浮点上
    不等的分数（如 ``σ(a) + σ(-a)`` 与 ``σ(b) + σ(-b)``）可能与 torch 选出不同的专家；选中的 k 个 logits 全都小于 -18 时 router
    给出均匀的权重，不再是 ``s / Σs``。
    """

    name: ClassVar[str] = "lower-gate-experts-to-ort-moe"

    def __init__(self, kernels: OrtKernels | None = None) -> None:
        self.kernels = kernels or installed_kernels()

    def call(self, module: GraphModule) -> PassResult:
        count, refused = 0, []
        for experts in module.find(MOE_EXPERTS.name):
            if refusal := self._refuse(module, experts):
                refused.append(refusal)
            else:
                self._rewrite(module, experts)
                count += 1
        return PassResult(name=self.name, changed=count > 0, count=count, refused=tuple(refused))

    def _refuse(self, module: GraphModule, experts: gs.Node) -> Refusal | None:
        def refusal(reason: str, value: str) -> Refusal:
            return Refusal(node=experts.name, reason=reason, value=value)

        # 情形 2。
        ids, weights = port(experts, "topk_ids"), port(experts, "topk_weights")
        gate = ids.inputs[0] if ids.inputs else None
        if gate is None or (gate.op, gate.domain) != (MOE_GATE.name, DOMAIN):
            return refusal(
                "topk_ids 不是 MoeGate 的输出", f"{ids.name} 来自 {gate.op if gate else '图的输入'}"
            )
        if [t.name for t in gate.outputs] != [ids.name, weights.name]:
            return refusal("topk_ids 与 topk_weights 不是同一个 MoeGate 的输出", weights.name)
        # 情形 3。
        for key, only in _REQUIRED.items():
            if gate.attrs[key] != only:
                return refusal(f"MoEGroupRouter 只支持 {key} = {only}", f"{key} = {gate.attrs[key]}")
        # 情形 4。
        for tensor in (ids, weights):
            if others := [node.name for node in tensor.outputs if node is not experts]:
                return refusal(f"{tensor.name} 还有别的消费者", "、".join(others))
            if any(tensor is output for output in module.graph.outputs):
                return refusal(f"{tensor.name} 是图的输出", tensor.name)
        # 情形 5。
        if problem := self.kernels.missing("MoEGroupRouter", _ROUTER_ATTRIBUTES):
            return refusal(problem, f"onnxruntime = {self.kernels.version}")
        # 情形 6。
        return refuse_experts(module, experts, self.kernels)

    def _rewrite(self, module: GraphModule, experts: gs.Node) -> None:
        # 情形 1。
        gate, where, y = port(experts, "topk_ids").inputs[0], scope(experts), experts.outputs[0]
        logits, bias = gate.inputs
        attrs = gate.attrs
        log_weights = gs.Variable(f"{where}/router_log_weights", np.float32, logits.shape)
        router = gs.Node(
            op="MoEGroupRouter",
            name=f"{where}/MoEGroupRouter",
            domain=MICROSOFT,
            attrs={
                "n_group": attrs["n_group"],
                "topk_group": attrs["topk_group"],
                "group_topk": 2,
                "top_k": attrs["top_k"],
                "router_sentinel": SENTINEL,
            },
            inputs=[logits, bias],
            outputs=[log_weights],
        )
        unscaled = gs.Variable(f"{where}/moe_unscaled", np.float32, y.shape)
        moe = moe_node(module, experts, log_weights, unscaled)
        factor = module.constant(
            "constants/routed_scaling_factor", np.array(attrs["routed_scaling_factor"], np.float32)
        )
        scaled = gs.Node(op="Mul", name=f"{where}/MoE_scale", inputs=[unscaled, factor], outputs=[y])
        # 放在 experts 的位置：x 未必在 gate 之前就算好。
        module.replace(experts, [router, moe, scaled])
        module.replace(gate, [])
