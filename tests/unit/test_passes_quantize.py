"""换成量化算子的各个 pass：匹配、拒绝、保留、幂等与数值。"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.checkpoint.recipe import (
    Recipe,
)
from deepseek_export.checkpoint.weight_only import (
    BlockFormat,
    Quantization,
    block_codes,
    block_scales,
    dequantized,
    signed_codes,
    unpacked_int4,
)
from deepseek_export.ort_kernels import OrtKernels, installed_kernels
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.passes.base import MICROSOFT, GraphModule
from deepseek_export.passes.fuse_quantized_experts import FuseQuantizedExpertsPass
from deepseek_export.passes.fuse_quantized_linears import FuseQuantizedLinearsPass, int8_linears
from deepseek_export.passes.lower_gate_experts_to_ort_moe import LowerGateExpertsToOrtMoePass
from deepseek_export.passes.quantize_linears_to_matmul_nbits import QuantizeLinearsToMatMulNBitsPass
from deepseek_export.passes.quantize_moe_to_qmoe import QuantizeMoeToQMoePass
from deepseek_export.passes.quantize_weights_to_dequantize_linear import (
    QuantizeWeightsToDequantizeLinearPass,
)
from deepseek_export.passes.split_experts import SplitExpertsPass
from deepseek_export.passes.wrap_quant_kernels import WrapQuantKernelsPass
from tests.models import model_config, ort_session
from tests.unit.test_passes_moe import feeds_for, moe_module, ops

pytestmark = pytest.mark.unit

SCALES = ("float32", "float16", "bfloat16")

FORMS = [BlockFormat(kind=kind, block=block) for kind in ("int8", "int4") for block in (32, 64, 128)]


def without(*names: str) -> OrtKernels:
    kernels = installed_kernels()
    kept = {op: a for op, a in kernels.attributes.items() if op not in names}
    return dataclasses.replace(kernels, version="1.10.0", attributes=kept)


def linear_module(width: int = 70, **extra: np.ndarray) -> GraphModule:
    """``y = x·Wᵀ``；W 是 layers.0 的 o_proj，另有一个两个激活之间的 MatMul。"""
    name = "model.layers.0.self_attn.o_proj.weight"
    recipe = Recipe(op="copy", sources=(name,), shape=(24, width), dtype="float32")
    info, T = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Transpose", [name], ["wt"], "layers.0.self_attn.o_proj/Transpose_0", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["h"], "layers.0.self_attn.o_proj/MatMul_1"),
        helper.make_node("Transpose", ["h"], ["ht"], "t", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h", "ht"], ["y"], "scores"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", T, ["B", "S", width]), info(name, T, [24, width])],
        [info("y", T, ["B", "S", "S"])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return GraphModule(
        gs.import_onnx(proto), {}, {name: recipe}, "float32", model_config("v3"), (), "main", (), None
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear_becomes_matmul_nbits(form):
    """EXPORT-32：线性层换成 MatMulNBits，只有激活的 MatMul 不动；数值与还原的权重在 int8 激活的容差之内，再跑一遍不变。"""
    module = linear_module()
    rewrite = QuantizeLinearsToMatMulNBitsPass(Quantization(kind=form.kind, block=form.block))
    result = rewrite(module)
    assert (result.changed, result.count, result.refused) == (True, 1, ())
    assert ops(module) == ["MatMulNBits", "Transpose", "MatMul"]
    (name,) = module.quantized
    assert list(module.weights) == [f"{name}.{form.kind}", f"{name}.{form.kind}.scales"]
    rng = np.random.default_rng(0)
    weights, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 70), (2, 3, 70)))
    feeds = {
        "x": x,
        f"{name}.{form.kind}": block_codes(weights, form),
        f"{name}.{form.kind}.scales": block_scales(weights, form),
    }
    (got,) = ort_session(module.to_proto()).run(None, feeds)
    h = x @ dequantized(weights, form).T
    assert tolerance("block", "float32", form.kind).accepts(measure(got, h @ h.transpose(0, 2, 1)))
    assert not rewrite(module).changed


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_kernels_become_functions(kind):
    """CPU-12：MatMulNBits 成为 Int8Linear、Int4Linear 的函数体，没有算子库时逐位不变；scale 变成 float16；再跑一遍不变。"""
    module, quantization = linear_module(), Quantization(kind=kind)
    QuantizeLinearsToMatMulNBitsPass(quantization)(module)
    before = module.to_proto()
    rewrite = WrapQuantKernelsPass()
    assert rewrite(module).count == 1
    assert ops(module) == [f"{kind.capitalize()}Linear", "Transpose", "MatMul"]
    after = module.to_proto()
    onnx.checker.check_model(after, full_check=True)
    rng, (name,), form = np.random.default_rng(0), module.quantized, quantization.format("float16")
    assert {recipe.form for recipe in module.weights.values()} == {form}
    assert module.weights[f"{name}.{kind}.scales"].dtype == "float16"
    weights, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 70), (2, 3, 70)))
    feeds = {
        "x": x,
        f"{name}.{kind}": block_codes(weights, form),
        f"{name}.{kind}.scales": block_scales(weights, form),
    }
    (got,) = ort_session(after).run(None, feeds)
    (want,) = ort_session(before).run(None, widened(feeds))
    assert got.tobytes() == want.tobytes()
    assert not rewrite(module).changed


@pytest.mark.parametrize("rewrite", [QuantizeLinearsToMatMulNBitsPass, QuantizeWeightsToDequantizeLinearPass])
@pytest.mark.parametrize("keep", ["o_proj", "layers.0", "self_attn"])
def test_kept_linear_stays(keep, rewrite):
    module = linear_module()
    result = rewrite(Quantization(kind="int8", keep=(keep,)))(module)
    assert (result.count, result.refused, module.quantized) == (0, (), set())
    assert ops(module) == ["Transpose", "MatMul", "Transpose", "MatMul"]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear_takes_a_dequantized_weight(form):
    """EXPORT-33：权重换成 DequantizeLinear 还原的，只有激活的 MatMul 不动；再跑一遍不变。"""
    module = linear_module(width=256)
    rewrite = QuantizeWeightsToDequantizeLinearPass(Quantization(kind=form.kind, block=form.block))
    result = rewrite(module)
    assert (result.changed, result.count, result.refused) == (True, 1, ())
    assert ops(module) == ["DequantizeLinear", "Transpose", "MatMul", "Transpose", "MatMul"]
    (name,) = module.quantized
    assert {n: (r.dtype, r.shape) for n, r in module.weights.items()} == {
        f"{name}.{form.kind}": (form.kind, (24, 256)),
        f"{name}.{form.kind}.scales": ("float32", (24, 256 // form.block)),
    }
    assert not rewrite(module).changed
    onnx.checker.check_model(module.to_proto(), full_check=True)


def test_a_width_that_is_no_multiple_is_refused():
    module = linear_module(width=70)
    result = QuantizeWeightsToDequantizeLinearPass(Quantization(kind="int8"))(module)
    assert (result.changed, len(result.refused)) == (False, 1)
    assert "70" in result.refused[0].value


@pytest.mark.parametrize(("keep", "count"), [((), 3), (("down_proj",), 2), (("mlp.experts",), 0)])
def test_experts_take_dequantized_weights(keep, count):
    """EXPORT-33：MoeExperts 原样留着，三个叠放的权重各由一个 DequantizeLinear 还原；``keep`` 逐个权重生效。"""
    module = moe_module("v3", hidden_size=64, moe_intermediate_size=32)
    result = QuantizeWeightsToDequantizeLinearPass(Quantization(kind="int4", keep=keep))(module)
    assert (result.count, result.refused, len(module.quantized)) == (count, (), count)
    (experts,) = module.find("MoeExperts")
    restored = [t.inputs[0].op for t in experts.inputs if t.inputs and t.inputs[0].op == "DequantizeLinear"]
    assert len(restored) == count
    assert result.kept == 3 - count


def _quantized_experts(kind: str, keep: tuple[str, ...] = ()) -> GraphModule:
    module = moe_module("v3", hidden_size=64, moe_intermediate_size=32)
    QuantizeWeightsToDequantizeLinearPass(Quantization(kind=kind, keep=keep))(module)
    return module


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_experts_read_their_codes(kind):
    """EXPORT-33：三个 DequantizeLinear 连同 MoeExperts 换成 QuantizedMoeExperts，函数体与原来逐位相同；再跑一遍不变。"""
    before, module = _quantized_experts(kind), _quantized_experts(kind)
    result = FuseQuantizedExpertsPass()(module)
    assert (result.changed, result.count, result.kept, result.refused) == (True, 1, 0, ())
    assert not {"DequantizeLinear", "MoeExperts"} & set(ops(module))
    assert module.weights == before.weights
    (node,) = module.find("QuantizedMoeExperts")
    assert (node.name, node.attrs["block_size"]) == ("layers.1.mlp/QuantizedMoeExperts", 32)
    proto = module.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert {one.name for one in proto.functions} >= {"QuantizedMoeExperts", "MoeExperts"}
    form, feeds = BlockFormat(kind=kind), {}
    for name, array in feeds_for(moe_module("v3", hidden_size=64, moe_intermediate_size=32), 5).items():
        feeds[name] = ort_value(array)
        if array.ndim == 3 and array.shape[-1] % 32 == 0:
            codes = signed_codes(array, form)
            codes = (
                unpacked_int4(codes.reshape(-1)).reshape(array.shape)
                if kind == "int4"
                else codes.view(np.int8)
            )
            feeds[f"{name}.{kind}"] = ort_value(codes)
            feeds[f"{name}.{kind}.scales"] = ort_value(block_scales(array, form))
    want, got = (
        session.run_with_ort_values(["y"], {one.name: feeds[one.name] for one in session.get_inputs()})[
            0
        ].numpy()
        for session in (ort_session(before.to_proto()), ort_session(proto))
    )
    assert got.tobytes() == want.tobytes()
    assert not FuseQuantizedExpertsPass()(module).changed


def test_experts_with_a_floating_weight_are_not_fused():
    """EXPORT-33：只量化了一部分的拒绝，写明哪个是浮点；都是浮点的不算拒绝。"""
    partly = _quantized_experts("int8", ("down_proj",))
    result = FuseQuantizedExpertsPass()(partly)
    assert (result.count, result.kept) == (0, 0)
    (refusal,) = result.refused
    assert "w_down" in refusal.value
    assert ops(partly).count("DequantizeLinear") == 2
    result = FuseQuantizedExpertsPass()(_quantized_experts("int8", ("mlp.experts",)))
    assert (result.count, result.kept, result.refused) == (0, 1, ())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_int8_linears_read_their_codes(kind):
    """EXPORT-33：int8 的线性层连同还原换成 QuantizedLinear，函数体与原来逐位相同；int4 的不动，编译器自己融；再跑一遍不变。"""
    before, module = linear_module(64), linear_module(64)
    for one in (before, module):
        QuantizeWeightsToDequantizeLinearPass(Quantization(kind=kind))(one)
    count = len(int8_linears(module))
    result = FuseQuantizedLinearsPass()(module)
    assert (result.count, result.changed, result.refused) == (count, kind == "int8", ())
    assert count == (kind == "int8")
    assert not FuseQuantizedLinearsPass()(module).changed
    if kind == "int4":
        assert "DequantizeLinear" in ops(module)
        return
    assert ops(module) == ["QuantizedLinear", "Transpose", "MatMul"]
    assert module.weights == before.weights
    (node,) = module.find("QuantizedLinear")
    assert node.name == "layers.0.self_attn.o_proj/QuantizedLinear"
    proto = module.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    rng, name = np.random.default_rng(0), "model.layers.0.self_attn.o_proj.weight.int8"
    feeds = {
        "x": rng.standard_normal((2, 3, 64)).astype(np.float32),
        name: rng.integers(-127, 128, (24, 64)).astype(np.int8),
        f"{name}.scales": rng.random((24, 2)).astype(np.float32),
    }
    want, got = (ort_session(one).run(["y"], feeds)[0] for one in (before.to_proto(), proto))
    assert got.tobytes() == want.tobytes()


def test_linear_without_the_kernel_is_refused():
    module = linear_module()
    result = QuantizeLinearsToMatMulNBitsPass(Quantization(kind="int8"), without("MatMulNBits"))(module)
    assert (result.count, len(result.refused)) == (0, 1)
    assert "1.10.0" in result.refused[0].value


def qmoe_module(**overrides) -> GraphModule:
    """宽度是 64 与 32 的专家，已下沉成 MoE。"""
    module = moe_module("v3", **{"hidden_size": 64, "moe_intermediate_size": 32, **overrides})
    assert LowerGateExpertsToOrtMoePass()(module).count == 1
    return module


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_moe_becomes_qmoe(kind, rows):
    """EXPORT-32：QMoE 的数值与还原的专家权重在 int8 激活的容差之内，路由不变；再跑一遍不变。"""
    reference, module, form = qmoe_module(), qmoe_module(), BlockFormat(kind=kind, block=32)
    rewrite = QuantizeMoeToQMoePass(Quantization(kind=kind, block=32))
    result = rewrite(module)
    assert (result.changed, result.count, result.refused, result.notes) == (True, 1, (), ())
    assert "QMoE" in ops(module)
    assert "MoE" not in ops(module)
    stems = {name.rpartition(".experts.*.")[2] for name in module.quantized}
    assert stems == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    feeds = feeds_for(reference, rows)
    rounded = {
        n: dequantized(a, form) if n in reference.weights and a.ndim == 3 else a for n, a in feeds.items()
    }
    session = ort_session(reference.to_proto())
    (want,) = session.run(["y"], {i.name: rounded[i.name] for i in session.get_inputs()})
    given_feeds = {}
    for value in ort_session(module.to_proto()).get_inputs():
        base = value.name.removesuffix(".scales").removesuffix(f".{kind}")
        if value.name.endswith(".scales"):
            given_feeds[value.name] = block_scales(feeds[base], form)
        elif value.name != base:
            given_feeds[value.name] = block_codes(feeds[base], form).reshape(value.shape)
        else:
            given_feeds[value.name] = feeds[base]
    (got,) = ort_session(module.to_proto()).run(["y"], given_feeds)
    assert tolerance("op", "float32", kind).accepts(measure(got, want))
    assert not rewrite(module).changed
    # CPU-13：再成为 Int8Experts、Int4Experts 的函数体，没有算子库时逐位不变。
    given_feeds = {n: a.astype(np.float16) if n.endswith(".scales") else a for n, a in given_feeds.items()}
    (got,) = ort_session(module.to_proto()).run(["y"], widened(given_feeds))
    assert WrapQuantKernelsPass()(module).count == 1
    assert f"{kind.capitalize()}Experts" in ops(module)
    (wrapped,) = ort_session(module.to_proto()).run(["y"], given_feeds)
    assert wrapped.tobytes() == got.tobytes()


def widened(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """scale 展宽到 float32：onnxruntime 的节点要的。"""
    return {n: a.astype(np.float32) if n.endswith(".scales") else a for n, a in feeds.items()}


@pytest.mark.parametrize(
    ("overrides", "block", "kernels", "value"),
    [
        ({"moe_intermediate_size": 40}, 32, None, "40"),
        ({}, 64, None, "32"),
        ({}, 32, without("QMoE"), "1.10.0"),
    ],
)
def test_qmoe_refusals(overrides, block, kernels, value):
    """宽度不是 block 的倍数，或没有 kernel：拒绝，写明值，图不动。"""
    module = qmoe_module(**overrides)
    result = QuantizeMoeToQMoePass(Quantization(kind="int8", block=block), kernels)(module)
    assert (result.changed, len(result.refused)) == (False, 1)
    assert value in result.refused[0].value
    assert module.find("MoE", domain=MICROSOFT)


@pytest.mark.parametrize("keep", ["mlp.experts", "down_proj", "layers.1.mlp"])
def test_kept_experts_stay(keep):
    module = qmoe_module()
    result = QuantizeMoeToQMoePass(Quantization(kind="int8", keep=(keep,)))(module)
    assert (result.count, result.refused, module.quantized) == (0, (), set())


def test_split_experts_are_named_as_a_whole():
    """EXPORT-33、MOE-20：拆成几组的专家逐组还原；记的名字、``keep`` 认的名字都是拆之前的。"""
    module = moe_module("v3", hidden_size=64, moe_intermediate_size=32)
    module.max_elements = 6 * 64 * 32
    assert SplitExpertsPass()(module).count == 1
    kept = QuantizeWeightsToDequantizeLinearPass(Quantization(kind="int4", keep=("experts.*.down_proj",)))
    result = kept(module)
    assert (result.count, len(module.find("MoeExperts"))) == (4, 2)
    stems = {name.partition(".experts.")[2] for name in module.quantized}
    assert stems == {"*.gate_proj.weight", "*.up_proj.weight"}
    shapes = {recipe.shape for recipe in module.weights.values() if recipe.op == "codes"}
    assert shapes == {(6, 32, 64)}
