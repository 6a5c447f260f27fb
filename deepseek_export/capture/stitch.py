"""把各种块各捕获一次，再逐层实例化，拼成整个模型。

同一种块（dense 层、MoE 层；稀疏注意力的还分自己挑 key 的与沿用的）只追踪一次，所以捕获时间与层数无关；每层只复制节点、改名，并把权重输入接到该层的权重名上。
到 bundle 为止权重都只是图的输入，pass 不会碰到权重内容。
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import onnx
from onnx import helper

from deepseek_export.capture import blocks, names
from deepseek_export.capture.bodies import (
    mla_attention_body,
    moe_experts_body,
    moe_gate_body,
    spec_accept_body,
)
from deepseek_export.capture.places import EMBED_PORTS, Place, head_ports, layer_ports, mtp_ports
from deepseek_export.capture.sparse_bodies import lightning_indexer_body, sparse_mla_attention_body
from deepseek_export.capture.trace import OPSET, TracedGraph
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.recipe import Recipe, mtp_recipes, weight_recipes
from deepseek_export.dtypes import DTYPES
from deepseek_export.ops.table import (
    DOMAIN,
    LIGHTNING_INDEXER,
    MLA_ATTENTION,
    MOE_EXPERTS,
    MOE_GATE,
    OPS,
    OPSET_VERSION,
    SPARSE_MLA_ATTENTION,
)
from deepseek_export.profile import OptimizationProfile
from deepseek_export.records import ModelDtype, OpSite
from deepseek_export.reference.model import CacheTensor, Forms, cache_tensors
from deepseek_export.reference.weights import by_torch, draft_initializer_name, initializer_name, torch_dtype


@dataclass
class CapturedModel:
    """捕获的结果。

    Attributes:
        proto: 整个模型；权重是图的输入（排在 I/O 契约的输入之后），没有函数体。
        functions: ``op_type`` → 函数体。
        weights: 权重输入名 → 配方。
        sites: 每层的 ``dsx::`` 节点的位置。
        role: ``main`` 主模型，``draft`` 草稿模型。
        layers: 图里的解码层编号；草稿模型只有一层，编号接在主干之后。
        verify: 主模型带哪种草稿验证；``None`` 表示没有打开 MTP。
    """

    proto: onnx.ModelProto
    functions: dict[str, onnx.FunctionProto]
    weights: dict[str, Recipe]
    sites: list[OpSite] = field(default_factory=list)
    role: Literal["main", "draft"] = "main"
    layers: tuple[int, ...] = ()
    verify: Literal["greedy", "rejection"] | None = None


def capture_model(
    config: ModelConfig,
    profile: OptimizationProfile,
    dtype: ModelDtype = "float32",
    on_step: Callable[[str], None] = lambda step: None,
) -> CapturedModel:
    """捕获整个模型；不读任何权重。

    Args:
        config: 模型配置。
        profile: 打开的优化成为 ``dsx::`` 节点，关闭的是普通算子。
        dtype: 计算 dtype；缓存 dtype 由 ``profile.mla.cache_dtype`` 决定。
        on_step: 每开始一步调用一次，参数是这一步的名字。
    """
    return _Stitcher(config, profile, dtype, on_step).run()


def capture_draft(
    config: ModelConfig,
    profile: OptimizationProfile,
    index: int,
    dtype: ModelDtype = "float32",
    on_step: Callable[[str], None] = lambda step: None,
) -> CapturedModel:
    """捕获第 ``index`` 个 MTP 模块的草稿模型；参数同 :func:`capture_model`。

    权重里词嵌入与 lm_head 沿用主模型的名字，写 bundle 时与主模型指向同一份数据。
    """
    return _Stitcher(config, profile, dtype, on_step).run_draft(index)


class _Stitcher:
    def __init__(self, config, profile, dtype, on_step) -> None:
        self.config: ModelConfig = config
        self.profile: OptimizationProfile = profile
        self.on_step: Callable[[str], None] = on_step
        self.dtype = torch_dtype(dtype)
        cache_dtype = dtype if profile.mla.cache_dtype == "model" else profile.mla.cache_dtype
        self.cache_dtype = torch_dtype(cache_dtype)
        self.forms = Forms.for_capture(profile)
        self.recipes = weight_recipes(config, dtype)
        self.dtype_name: ModelDtype = dtype
        self.parameter_name: Callable[[str], str] = functools.partial(initializer_name, config=config)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.value_info: dict[str, onnx.ValueInfoProto] = {}
        self.sites: list[OpSite] = []

    def run(self) -> CapturedModel:
        c = self.config
        traced: dict[tuple[bool, bool], TracedGraph] = {}
        self.on_step("embed")
        embed = blocks.embed_block(c, self.dtype)
        for is_moe, ranks in sorted({self._kind(i) for i in range(c.num_hidden_layers)}):
            self.on_step(
                ("moe layer" if is_moe else "dense layer")
                + (" (shared)" if c.indexer is not None and not ranks else "")
            )
            traced[is_moe, ranks] = blocks.layer_block(
                c, is_moe, ranks, self.forms, self.dtype, self.cache_dtype
            )
        self.on_step("head")
        head = blocks.head_block(c, self.dtype)
        functions = self._bodies(c.num_moe_layers > 0)
        self.on_step("stitch")
        self._place(Place(embed, "embed", EMBED_PORTS))
        for i in range(c.num_hidden_layers):
            ports = layer_ports(i, [cache.name for cache in self._caches(i)], c.chooser_of(i))
            self._place(Place(traced[self._kind(i)], f"layers.{i}", ports), layer=i)
        self._place(Place(head, "head", head_ports(c.num_hidden_layers)))
        inputs, outputs = self._contract_values(range(c.num_hidden_layers))
        if self.profile.mtp.enabled:
            mode = self.profile.mtp.verify
            self.on_step("spec accept")
            functions[blocks.accept_spec(mode).name] = spec_accept_body(c, self.dtype, mode)
            accept = blocks.accept_block(c, self.dtype, mode)
            self._place(Place(accept, "accept", {"target_logits": names.LOGITS}))
            inputs[3:3] = self._accept_inputs(mode)
            outputs[2:2] = [
                helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["B"])
                for name in (names.NUM_ACCEPTED, names.NEXT_ID)
            ]
        verify = self.profile.mtp.verify if self.profile.mtp.enabled else None
        model = self._model(inputs, outputs)
        layers = tuple(range(c.num_hidden_layers))
        return CapturedModel(model, functions, self.recipes, self.sites, "main", layers, verify)

    def run_draft(self, index: int) -> CapturedModel:
        """第 ``index`` 个 MTP 模块。"""
        c = self.config
        layer = c.num_hidden_layers + index
        self.parameter_name = functools.partial(draft_initializer_name, config=c, index=index)
        self.on_step(f"mtp {index}")
        embed = blocks.embed_block(c, self.dtype, index + 1)
        block = blocks.mtp_block(c, index, self.forms, self.dtype, self.cache_dtype)
        head = blocks.draft_head_block(c, self.dtype)
        functions = self._bodies(c.is_moe_layer(layer))
        self._place(Place(embed, "embed", EMBED_PORTS))
        ports = mtp_ports(layer, [cache.name for cache in self._caches(layer)])
        self._place(Place(block, "mtp", ports), layer=layer)
        self._place(Place(head, "head", {}))
        own = mtp_recipes(c, index, self.dtype_name)
        used = {name for node in self.nodes for name in node.input}
        self.recipes = {name: recipe for name, recipe in (self.recipes | own).items() if name in used}
        inputs, outputs = self._contract_values([layer])
        shape = ("B", "S", c.hidden_size)
        inputs.insert(1, helper.make_tensor_value_info(names.PREV_HIDDEN, by_torch(self.dtype).onnx, shape))
        outputs.insert(2, helper.make_tensor_value_info(names.DRAFT_ID, onnx.TensorProto.INT64, ["B"]))
        model = self._model(inputs, outputs)
        return CapturedModel(model, functions, self.recipes, self.sites, "draft", (layer,))

    def _accept_inputs(self, mode: str) -> list[onnx.ValueInfoProto]:
        integer, real, V = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT, self.config.vocab_size
        values = [helper.make_tensor_value_info(names.DRAFT_IDS, integer, ["B", "K"])]
        if mode == "rejection":
            values += [
                helper.make_tensor_value_info(names.DRAFT_PROBS, real, ["B", "K", V]),
                helper.make_tensor_value_info(names.UNIFORM, real, ["B", "L"]),
                helper.make_tensor_value_info(names.TEMPERATURE, real, [1]),
            ]
        return values

    def _kind(self, layer: int) -> tuple[bool, bool]:
        """第 ``layer`` 层用哪一种块：是不是 MoE，自己挑不挑 key。"""
        return self.config.is_moe_layer(layer), self.config.runs_indexer(layer)

    def _caches(self, layer: int) -> list[CacheTensor]:
        return cache_tensors(self.config, self.forms, self.cache_dtype, self.dtype, layer)

    def _bodies(self, has_moe: bool) -> dict[str, onnx.FunctionProto]:
        functions = {}
        sparse = self.config.indexer is not None
        if sparse:
            self.on_step(f"{LIGHTNING_INDEXER.name} body")
            # 索引缓存各层都一样，第一层总有。
            stored = self._caches(0)[-1].dtype
            functions[LIGHTNING_INDEXER.name] = lightning_indexer_body(self.config, self.dtype, stored)
        if self.profile.mla.enabled:
            spec = SPARSE_MLA_ATTENTION if sparse else MLA_ATTENTION
            build = sparse_mla_attention_body if sparse else mla_attention_body
            self.on_step(f"{spec.name} body")
            functions[spec.name] = build(self.config, self.profile.mla.form, self.dtype, self.cache_dtype)
        if self.profile.moe.enabled and has_moe:
            self.on_step(f"{MOE_GATE.name} body")
            functions[MOE_GATE.name] = moe_gate_body(self.config)
            self.on_step(f"{MOE_EXPERTS.name} body")
            functions[MOE_EXPERTS.name] = moe_experts_body(self.config, self.dtype)
        return functions

    def _place(self, place: Place, layer: int | None = None) -> None:
        """实例化一个块：端口接到 ``ports``，权重接到检查点名，其余值加前缀。"""
        block = place.block
        weights = {name: self.parameter_name(f"{place.prefix}.{name}") for name in place.weights}
        constants = {name: constant_name(tensor) for name, tensor in block.constants.items()}
        table = weights | constants

        def rename(name: str) -> str:
            return table.get(name) or place.value(name)

        placed = block.renamed(rename)
        self.constants.update(placed.constants)
        for name, info in placed.value_info.items():
            self.value_info.setdefault(name, info)
        for index, node in enumerate(placed.nodes):
            node.name = place.node(index)
            if node.domain == DOMAIN and layer is not None:
                self.sites.append(OpSite(layer, node.op_type, tuple(node.input), tuple(node.output)))
        self.nodes.extend(placed.nodes)

    def _contract_values(
        self, layers: Iterable[int]
    ) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """I/O 契约里主模型与草稿模型共有的部分；``layers`` 是图里的各层，缓存在图里从 0 编号。"""
        c = self.config
        inputs = [
            helper.make_tensor_value_info(names.INPUT_IDS, onnx.TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info(names.PAST_LENS, onnx.TensorProto.INT64, ["B"]),
            helper.make_tensor_value_info(names.LOGITS_POSITIONS, onnx.TensorProto.INT64, ["B", "L"]),
        ]
        outputs = [
            helper.make_tensor_value_info(names.LOGITS, by_torch(self.dtype).onnx, ["B", "L", c.vocab_size]),
            helper.make_tensor_value_info(names.HIDDEN, by_torch(self.dtype).onnx, ["B", "S", c.hidden_size]),
        ]
        for i, layer in enumerate(layers):
            for cache in self._caches(layer):
                shape: list[str | int | None] = ["B", cache.heads, "T", cache.width]
                for values, name in (
                    (inputs, names.cache_input(cache.name, i)),
                    (outputs, names.cache_output(cache.name, i)),
                ):
                    values.append(helper.make_tensor_value_info(name, by_torch(cache.dtype).onnx, shape))
        return inputs, outputs

    def _model(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        for name, recipe in self.recipes.items():
            inputs.append(helper.make_tensor_value_info(name, DTYPES[recipe.dtype].onnx, list(recipe.shape)))
        declared = {value.name for value in (*inputs, *outputs)}
        inner = [
            info for name, info in self.value_info.items() if name not in declared | self.constants.keys()
        ]
        graph = helper.make_graph(
            self.nodes, "model", inputs, outputs, initializer=list(self.constants.values()), value_info=inner
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == DOMAIN for node in self.nodes):
            opsets.append(helper.make_opsetid(DOMAIN, OPSET_VERSION))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="dsx", ir_version=11)
        assert all(node.op_type in OPS for node in self.nodes if node.domain == DOMAIN)
        return model


def constant_name(tensor: onnx.TensorProto) -> str:
    """按内容命名：各层的相同常量合并成一个。"""
    content = tensor.raw_data + bytes(str((tensor.data_type, list(tensor.dims))), "ascii")
    return f"constants/{hashlib.sha256(content).hexdigest()[:12]}"
