"""各阶段之间的合法性检查：一组规则，违反者写明阶段，不留给后端去报。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from deepseek_export.capture import names
from deepseek_export.errors import DsxError
from deepseek_export.ops.table import DOMAIN, OPS, PLUGIN_NAMESPACE, PLUGIN_VERSION
from deepseek_export.passes.base import MICROSOFT, GraphModule
from deepseek_export.passes.emitter import dtype_of

#: 标准域与 dsx 之外，某个目标的图里还允许出现的域。
_EXTRA_DOMAINS = {"ort-cpu": MICROSOFT}

#: 函数体里通过属性引用取值、允许各节点不同的属性；其余属性已固化在函数体的结构里。
_FREE_ATTRIBUTES = frozenset({"scale", "K", "N", "block_size", "block_rows"})

_PLUGIN_ATTRIBUTES = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}

_KINDS = {"int": int, "float": float, "str": str}

_SHOWN = 5


@dataclass(frozen=True)
class _Context:
    module: GraphModule
    domains: set[str]

    @property
    def dsx_nodes(self) -> list[gs.Node]:
        return [node for node in self.module.graph.nodes if node.domain == DOMAIN]


def check_legality(module: GraphModule, stage: str, target: str) -> None:
    """检查 ``module`` 是否合法；不改动它。

    Args:
        module: 某个阶段之后的图。
        stage: 该阶段的名字（``capture`` 或 pass 名），违反时由它负责。
        target: 编译目标，决定允许的域。

    Raises:
        DsxError: ``DSX-E303``，列出违反的规则与节点。
    """
    context = _Context(module, {"", DOMAIN, _EXTRA_DOMAINS.get(target, "")})
    problems = [problem for rule in RULES for problem in rule(context)]
    if not problems:
        return
    more = f"……等 {len(problems)} 处" if len(problems) > _SHOWN else ""
    what = f"{stage} 之后（目标 {target}）：{'；'.join(problems[:_SHOWN])}{more}"
    raise DsxError("DSX-E303", what, f"这是 dsx 的缺陷，出在 {stage}：请附上这段文字和 pip list 报告")


def _operators(c: _Context) -> Iterator[str]:
    """dsx 节点的算子、个数、属性与契约表一致。"""
    for node in c.dsx_nodes:
        spec = OPS.get(node.op)
        if spec is None:
            yield f"{node.name} 是契约表里没有的算子 dsx::{node.op}"
            continue
        for what, tensors, ports in (
            ("输入", node.inputs, spec.inputs),
            ("输出", node.outputs, spec.outputs),
        ):
            if len(tensors) != len(ports):
                yield f"{node.name} 有 {len(tensors)} 个{what}，应为 {len(ports)}"
            elif empty := [p.name for t, p in zip(tensors, ports, strict=True) if t.is_empty()]:
                yield f"{node.name} 的{what} {'、'.join(empty)} 是空的"
        kinds = {attribute.name: _KINDS[attribute.kind] for attribute in spec.attributes}
        if node.attrs.keys() != kinds.keys() | _PLUGIN_ATTRIBUTES.keys():
            different = sorted(node.attrs.keys() ^ (kinds.keys() | _PLUGIN_ATTRIBUTES.keys()))
            yield f"{node.name} 多或少了属性 {'、'.join(different)}"
        for key, value in node.attrs.items():
            if key in kinds and type(value) is not kinds[key]:
                yield f"{node.name} 的 {key} = {value!r} 应为 {kinds[key].__name__}"
            if value != _PLUGIN_ATTRIBUTES.get(key, value):
                yield f"{node.name} 的 {key} = {value!r} 应为 {_PLUGIN_ATTRIBUTES[key]!r}"


def _shared_bodies(c: _Context) -> Iterator[str]:
    """共用函数体的节点除 :data:`_FREE_ATTRIBUTES` 外属性全同；每个 dsx 算子都有函数体，签名与契约表一致。"""
    first: dict[str, gs.Node] = {}
    for node in c.dsx_nodes:
        other = first.setdefault(node.op, node)
        for key in node.attrs.keys() & other.attrs.keys() - _FREE_ATTRIBUTES:
            if node.attrs[key] != other.attrs[key]:
                mine, theirs = node.attrs[key], other.attrs[key]
                yield f"{node.name} 的 {key} = {mine!r}，而共用函数体的 {other.name} 是 {theirs!r}"
    for op in first:
        body = c.module.functions.get(op)
        if body is None:
            yield f"dsx::{op} 没有函数体"
        elif op in OPS and (list(body.input), list(body.output)) != (
            [port.name for port in OPS[op].inputs],
            [port.name for port in OPS[op].outputs],
        ):
            yield f"dsx::{op} 的函数体签名 ({', '.join(body.input)}) -> ({', '.join(body.output)}) 与契约表不符"


def _values(c: _Context) -> Iterator[str]:
    """每个值恰好定义一次，先定义后使用；节点名不重复；主图没有子图。"""
    graph, defined, seen = c.module.graph, set(), set()
    for tensor in graph.inputs:
        if tensor.name in defined:
            yield f"图的输入 {tensor.name} 重复"
        defined.add(tensor.name)
    for node in graph.nodes:
        if node.name in seen:
            yield f"节点名 {node.name} 重复"
        seen.add(node.name)
        for tensor in node.inputs:
            if not (tensor.is_empty() or isinstance(tensor, gs.Constant) or tensor.name in defined):
                yield f"{node.name} 的输入 {tensor.name} 没有来源，或在使用之后才定义"
        for tensor in node.outputs:
            if tensor.name in defined:
                yield f"值 {tensor.name} 定义了两次（第二次在 {node.name}）"
            defined.add(tensor.name)
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            yield f"主图里 {node.name} 带子图，控制流只能出现在函数体里"
    for tensor in graph.outputs:
        if tensor.name not in defined:
            yield f"图的输出 {tensor.name} 没有来源"


def _domains(c: _Context) -> Iterator[str]:
    """只用目标允许的域。"""
    for node in c.module.graph.nodes:
        if (node.domain or "") not in c.domains:
            yield f"{node.name} 的域 {node.domain} 不允许，允许：{'、'.join(sorted(c.domains - {''}))}"


def _weights(c: _Context) -> Iterator[str]:
    """契约之外的输入都是权重：有配方，形状、dtype 相符，有人消费。"""
    module = c.module
    contract = _contract_inputs(module)
    inputs = {tensor.name: tensor for tensor in module.graph.inputs if tensor.name not in contract}
    used = {tensor.name for node in module.graph.nodes for tensor in node.inputs}
    for name, tensor in inputs.items():
        recipe = module.weights.get(name)
        if recipe is None:
            yield f"输入 {name} 既不在 I/O 契约里，也没有权重配方"
            continue
        if tuple(tensor.shape) != recipe.shape or dtype_of(tensor).name != recipe.dtype:
            declared, wanted = (
                f"{dtype_of(tensor).name}{list(tensor.shape)}",
                f"{recipe.dtype}{list(recipe.shape)}",
            )
            yield f"权重 {name} 声明为 {declared}，配方是 {wanted}"
        if name not in used:
            yield f"权重 {name} 没有节点消费"
    for name in module.weights.keys() - inputs.keys():
        yield f"配方 {name} 没有对应的权重输入"


def _contract(c: _Context) -> Iterator[str]:
    """I/O 契约的输入排在最前，输出一个不少，次序固定。"""
    module = c.module
    inputs = [tensor.name for tensor in module.graph.inputs]
    expected = _contract_inputs(module)
    if inputs[: len(expected)] != expected:
        yield f"前 {len(expected)} 个输入是 {inputs[: len(expected)]}，应为 {expected}"
    outputs = [tensor.name for tensor in module.graph.outputs]
    wanted = [names.LOGITS, names.HIDDEN]
    if module.role == "draft":
        wanted.append(names.DRAFT_ID)
    elif module.verify is not None:
        wanted += [names.NUM_ACCEPTED, names.NEXT_ID]
    wanted += [names.cache_output(cache, i) for i, cache in _caches(module)]
    if outputs != wanted:
        yield f"输出是 {outputs}，应为 {wanted}"


def _contract_inputs(module: GraphModule) -> list[str]:
    inputs = [names.INPUT_IDS, names.PAST_LENS, names.LOGITS_POSITIONS]
    if module.role == "draft":
        inputs.insert(1, names.PREV_HIDDEN)
    elif module.verify is not None:
        inputs.append(names.DRAFT_IDS)
        if module.verify == "rejection":
            inputs += [names.DRAFT_PROBS, names.UNIFORM, names.TEMPERATURE]
    return inputs + [names.cache_input(cache, i) for i, cache in _caches(module)]


def _caches(module: GraphModule) -> list[tuple[int, str]]:
    """图里的缓存：层在图里的编号与名字的词干，按次序。"""
    latent = any(tensor.name == names.cache_input("kv_cache", 0) for tensor in module.graph.inputs)
    every = ["kv_cache"] if latent else ["k_cache", "v_cache"]
    return [
        (i, cache)
        for i, layer in enumerate(module.layers)
        for cache in every + ["index_cache"] * module.config.runs_indexer(layer)
    ]


RULES: tuple[Callable[[_Context], Iterator[str]], ...] = (
    _operators,
    _shared_bodies,
    _values,
    _domains,
    _weights,
    _contract,
)
