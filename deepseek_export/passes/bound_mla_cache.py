"""注意力与索引器的函数体只看缓存里用到的前缀。"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from deepseek_export.ops.table import LIGHTNING_INDEXER, MLA_ATTENTION, SPARSE_MLA_ATTENTION
from deepseek_export.passes.base import GraphModule, Pass, read_from
from deepseek_export.records import PassResult

#: 算子 → 缓存输入、写好的缓存、从哪个输入看 S。
_PORTS = {
    MLA_ATTENTION.name: ("kv_cache", "kv_cache_out", "q_nope"),
    SPARSE_MLA_ATTENTION.name: ("kv_cache", "kv_cache_out", "q_nope"),
    LIGHTNING_INDEXER.name: ("index_cache", "index_cache_out", "k"),
}


class BoundMlaCachePass(Pass):
    """让注意力的代价随上下文的实际长度走，而不是随缓存容量走。

    改写：

    1. ``MlaAttention`` 的函数体：注意力改为在 ``kv_cache_out[:, :, :max(past_lens)+S]`` 上计算。被切掉的行对每个 query 都不可见，
       softmax 权重恰好是 0，所以结果不变；作为输出的缓存仍是完整的，原地写入不受影响。

    2. ``SparseMlaAttention``、``LightningIndexer`` 的：同样切。长度不超过名额数时因此走稠密的路，容量再大也不排名。

    不改写：

    3. 没有这些算子（MLA 关闭），或函数体已经切过。

    ``count`` 是受益的节点数。只用于 ONNX Runtime：切片长度取决于 ``past_lens`` 的值，
    TensorRT 的形状推导做不到。
    """

    name: ClassVar[str] = "bound-mla-cache"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count = 0
        for op, ports in _PORTS.items():
            body, nodes = module.functions.get(op), len(module.find(op))
            # Case 3
            if body is None or not nodes or any(_used(ports[0]) in node.output for node in body.node):
                continue
            # Case 1 & 2
            module.functions[op] = _bounded(body, *ports)
            count += nodes
        return PassResult(name=self.name, changed=count > 0, count=count)


def _bounded(body: onnx.FunctionProto, cache: str, written: str, query: str) -> onnx.FunctionProto:
    """函数体由捕获缓存共享，改副本。"""
    bounded = onnx.FunctionProto()
    bounded.CopyFrom(body)
    at = next(i for i, node in enumerate(bounded.node) if written in node.output)
    head, tail = list(bounded.node[: at + 1]), list(bounded.node[at + 1 :])
    for node in tail:
        read_from(node, written, _used(cache))
        read_from(node, cache, _used(cache))  # auto 的代价比较、够不够名额也按实际长度
    del bounded.node[:]
    bounded.node.extend([*head, *_bound_nodes(cache, written, query), *tail])
    return bounded


def _used(cache: str) -> str:
    """用到的前缀叫什么。"""
    return f"bound/{cache}"


def _bound_nodes(cache: str, written: str, query: str) -> list[onnx.NodeProto]:
    """``written`` → 前 ``max(past_lens)+S`` 行。"""

    def constant(name: str, value: int) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(np.array([value], np.int64), name)
        return helper.make_node("Constant", [], [name], value=tensor)

    return [
        constant("bound/zero", 0),
        constant("bound/axis", 2),
        helper.make_node("ReduceMax", ["past_lens"], ["bound/past"], name="bound/ReduceMax", keepdims=0),
        helper.make_node("Shape", [query], ["bound/S"], name="bound/Shape", start=1, end=2),
        helper.make_node("Add", ["bound/past", "bound/S"], ["bound/length"], name="bound/Add"),
        helper.make_node(
            "Slice", [written, "bound/zero", "bound/length", "bound/axis"], [_used(cache)], name="bound/Slice"
        ),
    ]
