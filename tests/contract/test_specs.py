"""规格与测试互相对得上：每条承诺有测试，测试不引用不存在的承诺；错误码有说明、有测试。"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from deepseek_export.errors import ERRORS, DsxError
from perf.gates import load_gates
from perf.suites import SUITES

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT = re.compile(r"\b(?:PROFILE|MLA|MOE|MTP|EXPORT|RUNTIME|PARITY|HF|TRT|CPU|KERNEL)-\d+\b")


def python_sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_every_requirement_has_a_test_and_none_is_invented():
    """specs/ 里每个编号都被测试或 perf 引用，反之亦然。"""
    declared = set()
    for spec in (ROOT / "specs").rglob("spec.md"):
        ids = re.findall(r"^### (\S+) ", spec.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(REQUIREMENT.fullmatch(name) for name in ids), (spec, ids)
        assert not declared & set(ids)
        declared |= set(ids)
    named = set()
    for path in python_sources("tests", "perf"):
        if path.name != Path(__file__).name:
            named |= set(REQUIREMENT.findall(path.read_text(encoding="utf-8")))
    assert named == declared


def test_gates_are_promises_with_the_same_number_and_command():
    """perf/gates.toml 的每条门槛：规格里同一个编号的那一节写着同样的门槛、比值与命令。"""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "specs").rglob("spec.md"))
    sections = {part.split(" ", 1)[0]: part for part in re.split(r"^### ", text, flags=re.MULTILINE)}
    gates = load_gates().gates
    assert gates
    for gate in gates:
        section = sections[gate.id]
        assert gate.suite in SUITES
        assert f"`python -m perf run {gate.suite}`" in section
        assert f"{gate.max:.2f}" in section
        # 一个编号可以有几条门槛，有一条没有达到就要写明。
        assert ("未达到" in section) == any(other.open for other in gates if other.id == gate.id)


def test_error_codes_are_raised_tested_and_documented():
    """每个错误码在源码里真的会抛、在测试里被断言、在 docs/errors.md 里有说明。"""
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in python_sources("deepseek_export")
        if path.name != "errors.py"
    )
    tests = "\n".join(path.read_text(encoding="utf-8") for path in python_sources("tests"))
    manual = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    for code, title in ERRORS.items():
        assert code in source, f"{code} 没有任何地方抛出"
        assert code in tests, f"{code} 没有测试"
        assert f"### {code} {title}" in manual, f"{code} 没有说明"
    used = set(re.findall(r"DSX-E\d+", source + manual))
    assert used <= set(ERRORS)


def test_error_message_has_three_lines():
    """码与标题、出了什么事、怎么办。"""
    text = str(DsxError("DSX-E103", "model_type = 'llama'", "换一个检查点"))
    assert text.splitlines() == [
        "DSX-E103 不支持的 model_type",
        "  model_type = 'llama'",
        "  建议：换一个检查点",
    ]


def test_tolerances_live_in_one_table():
    """除容差表之外，包里没有 rtol/atol 之类的字面量。"""
    for path in python_sources("deepseek_export"):
        if path.name == "tolerances.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("rtol", "atol"):
                raise AssertionError(f"{path.name}:{node.value.lineno} 写了 {node.arg}")
