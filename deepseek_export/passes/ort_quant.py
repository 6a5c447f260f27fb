"""几个量化 pass 共用的部分：权重怎么换成码与 scale。"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from deepseek_export.checkpoint.recipe import quantized_recipes
from deepseek_export.checkpoint.weight_only import BlockFormat
from deepseek_export.passes.base import GraphModule

#: 激活逐块量化到 int8；理由见 :class:`~deepseek_export.passes.quantize_linears_to_matmul_nbits.QuantizeLinearsToMatMulNBitsPass`。
ACCURACY_LEVEL = 4


def quantized_rows(
    module: GraphModule, weight: gs.Variable, form: BlockFormat
) -> tuple[gs.Variable, gs.Variable]:
    """登记按行取用的 ``weight`` 的码（有符号，[行, 宽]）与 scale 两个新权重。"""
    codes, scales = quantized_recipes(module.weights[weight.name], form, signed=True)
    name = f"{weight.name}.lookup"
    return (
        module.add_weight(name, codes, before=weight),
        module.add_weight(f"{name}.scales", scales, before=weight),
    )


def quantized_weight(
    module: GraphModule, weight: gs.Variable, form: BlockFormat, packed: bool = False, signed: bool = False
) -> tuple[gs.Variable, gs.Variable]:
    """登记 ``weight`` 的码与 scale 两个新权重。

    Args:
        module: 登记在这里。
        weight: 浮点权重输入，最后一维是输入维。
        form: 格式。
        packed: 码的最后两维合成一维（``QMoE``）；数据相同，只是形状不同。
        signed: 码是有符号的（``DequantizeLinear``）。
    """
    codes, scales = quantized_recipes(module.weights[weight.name], form, signed)
    if packed:
        *rows, blocks, width = codes.shape
        codes = codes.model_copy(update={"shape": (*rows, blocks * width)})
    name = f"{weight.name}.{form.kind}"
    return (
        module.add_weight(name, codes, before=weight),
        module.add_weight(f"{name}.scales", scales, before=weight),
    )
