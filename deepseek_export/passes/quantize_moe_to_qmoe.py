"""``com.microsoft::MoE`` → ``com.microsoft::QMoE``，专家的权重换成 int8 / int4 的码与 scale。"""

from __future__ import annotations

import re
from typing import ClassVar

import onnx_graphsurgeon as gs

from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.ort_kernels import OrtKernels, installed_kernels
from deepseek_export.passes.base import MICROSOFT, GraphModule, Pass
from deepseek_export.passes.ort_moe import scope
from deepseek_export.passes.ort_quant import ACCURACY_LEVEL, quantized_weight
from deepseek_export.records import PassResult, Refusal

#: ``MoE`` 的输入位置。
_X, _ROUTER, _GATE_UP, _DOWN = 0, 1, 2, 4
#: ``QMoE`` 的第一个零点的位置，down 的紧随其后。
_GATE_UP_ZEROS = 11

_EXPERT = re.compile(r"\.experts\.\d+\.")

_NEW_ATTRIBUTES = ("expert_weight_bits", "block_size", "accuracy_level", "weights_prepacked")


class QuantizeMoeToQMoePass(Pass):
    """把下沉好的 ``MoE`` 换成只量化权重的 ``QMoE``；路由、激活与归一化的语义不变。

    改写：

    1. ``y = MoE(x, log 权重, gate_up, -, down)``：gate_up 与 down 换成码与 scale，其余属性原样。``weights_prepacked=0`` 表示码就是
       [E, N, K·bits/8] 的原始布局。

    不改写：

    2. 某个专家权重在 ``keep`` 里：用户要的，不算拒绝；
    3. D 或 I 不是 block 的倍数（``QMoE`` 的要求）：拒绝；
    4. 安装的 onnxruntime 没有 ``QMoE`` 的 float32 kernel，或它不认得这些属性：拒绝；
    5. 没有下沉成 ``MoE`` 的专家：留在 ``MoeExperts`` 里的，下沉的 pass 已写明原因；MoE 关闭时的稠密写法记一条 ``notes``。

    名字：x、y 保留；新权重叫 ``{w}.{kind}`` 与 ``{w}.{kind}.scales``，照检查点的码写、而码有零点的另有 ``{w}.{kind}.zero_points``。

    数值：同 ``MatMulNBits``，``accuracy_level=4``；8 位的 kernel 无论哪一级都把激活量化到 int8（onnxruntime 1.32）。
    """

    name: ClassVar[str] = "quantize-moe-to-qmoe"

    def __init__(self, quantization: Quantization, kernels: OrtKernels | None = None) -> None:
        self.quantization = quantization
        self.kernels = kernels or installed_kernels()

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count, kept, refused = 0, 0, []
        for moe in module.find("MoE", domain=MICROSOFT):
            # 情形 2。
            if self.quantization.keeps(scope(moe), *_expert_names(module, moe)):
                kept += 1
            elif refusal := self._refuse(module, moe):
                refused.append(refusal)
            else:
                self._rewrite(module, moe)
                count += 1
        return PassResult(
            name=self.name,
            changed=count > 0,
            count=count,
            refused=tuple(refused),
            kept=kept,
            notes=self._notes(module, {refusal.node for refusal in refused}),
        )

    def _refuse(self, module: GraphModule, moe: gs.Node) -> Refusal | None:
        # 情形 3。
        for index in (_GATE_UP, _DOWN):
            name = moe.inputs[index].name
            width = module.weights[name].shape[-1]
            if width % self.quantization.block:
                reason = f"QMoE 要求专家的输入宽度是 block（{self.quantization.block}）的倍数"
                return Refusal(node=moe.name, reason=reason, value=f"{name} 的宽度 = {width}")
        # 情形 4。
        if problem := self.kernels.missing("QMoE", (*moe.attrs, *_NEW_ATTRIBUTES)):
            return Refusal(node=moe.name, reason=problem, value=f"onnxruntime = {self.kernels.version}")
        return None

    def _notes(self, module: GraphModule, refused: set[str]) -> tuple[str, ...]:
        """情形 5：还是浮点、不是用户要保留的、又没有别处说明原因的叠放权重。"""
        readers = [n for n in module.graph.nodes if n.op != MOE_EXPERTS.name and n.name not in refused]
        read = {tensor.name for node in readers for tensor in node.inputs}
        left = [
            name
            for name, recipe in module.weights.items()
            if recipe.op == "stack" and name in read and not self.quantization.keeps(name)
        ]
        if not left:
            return ()
        why = "它们没有下沉成 MoE 节点（moe.enabled=false，或下沉被拒绝）"
        return (f"{len(left)} 个专家权重没有量化：{why}，例如 {left[0]}",)

    def _rewrite(self, module: GraphModule, moe: gs.Node) -> None:
        # 情形 1。
        names = _expert_names(module, moe)
        inputs, zero_points = [moe.inputs[_X], moe.inputs[_ROUTER]], []
        for index in (_GATE_UP, _DOWN):
            codes, scales, zeros = quantized_weight(
                module, moe.inputs[index], self.quantization.format(module.dtype), packed=True
            )
            inputs += [codes, scales, gs.Variable.empty()]
            zero_points.append(zeros)
        node = gs.Node(
            op="QMoE",
            name=f"{scope(moe)}/QMoE",
            domain=MICROSOFT,
            attrs={
                **moe.attrs,
                "expert_weight_bits": self.quantization.bits,
                "block_size": self.quantization.block,
                "accuracy_level": ACCURACY_LEVEL,
                "weights_prepacked": 0,
            },
            inputs=_with_zero_points(inputs, zero_points),
            outputs=[moe.outputs[0]],
        )
        module.quantized.update(names)
        module.replace(moe, [node])


def _with_zero_points(inputs: list[gs.Tensor], zeros: list[gs.Variable | None]) -> list[gs.Tensor]:
    """``QMoE`` 的零点在最后，前面空着没有用到的 fc3；没有零点就到最后一个权重的 scale 为止。"""
    given = [one for one in zeros if one is not None]
    if not given:
        return inputs[:-1]
    return [*inputs, *(gs.Variable.empty() for _ in range(_GATE_UP_ZEROS - len(inputs))), *given]


def _expert_names(module: GraphModule, moe: gs.Node) -> set[str]:
    """gate、up、down 三个叠放权重在检查点里的名字，编号写成 ``*``；下沉时前两个合成了一个，太大的还按编号拆过组。"""
    sources = [source for i in (_GATE_UP, _DOWN) for source in module.weights[moe.inputs[i].name].sources]
    return {_EXPERT.sub(".experts.*.", source) for source in sources}
