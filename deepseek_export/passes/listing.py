"""下沉后的模型 → 一份确定的文本清单，供 ``graphs/`` 逐行比较。

小常量写值而不写名字；大常量写 dtype、形状和首末两个值（4 位有效数字），免得换一台机器差 1 ulp 就变。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

_SMALL = 8


def graph_listing(proto: onnx.ModelProto) -> str:
    """清单全文，分 model、inputs、weights、outputs、nodes、function 几节，以换行结尾。

    Args:
        proto: :func:`~deepseek_export.passes.lower` 的结果；维度全静态的输入算作权重。
    """
    props = {prop.key: prop.value for prop in proto.metadata_props}
    opsets = ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in proto.opset_import)
    header = f"model target={props.get('dsx.target', '-')} profile={props.get('dsx.profile', '-')} opset=({opsets})"
    graph = proto.graph
    contract = [value for value in graph.input if _is_dynamic(value)]
    weights = [value for value in graph.input if not _is_dynamic(value)]
    lines = [header]
    for title, values in (("inputs", contract), ("weights", weights), ("outputs", graph.output)):
        lines += ["", f"[{title}]", *(_value_line(value) for value in values)]
    constants = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
    lines += ["", "[nodes]", *_node_lines(graph.node, constants, "")]
    for function in proto.functions:
        signature = f"({', '.join(function.input)}) -> {', '.join(function.output)}"
        lines += ["", f"[function {function.domain}.{function.name}{signature}]"]
        lines += _node_lines(function.node, {}, "")
    return "\n".join(lines) + "\n"


def _is_dynamic(value: onnx.ValueInfoProto) -> bool:
    return any(dim.HasField("dim_param") for dim in value.type.tensor_type.shape.dim)


def _value_line(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{value.name}: {_dtype(tensor.elem_type)}[{dims}]"


def _dtype(elem_type: int) -> str:
    return helper.tensor_dtype_to_np_dtype(elem_type).name


def _tensor(tensor: onnx.TensorProto) -> str:
    array = numpy_helper.to_array(tensor)
    values = [
        _scalar(value) for value in array.reshape(-1)[:: max(array.size - 1, 1) if array.size > _SMALL else 1]
    ]
    dtype = _dtype(tensor.data_type)
    if array.size > _SMALL:
        return f"{dtype}{list(array.shape)}({values[0]} .. {values[-1]})"
    if not array.ndim:
        return f"{dtype}({values[0]})"
    # 一维从元素个数就看得出形状。
    shape = list(array.shape) if array.ndim > 1 or not array.size else ""
    return f"{dtype}{shape}({', '.join(values)})"


def _scalar(value) -> str:
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    return f"{float(value):.4g}"


def _node_lines(nodes: Sequence[onnx.NodeProto], outer: Mapping[str, str], indent: str) -> Iterator[str]:
    constants = dict(outer)
    for node in nodes:
        if node.op_type == "Constant" and (value := _constant_value(node)) is not None:
            constants[node.output[0]] = value
            continue
        inputs = ", ".join(constants.get(name, name) or "-" for name in node.input)
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        plain = [_attribute(a) for a in attributes if not a.HasField("g")]
        shown = f" {{{', '.join(plain)}}}" if plain else ""
        name = f"{node.name}: " if node.name else ""
        yield f"{indent}{name}{op}({inputs}) -> {', '.join(node.output)}{shown}"
        for attribute in attributes:
            if attribute.HasField("g"):
                signature = ", ".join(value.name for value in attribute.g.input)
                results = ", ".join(value.name for value in attribute.g.output)
                yield f"{indent}  {attribute.name}({signature}) -> {results}:"
                yield from _node_lines(attribute.g.node, constants, indent + "    ")


def _constant_value(node: onnx.NodeProto) -> str | None:
    """``Constant`` 节点的值；引用函数属性的返回 ``None``，照普通节点列出。"""
    attribute = node.attribute[0]
    return _tensor(attribute.t) if attribute.HasField("t") else None


def _attribute(attribute: onnx.AttributeProto) -> str:
    if attribute.ref_attr_name:
        return f"{attribute.name}=@{attribute.ref_attr_name}"
    if attribute.HasField("t"):
        return f"{attribute.name}={_tensor(attribute.t)}"
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return f"{attribute.name}={value.decode()}"
    if isinstance(value, (int, float)):
        return f"{attribute.name}={_scalar(value)}"
    return f"{attribute.name}=[{', '.join(map(_scalar, value))}]"
