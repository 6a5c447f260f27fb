"""ops/table.py：torch 签名、ONNX schema 与契约表一致，别处不再拼写算子名。"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from onnx import defs

import deepseek_export
from deepseek_export.dtypes import DTYPES
from deepseek_export.ops import registry
from deepseek_export.ops.spec import TYPE_CONSTRAINTS
from deepseek_export.ops.table import DOMAIN, OPS, OPSET_VERSION
from tools.make_ops_header import HEADER, header
from tools.make_ops_page import PAGE, page

pytestmark = pytest.mark.unit

PACKAGE = Path(deepseek_export.__path__[0])
#: C++ 源码里的字符串。
STRINGS = re.compile(r'"(\w+)"')
SPECS = [pytest.param(spec, id=spec.name) for spec in OPS.values()]


@pytest.mark.parametrize("spec", SPECS)
def test_torch_schema(spec):
    """torch 算子的参数名、次序、类型与返回个数。"""
    schema = getattr(torch.ops.dsx, spec.torch_name).default._schema
    kinds = {"int": "int", "float": "float", "str": "str"}
    want = [(port.name, "Tensor") for port in spec.inputs]
    want += [(attribute.name, kinds[attribute.kind]) for attribute in spec.attributes]
    assert [(a.name, str(a.type)) for a in schema.arguments] == want
    assert [str(r.type) for r in schema.returns] == ["Tensor"] * len(spec.outputs)
    assert not schema.is_mutable


@pytest.mark.parametrize("spec", SPECS)
def test_onnx_schema(spec):
    """onnx 里登记的 schema：名字、次序、个数、类型、属性。"""
    assert defs.has(spec.name, DOMAIN)
    schema = defs.get_schema(spec.name, OPSET_VERSION, DOMAIN)
    assert [(p.name, p.type_str) for p in schema.inputs] == [(p.name, p.type) for p in spec.inputs]
    assert [(p.name, p.type_str) for p in schema.outputs] == [(p.name, p.type) for p in spec.outputs]
    assert (schema.min_input, schema.max_input) == (len(spec.inputs),) * 2, "输入个数固定"
    assert (schema.min_output, schema.max_output) == (len(spec.outputs),) * 2
    required = {name: a.type.name for name, a in schema.attributes.items() if a.required}
    kinds = {"int": "INT", "float": "FLOAT", "str": "STRING"}
    assert required == {a.name: kinds[a.kind] for a in spec.attributes}
    optional = {name: a.type.name for name, a in schema.attributes.items() if not a.required}
    assert optional == {"plugin_namespace": "STRING", "plugin_version": "STRING"}
    for constraint in schema.type_constraints:
        allowed = [DTYPES[dtype].onnx_type for dtype in TYPE_CONSTRAINTS[constraint.type_param_str]]
        assert sorted(constraint.allowed_type_strs) == sorted(allowed)


@pytest.mark.parametrize("spec", SPECS)
def test_table_is_well_formed(spec):
    """名字不重复，类型变量都有定义；属性只用插件字段认得的三种类型。"""
    names = [port.name for port in spec.inputs] + [a.name for a in spec.attributes]
    assert len(set(names)) == len(names)
    assert {port.type for port in (*spec.inputs, *spec.outputs)} <= TYPE_CONSTRAINTS.keys()
    assert {a.kind for a in spec.attributes} <= {"int", "float", "str"}
    assert getattr(torch.ops.dsx, spec.torch_name).default in registry.TRANSLATIONS


def docstrings(tree: ast.AST) -> set[ast.Constant]:
    """不赋给任何东西的字符串：docstring，以及写在赋值后面的说明。"""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def spelled_names(source: str) -> list[str]:
    """源码里（docstring 除外）作为整个字符串出现的算子名（给人看的消息里提到它不算）。"""
    tree = ast.parse(source)
    skip = docstrings(tree)
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and node not in skip
        and isinstance(node.value, str)
        and node.value in OPS
    ]


def test_names_are_spelled_only_in_the_table():
    """包里只有 ops/table.py 写着算子名。"""
    assert spelled_names('"""MoeGate"""\nx = "MoeGate"\n') == ["MoeGate"], "检查本身要有效"
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if (names := spelled_names(path.read_text(encoding="utf-8")))
    }
    assert set(found) == {"ops/table.py"}


def test_the_header_is_generated():
    """plugins/ops.h 就是生成器写的那一份：改了契约表要 make ops-header。"""
    assert HEADER.read_text(encoding="utf-8") == header()


def test_the_page_is_generated():
    """docs/operators.md 也是：算子的端口、形状、属性不在文档里另写一遍。"""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_native_code_spells_no_operators():
    """C++ 里只有 ops.h 写着算子名、端口名与插件的 namespace：别处引用它们的枚举与常量。"""
    names = {port.name for spec in OPS.values() for port in (*spec.inputs, *spec.outputs)}
    names |= OPS.keys() | {attribute.name for spec in OPS.values() for attribute in spec.attributes}
    assert names & set(STRINGS.findall(HEADER.read_text(encoding="utf-8"))), "检查本身要有效"
    found = {
        path.name: spelled
        for path in HEADER.parent.glob("*/*.[ch]*")
        if (spelled := (names | {DOMAIN}) & set(STRINGS.findall(path.read_text(encoding="utf-8"))))
    }
    assert found == {}
