"""``MoeExperts`` 的权重大到运行时装不下一个张量：按专家编号拆成几组。"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.capture.bodies import moe_experts_body
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.errors import DsxError
from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.ort_moe import port
from deepseek_export.records import PassResult
from deepseek_export.reference.weights import torch_dtype

_WEIGHTS = ("w_gate", "w_up", "w_down")


class SplitExpertsPass(Pass):
    """让每个专家权重都不超过 ``module.max_elements`` 个元素。

    改写：

    1. ``MoeExperts`` 的权重太大：专家按编号均分成最少的 G 组（G 整除专家数），每组一个 ``MoeExperts``，``topk_ids`` 减去这组的起点，
       各组的 ``y`` 相加。编号落在 ``[0, E/G)`` 之外的不归这一组，算子按约定跳过，所以每个 token 的每个专家恰好算一次。

    不改写：

    2. 权重都不超过上限。

    拒绝编译（``DSX-E410``）：

    3. 还有权重超过上限：不是逐专家叠放的（MoE 关闭时的专家、词嵌入），或单个专家就超过。

    名字：``x``、topk_ids、topk_weights、``y`` 全部保留；权重 ``…experts.*.up_proj.weight`` 变成 ``…experts.{0..127}.up_proj.weight`` 等。

    数值：``y`` 先在组内以 float32 累加、转成模型 dtype，再跨组相加；float16 因此比不拆多舍入 G-1 次。
    """

    name: ClassVar[str] = "split-experts"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        sizes = []
        for experts in module.find(MOE_EXPERTS.name):
            # 情形 1。
            if size := _group_size(module, experts):
                self._rewrite(module, experts, size)
                sizes.append(size)
        if sizes:
            (size,) = set(sizes)  # 各层的专家同形，函数体才能共用
            part = replace(module.config, n_routed_experts=size)
            module.functions[MOE_EXPERTS.name] = moe_experts_body(part, torch_dtype(module.dtype))
        return PassResult(name=self.name, changed=bool(sizes), count=len(sizes))

    def ensures(self, module: GraphModule) -> None:
        """情形 3。"""
        if left := module.oversized():
            size = math.prod(module.weights[left[0]].shape)
            raise DsxError(
                "DSX-E410",
                f"{left[0]} 有 {size} 个元素，一个张量至多 {module.max_elements} 个",
                "打开 moe（例如 -p mla+moe），专家权重就能按组拆开；其余权重 dsx 拆不了",
            )

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


def _group_size(module: GraphModule, experts: gs.Node) -> int:
    """每组几个专家；0 表示不拆（情形 2、3）。"""
    recipes = [module.weights[port(experts, name).name] for name in _WEIGHTS]
    if any(recipe.op != "stack" for recipe in recipes):
        return 0
    E, largest = port(experts, "w_gate").shape[0], max(math.prod(recipe.shape) for recipe in recipes)
    fits = (E // g for g in range(1, E + 1) if E % g == 0 and largest // g <= module.max_elements)
    size = next(fits, 0)
    return 0 if size == E else size


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
