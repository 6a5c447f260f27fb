"""网页报告的测试用的：把页、图读回来，与编的结果。"""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

from deepseek_export.benchmark.bundle import BenchReport, Ratio, Scenario, Subject, Way
from deepseek_export.benchmark.depth_steps import Depth, Read
from deepseek_export.benchmark.memory import MemorySample
from deepseek_export.benchmark.spread import Spread, paired_ratio
from deepseek_export.parity.compare import BlockCase, ComparisonReport
from deepseek_export.parity.measures import Measure
from deepseek_export.parity.report import Case, ParityReport, QuantLoss
from deepseek_export.parity.tolerances import TOLERANCES, Tolerance
from deepseek_export.report.svg import FONT, text_width
from tests.perf_runs import ENVIRONMENT

SVG = "{http://www.w3.org/2000/svg}"
#: 检查点里可以有任何名字。
HOSTILE = 'a<script src="http://x.test/y.js">&amp;"\'\x07 层'
_VERSIONS = {"python": "3.11", "torch": "2.11", "onnxruntime": "1.24"}


class Row(NamedTuple):
    """表里的一行：行名、全部文字、``<data value>`` 里的数。"""

    name: str
    words: list[str]
    numbers: list[float]


def parsed(page: str) -> ET.Element:
    """页是合法的 XML。"""
    return ET.fromstring(page)


def rows(page: str) -> list[Row]:
    """每张表的每一行，不含表头。"""
    found = []
    for row in parsed(page).iter("tr"):
        cells = [child for child in row if child.get("scope") != "col"]
        if cells:
            words = ["".join(cell.itertext()) for cell in cells]
            numbers = [json.loads(data.get("value", "")) for cell in cells for data in cell.iter("data")]
            found.append(Row(words[0], words, [number for number in numbers if number is not None]))
    return found


def holds(found: list[Row], name: str, numbers: list[float], words: tuple[str, ...] = ()) -> bool:
    """有一行叫这个名字，带着这些数（逐位相同）与这些字。"""
    return any(
        row.name == name
        and set(words) <= set(row.words)
        and all(_has(row.numbers, number) for number in numbers)
        for row in found
    )


def _has(numbers: list[float], wanted: float) -> bool:
    return any(number == wanted or (math.isnan(number) and math.isnan(wanted)) for number in numbers)


class Words(NamedTuple):
    """图里的一行文字占的地方。"""

    text: str
    left: float
    right: float
    top: float
    bottom: float


def words(picture: ET.Element) -> list[Words]:
    """一张图的全部文字。"""
    found = []
    for node in picture.iter(f"{SVG}text"):
        text = "".join(node.itertext())
        size = float(node.get("font-size", FONT))
        wide, x, y = text_width(text, size), float(node.get("x", 0)), float(node.get("y", 0))
        left = {"middle": x - wide / 2, "end": x - wide}.get(node.get("text-anchor", "start"), x)
        found.append(Words(text, left, left + wide, y - 0.75 * size, y + 0.2 * size))
    return found


def check_picture(picture: ET.Element) -> None:
    """有名字与说明，字不相撞、不出图，颜色都由样式给。"""
    assert picture.get("role") == "img"
    assert [child.tag for child in picture][:2] == [f"{SVG}title", f"{SVG}desc"]
    assert all(child.text for child in list(picture)[:2])
    left, top, width, height = map(float, picture.get("viewBox", "").split())
    shown = words(picture)
    assert shown
    for one in shown:
        assert one.left >= left - 1, one
        assert one.right <= left + width + 1, one
        assert one.top >= top, one
        assert one.bottom <= top + height + 1, one
    for one, other in itertools.combinations(shown, 2):
        apart = (
            one.right <= other.left
            or other.right <= one.left
            or one.bottom <= other.top
            or other.bottom <= one.top
        )
        assert apart, (one, other)
    for node in picture.iter():
        assert not {"fill", "stroke", "style", "onload", "href"} & set(node.attrib)


def bars(picture: ET.Element) -> list[tuple[float, float]]:
    """横条的（左边，长），自上而下。"""
    found = [node for node in picture.iter(f"{SVG}rect") if re.fullmatch(r"f\d", node.get("class", ""))]
    found = [node for node in found if node.find(f"{SVG}title") is not None]
    return [(float(node.get("x", 0)), float(node.get("width", 0))) for node in found]


def case(level: Any, name: str, share: float, note: str = "", **changes: Any) -> Case:
    """三个量都占容差的 ``share``。"""
    limit = TOLERANCES["block", "float32"]
    m = Measure(
        share * limit.max_abs, (0, 3, 7), share * limit.calc_diff, 1 - share * limit.norm, 0.5, 42, 1.25, 1.0
    )
    m = Measure(**{**m.__dict__, **changes})
    return Case(
        level=level, name=name, passed=limit.accepts(m), measure=m, tolerance=limit, near_ties=0, note=note
    )


def parity_report(layers: int = 3) -> ParityReport:
    """各种各样的项：通过、不过、无穷大、恰好相等、形状不同、近平局、没有量、不限的容差。"""
    infinite = {"max_abs": math.inf, "calc_diff": math.inf, "norm_ratio": math.inf, "got": math.nan}
    loose = Tolerance(math.inf, 1e-1, 1e-1, f"只防跑偏 {HOSTILE}")
    free = case("loss", "logits[0]", 0.1)
    cases = [
        case("op", f"layers.0 {HOSTILE} B=1 S=1 T=8", 0.01),
        *(
            case("block", f"layers.{layer}.{part} ({phase})", 0.001 * (layer + 1))
            for layer in range(layers)
            for part in ("self_attn", "mlp")
            for phase in ("prefill", "decode")
        ),
        case("block", "head (prefill)", 3.0, "最大差在 [0, 3, 7]"),
        case("block", "head (decode)", 1.0, **infinite),
        Case(level="block", name="hidden (decode)", passed=False, note="形状是 [1]，应为 [2]"),
        case("model", "logits[0] prefill (5 tokens)", 0.0, norm_ratio=1.0).model_copy(
            update={"near_ties": 4}
        ),
        Case(level="tokens", name="tokens[0] alone", passed=True, near_ties=2, note="64 个 token 全部相同"),
        free.model_copy(update={"tolerance": loose, "passed": True}),
    ]
    loss = QuantLoss(
        kind="int8",
        block=32,
        tokens=50,
        before_a_flip=40,
        relative_error=0.01,
        relative_error_before_a_flip=0.005,
    )
    return ParityReport(
        bundle=f"out/{HOSTILE}",
        checkpoint="ckpt",
        profile="mla",
        target="ort-cpu",
        dtype="float32",
        oracle="transformers 5.17",
        environment=_VERSIONS,
        levels=["op", "block", "model", "tokens", "loss"],
        cases=cases,
        notes=[HOSTILE],
        loss=loss,
        polygraphy="polygraphy run out/model.onnx --onnxrt",
    )


def comparison_report() -> ComparisonReport:
    """两张图、两个后端，一个块不过。"""
    cases = [
        BlockCase(
            backend=backend,
            graph=graph,
            block=name,
            phase="prefill",
            case=case("block", f"{name} (prefill)", share),
        )
        for backend in ("ort", "trt")
        for graph in ("model.onnx", "mtp.onnx")
        for name, share in (("layers.0.self_attn", 0.02), (f"layers.1.{HOSTILE}", 5.0))
    ]
    return ComparisonReport(
        bundle="out",
        checkpoint="ckpt",
        profile="mla",
        target="portable",
        dtype="float32",
        backends=["ort", "trt"],
        environment=_VERSIONS,
        folder="out/reports/compare",
        commands={"model.onnx": "polygraphy run model.onnx"},
        cases=cases,
    )


def bench_report(against: bool = True, memory: bool = True) -> BenchReport:
    """被测的两种跑法，与一个对照。"""
    names = ["bundle", "against"] if against else ["bundle"]
    depths = [
        bench_depth(context, {name: _spread(1e-5 * context * (i + 1)) for i, name in enumerate(names)})
        for context in (256, 1024, 4096, 8192)
    ]
    sample = MemorySample(
        cache_computed=1 << 20, cache_resident=1 << 21, loaded=1 << 28, resident=1 << 29, peak=1 << 30
    )
    ways = {
        f"{name}/{way}": Way(
            prefill_s=_spread(0.3),
            token_s=_spread(0.02 * (i + 1)),
            speculation={"acceptance": [0.9, None]},
            notes=[HOSTILE],
        )
        for name in names
        for i, way in enumerate(("plain", "speculative"))
    }
    value = paired_ratio(depths[0].step_s[names[0]], depths[0].step_s[names[-1]])
    ratios = [
        Ratio(what="decode", numerator="bundle/speculative", denominator="bundle/plain", value=value),
        Ratio(what="depth 256", numerator="bundle", denominator="against", value=value.scaled(3.0)),
    ]
    return BenchReport(
        environment=ENVIRONMENT,
        scenario=Scenario(depths=(256, 1024, 4096, 8192)),
        subjects={
            name: Subject(
                path=f"out/{name}/{HOSTILE}",
                profile="full",
                target="ort-cpu",
                dtype="float32",
                cache_bytes_per_token=576,
                memory=sample if memory else None,
            )
            for name in names
        },
        ways=ways,
        depths=depths,
        ratios=ratios if against else [],
    )


def bench_depth(context: int, step_s: dict[str, Spread]) -> Depth:
    """一个上下文的一步，与读了多少。"""
    reads = {
        name: Read(
            weight_bytes=3 << 20,
            cache_bytes=576 * context,
            bytes_per_second=_spread(2e10),
            share=_spread(0.7),
        )
        for name in step_s
    }
    return Depth(context=context, step_s=step_s, reads=reads, machine_bytes_per_second=_spread(2.9e10))


def _spread(middle: float) -> Spread:
    return Spread.of([middle * 0.9, middle, middle * 1.7])
