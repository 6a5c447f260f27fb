"""在某个节点的位置上逐个生成新节点；几个 pass 共用。"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.dtypes import BY_ONNX, Dtype, by_numpy

_CONSTANTS = "constants/"


def dtype_of(tensor: gs.Tensor) -> Dtype:
    """张量的 dtype；graph-surgeon 里 numpy 没有的类型（bfloat16）是 ONNX 的编号。"""
    return BY_ONNX[tensor.dtype] if isinstance(tensor.dtype, int) else by_numpy(tensor.dtype)


def shared_constants(graph: gs.Graph) -> dict[str, gs.Constant]:
    """图里已有的、可以共用的具名常量；前面的 pass 生成的也在里面。"""
    tensors = (tensor for node in graph.nodes for tensor in node.inputs)
    return {t.name: t for t in tensors if isinstance(t, gs.Constant) and t.name.startswith(_CONSTANTS)}


class Emitter:
    """收集顶替一个节点的新节点。

    Args:
        scope: 新节点与新值的名字前缀，例如 ``layers.3.self_attn``。
        constants: 共用的具名常量，见 :func:`shared_constants`。

    Attributes:
        nodes: 已生成的节点，按次序。
    """

    def __init__(self, scope: str, constants: dict[str, gs.Constant]) -> None:
        self.scope = scope
        self.nodes: list[gs.Node] = []
        self._constants = constants

    def ints(self, *values: int) -> gs.Constant:
        """一维 int64 常量。"""
        name = f"{_CONSTANTS}i64_{'_'.join(map(str, values))}"
        return self._constants.setdefault(name, gs.Constant(name, np.array(values, np.int64)))

    def int0d(self, value: int) -> gs.Constant:
        """标量 int64 常量。"""
        name = f"{_CONSTANTS}i64_scalar_{value}"
        return self._constants.setdefault(name, gs.Constant(name, np.array(value, np.int64)))

    def array(self, name: str, value: np.ndarray) -> gs.Constant:
        """别的常量；同名的是同一个。"""
        name = f"{_CONSTANTS}{name}"
        return self._constants.setdefault(name, gs.Constant(name, value))

    def float0d(self, value: float) -> gs.Constant:
        """标量 float32 常量。"""
        name = f"{_CONSTANTS}f32_scalar_{value}"
        return self._constants.setdefault(name, gs.Constant(name, np.array(value, np.float32)))

    def __call__(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        name: str,
        like: gs.Tensor | np.dtype | type,
        shape: Sequence[int | str] | None = None,
        domain: str | None = None,
        **attrs,
    ) -> gs.Variable:
        """生成一个单输出节点，返回它的输出。

        Args:
            op: 算子。
            inputs: 输入。
            name: 节点与输出在 ``scope`` 里的名字。
            like: 输出的 dtype，或 dtype 相同的张量。
            shape: 输出的形状；``None`` 留给形状推导。
            domain: 算子的域。
            **attrs: 属性。
        """
        dtype = like.dtype if isinstance(like, gs.Tensor) else np.dtype(like)
        out = gs.Variable(f"{self.scope}/{name}", dtype, None if shape is None else list(shape))
        self.add(op, inputs, name, [out], domain, **attrs)
        return out

    def split(
        self, tensor: gs.Tensor, sizes: Sequence[int], names: Sequence[str], axis: int
    ) -> list[gs.Variable]:
        """沿 ``axis`` 切成几段。"""
        outs = [gs.Variable(f"{self.scope}/{name}", tensor.dtype) for name in names]
        self.add("Split", [tensor, self.ints(*sizes)], f"{names[0]}_split", outs, axis=axis)
        return outs

    def add(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        name: str,
        outputs: Sequence[gs.Tensor],
        domain: str | None = None,
        **attrs,
    ) -> None:
        """生成一个节点，输出由调用者给。"""
        self.nodes.append(
            gs.Node(
                op=op,
                name=f"{self.scope}/{name}",
                attrs=attrs,
                inputs=list(inputs),
                outputs=list(outputs),
                domain=domain,
            )
        )
