"""几个量化 pass 共用的部分：权重怎么换成码与 scale。"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from deepseek_export.checkpoint.int4_codes import with_zeros
from deepseek_export.checkpoint.recipe import quantized_recipes, zero_points
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
) -> tuple[gs.Variable, gs.Variable, gs.Variable | None]:
    """登记 ``weight`` 的码与 scale 两个新权重；照检查点的 4 位码写、而码有零点的，另有零点。

    Args:
        module: 登记在这里。
        weight: 浮点权重输入，最后一维是输入维。
        form: 格式。
        packed: 码的最后两维合成一维（``QMoE``）；数据相同，只是形状不同。
        signed: 码是有符号的（``DequantizeLinear``），没有零点。
    """
    recipe = module.weights[weight.name]
    form = form if signed else with_zeros(module.int4(recipe), form)
    codes, scales = quantized_recipes(recipe, form, signed)
    if packed:
        *rows, blocks, width = codes.shape
        codes = codes.model_copy(update={"shape": (*rows, blocks * width)})
    name = f"{weight.name}.{form.kind}"
    given = {"": codes, ".scales": scales} | (
        {".zero_points": zero_points(recipe, form)} if form.zeros else {}
    )
    added = [module.add_weight(f"{name}{part}", one, before=weight) for part, one in given.items()]
    return added[0], added[1], added[2] if form.zeros else None
