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
REQUIREMENT = re.compile(
    r"\b(?:PROFILE|MLA|MOE|MTP|EXPORT|RUNTIME|PARITY|HF|TRT|CPU|KERNEL|SERVE|REPORT|CLUSTER|DSA)-\d+\b"
)

#: 没有测试、只有门槛的编号，标题以它结尾。
BY_PERF = "（由 perf 证明）"


def python_sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def sections() -> dict[str, str]:
    """编号 → 规格里那一节，第一行是去掉了 ``###`` 的标题。"""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "specs").rglob("spec.md"))
    parts = [part.split("\n## ")[0] for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]]
    found = {part.split(" ", 1)[0]: part for part in parts}
    assert len(found) == len(parts), "有编号写了两遍"
    return found


def test_every_requirement_is_proved_and_none_is_invented():
    """每个编号要么有测试，要么在标题里写明由 perf 证明、有门槛；测试与 perf 不引用不存在的编号。"""
    declared = sections()
    assert all(REQUIREMENT.fullmatch(name) for name in declared)
    named = {
        folder: {
            name
            for path in python_sources(folder)
            if path.name != Path(__file__).name
            for name in REQUIREMENT.findall(path.read_text(encoding="utf-8"))
        }
        for folder in ("tests", "perf")
    }
    assert named["tests"] | named["perf"] <= set(declared)
    marked = {name for name, section in declared.items() if section.splitlines()[0].endswith(BY_PERF)}
    assert marked == set(declared) - named["tests"]
    assert marked <= {gate.id for gate in load_gates().gates}
    assert BY_PERF not in "".join(section.partition("\n")[2] for section in declared.values())


def test_gates_are_promises_with_the_same_number_and_command():
    """perf/gates.toml 的每条门槛：规格里同一个编号的那一节写着同样的门槛、比值与命令。"""
    declared, gates = sections(), load_gates().gates
    assert gates
    for gate in gates:
        section = declared[gate.id]
        assert gate.suite in SUITES
        assert f"`python -m perf run {gate.suite}`" in section
        assert f"{gate.max:.2f}" in section
        # 一个编号可以有几条门槛，有一条没有达到就要写明。
        assert ("未达到" in section) == any(other.open for other in gates if other.id == gate.id)


def test_error_codes_are_documented_and_none_is_invented():
    """每个错误码在 docs/errors.md 里有说明，别处不写表里没有的码；都触发过由 tests/raised_codes.py 在运行时看。"""
    manual = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    documented = re.findall(r"^### (DSX-E\d+ .+)$", manual, re.MULTILINE)
    assert sorted(documented) == sorted(f"{code} {title}" for code, title in ERRORS.items())
    sources = (
        path.read_text(encoding="utf-8") for path in python_sources("deepseek_export", "perf", "tools")
    )
    assert set(re.findall(r"DSX-E\d+", "\n".join([manual, *sources]))) <= set(ERRORS)


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
