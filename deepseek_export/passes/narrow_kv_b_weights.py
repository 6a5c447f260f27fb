"""放不成 int8 的 w_kv_b 存成 bfloat16：吸收形式里它每一步都要整个读一遍。"""

from __future__ import annotations

from typing import ClassVar

import onnx
from onnx import TensorProto, helper

from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.ops.table import MLA_ATTENTION, OPS, SPARSE_MLA_ATTENTION
from deepseek_export.passes.base import GraphModule, Pass, read_from
from deepseek_export.passes.ort_moe import scope
from deepseek_export.records import PassResult

_WEIGHT, _WIDE = "w_kv_b", "narrow/w_kv_b"


class NarrowKvBWeightsPass(Pass):
    """把 ``MlaAttention`` 的 w_kv_b 换成 bfloat16，减半它的大小与每一步读它的时间。

    改写：

    1. ``MlaAttention`` 的 w_kv_b 是 float32 权重输入：权重改成 bfloat16，函数体的开头转回 float32。C++ 算子库直接读 bfloat16；没有库时
       ONNX Runtime 在建会话时把转换折叠掉，与原来一样快。

    不改写：

    2. 权重或所在模块在 ``keep`` 里：用户要的，不算拒绝；
    3. 没有 ``MlaAttention``（MLA 关闭），或已经是 int8、bfloat16。

    数值：检查点本来就是 bfloat16 时一位不差；否则是 2^-9 的相对舍入，比 int8 的量化误差小几倍。
    """

    name: ClassVar[str] = "narrow-kv-b-weights"

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count = kept = 0
        for node in [*module.find(MLA_ATTENTION.name), *module.find(SPARSE_MLA_ATTENTION.name)]:
            weight = node.inputs[OPS[node.op].find(_WEIGHT)[1]]
            recipe = module.weights.get(weight.name)
            # 情形 2。
            if self.quantization.keeps(scope(node), weight.name):
                kept += 1
                continue
            # 情形 3。
            if recipe is None or recipe.dtype != "float32":
                continue
            # 情形 1。
            module.weights[weight.name] = recipe.model_copy(update={"dtype": "bfloat16"})
            weight.dtype = TensorProto.BFLOAT16  # numpy 没有这个类型，graph-surgeon 用 ONNX 的编号
            count += 1
        for op in (MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name):
            if count and op in module.functions:
                module.functions[op] = _widened(module.functions[op])
        return PassResult(name=self.name, changed=count > 0, count=count, kept=kept)


def _widened(body: onnx.FunctionProto) -> onnx.FunctionProto:
    """函数体的开头把 w_kv_b 转成 float32；传进来的已是 float32 时什么也不变。"""
    if any(_WIDE in node.output for node in body.node):
        return body
    wide = onnx.FunctionProto()
    wide.CopyFrom(body)  # 函数体由捕获缓存共享，改副本
    for node in wide.node:
        read_from(node, _WEIGHT, _WIDE)
    cast = helper.make_node("Cast", [_WEIGHT], [_WIDE], name="narrow/Cast", to=TensorProto.FLOAT)
    nodes = [cast, *wide.node]
    del wide.node[:]
    wide.node.extend(nodes)
    return wide
