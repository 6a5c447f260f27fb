"""把契约表登记到 torch 与 onnx：``torch.ops.dsx.*``、``onnx.defs`` 的 schema、torch → ONNX 的翻译表。

导入本模块即完成登记（只登记一次）；需要 torch，所以只由 reference 及以上各层导入。
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from onnx import defs
from onnxscript import values

from deepseek_export.dtypes import DTYPES
from deepseek_export.ops import index_topk, moe_experts, moe_gate, quant_experts, quant_linear, spec_accept
from deepseek_export.ops import latent_attention as latent
from deepseek_export.ops import latent_cache_update as update
from deepseek_export.ops import lightning_indexer as indexer
from deepseek_export.ops import mla_attention as mla
from deepseek_export.ops import quantized_linear as linear
from deepseek_export.ops import quantized_moe_experts as quantized
from deepseek_export.ops import sparse_latent_attention as sparse_latent
from deepseek_export.ops import sparse_mla_attention as sparse
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec
from deepseek_export.ops.table import (
    DOMAIN,
    INDEX_TOPK,
    INT4_AFFINE_EXPERTS,
    INT4_AFFINE_LINEAR,
    INT4_EXPERTS,
    INT4_LINEAR,
    INT8_EXPERTS,
    INT8_LINEAR,
    LATENT_ATTENTION,
    LATENT_CACHE_UPDATE,
    LIGHTNING_INDEXER,
    MLA_ATTENTION,
    MOE_EXPERTS,
    MOE_GATE,
    OPS,
    OPSET_VERSION,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    QUANTIZED_LINEAR,
    QUANTIZED_MOE_EXPERTS,
    SPARSE_LATENT_ATTENTION,
    SPARSE_MLA_ATTENTION,
    SPEC_ACCEPT,
    SPEC_ACCEPT_REJECTION,
)

_EAGER: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    MLA_ATTENTION.name: (mla.mla_attention, mla.fake),
    LIGHTNING_INDEXER.name: (indexer.lightning_indexer, indexer.fake),
    SPARSE_MLA_ATTENTION.name: (sparse.sparse_mla_attention, sparse.fake),
    LATENT_ATTENTION.name: (latent.latent_attention, latent.fake),
    LATENT_CACHE_UPDATE.name: (update.latent_cache_update, update.fake),
    INDEX_TOPK.name: (index_topk.index_topk, index_topk.fake),
    SPARSE_LATENT_ATTENTION.name: (sparse_latent.sparse_latent_attention, sparse_latent.fake),
    MOE_GATE.name: (moe_gate.moe_gate, moe_gate.fake),
    MOE_EXPERTS.name: (moe_experts.moe_experts, moe_experts.fake),
    QUANTIZED_MOE_EXPERTS.name: (quantized.quantized_moe_experts, quantized.fake),
    QUANTIZED_LINEAR.name: (linear.quantized_linear, linear.fake),
    SPEC_ACCEPT.name: (spec_accept.spec_accept, spec_accept.fake),
    SPEC_ACCEPT_REJECTION.name: (spec_accept.spec_accept_rejection, spec_accept.fake),
    INT8_LINEAR.name: (quant_linear.int8_linear, quant_linear.fake),
    INT4_LINEAR.name: (quant_linear.int4_linear, quant_linear.fake),
    INT8_EXPERTS.name: (quant_experts.int8_experts, quant_experts.fake),
    INT4_EXPERTS.name: (quant_experts.int4_experts, quant_experts.fake),
    INT4_AFFINE_LINEAR.name: (quant_linear.int4_affine_linear, quant_linear.fake_affine),
    INT4_AFFINE_EXPERTS.name: (quant_experts.int4_affine_experts, quant_experts.fake_affine),
}
_ATTRIBUTE_TYPES = {
    "int": defs.OpSchema.AttrType.INT,
    "float": defs.OpSchema.AttrType.FLOAT,
    "str": defs.OpSchema.AttrType.STRING,
}
_PYTHON_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}
_LIBRARY = torch.library.Library(DOMAIN, "DEF")


def onnx_schema(spec: OpSpec) -> defs.OpSchema:
    """契约表的一行 → ``onnx.defs.OpSchema``。

    ``plugin_namespace``/``plugin_version`` 声明为可选属性：TensorRT 靠它们找插件，而 ``onnx.checker`` 会拒绝未声明的属性。
    """
    parameter, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    used = {port.type for port in (*spec.inputs, *spec.outputs)}
    attributes = [attribute(a.name, _ATTRIBUTE_TYPES[a.kind], required=True) for a in spec.attributes]
    attributes += [
        attribute(name, defs.OpSchema.AttrType.STRING, required=False)
        for name in ("plugin_namespace", "plugin_version")
    ]
    return defs.OpSchema(
        spec.name,
        DOMAIN,
        OPSET_VERSION,
        doc=spec.doc,
        inputs=[parameter(port.name, port.type) for port in spec.inputs],
        outputs=[parameter(port.name, port.type) for port in spec.outputs],
        type_constraints=[
            (name, [DTYPES[dtype].onnx_type for dtype in dtypes], "")
            for name, dtypes in TYPE_CONSTRAINTS.items()
            if name in used
        ],
        attributes=attributes,
    )


def _make_translation(spec: OpSpec) -> Callable[..., Any]:
    """torch 算子 → 一个 ``dsx::`` 节点。

    exporter 靠形参名与注解区分输入和属性，所以把契约表里的签名挂在函数上。
    """
    # schema 告诉 exporter 有几个输出；没有它，多输出算子的 getitem 会越界。
    node = values.Op(values.Opset(DOMAIN, OPSET_VERSION), spec.name, onnx_schema(spec))
    names = [port.name for port in spec.inputs]
    annotations = {a.name: _PYTHON_TYPES[a.kind] for a in spec.attributes}

    def translate(*args, **kwargs):
        inputs, attributes = args[: len(names)], dict(zip(annotations, args[len(names) :], strict=False))
        plugin = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
        return node(*inputs, **attributes, **kwargs, **plugin)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    parameters += [inspect.Parameter(name, kind, annotation=t) for name, t in annotations.items()]
    translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    translate.__annotations__ = annotations
    return translate


_ONNX = values.Opset("", 24)
_TENSOR_SCATTER = values.Op(_ONNX, "TensorScatter", defs.get_schema("TensorScatter", 24))
_TOP_K = values.Op(_ONNX, "TopK", defs.get_schema("TopK", 24))
_CONSTANT = values.Op(_ONNX, "Constant", defs.get_schema("Constant", 24))


def _translate_tensor_scatter(past_cache, update, write_indices):
    return _TENSOR_SCATTER(past_cache, update, write_indices)


def _translate_top_k(x, k: int):
    return _TOP_K(x, _CONSTANT(value_ints=[k]), axis=-1, largest=1, sorted=1)


def _register(spec: OpSpec) -> None:
    eager, fake = _EAGER[spec.name]
    _LIBRARY.define(spec.torch_schema)
    _LIBRARY.impl(spec.torch_name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{DOMAIN}::{spec.torch_name}", fake, lib=_LIBRARY)
    defs.register_schema(onnx_schema(spec))


for _spec in OPS.values():
    _register(_spec)

#: ``torch.onnx.export(custom_translation_table=...)`` 的内容。
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.dsx, spec.torch_name).default: _make_translation(spec) for spec in OPS.values()
}
TRANSLATIONS[torch.ops.dsx_std.tensor_scatter.default] = _translate_tensor_scatter
TRANSLATIONS[torch.ops.dsx_std.top_k.default] = _translate_top_k

__all__ = ["TRANSLATIONS", "onnx_schema"]
