"""重新生成 plugins/ops.h：C++ 一侧的算子契约，由 ops/table.py 得出，tests/unit/test_ops_table.py 核对。

头文件提交在仓库里，所以安装时构建 C++ 算子库不需要先装 dsx 的依赖。
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deepseek_export.dtypes import DTYPES
from deepseek_export.engine.plugins import PLUGIN_OPS
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec, Port
from deepseek_export.ops.table import DOMAIN, OPS, PLUGIN_NAMESPACE, PLUGIN_VERSION

HEADER = Path(__file__).resolve().parent.parent / "plugins/ops.h"

_ATTRIBUTE_TYPES = {"int": "int64_t", "float": "float", "str": "std::string"}

_HEAD = f"""\
// 算子的契约：由 deepseek_export/ops/table.py 生成（make ops-header），不要手改。
//
// 一个算子一个 namespace：名字，输入输出的次序（枚举与端口同名）、类型变量、秩，属性的名字与类型。
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace dsx::ops {{

inline constexpr char const* kDomain = "{DOMAIN}";
inline constexpr char const* kPluginNamespace = "{PLUGIN_NAMESPACE}";
inline constexpr char const* kPluginVersion = "{PLUGIN_VERSION}";

// 类型变量：允许的 ONNX 类型（与 ONNXTensorElementDataType 同值）。
struct Types {{
    size_t count;
    std::array<int, {max(map(len, TYPE_CONSTRAINTS.values()))}> onnx;
}};

struct Port {{
    char const* name;
    Types const* type;
    size_t rank;  // 0 是不定
}};

template <typename T>
struct Attribute {{
    char const* name;
}};
"""


def header() -> str:
    """``plugins/ops.h`` 应有的内容。"""
    lines = [_HEAD]
    for name, dtypes in TYPE_CONSTRAINTS.items():
        numbers = ", ".join(str(DTYPES[dtype].onnx) for dtype in dtypes)
        lines.append(
            f"inline constexpr Types k{name}{{{len(dtypes)}, {{{numbers}}}}};  // {'、'.join(dtypes)}"
        )
    names = ", ".join(f'"{spec.name}"' for spec in PLUGIN_OPS)
    lines += ["", "// 有 TensorRT 插件的算子。"]
    lines += [f"inline constexpr std::array<char const*, {len(PLUGIN_OPS)}> kPlugins{{{names}}};"]
    for spec in OPS.values():
        lines += ["", *_namespace(spec)]
    return "\n".join([*lines, "", "}  // namespace dsx::ops", ""])


def _namespace(spec: OpSpec) -> Iterator[str]:
    yield f"namespace {spec.torch_name} {{"
    yield f'inline constexpr char const* kName = "{spec.name}";'
    yield from _ports("Input", spec.inputs)
    yield from _ports("Output", spec.outputs)
    for a in spec.attributes:
        yield f'inline constexpr Attribute<{_ATTRIBUTE_TYPES[a.kind]}> {a.name}{{"{a.name}"}};'
    yield f"}}  // namespace {spec.torch_name}"


def _ports(kind: str, ports: tuple[Port, ...]) -> Iterator[str]:
    yield f"enum {kind} : size_t {{ {', '.join(port.name for port in ports)} }};"
    yield f"inline constexpr std::array<Port, {len(ports)}> k{kind}s{{{{"
    for port in ports:
        rank = 0 if "..." in port.dims else len(port.dims)
        yield f'    {{"{port.name}", &k{port.type}, {rank}}},  // [{", ".join(port.dims)}]'
    yield "}};"


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
