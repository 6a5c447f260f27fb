"""``MoeExperts`` 的函数体换成没有循环的写法。"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from deepseek_export.capture.bodies import moe_experts_dense_body
from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.ort_moe import port
from deepseek_export.records import PassResult
from deepseek_export.reference.weights import torch_dtype


class UseDenseExpertsBodyPass(Pass):
    """让没有插件的 TensorRT 也建得出引擎：它没有 ``NonZero``，按专家循环的函数体解析不了。

    改写：

    1. ``MoeExperts`` 的函数体换成“每个专家都算，再乘路由权重”，结果相同，代价与专家数成正比。只有函数体真的被内联时（没有插件，
       或在 ONNX Runtime 上校验）才付这个代价；``dsx build`` 要求每个 ``MoeExperts`` 都是插件层。

    不改写：

    2. 没有 ``MoeExperts``（MoE 关闭），或函数体已经换过。

    ``count`` 是受影响的 ``MoeExperts`` 节点数。
    """

    name: ClassVar[str] = "use-dense-experts-body"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        nodes = module.find(MOE_EXPERTS.name)
        # 情形 2。
        if not nodes:
            return PassResult(name=self.name, changed=False, count=0)
        # 太大的专家权重已拆成几组，每组的专家数写在权重的形状里。
        part = replace(module.config, n_routed_experts=port(nodes[0], "w_gate").shape[0])
        dense = moe_experts_dense_body(part, torch_dtype(module.dtype))
        if module.functions[MOE_EXPERTS.name] == dense:
            return PassResult(name=self.name, changed=False, count=0)
        module.functions[MOE_EXPERTS.name] = dense
        return PassResult(name=self.name, changed=True, count=len(nodes))
