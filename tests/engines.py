"""TensorRT 测试共用的断言。"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable

import onnx
import pytest

from deepseek_export.dtypes import BY_ONNX
from deepseek_export.engine.build import BuiltEngine
from deepseek_export.engine.layers import EngineLayer
from deepseek_export.errors import DsxError
from tools.make_engine_graphs import ENGINE_GRAPHS, listing, listing_name


def refused(code: str, call, *arguments) -> DsxError:
    with pytest.raises(DsxError) as caught:
        call(*arguments)
    assert caught.value.code == code
    return caught.value


def assert_listing(name: str, sm: int, layers) -> None:
    """与记下的清单一致；RTX 换了版本只比插件层。"""
    recorded = (ENGINE_GRAPHS / listing_name(name, sm)).read_text(encoding="utf-8").splitlines()
    now = listing(layers).splitlines()
    if recorded[0] != now[0]:
        recorded, now = (
            [line for line in text if line.startswith(("[", "dsx::"))] for text in (recorded, now)
        )
        recorded, now = ([line.partition("]")[0] for line in text] for text in (recorded, now))
    difference = "\n".join(difflib.unified_diff(recorded, now, "graphs/engines/", "now", lineterm="", n=1))
    assert not difference, f"确认是有意的就运行 tools/make_engine_graphs.py：\n{difference}"


def assert_plugin_layers(
    layers,
    num_layers: int,
    num_moe_layers: int,
    num_indexers: int = 0,
    experts: str = "MoeExperts",
    linears: int = 0,
    updates: int = 0,
) -> None:
    """每层的插件一个不多、一个不少；``num_indexers`` 是自己排名的层数，0 是没有稀疏注意力的模型；``experts`` 是专家的插件，``linears`` 是读码的线性层，``updates`` 是写 int8 缓存的层。"""
    ops = Counter(layer.op for layer in layers["decode"] if layer.op)
    attention = "SparseLatentAttention" if num_indexers else "LatentAttention"
    wanted = {attention: num_layers, experts: num_moe_layers, "IndexTopK": num_indexers}
    assert ops == Counter({**wanted, "QuantizedLinear": linears, "LatentCacheUpdate": updates})
    assert all(len(layer.onnx) == 1 for layer in layers["decode"] if layer.op)
    fused = [layer for layer in layers["prefill"] if "mha" in layer.name]
    assert [len(layer.onnx) for layer in fused] == [1] * num_layers
    assert all(layer.onnx[0].endswith("/mla/Attention") for layer in fused)
    assert not any("/mla/absorb_" in name for layer in layers["prefill"] for name in layer.onnx)
    assert not any("/mla/Attention" in name for layer in layers["decode"] for name in layer.onnx)


def widening_layers(layers: Iterable[EngineLayer]) -> list[str]:
    """只还原权重、不做矩阵乘的层。"""
    return [
        layer.name
        for layer in layers
        if any("/DequantizeLinear" in name for name in layer.onnx)
        and not any("/MatMul" in name for name in layer.onnx)
    ]


def weight_bytes(engine: BuiltEngine, profile: str) -> int:
    """主模型一步搬多少字节的权重，由层的清单与引擎旁的 ONNX 算出。

    一层读它那些节点用到的权重，整个地读（词嵌入只取几行，不算）；只还原的层（:func:`widening_layers`）另把还原的写一遍，下一层再读一遍。
    """
    graph = onnx.load(engine.path / "model.onnx", load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node if node.op_type != "Gather"}
    total, layers = 0, engine.layers["model.plan"][profile]
    widening = widening_layers(layers)
    for layer in layers:
        used = {name for one in layer.onnx if one in nodes for name in nodes[one].input if name in weights}
        for name in used:
            tensor = weights[name]
            total += BY_ONNX[tensor.data_type].nbytes(math.prod(tensor.dims))
            if layer.name in widening and not name.endswith(".scales"):
                total += 2 * 2 * math.prod(tensor.dims)
    return total
