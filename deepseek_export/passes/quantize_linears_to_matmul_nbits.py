"""线性层的 ``MatMul`` → ``com.microsoft::MatMulNBits``，权重换成 int8 / int4 的码与 scale。"""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs

from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.ort_kernels import OrtKernels, installed_kernels
from deepseek_export.passes.base import MICROSOFT, GraphModule, Pass, PassError
from deepseek_export.passes.ort_moe import scope
from deepseek_export.passes.ort_quant import ACCURACY_LEVEL, quantized_weight
from deepseek_export.records import PassResult, Refusal

_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")


class QuantizeLinearsToMatMulNBitsPass(Pass):
    """把线性层换成只量化权重的矩阵乘。

    改写：

    1. ``y = MatMul(x, Transpose(w))``，w 是 [N, K] 的 float32 权重输入：换成 ``MatMulNBits(x, 码, scale)``，``Transpose`` 随之消失。
       bias 是后面单独的 ``Add``，不动。共享的词嵌入用作 lm_head 时，词嵌入那一份另有 pass。

    不改写：

    2. 权重或所在模块在 ``keep`` 里：用户要的，不算拒绝；
    3. 不是这个样子的矩阵乘：router（``Gemm``，始终 float32）、``MlaAttention`` 的 w_kv_b（函数体要浮点，另有 pass）、MLA 关闭时的 QK/PV；
    4. 安装的 onnxruntime 没有 ``MatMulNBits`` 的 float32 kernel：拒绝，逐处给出原因。

    名字：x、y 保留；新权重叫 ``{w}.{kind}`` 与 ``{w}.{kind}.scales``，照检查点的码写、而码有零点的另有 ``{w}.{kind}.zero_points``。

    数值：``accuracy_level=4``，激活也逐块量化到 int8 再做整数点积。8 位权重只有这一级有像样的 kernel（onnxruntime 1.32 实测，
    K=1024、N=4096、一行：0.08 ms，``accuracy_level=1`` 每次先还原整个权重，15 ms），代价是每个算子约 6e-3 的相对误差。
    """

    name: ClassVar[str] = "quantize-linears-to-matmul-nbits"

    def __init__(self, quantization: Quantization, kernels: OrtKernels | None = None) -> None:
        self.quantization = quantization
        self.kernels = kernels or installed_kernels()
        self._left: set[str] = set()

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count, kept, refused, self._left = 0, 0, [], set[str]()
        problem = self.kernels.missing("MatMulNBits", _ATTRIBUTES)
        for matmul, transpose in linears(module):
            weight = transpose.inputs[0]
            # 情形 2；与词嵌入共享权重时，只有模块路径认得出 lm_head。
            if self.quantization.keeps(scope(matmul), weight.name):
                self._left.add(matmul.name)
                kept += 1
            # 情形 4。
            elif problem:
                self._left.add(matmul.name)
                refused.append(
                    Refusal(node=matmul.name, reason=problem, value=f"onnxruntime = {self.kernels.version}")
                )
            else:
                self._rewrite(module, matmul, transpose)
                count += 1
        return PassResult(name=self.name, changed=count > 0, count=count, refused=tuple(refused), kept=kept)

    def ensures(self, module: GraphModule) -> None:
        """剩下的线性层恰好是要保留的与拒绝的。"""
        left = {matmul.name for matmul, _ in linears(module)}
        if left != self._left:
            raise PassError(f"剩下的线性层 {sorted(left)} 与保留的、拒绝的 {sorted(self._left)} 不一致")

    def _rewrite(self, module: GraphModule, matmul: gs.Node, transpose: gs.Node) -> None:
        # 情形 1。
        x, weight, y = matmul.inputs[0], transpose.inputs[0], matmul.outputs[0]
        rows, width = module.weights[weight.name].shape
        codes, scales, zeros = quantized_weight(module, weight, self.quantization.format(module.dtype))
        node = gs.Node(
            op="MatMulNBits",
            name=f"{scope(matmul)}/MatMulNBits",
            domain=MICROSOFT,
            attrs={
                "K": width,
                "N": rows,
                "bits": self.quantization.bits,
                "block_size": self.quantization.block,
                "accuracy_level": ACCURACY_LEVEL,
            },
            inputs=[x, codes, scales] if zeros is None else [x, codes, scales, zeros],
            outputs=[y],
        )
        module.quantized.add("lm_head.weight" if scope(matmul) == "head.lm_head" else weight.name)
        module.replace(matmul, [node])
        if not transpose.outputs[0].outputs:
            module.replace(transpose, [])


def linears(module: GraphModule) -> list[tuple[gs.Node, gs.Node]]:
    """``MatMul(x, Transpose(w))``，w 是模型 dtype 的二维权重输入；按图的次序，(MatMul, Transpose)。"""
    found = []
    for matmul in module.find("MatMul", domain=""):
        transpose = matmul.inputs[1].inputs[0] if matmul.inputs[1].inputs else None
        if transpose is None or transpose.op != "Transpose" or transpose.attrs.get("perm") != [1, 0]:
            continue
        recipe = module.weights.get(transpose.inputs[0].name)
        if recipe is not None and len(recipe.shape) == 2 and recipe.dtype == module.dtype:
            found.append((matmul, transpose))
    return found
