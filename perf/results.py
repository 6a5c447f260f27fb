"""一次运行的结果，以及只追加的历史 ``perf/history/runs.jsonl``。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from deepseek_export.benchmark.spread import Spread

ROOT = Path(__file__).resolve().parents[1]
HISTORY = ROOT / "perf/history/runs.jsonl"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Case(_Model):
    """场景里的一格。

    Attributes:
        name: 例如 ``v2-lite b1 float32``。
        values: ``系列.量`` → 几次测量，例如 ``baseline.peak``，单位是秒或字节。
        ratios: 名字 → 逐对之比，一律是「优化后 / 对照」，越小越好。
        facts: 不是重复测量的东西：接受率、曲线、专家负载。
    """

    name: str
    values: dict[str, Spread]
    ratios: dict[str, Spread] = {}
    facts: dict[str, Any] = {}


class SuiteResult(_Model):
    """一套场景的结果。"""

    suite: str
    title: str
    scenario: dict[str, Any]
    cases: list[Case]

    @field_validator("scenario")
    @classmethod
    def _as_written(cls, scenario: dict[str, Any]) -> dict[str, Any]:
        """刚量的与历史里读回来的要能比：JSON 没有元组。"""
        found: dict[str, Any] = json.loads(json.dumps(scenario))
        return found


class Run(_Model):
    """一次 ``python -m perf run``。

    Attributes:
        started: 开始的时刻，ISO 8601。
        quick: 是不是缩小了的场景；与完整场景的数不可比。
        skipped: 没有跑的，各一句原因。
    """

    started: str
    quick: bool
    environment: dict[str, Any]
    suites: list[SuiteResult]
    skipped: list[str]


def append(run: Run, history: Path | None = None) -> None:
    """追加一行，缺省进 :data:`HISTORY`；已有的行从不改写。"""
    history = history or HISTORY
    history.parent.mkdir(parents=True, exist_ok=True)
    with history.open("a", encoding="utf-8") as file:
        file.write(run.model_dump_json() + "\n")


def load(history: Path | None = None) -> list[Run]:
    """全部历史，从旧到新。"""
    history = history or HISTORY
    if not history.is_file():
        return []
    return [Run.model_validate_json(line) for line in history.read_text(encoding="utf-8").splitlines()]


def machine(run: Run) -> tuple[object, ...]:
    """CPU 型号、核数、线程数：都相同的两次运行才能比。"""
    cpu = run.environment["cpu"]
    return cpu["model"], cpu["cores"], run.environment["threads"]


def comparable(run: Run, suite: SuiteResult, history: list[Run]) -> tuple[Run, SuiteResult] | None:
    """``history`` 里与 ``run`` 的这一套可比的最近一次：同一种机器、同样的场景，C++ 算子库也相同（早先的历史没有记，算相同）。"""
    library = run.environment.get("cpu_library")
    for past in reversed(history):
        if machine(past) == machine(run) and past.environment.get("cpu_library", library) == library:
            for old in past.suites:
                if old.suite == suite.suite and old.scenario == suite.scenario:
                    return past, old
    return None


def latest(runs: list[Run]) -> list[Run]:
    """与最后一次同一种机器的运行里，每一套各取最近一次（完整的优先于缩小的）。

    Returns:
        留下的运行，从旧到新，各只含被取的那几套与仍没有结果的跳过；环境是它自己的。

    Raises:
        ValueError: 历史是空的。
    """
    if not runs:
        raise ValueError("还没有测过：先运行 python -m perf run")
    same = [run for run in runs if machine(run) == machine(runs[-1])]
    chosen = {s.suite: s for quick in (True, False) for run in same if run.quick is quick for s in run.suites}
    kept = [
        run.model_copy(
            update={
                "suites": [suite for suite in run.suites if chosen[suite.suite] is suite],
                "skipped": [line for line in run.skipped if line.split("：")[0] not in chosen],
            }
        )
        for run in same
    ]
    return [run for run in kept if run.suites or run.skipped]


def newest(runs: list[Run]) -> list[Run]:
    """每一套最近一次完整的运行，不论在哪台机器上；一个运行一套，从旧到新。同一时刻开始的几行都留下：从前的结果分成几行转来。"""
    full = [
        run.model_copy(update={"suites": [suite], "skipped": []})
        for run in sorted(runs, key=lambda run: run.started)
        if not run.quick
        for suite in run.suites
    ]
    last = {run.suites[0].suite: run.started for run in full}
    return [run for run in full if last[run.suites[0].suite] == run.started]
