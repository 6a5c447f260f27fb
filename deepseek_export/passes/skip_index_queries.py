"""长度不超过名额时，索引器的 query 与各头的权重没有人看：那时不算它们。"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.ops.table import LIGHTNING_INDEXER
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.emitter import Emitter, shared_constants
from deepseek_export.records import PassResult

#: 这个 pass 添的节点与值，名字里索引器之后的一段；其中 ``rows`` 就是 ``Sq``。
SCOPE, ROWS = "/queries/", "/queries/rows"
#: 契约表里 ``q``、``w`` 的行数；与新 token 的个数相同，或是 0。
_ROWS = "Sq"


class SkipIndexQueriesPass(Pass):
    """看得见的 key 不超过名额的一步，全部选中，不打分：只为打分而算的那几个节点改在 0 行上算。

    改写：

    1. ``LightningIndexer`` 的 ``q``、``w`` 由 ``wq_b``、``weights_proj`` 与旋转算出，别处不用：这一串节点读的每个 [B, S, ...] 换成它的前
       ``Sq`` 行，目标形状里的 S 换成 ``Sq``。要排名时 ``Sq`` 就是 S，否则是 0，这一串都是空的。写缓存的 ``k`` 照算。

    不改写：

    2. 没有 ``LightningIndexer``，或已经换过。

    不用 ``If``：主图没有子图，逐块校验照旧；按节点查错时由外面给 ``rows``，让 query 都在。名字：原有的都不改。数值：要排名时一位不变，不要时结果与它们无关。

    Args:
        by: 按什么看要不要排名，与函数体一致：``capacity`` 是缓存的容量，``length`` 是用到的长度（``bound-mla-cache`` 之后）。
    """

    name: ClassVar[str] = "skip-index-queries"

    def __init__(self, by: Literal["capacity", "length"]) -> None:
        self.by = by

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        constants, count = shared_constants(module.graph), 0
        for node in module.find(LIGHTNING_INDEXER.name):
            # 情形 2。
            if node.inputs[0].shape[1] != _ROWS:
                _Queries(module, node, self.by == "length", constants).shorten()
                count += 1
        return PassResult(name=self.name, changed=count > 0, count=count)


class _Queries:
    """一个索引器的 ``q``、``w`` 的由来。"""

    def __init__(
        self, module: GraphModule, indexer: gs.Node, by_length: bool, constants: dict[str, gs.Constant]
    ) -> None:
        self._module, self._indexer, self._by_length = module, indexer, by_length
        self._emit = Emitter(indexer.name.rpartition("/")[0] + SCOPE.rstrip("/"), constants)
        self._shorter: dict[str, gs.Tensor] = {}
        self._rows: gs.Tensor | None = None

    def shorten(self) -> None:
        """情形 1。"""
        nodes = self._module.graph.nodes
        chain = self._chain()
        for node in chain:
            node.inputs = [self._shortened(tensor, chain) for tensor in node.inputs]
            at = next(i for i, other in enumerate(nodes) if other is node)
            nodes[at:at] = self._emit.nodes
            self._emit.nodes.clear()
            for tensor in node.outputs:
                if tensor.shape is not None:
                    tensor.shape = [_renamed(dim) for dim in tensor.shape]

    def _chain(self) -> list[gs.Node]:
        """只为 ``q``、``w`` 而算的节点，按图的次序。"""
        wanted, found = self._indexer.inputs[:2], []
        kept = {id(tensor) for tensor in self._module.graph.outputs}
        inside: set[int] = set()
        for node in reversed(self._module.graph.nodes):
            used = [reader for tensor in node.outputs for reader in tensor.outputs]
            # Shape 只看形状，换成短的也没有省下什么。
            if any(id(tensor) in kept for tensor in node.outputs) or not used or node.op == "Shape":
                continue
            asked = any(tensor is output for tensor in wanted for output in node.outputs)
            if all(id(reader) in inside or (asked and reader is self._indexer) for reader in used):
                inside.add(id(node))
                found.append(node)
        return found[::-1]

    def _shortened(self, tensor: gs.Tensor, chain: list[gs.Node]) -> gs.Tensor:
        """这一串读的值，换成 ``Sq`` 行的；与行数无关的原样。"""
        maker = tensor.inputs[0] if tensor.inputs else None
        if isinstance(tensor, gs.Constant) or any(maker is node for node in chain):
            return tensor
        if tensor.name not in self._shorter:
            self._shorter[tensor.name] = self._made(tensor, maker)
        return self._shorter[tensor.name]

    def _made(self, tensor: gs.Tensor, maker: gs.Node | None) -> gs.Tensor:
        if tensor.shape is not None and len(tensor.shape) > 1 and tensor.shape[1] == "S":
            shape = [_renamed(dim) for dim in tensor.shape]
            bounds = [self._emit.ints(0), self._row_count(tensor), self._emit.ints(1)]
            return self._emit("Slice", [tensor, *bounds], f"part{len(self._shorter)}", tensor, shape)
        if _is_length(maker):
            return self._row_count(tensor)
        if maker is not None and maker.op == "Concat" and tensor.dtype == np.int64:
            parts = [self._shortened(part, []) for part in maker.inputs]
            if any(new is not old for new, old in zip(parts, maker.inputs, strict=True)):
                return self._emit("Concat", parts, f"shape{len(self._shorter)}", tensor, tensor.shape, axis=0)
        return tensor

    def _row_count(self, source: gs.Tensor) -> gs.Tensor:
        """``Sq`` [1]；一个索引器只算一次。``source`` 是 S 自己 [1]，或一个 [B, S, ...]。"""
        if self._rows is None:
            *_, cache, past_lens = self._indexer.inputs
            emit, slots, S = self._emit, self._emit.ints(self._indexer.attrs["topk"]), source
            if not (source.inputs and _is_length(source.inputs[0])):
                S = emit("Shape", [source], "new", np.int64, [1], start=1, end=2)
            if self._by_length:
                past = emit("ReduceMax", [past_lens], "past", np.int64, [], keepdims=0)
                seen = emit("Add", [past, S], "length", np.int64, [1])
            else:
                seen = emit("Shape", [cache], "capacity", np.int64, [1], start=2, end=3)
            ranks = emit("Greater", [seen, slots], "ranks", np.bool_, [1])
            self._rows = emit("Where", [ranks, S, emit.ints(0)], "rows", np.int64, [1])
        return self._rows


def _is_length(maker: gs.Node | None) -> bool:
    """取第 1 维的 ``Shape``。"""
    return (
        maker is not None
        and maker.op == "Shape"
        and (maker.attrs.get("start"), maker.attrs.get("end")) == (1, 2)
    )


def _renamed(dim: int | str) -> int | str:
    return dim if isinstance(dim, int) else dim.replace("S", _ROWS)
