"""graphs/ 里的清单与现在生成的一致：图的任何变化都要在 diff 里被看见。"""

from __future__ import annotations

import difflib
import re
from collections import Counter

import pytest

from tools.make_graphs import CONFIGS, GRAPHS, golden_listings, golden_names, toolchain_line

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

_OPERATOR = re.compile(r"(?:^|: )((?:dsx|com\.microsoft)\.\w+)\(.*?(\{.*\})?$")


def _minor_versions(line: str) -> dict[str, str]:
    """``# torch 2.13.0, ...`` → 追踪器相关的包 → ``2.13``。"""
    versions = dict(re.findall(r"(\w+) (\d+\.\d+)", line))
    return {package: versions[package] for package in ("torch", "onnxscript")}


def _interface(text: str) -> list[str]:
    """model、inputs、weights、outputs 几节。"""
    return text.partition("\n[nodes]")[0].splitlines()[1:]


def _operators(text: str) -> Counter:
    """dsx 与 com.microsoft 节点的算子和属性，不看名字。"""
    nodes = text.partition("\n[nodes]")[2].partition("\n[function")[0]
    return Counter(match.groups() for line in nodes.splitlines() if (match := _OPERATOR.search(line)))


def _difference(recorded: str, current: str) -> str | None:
    """两份清单的差别；追踪器换了次版本时只比接口和融合算子。"""
    if _minor_versions(recorded.partition("\n")[0]) == _minor_versions(current.partition("\n")[0]):
        old, new = recorded.splitlines()[1:], current.splitlines()[1:]
    else:
        old, new = (
            [*_interface(t), *map(str, sorted(_operators(t).items(), key=str))] for t in (recorded, current)
        )
    return "\n".join(difflib.unified_diff(old, new, "graphs/", "now", lineterm="", n=1)) or None


@pytest.mark.parametrize("family", CONFIGS)
def test_listings_match_what_is_recorded(family):
    for name, text in golden_listings(family):
        recorded = (GRAPHS / name).read_text(encoding="utf-8")
        difference = _difference(recorded, text)
        assert difference is None, f"{name} 变了；确认是有意的就运行 make graphs：\n{difference}"


def test_every_combination_is_recorded_and_nothing_else():
    expected = set().union(*map(golden_names, CONFIGS))
    assert {path.name for path in GRAPHS.glob("*.txt")} == expected


def test_another_tracer_version_compares_interface_and_operators_only():
    text = (GRAPHS / "deepseek_v3.mla+moe.ort-cpu.txt").read_text(encoding="utf-8")
    other = re.sub(r"torch \d+\.\d+", "torch 1.0", text, count=1)
    assert _minor_versions(other.partition("\n")[0]) != _minor_versions(toolchain_line())
    assert (
        _operators(text)[("com.microsoft.MoE", re.search(r"com\.microsoft\.MoE\(.*(\{.*\})", text)[1])] == 1
    )
    respelled = other.replace(": MatMul(", ": Gemm(").replace("layers.0/linear_1", "layers.0/renamed")
    assert _difference(text, respelled) is None
    assert "top_k=3" in (_difference(text, respelled.replace("top_k=2", "top_k=3")) or "")
    assert "logits: float32" in (
        _difference(text, respelled.replace("logits: float32", "logits: float16")) or ""
    )
    same = text.replace(": MatMul(", ": Gemm(", 1)
    assert "Gemm" in (_difference(text, same) or "")
