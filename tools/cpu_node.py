"""只有一个 ``dsx::MlaAttention`` 节点、没有函数体的模型：装了算子库才能运行，所以跑的一定是 kernel。不导入 torch。"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
from onnx import helper

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.benchmark.depth import random_rows
from deepseek_export.checkpoint.weight_only import BlockFormat, QuantBlock, packed_rows
from deepseek_export.dtypes import DTYPES
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec
from deepseek_export.ops.table import DOMAIN, MLA_ATTENTION, OPSET_VERSION

#: 算子收的计算 dtype 与缓存 dtype。
COMPUTES, CACHES = TYPE_CONSTRAINTS["T"], TYPE_CONSTRAINTS["C"]
SCALE = 0.1
#: 各宽度都不是向量长度的倍数；WIDE 都是 32 的倍数，走 bfloat16 直接相乘的那条路。
ODD = {"dn": 6, "dr": 4, "dv": 5, "r": 20}
WIDE = {"dn": 32, "dr": 32, "dv": 32, "r": 64}


def make_session(
    library,
    dtype: str,
    cache_dtype: str,
    isa: str = "",
    form: str = "",
    threads: int = 1,
    weight_dtype: str | None = None,
) -> ort.InferenceSession:
    """用 ``library`` 建会话，指令集与形式在建会话时定下；``weight_dtype`` 缺省同 ``dtype``。"""

    kinds = {"T": dtype, "C": cache_dtype, "W": weight_dtype or dtype}
    return op_session(library, MLA_ATTENTION, kinds, {"scale": SCALE}, isa, form, threads)


def op_session(
    library,
    spec: OpSpec,
    kinds: Mapping[str, str],
    attributes: Mapping[str, Any],
    isa: str = "",
    form: str = "",
    threads: int = 1,
) -> ort.InferenceSession:
    """只有一个 ``spec`` 节点的会话；``kinds`` 是类型变量的 dtype，只容一种类型的不用写。"""

    def info(port):
        kind = kinds.get(port.type) or TYPE_CONSTRAINTS[port.type][0]
        shape = [f"{port.name}_{i}" for i in range(len(port.dims))]
        return helper.make_tensor_value_info(port.name, DTYPES[kind].onnx, shape)

    inputs, outputs = list(map(info, spec.inputs)), list(map(info, spec.outputs))
    plugin = {"plugin_namespace": "dsx", "plugin_version": "1"}
    sources, results = [value.name for value in inputs], [value.name for value in outputs]
    node = helper.make_node(spec.name, sources, results, domain=DOMAIN, **attributes, **plugin)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library.path))
    with mock.patch.dict(os.environ, {"DSX_CPU_ISA": isa, "DSX_CPU_MLA_FORM": form}):
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def make_inputs(
    dtype: str,
    cache_dtype: str,
    S: int,
    H: int,
    T: int,
    past: Sequence[int],
    *,
    dn: int,
    dr: int,
    dv: int,
    r: int,
    weight_dtype: str | None = None,
    seed: int = 0,
    weight_block: QuantBlock = 32,
) -> dict[str, np.ndarray]:
    """随机输入；``w_kv_b`` 缩小到使输出的均方根约为 1，int8 的每 ``weight_block`` 个码一个 scale。"""
    rng, B = np.random.default_rng(seed), len(past)
    shapes = {
        "q_nope": (B, S, H, dn),
        "q_pe": (B, S, H, dr),
        "c_kv": (B, S, r),
        "k_pe": (B, S, dr),
        "w_kv_b": (H * (dn + dv), r),
    }
    made = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    made["w_kv_b"] *= r**-0.5
    weight, width = made.pop("w_kv_b"), r + 2 * dr + 6 if cache_dtype == "int8" else r + dr
    if weight_dtype == "int8":
        weight = packed_rows(weight, BlockFormat(kind="int8", block=weight_block, scale="float16"))
    return {name: array.astype(DTYPES[dtype].numpy) for name, array in made.items()} | {
        "w_kv_b": weight.astype(DTYPES[weight_dtype or dtype].numpy),
        "kv_cache": random_rows(rng, (B, 1, T, width), DTYPES[cache_dtype].numpy),
        "past_lens": np.array(past, np.int64),
    }


def bind(
    session: ort.InferenceSession, inputs: dict[str, np.ndarray], cache_out: np.ndarray
) -> tuple[ort.IOBinding, np.ndarray]:
    """绑好全部输入输出，返回绑定与 ``o``；绑定只借用数组的内存。``cache_out`` 是 ``inputs["kv_cache"]`` 就原地写。"""
    B, S, H, dn = inputs["q_nope"].shape
    o = np.zeros((B, S, H, inputs["w_kv_b"].shape[0] // H - dn), inputs["q_nope"].dtype)
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort_value(array))
    binding.bind_ortvalue_output("o", ort_value(o))
    binding.bind_ortvalue_output("kv_cache_out", ort_value(cache_out))
    return binding, o


def call(
    session: ort.InferenceSession, inputs: dict[str, np.ndarray], in_place: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """跑一次，返回 ``o`` 与 ``kv_cache_out``；``inputs`` 不会被改。"""
    used = {name: array.copy() for name, array in inputs.items()}
    cache = used["kv_cache"] if in_place else np.zeros_like(used["kv_cache"])
    binding, o = bind(session, used, cache)
    options = ort.RunOptions()
    options.log_severity_level = 4
    session.run_with_iobinding(binding, options)
    return o, cache
