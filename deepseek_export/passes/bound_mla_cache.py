"""``MlaAttention`` 的函数体只看缓存里用到的前缀。"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from deepseek_export.ops.table import MLA_ATTENTION
from deepseek_export.passes.base import GraphModule, Pass, read_from
from deepseek_export.records import PassResult

_CACHE, _USED = "kv_cache_out", "bound/kv_cache"


class BoundMlaCachePass(Pass):
    """让注意力的代价随上下文的实际长度走，而不是随缓存容量走。

    改写：

    1. ``MlaAttention`` 的函数体：注意力改为在 ``kv_cache_out[:, :, :max(past_lens)+S]`` 上计算。被切掉的行对每个 query 都不可见，
       softmax 权重恰好是 0，所以结果不变；作为输出的缓存仍是完整的，原地写入不受影响。

    不改写：

    2. 没有 ``MlaAttention``（MLA 关闭），或函数体已经切过。

    ``count`` 是受益的 ``MlaAttention`` 节点数。只用于 ONNX Runtime：切片长度取决于 ``past_lens`` 的值，
    TensorRT 的形状推导做不到。
    """

    name: ClassVar[str] = "bound-mla-cache"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        body = module.functions.get(MLA_ATTENTION.name)
        nodes = len(module.find(MLA_ATTENTION.name))
        # Case 2
        if body is None or not nodes or any(_USED in node.output for node in body.node):
            return PassResult(name=self.name, changed=False, count=0)
        # Case 1：函数体由捕获缓存共享，改副本。
        bounded = onnx.FunctionProto()
        bounded.CopyFrom(body)
        written = next(i for i, node in enumerate(bounded.node) if _CACHE in node.output)
        head, tail = list(bounded.node[: written + 1]), list(bounded.node[written + 1 :])
        for node in tail:
            read_from(node, _CACHE, _USED)
            read_from(node, "kv_cache", _USED)  # auto 的代价比较也按实际长度
        del bounded.node[:]
        bounded.node.extend([*head, *_bound_nodes(), *tail])
        module.functions[MLA_ATTENTION.name] = bounded
        return PassResult(name=self.name, changed=True, count=nodes)


def _bound_nodes() -> list[onnx.NodeProto]:
    """``kv_cache_out`` → 前 ``max(past_lens)+S`` 行。"""

    def constant(name: str, value: int) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(np.array([value], np.int64), name)
        return helper.make_node("Constant", [], [name], value=tensor)

    return [
        constant("bound/zero", 0),
        constant("bound/axis", 2),
        helper.make_node("ReduceMax", ["past_lens"], ["bound/past"], name="bound/ReduceMax", keepdims=0),
        helper.make_node("Shape", ["q_nope"], ["bound/S"], name="bound/Shape", start=1, end=2),
        helper.make_node("Add", ["bound/past", "bound/S"], ["bound/length"], name="bound/Add"),
        helper.make_node(
            "Slice", [_CACHE, "bound/zero", "bound/length", "bound/axis"], [_USED], name="bound/Slice"
        ),
    ]
