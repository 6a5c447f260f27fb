"""权重由 ``DequantizeLinear`` 还原的 ``MoeExperts`` → ``QuantizedMoeExperts``，它直接读码。"""

from __future__ import annotations

from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from deepseek_export.capture.functions import function_of
from deepseek_export.ops.table import (
    DOMAIN,
    MOE_EXPERTS,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    QUANTIZED_MOE_EXPERTS,
)
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.ort_moe import port, scope
from deepseek_export.records import PassResult, Refusal

_PLUGIN = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
_WEIGHTS = ("w_gate", "w_up", "w_down")
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
            restored = [_restored(experts, name) for name in _WEIGHTS]
            found = [node for node in restored if node is not None]
            if len(found) == len(_WEIGHTS):
                _rewrite(module, experts, found)
                count += 1
            elif found:
                # 情形 3。
                floating = [name for name, node in zip(_WEIGHTS, restored, strict=True) if node is None]
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


def _rewrite(module: GraphModule, experts: gs.Node, restored: list[gs.Node]) -> None:
    # 情形 1；一次量化的 block 只有一个。
    (block,) = {node.attrs["block_size"] for node in restored}
    routed = [port(experts, name) for name in ("x", "topk_ids", "topk_weights")]
    node = gs.Node(
        op=QUANTIZED_MOE_EXPERTS.name,
        name=f"{scope(experts)}/{QUANTIZED_MOE_EXPERTS.name}",
        domain=DOMAIN,
        attrs={"block_size": block} | _PLUGIN,
        inputs=[*routed, *(tensor for one in restored for tensor in one.inputs)],
        outputs=list(experts.outputs),
    )
    module.functions.setdefault(QUANTIZED_MOE_EXPERTS.name, _body())
    module.replace(experts, [node])
    for one in restored:
        module.replace(one, [])


def _body() -> onnx.FunctionProto:
    """还原三个权重，再调 ``MoeExperts``。"""
    ports = [one.name for one in QUANTIZED_MOE_EXPERTS.inputs]
    nodes = []
    for name in _WEIGHTS:
        restore = helper.make_node(
            _RESTORE, [name, f"{name}_scales"], [f"{name}/restored"], name=f"{name}/{_RESTORE}", axis=2
        )
        kind = onnx.AttributeProto.INT
        restore.attribute.append(
            onnx.AttributeProto(name="block_size", ref_attr_name="block_size", type=kind)
        )
        nodes.append(restore)
    inputs = [*ports[:3], *(f"{name}/restored" for name in _WEIGHTS)]
    call = helper.make_node(
        MOE_EXPERTS.name, inputs, ["y"], name=f"experts/{MOE_EXPERTS.name}", domain=DOMAIN, **_PLUGIN
    )
    return function_of(QUANTIZED_MOE_EXPERTS, [*nodes, call])
