"""只有一个 int8、int4 节点的模型：``dsx`` 的没有函数体，所以跑的一定是算子库的 kernel；另有 onnxruntime 自己的那个作对照。不导入 torch。

onnxruntime 的节点以常量给权重，与 bundle 里一样：只有常量会预先打包，走量化激活的 kernel；否则它先还原权重，再做 float32 的乘法。
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from unittest import mock

import numpy as np
import onnxruntime as ort
from onnx import helper, numpy_helper

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.dtypes import DTYPES
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec
from deepseek_export.ops.table import (
    DOMAIN,
    INT4_AFFINE_EXPERTS,
    INT4_AFFINE_LINEAR,
    INT4_EXPERTS,
    INT4_LINEAR,
    INT8_EXPERTS,
    INT8_LINEAR,
    OPSET_VERSION,
)
from deepseek_export.passes.base import MICROSOFT
from deepseek_export.passes.ort_moe import MOE_ATTRIBUTES, SENTINEL

LINEAR: Mapping[int, OpSpec] = MappingProxyType({8: INT8_LINEAR, 4: INT4_LINEAR})
EXPERTS: Mapping[int, OpSpec] = MappingProxyType({8: INT8_EXPERTS, 4: INT4_EXPERTS})


def linear_spec(bits: int, affine: bool) -> OpSpec:
    """零点逐块给出的只有 4 位。"""
    return INT4_AFFINE_LINEAR if affine else LINEAR[bits]


def experts_spec(bits: int, affine: bool) -> OpSpec:
    """同 :func:`linear_spec`。"""
    return INT4_AFFINE_EXPERTS if affine else EXPERTS[bits]


def op_session(library, spec: OpSpec, attributes: dict, isa: str = "", threads: int = 1):
    """算子库的 kernel；指令集在建会话时定下。"""
    node = helper.make_node(
        spec.name,
        [port.name for port in spec.inputs],
        ["y"],
        domain=DOMAIN,
        plugin_namespace="dsx",
        plugin_version="1",
        **attributes,
    )
    return _session(node, spec, library, isa, threads)


def linear_session(
    library, bits: int, K: int, N: int, block: int, isa: str = "", threads: int = 1, affine: bool = False
):
    """``dsx::Int8Linear``、``dsx::Int4Linear``、``dsx::Int4AffineLinear``。"""
    attributes = {"K": K, "N": N, "block_size": block}
    return op_session(library, linear_spec(bits, affine), attributes, isa, threads)


def onnxruntime_linear(inputs: dict[str, np.ndarray], bits: int, block: int) -> np.ndarray:
    """``MatMulNBits``，函数体里的那个节点，的输出。"""
    K, N = inputs["x"].shape[-1], len(inputs["codes"])
    attributes = {"K": K, "N": N, "block_size": block, "bits": bits, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", list(inputs), ["y"], domain=MICROSOFT, **attributes)
    constants = inputs | {"scales": inputs["scales"].astype(np.float32)}
    del constants["x"]
    spec = linear_spec(bits, "zero_points" in inputs)
    return call(_session(node, spec, constants=constants), {"x": inputs["x"]})


def experts_session(
    library, bits: int, k: int, block: int, isa: str = "", threads: int = 1, affine: bool = False
):
    """``dsx::Int8Experts``、``dsx::Int4Experts``、``dsx::Int4AffineExperts``。"""
    return op_session(library, experts_spec(bits, affine), {"k": k, "block_size": block}, isa, threads)


def onnxruntime_experts(inputs: dict[str, np.ndarray], bits: int, k: int, block: int) -> np.ndarray:
    """``QMoE``，函数体里的那个节点，的输出。"""
    spec = experts_spec(bits, "down_zero_points" in inputs)
    names = [port.name for port in spec.inputs]
    own = {
        "k": k,
        "block_size": block,
        "expert_weight_bits": bits,
        "accuracy_level": 4,
        "weights_prepacked": 0,
    }
    ports = [*names[:4], "", *names[4:6]]
    if names[6:]:
        ports += [*[""] * (11 - len(ports)), *names[6:]]
    node = helper.make_node("QMoE", ports, ["y"], domain=MICROSOFT, **MOE_ATTRIBUTES, **own)
    constants = {
        name: inputs[name].astype(np.float32) if name.endswith("scales") else inputs[name]
        for name in names[2:]
    }
    feeds = {name: inputs[name] for name in names[:2]}
    return call(_session(node, spec, constants=constants), feeds)


def _session(
    node,
    spec: OpSpec,
    library=None,
    isa: str = "",
    threads: int = 1,
    constants: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> ort.InferenceSession:
    def info(port):
        # 秩不写死：x 可以是 [N, K] 也可以是 [B, S, K]。
        return helper.make_tensor_value_info(port.name, DTYPES[TYPE_CONSTRAINTS[port.type][0]].onnx, None)

    graph = helper.make_graph(
        [node],
        "one",
        [info(port) for port in spec.inputs if port.name not in constants],
        [info(port) for port in spec.outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid(*pair) for pair in (("", 24), (DOMAIN, OPSET_VERSION), (MICROSOFT, 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    with mock.patch.dict(os.environ, {"DSX_CPU_ISA": isa}):
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def linear_inputs(
    bits: int, rows: tuple[int, ...], K: int, N: int, block: int, seed: int = 0, affine: bool = False
) -> dict[str, np.ndarray]:
    """随机的 x [*rows, K]、码与 scale，``affine`` 时另有零点；补满最后一块的码、多出来的零点也是随机的，不该影响结果。"""
    rng = np.random.default_rng(seed)
    blocks = -(-K // block)
    x = rng.standard_normal((*rows, K), dtype=np.float32)
    x[..., K // 2 :] *= 30  # 各块的 scale 不同
    if x.size:
        x.reshape(-1, K)[0, : min(K, block)] = 0  # 全零的块
    made = {
        "x": x,
        "codes": rng.integers(0, 256, (N, blocks, block * bits // 8), dtype=np.uint8),
        "scales": (rng.uniform(0.5, 1.5, (N, blocks)) / (_SPREAD[bits] * K**0.5)).astype(np.float16),
    }
    if affine:
        made["zero_points"] = rng.integers(0, 256, (N, -(-blocks // 2)), dtype=np.uint8)
    return made


#: 均匀的码的标准差：还原的权重因此约为 1/√K。
_SPREAD = {8: 74, 4: 4.6}


def experts_inputs(
    bits: int, N: int, D: int, inner: int, E: int, k: int, block: int, seed: int = 0, affine: bool = False
) -> dict[str, np.ndarray]:
    """随机的 x、码与 scale，``affine`` 时另有零点；每个 token 有 k 个专家的 log 权重，其余是哨兵。"""
    rng = np.random.default_rng(seed)
    log_weights = np.full((N, E), SENTINEL, np.float32)
    for row in log_weights:
        row[rng.choice(E, k, replace=False)] = rng.uniform(-3, 0, k)
    made = {"x": rng.standard_normal((N, D), dtype=np.float32), "log_weights": log_weights}
    for name, rows, width in (("gate_up", 2 * inner, D), ("down", D, inner)):
        made[name] = rng.integers(0, 256, (E, rows, width * bits // 8), dtype=np.uint8)
        scales = rng.uniform(0.5, 1.5, (E, rows, width // block))
        made[f"{name}_scales"] = (scales / (_SPREAD[bits] * width**0.5)).astype(np.float16)
    if affine:
        for name, rows, width in (("gate_up", 2 * inner, D), ("down", D, inner)):
            shape = (E, rows, -(-(width // block) // 2))
            made[f"{name}_zero_points"] = rng.integers(0, 256, shape, dtype=np.uint8)
    return made


def experts_reference(
    inputs: dict[str, np.ndarray], bits: int, k: int, block: int, exact: bool = False
) -> np.ndarray:
    """按定义逐 token 逐专家计算，float64；``exact`` 时激活不量化。"""

    def rounded(x):
        return x if exact else quantized(x.astype(np.float32), block)

    def widened(name, e):
        codes = inputs[name][e]
        blocks = codes.reshape(len(codes), -1, block * bits // 8)
        zeros = inputs.get(f"{name}_zero_points")
        own = None if zeros is None else zeros[e]
        return weights(blocks, inputs[f"{name}_scales"][e], bits, codes.shape[-1] * 8 // bits, own)

    y = np.zeros(inputs["x"].shape, np.float64)
    for n, row in enumerate(inputs["log_weights"].astype(np.float64)):
        top = np.argsort(-row, kind="stable")[:k]
        shares = np.exp(row[top] - row[top[0]])
        for e, share in zip(top, shares / shares.sum(), strict=True):
            h = widened("gate_up", e) @ rounded(inputs["x"][n])
            gate, up = h[0::2], h[1::2]
            y[n] += share * (widened("down", e) @ rounded(gate / (1 + np.exp(-gate)) * up))
    return y.astype(np.float32)


def quantized(x: np.ndarray, block: int) -> np.ndarray:
    """激活逐块量化成两个 int8 平面再还原，float64：块里最大的绝对值对应 127，余数再分 254 档。"""
    width = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % block)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
    top = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    scaled = blocks * inverse
    high = np.rint(scaled)
    low = np.rint((scaled - high) * np.float32(254))
    steps = high.astype(np.float64) + low.astype(np.float64) / 254
    return (steps * (top / np.float32(127))).reshape(padded.shape)[..., :width]


def weights(
    codes: np.ndarray, scales: np.ndarray, bits: int, width: int, zero_points: np.ndarray | None = None
) -> np.ndarray:
    """还原的权重 [..., width]，float64；没有零点的是 2^(bits-1)。"""
    if bits == 4:
        codes = nibbles(codes)
    zeros = np.float64(1 << (bits - 1))
    if zero_points is not None:
        zeros = nibbles(zero_points)[..., : scales.shape[-1], None].astype(np.float64)
    values = (codes.astype(np.float64) - zeros) * scales.astype(np.float64)[..., None]
    return values.reshape(*scales.shape[:-1], -1)[..., :width]


def nibbles(packed: np.ndarray) -> np.ndarray:
    """最后一维一字节两个 4 位数，低位在前。"""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def call(session: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """跑一次。"""
    feeds = {name: ort_value(np.ascontiguousarray(array)) for name, array in inputs.items()}
    options = ort.RunOptions()
    options.log_severity_level = 4
    return session.run_with_ort_values(None, feeds, options)[0].numpy()
