"""``LightningIndexer`` → TensorRT 的缓存写入，加上一个插件核 ``IndexTopK``。"""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs

from deepseek_export.capture.sparse_bodies import index_topk_body
from deepseek_export.ops.table import (
    DOMAIN,
    INDEX_TOPK,
    LIGHTNING_INDEXER,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
)
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.emitter import Emitter, dtype_of, shared_constants
from deepseek_export.records import PassResult
from deepseek_export.reference.weights import torch_dtype


class LowerIndexerToTensorrtPass(Pass):
    """每个 ``LightningIndexer`` 变成索引缓存的写入与一个插件核。

    改写：

    1. ``index_cache_out = TensorScatter(index_cache, k, past_lens)``，TensorRT 认作 KV_CACHE_UPDATE，原地执行；
       ``indices, counts = IndexTopK(q, w, index_cache_out, past_lens)``，解码与 prefill 都是它。

    不改写：

    2. 没有 ``LightningIndexer``。

    名字：全部输入、输出保留。
    """

    name: ClassVar[str] = "lower-indexer-to-tensorrt"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        sites = module.find(LIGHTNING_INDEXER.name)
        # 情形 2。
        if not sites:
            return PassResult(name=self.name, changed=False, count=0)
        constants = shared_constants(module.graph)
        for node in sites:
            module.replace(node, _lowered(node, constants))
        q, _, cache, _ = module.find(INDEX_TOPK.name)[0].inputs
        module.functions[INDEX_TOPK.name] = index_topk_body(
            module.config, torch_dtype(dtype_of(q).name), torch_dtype(dtype_of(cache).name)
        )
        return PassResult(name=self.name, changed=True, count=len(sites))


def _lowered(node: gs.Node, constants: dict[str, gs.Constant]) -> list[gs.Node]:
    """情形 1。"""
    emit = Emitter(node.name.rpartition("/")[0], constants)
    q, w, k, cache, past_lens = node.inputs
    indices, counts, cache_out = node.outputs
    rows = emit("Unsqueeze", [k, emit.ints(1)], "index/new", k)
    if cache.dtype != k.dtype:
        rows = emit("Cast", [rows], "index/new_cast", cache, to=dtype_of(cache).onnx)
    emit.add("TensorScatter", [cache, rows, past_lens], "index/TensorScatter", [cache_out])
    emit.add(
        INDEX_TOPK.name,
        [q, w, cache_out, past_lens],
        INDEX_TOPK.name,
        [indices, counts],
        domain=DOMAIN,
        topk=node.attrs["topk"],
        plugin_namespace=PLUGIN_NAMESPACE,
        plugin_version=PLUGIN_VERSION,
    )
    return emit.nodes
