"""词嵌入的 ``Gather`` → 取窄的行，只展宽取到的那几行。"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from deepseek_export.checkpoint.weight_only import KERNEL_SCALE, BlockFormat, Quantization
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.ort_moe import scope
from deepseek_export.passes.ort_quant import quantized_rows
from deepseek_export.records import PassResult


class QuantizeEmbeddingPass(Pass):
    """词嵌入存窄：每一步只用到几行，展宽它们不花什么，文件却小到一半或四分之一。

    改写，``x = Gather(词嵌入, ids)``，词嵌入是 float32 权重输入：

    1. int4 的 bundle 存逐块的 int8：``Gather`` 码与 scale，``DequantizeLinear`` 还原取到的行；
    2. int8 的 bundle，或宽度不是 block 的倍数：存 bfloat16，取到的行转回 float32。检查点本来就是 bfloat16 时无损。int8 的不也存 int8：
       演示检查点的路由会多翻几处，超过 PARITY-21 的门槛；int4 的误差大得多，看不出差别（docs/perf/precision.md）。

    不改写：

    3. 权重或所在模块在 ``keep`` 里：用户要的，不算拒绝。

    名字：x 保留；新权重叫 ``{w}.lookup``（与 ``{w}.lookup.scales``）。与 lm_head 共享的词嵌入，lm_head 自己另有一份。
    """

    name: ClassVar[str] = "quantize-embedding"

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count = kept = 0
        for gather in embeddings(module):
            weight, block = gather.inputs[0], self.quantization.block
            # 情形 3。
            if self.quantization.keeps(scope(gather), weight.name):
                kept += 1
                continue
            # 情形 1。
            if stores_codes(self.quantization, module.weights[weight.name].shape[-1]):
                _use_codes(module, gather, BlockFormat(kind="int8", block=block, scale=KERNEL_SCALE))
            # 情形 2。
            else:
                _use_bfloat16(module, gather)
            count += 1
        return PassResult(name=self.name, changed=count > 0, count=count, kept=kept)


def stores_codes(quantization: Quantization, width: int) -> bool:
    """这样宽的词嵌入存成 int8 吗；不是就存 bfloat16。"""
    return quantization.kind == "int4" and width % quantization.block == 0


def embeddings(module: GraphModule) -> list[gs.Node]:
    """取二维 float32 权重输入的几行的 ``Gather``。"""
    found = []
    for gather in module.find("Gather", domain=""):
        recipe = module.weights.get(gather.inputs[0].name)
        by_row = gather.attrs.get("axis", 0) == 0
        if recipe is not None and len(recipe.shape) == 2 and recipe.dtype == "float32" and by_row:
            found.append(gather)
    return found


def _use_codes(module: GraphModule, gather: gs.Node, form: BlockFormat) -> None:
    weight, ids, x = gather.inputs[0], gather.inputs[1], gather.outputs[0]
    codes, scales = quantized_rows(module, weight, form)
    stem = gather.name
    rows = gs.Variable(f"{stem}/rows", np.int8)
    narrow = gs.Variable(f"{stem}/scales", np.dtype(form.scale))
    wide = gs.Variable(f"{stem}/scales/float32", np.float32)
    restore = {"axis": -1, "block_size": form.block}
    module.quantized.add(weight.name)
    module.replace(
        gather,
        [
            gs.Node("Gather", f"{stem}/codes", {"axis": 0}, [codes, ids], [rows]),
            gs.Node("Gather", f"{stem}/scales", {"axis": 0}, [scales, ids], [narrow]),
            gs.Node("Cast", f"{stem}/widen", {"to": TensorProto.FLOAT}, [narrow], [wide]),
            gs.Node("DequantizeLinear", f"{stem}/restore", restore, [rows, wide], [x]),
        ],
    )


def _use_bfloat16(module: GraphModule, gather: gs.Node) -> None:
    weight, ids, x = gather.inputs[0], gather.inputs[1], gather.outputs[0]
    recipe = module.weights[weight.name].model_copy(update={"dtype": "bfloat16"})
    table = module.add_weight(f"{weight.name}.lookup", recipe, before=weight)
    table.dtype = TensorProto.BFLOAT16  # numpy 没有这个类型，graph-surgeon 用 ONNX 的编号
    rows = gs.Variable(f"{gather.name}/rows", TensorProto.BFLOAT16)
    module.replace(
        gather,
        [
            gs.Node("Gather", f"{gather.name}/rows", {"axis": 0}, [table, ids], [rows]),
            gs.Node("Cast", f"{gather.name}/widen", {"to": TensorProto.FLOAT}, [rows], [x]),
        ],
    )
