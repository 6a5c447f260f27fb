"""QuantizeEmbeddingPass：词嵌入存成 int8 或 bfloat16，只展宽取到的行，一位不差；保留的不动，跑两遍第二遍不变。"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.weight_only import (
    BlockFormat,
    Quantization,
    block_scales,
    dequantized,
    signed_codes,
)
from deepseek_export.passes.base import GraphModule
from deepseek_export.passes.quantize_embedding import QuantizeEmbeddingPass
from tests.models import model_config, ort_session

pytestmark = pytest.mark.unit

NAME, ROWS = "model.embed_tokens.weight", 50


def embedding(width: int = 128) -> GraphModule:
    info = helper.make_tensor_value_info
    node = helper.make_node("Gather", [NAME, "ids"], ["x"], name="embed.embed_tokens/Gather", axis=0)
    graph = helper.make_graph(
        [node],
        "one",
        [info("ids", TensorProto.INT64, ["B", "S"]), info(NAME, TensorProto.FLOAT, [ROWS, width])],
        [info("x", TensorProto.FLOAT, ["B", "S", width])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    recipe = Recipe(op="copy", sources=(NAME,), shape=(ROWS, width), dtype="float32")
    return GraphModule(
        gs.import_onnx(proto), {}, {NAME: recipe}, "float32", model_config("v3"), (), "main", (), None
    )


@pytest.mark.parametrize("block", [32, 64, 128])
def test_only_the_rows_asked_for_are_restored(block):
    """EXPORT-32：int4 的 bundle 存 int8 的词嵌入；取到的行就是量化再还原的，一位不差。"""
    module = embedding()
    rewrite = QuantizeEmbeddingPass(Quantization.model_validate({"kind": "int4", "block": block}))
    assert rewrite(module).count == 1
    assert not rewrite(module).changed
    proto = module.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert {name: (recipe.dtype, recipe.shape) for name, recipe in module.weights.items()} == {
        f"{NAME}.lookup": ("int8", (ROWS, 128)),
        f"{NAME}.lookup.scales": ("float16", (ROWS, 128 // block)),
    }
    assert module.quantized == {NAME}
    form = BlockFormat.model_validate({"kind": "int8", "block": block, "scale": "float16"})
    weight = np.random.default_rng(0).standard_normal((ROWS, 128)).astype(np.float32)
    ids = np.array([[0, 49, 7], [7, 7, 1]])
    feeds = {
        "ids": ids,
        f"{NAME}.lookup": signed_codes(weight, form).view(np.int8),
        f"{NAME}.lookup.scales": block_scales(weight, form),
    }
    (got,) = ort_session(proto).run(None, feeds)
    np.testing.assert_array_equal(got, dequantized(weight, form)[ids])


@pytest.mark.parametrize("keep", ["embed_tokens", "model"])
def test_kept_embedding_stays(keep):
    result = QuantizeEmbeddingPass(Quantization(kind="int8", keep=(keep,)))(embedding())
    assert (result.changed, result.count, result.kept) == (False, 0, 1)


@pytest.mark.parametrize(("kind", "width"), [("int8", 128), ("int4", 48)])
def test_bfloat16_rows(kind, width):
    """EXPORT-32：int8 的 bundle、宽度不是 block 的倍数的：存 bfloat16，取到的行展宽，一位不差。"""
    module = embedding(width)
    rewrite = QuantizeEmbeddingPass(Quantization.model_validate({"kind": kind}))
    assert rewrite(module).count == 1
    assert not rewrite(module).changed
    (recipe,) = module.weights.values()
    assert (recipe.dtype, recipe.shape, module.quantized) == ("bfloat16", (ROWS, width), set())
    weight = np.random.default_rng(0).standard_normal((ROWS, width)).astype(ml_dtypes.bfloat16)
    ids = np.array([[0, 49, 7], [7, 7, 1]])
    feeds = {"ids": ort_value(ids), f"{NAME}.lookup": ort_value(weight)}
    (got,) = ort_session(module.to_proto()).run_with_ort_values(None, feeds)
    np.testing.assert_array_equal(got.numpy(), weight[ids].astype(np.float32))
