"""权重由 ``DequantizeLinear`` 还原的 ``MoeExperts`` → ``QuantizedMoeExperts``，它直接读码。"""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs

from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.coded_nodes import EXPERT_WEIGHTS, Coding, use_coded_experts
from deepseek_export.passes.ort_moe import port
from deepseek_export.records import PassResult, Refusal

_RESTORE = "DequantizeLinear"


class FuseQuantizedExpertsPass(Pass):
    """专家的码交给插件，不再每步把全部专家还原一遍。

    改写：

    1. 三个权重都由 ``DequantizeLinear`` 还原的 ``MoeExperts`` → ``QuantizedMoeExperts``，读码与 scale；函数体先还原，再调
       ``MoeExperts``，所以没有这个插件时与原来一样。

    不改写：

    2. 三个都是浮点的（``keep``，或宽度不是 block 的倍数）：没有可做的；
    3. 有的是码、有的是浮点：拒绝，是码的仍每步还原。

    名字：输入、输出、码与 scale 保留。

    数值：码乘 scale 先舍入到模型 dtype 还是不舍入，差在一次舍入之内。
    """

    name: ClassVar[str] = "fuse-quantized-experts"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count, kept, refused = 0, 0, []
        for experts in module.find(MOE_EXPERTS.name):
            restored = [_restored(experts, name) for name in EXPERT_WEIGHTS]
            found = [node for node in restored if node is not None]
            if len(found) == len(EXPERT_WEIGHTS):
                # 情形 1；一次量化的 block 只有一个。
                (block,) = {node.attrs["block_size"] for node in found}
                weights = [(node.inputs[0], node.inputs[1]) for node in found]
                use_coded_experts(module, experts, weights, Coding(block))
                for node in found:
                    module.replace(node, [])
                count += 1
            elif found:
                # 情形 3。
                floating = [name for name, node in zip(EXPERT_WEIGHTS, restored, strict=True) if node is None]
                reason = "三个权重没有都量化，插件只读全是码的：是码的每步整个还原一遍"
                refused.append(
                    Refusal(node=experts.name, reason=reason, value=f"浮点的是 {'、'.join(floating)}")
                )
            else:
                kept += 1
        return PassResult(name=self.name, changed=count > 0, count=count, refused=tuple(refused), kept=kept)


def _restored(experts: gs.Node, name: str) -> gs.Node | None:
    """还原权重 ``name`` 的节点；是浮点的为 ``None``。"""
    producers = port(experts, name).inputs
    return producers[0] if producers and producers[0].op == _RESTORE else None
