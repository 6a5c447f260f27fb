"""``MoeExperts`` 的权重大到运行时装不下一个张量：按专家编号拆成几组。"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.capture.bodies import moe_experts_body
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.passes.base import GraphModule, Pass, PassError, PassResult, Refusal
from deepseek_export.passes.ort_moe import port
from deepseek_export.reference.weights import torch_dtype

_WEIGHTS = ("w_gate", "w_up", "w_down")


class SplitExpertsPass(Pass):
    """让每个专家权重都不超过 ``module.max_elements`` 个元素。

    改写：

    1. ``MoeExperts`` 的权重太大：专家按编号均分成最少的 G 组（G 整除专家数），每组一个 ``MoeExperts``，``topk_ids`` 减去这组的起点，
       各组的 ``y`` 相加。编号落在 ``[0, E/G)`` 之外的不归这一组，算子按约定跳过，所以每个 token 的每个专家恰好算一次。

    不改写：

    2. 权重都不超过上限；
    3. 拒绝：权重不是逐专家叠放的，或单个专家就超过上限。

    名字：``x``、topk_ids、topk_weights、``y`` 全部保留；权重 ``…experts.*.up_proj.weight`` 变成 ``…experts.{0..127}.up_proj.weight`` 等。

    数值：``y`` 先在组内以 float32 累加、转成模型 dtype，再跨组相加；float16 因此比不拆多舍入 G-1 次。
    """

    name: ClassVar[str] = "split-experts"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count, refused, sizes = 0, [], set()
        for experts in module.find(MOE_EXPERTS.name):
            # 情形 2。
            if self._largest(experts) <= module.max_elements:
                continue
            # 情形 3。
            if refusal := self._refuse(module, experts):
                refused.append(refusal)
                continue
            # 情形 1。
            E = port(experts, "w_gate").shape[0]
            groups = next(g for g in range(2, E + 1) if E % g == 0 and self._fits(module, experts, E // g))
            self._rewrite(module, experts, E // groups)
            sizes.add(E // groups)
            count += 1
        if count:
            (size,) = sizes  # 各层的专家同形，函数体才能共用
            part = replace(module.config, n_routed_experts=size)
            module.functions[MOE_EXPERTS.name] = moe_experts_body(part, torch_dtype(module.dtype))
        return PassResult(name=self.name, changed=count > 0, count=count, refused=tuple(refused))

    def ensures(self, module: GraphModule) -> None:
        for experts in module.find(MOE_EXPERTS.name):
            oversized = self._largest(experts) > module.max_elements
            if oversized and self._refuse(module, experts) is None:
                raise PassError(f"{experts.name} 的权重仍超过 {module.max_elements} 个元素")

    @staticmethod
    def _largest(experts: gs.Node) -> int:
        return max(math.prod(port(experts, name).shape) for name in _WEIGHTS)

    def _fits(self, module: GraphModule, experts: gs.Node, size: int) -> bool:
        """每组 ``size`` 个专家时装得下。"""
        return self._largest(experts) // port(experts, "w_gate").shape[0] * size <= module.max_elements

    def _refuse(self, module: GraphModule, experts: gs.Node) -> Refusal | None:
        for name in _WEIGHTS:
            weight = port(experts, name)
            recipe = module.weights.get(weight.name)
            if recipe is None or recipe.op != "stack" or "*" not in weight.name:
                value = f"{weight.name} 的配方 = {recipe.op if recipe else '无'}"
                return Refusal(node=experts.name, reason=f"{name} 不是逐专家叠放的权重输入", value=value)
        if not self._fits(module, experts, 1):
            value = f"上限 = {module.max_elements}"
            return Refusal(node=experts.name, reason="单个专家的权重就超过一个张量的上限", value=value)
        return None

    @staticmethod
    def _rewrite(module: GraphModule, experts: gs.Node, size: int) -> None:
        ids, y = port(experts, "topk_ids"), experts.outputs[0]
        x, weights = port(experts, "x"), port(experts, "topk_weights")
        stacks = [port(experts, name) for name in _WEIGHTS]
        new: list[gs.Node] = []
        total: gs.Tensor | None = None
        for start in range(0, stacks[0].shape[0], size):
            stop, where = start + size, f"{experts.name}/{start}"
            mine = ids
            if start:
                origin = module.constant(f"constants/expert_{start}", np.array(start, np.int32))
                mine = gs.Variable(f"{where}/topk_ids", np.int32, ids.shape)
                new.append(gs.Node(op="Sub", name=f"{where}/Sub", inputs=[ids, origin], outputs=[mine]))
            parts = [_part(module, stack, start, stop) for stack in stacks]
            out = gs.Variable(f"{where}/y", y.dtype, y.shape)
            new.append(
                gs.Node(
                    op=experts.op,
                    name=f"{where}/{experts.op}",
                    domain=experts.domain,
                    attrs=dict(experts.attrs),
                    inputs=[x, mine, weights, *parts],
                    outputs=[out],
                )
            )
            if total is not None:
                last = stop == stacks[0].shape[0]
                summed = y if last else gs.Variable(f"{where}/y_sum", y.dtype, y.shape)
                new.append(gs.Node(op="Add", name=f"{where}/Add", inputs=[total, out], outputs=[summed]))
                out = summed
            total = out
        module.replace(experts, new)


def _part(module: GraphModule, stack: gs.Tensor, start: int, stop: int) -> gs.Variable:
    """叠放的权重里 ``[start, stop)`` 这些专家，登记成一个新权重。"""
    whole = module.weights[stack.name]
    recipe = Recipe(
        op="stack",
        sources=whole.sources[start:stop],
        shape=(stop - start, *whole.shape[1:]),
        dtype=whole.dtype,
    )
    return module.add_weight(stack.name.replace("*", f"{{{start}..{stop - 1}}}"), recipe, before=stack)
