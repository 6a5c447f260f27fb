"""门槛与退步：都只看比值。"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepseek_export.benchmark.spread import Spread
from perf.results import Run, comparable

GATES = Path(__file__).with_name("gates.toml")

Kind = Literal["memory", "count", "time"]
Status = Literal["pass", "within-spread", "fail", "open"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Gate(_Model):
    """一条门槛；各键的意思写在 ``gates.toml`` 的开头。"""

    id: str
    suite: str
    ratio: str
    max: float
    kind: Kind
    case: str = ""
    full: bool = False
    open: str = ""
    optional: bool = False


class Gates(_Model):
    """``gates.toml`` 的全部内容。"""

    regression_slack: float
    gates: list[Gate]


class Verdict(_Model):
    """一条门槛在一格上的结论。

    Attributes:
        id: 承诺的编号；退步没有编号。
        status: ``within-spread`` 是中位数超了门槛，而范围还够得着，不算失败。
    """

    id: str
    suite: str
    case: str
    ratio: str
    kind: Kind
    value: Spread
    limit: float
    status: Status
    note: str = ""


def load_gates(path: Path = GATES) -> Gates:
    """读门槛。"""
    return Gates.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))


def check(runs: Sequence[Run], gates: Gates) -> list[Verdict]:
    """对照门槛；没有跑的套件不看。

    Raises:
        ValueError: 跑了的套件里没有门槛要的格子或比值，门槛又不是 ``optional``：门槛写错了，或测量少了东西。
    """
    suites = {suite.suite: (run, suite) for run in runs for suite in run.suites}
    verdicts = []
    for gate in gates.gates:
        if gate.suite not in suites:
            continue
        run, suite = suites[gate.suite]
        if gate.full and run.quick:
            continue
        found = [
            (case.name, case.ratios[gate.ratio])
            for case in suite.cases
            if case.name.startswith(gate.case) and gate.ratio in case.ratios
        ]
        if not found and not gate.optional:
            raise ValueError(f"{gate.suite} 里没有 {gate.case or '任何格子'} 的 {gate.ratio}（{gate.id}）")
        verdicts += [
            Verdict(
                id=gate.id,
                suite=gate.suite,
                case=case,
                ratio=gate.ratio,
                kind=gate.kind,
                value=value,
                limit=gate.max,
                status=_status(value, gate),
                note=gate.open,
            )
            for case, value in found
        ]
    return verdicts


def _status(value: Spread, gate: Gate) -> Status:
    if value.median <= gate.max:
        return "pass"
    if value.low <= gate.max:
        return "within-spread"
    return "open" if gate.open else "fail"


def regressions(run: Run, history: list[Run], gates: Gates) -> list[Verdict]:
    """与同一种 CPU、同样的核数与线程、同一种场景的最近一次相比，变差到范围不相交的比值。"""
    kinds: dict[tuple[str, str], Kind] = {(gate.suite, gate.ratio): gate.kind for gate in gates.gates}
    verdicts = []
    for suite in run.suites:
        before = comparable(run, suite, history)
        previous = {} if before is None else {case.name: case.ratios for case in before[1].cases}
        for case in suite.cases:
            for name, value in case.ratios.items():
                old = previous.get(case.name, {}).get(name)
                if old is None:
                    continue
                if value.low > old.high and value.median > old.median * (1 + gates.regression_slack):
                    verdicts.append(
                        Verdict(
                            id="退步",
                            suite=suite.suite,
                            case=case.name,
                            ratio=name,
                            kind=kinds.get((suite.suite, name), "time"),
                            value=value,
                            limit=old.median,
                            status="fail",
                            note=f"上一次 {old.median:.3f}（{old.low:.3f}–{old.high:.3f}）",
                        )
                    )
    return verdicts
