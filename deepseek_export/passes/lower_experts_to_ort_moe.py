"""``MoeExperts`` → ``com.microsoft::MoE``，路由留在 ``MoeGate`` 的函数体里。"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.ort_kernels import OrtKernels, installed_kernels
from deepseek_export.passes.base import GraphModule, Pass, PassError
from deepseek_export.passes.ort_moe import LOG_FLOOR, SENTINEL, moe_node, port, refuse_experts, scope
from deepseek_export.records import PassResult


class LowerExpertsToOrtMoePass(Pass):
    """任意路由之后的专家换成 onnxruntime 的 ``MoE``。

    改写：

    1. ``MoeExperts(x, topk_ids, topk_weights, ...)``，不问 topk_* 从哪里来、还有谁在用：先铺满 :data:`SENTINEL`，再把
       ``ln(max(w, 1e-20))`` 写到 topk_ids 处（``ScatterElements``），``y = MoE(x, ·) * Σw``。``MoE`` 的 softmax 把权重归一化，
       ``Σw`` 把它还原，``routed_scaling_factor`` 已经含在 ``w`` 里。

    不改写，逐处给出原因：

    2. x 不是 float32；
    3. 安装的 onnxruntime 没有 ``MoE``，或它不认得 swiglu 的属性；
    4. 专家权重不是叠放的权重输入；
    5. 专家拆成了几组，或 gate 与 up 合成之后太大。

    名字：``x``、topk_ids、topk_weights、``y`` 全部保留。

    数值：权重要求非负（softmax、sigmoid 与正的 ``routed_scaling_factor`` 保证）；小于 1e-20 的权重按 1e-20 计。
    """

    name: ClassVar[str] = "lower-experts-to-ort-moe"

    def __init__(self, kernels: OrtKernels | None = None) -> None:
        self.kernels = kernels or installed_kernels()

    def requires(self, module: GraphModule) -> None:
        if module.graph.opset < 18:
            raise PassError(f"ReduceSum、Shape 的写法要求 opset 18 以上，这里是 {module.graph.opset}")

    def call(self, module: GraphModule) -> PassResult:
        count, refused = 0, []
        for experts in module.find(MOE_EXPERTS.name):
            # 情形 2、3、4、5。
            if refusal := refuse_experts(module, experts, self.kernels):
                refused.append(refusal)
            else:
                self._rewrite(module, experts)
                count += 1
        return PassResult(name=self.name, changed=count > 0, count=count, refused=tuple(refused))

    def _rewrite(self, module: GraphModule, experts: gs.Node) -> None:
        # 情形 1。
        x, ids, weights = (port(experts, name) for name in ("x", "topk_ids", "topk_weights"))
        (rows, k), E, y = ids.shape, port(experts, "w_gate").shape[0], experts.outputs[0]
        where, new = scope(experts), []

        def emit(op: str, inputs: list, name: str, dtype, shape: list, **attrs) -> gs.Variable:
            out = gs.Variable(f"{where}/{name}", dtype, shape)
            new.append(gs.Node(op=op, name=f"{where}/MoE_{name}", attrs=attrs, inputs=inputs, outputs=[out]))
            return out

        width = module.constant(f"constants/num_experts_{E}", np.array([E], np.int64))
        floor = module.constant("constants/log_floor", np.array(LOG_FLOOR, np.float32))
        last = module.constant("constants/last_axis", np.array([-1], np.int64))
        n = emit("Shape", [x], "num_rows", np.int64, [1], start=0, end=1)
        shape = emit("Concat", [n, width], "log_weights_shape", np.int64, [2], axis=0)
        fill = gs.Constant("value", np.array([SENTINEL], np.float32))
        blank = emit("ConstantOfShape", [shape], "unselected", np.float32, [rows, E], value=fill)
        floored = emit("Max", [weights, floor], "floored_weights", np.float32, [rows, k])
        logs = emit("Log", [floored], "selected_log_weights", np.float32, [rows, k])
        log_weights = emit(
            "ScatterElements", [blank, ids, logs], "log_weights", np.float32, [rows, E], axis=1
        )
        normalised = gs.Variable(f"{where}/moe_normalised", np.float32, y.shape)
        new.append(moe_node(module, experts, log_weights, normalised))
        total = emit("ReduceSum", [weights, last], "weight_sum", np.float32, [rows, 1], keepdims=1)
        new.append(gs.Node(op="Mul", name=f"{where}/MoE_scale", inputs=[normalised, total], outputs=[y]))
        module.replace(experts, new)
