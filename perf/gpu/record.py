"""一次验收的目录 → 历史的一行：各点的用时对目标、审计的估计在旁边、哪些没有核对过。"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from deepseek_export.kernels.audit import CARDS, audit, estimate
from perf.gpu import lines, points

TITLE = "NVIDIA 卡上插件的 kernel"
#: 离得更近的那个上限 → 显示名与要达到它的几成。
TARGETS = {"memory": ("带宽", 0.8), "compute": ("算力", 0.6)}
_CEILINGS = {"copy": ("memory", "copy.gb_s", 1e9), "matmul": ("compute", "matmul.tflop_s", 1e12)}


def load(folder: Path) -> dict[str, Any]:
    """``perf.results.Run`` 的字段。

    Raises:
        FileNotFoundError: 不是 ``python -m perf.gpu.accept`` 写的目录，或里面没有卡的一行。
        ValueError: 混着几张卡的结果。
        DsxError: ``DSX-E902``，没有装 triton，算不出审计的估计。
    """
    rows = lines.read(folder)
    cards = sorted({row["on"] for row in rows if "on" in row})
    if len(cards) > 1:
        raise ValueError(f"{folder} 里混着几张卡的结果：{'、'.join(cards)}；一张卡一个目录")
    start = next((row for row in rows if row["phase"] == "start"), None)
    card = next((row for row in rows if row.get("item") == "card" and row["status"] == "ok"), None)
    if start is None or card is None:
        raise FileNotFoundError(f"{folder} 里没有卡的一行：environment 一步没有做成")
    return {
        "started": start["started"],
        "quick": False,
        "environment": start["environment"],
        "suites": [_suite(rows, card)],
        "skipped": [],
    }


def _suite(rows: list[dict[str, Any]], card: dict[str, Any]) -> dict[str, Any]:
    ceilings = {row["ceiling"]: row for row in rows if "ceiling" in row and row["status"] == "ok"}
    limits = {
        kind: ceilings[name]["amount"] / median(ceilings[name]["seconds"])
        for name, (kind, _, __) in _CEILINGS.items()
        if name in ceilings
    }
    values = {
        label: spread([limits[kind] / unit]) for kind, label, unit in _CEILINGS.values() if kind in limits
    }
    if "launch" in ceilings:
        values["launch.seconds"] = spread(ceilings["launch"]["seconds"])
    # 补做过的以最后一次为准。
    checks = {(row["check"], row["item"]): row for row in rows if "check" in row}
    timed = {(row["time"], row["item"]): row for row in rows if "time" in row}
    facts = {name: card[name] for name in ("sm", "multiprocessors", "memory_bytes", "versions")}
    facts["phases"] = {
        row["phase"]: " ".join(filter(None, (row["status"], row["detail"])))
        for row in rows
        if "item" not in row and row["phase"] != "start"
    }
    facts["checks"] = sum(row["status"] == "ok" for row in checks.values())
    facts["failed_checks"] = [
        f"{row['item']}（{program}）：{failure(row)}"
        for (program, _), row in checks.items()
        if row["status"] == "failed"
    ]
    everything = [*checks.values(), *timed.values()]
    facts["skipped"] = [f"{row['item']}：{row['detail']}" for row in everything if row["status"] == "skipped"]
    facts["not_timed"] = [
        f"{row['item']}：{row['detail']}" for row in timed.values() if row["status"] == "failed"
    ]
    cases = [{"name": "上限", "values": values, "facts": facts}]
    for row in timed.values():
        if row["status"] == "ok":
            cases.append(_case(row, limits, card, _unverified(row["time"], list(checks.values()))))
    engine = next((row for row in reversed(rows) if row.get("item") == "engine"), None)
    if engine is not None:
        cases.append({"name": "引擎", "values": {}, "facts": engine})
    scenario = {"card": card["card"], "points": [case["name"] for case in cases[1:]]}
    return {"suite": "gpu", "title": TITLE, "scenario": scenario, "cases": cases}


def _unverified(program: str, checks: list[dict[str, Any]]) -> str | None:
    """这个程序的计时为什么不算数；核对过而都通过的是 ``None``。"""
    mine = [row for row in checks if row["check"] == program]
    failed = [row for row in mine if row["status"] == "failed"]
    if failed:
        return f"核对不过：{failed[0]['item']}"
    return None if any(row["status"] == "ok" for row in mine) else "没有核对过"


def _case(
    row: dict[str, Any], limits: dict[str, float], card: dict[str, Any], unverified: str | None
) -> dict[str, Any]:
    """一个计时的点；限制在哪一边由两个上限下的理论时间决定，比值是用时对那一边的目标时间。

    没有核对过的带记号，没有比值，所以不算进门槛。
    """
    seconds = row["seconds"]
    case: dict[str, Any] = {"name": row["item"], "values": {"dsx.seconds": spread(seconds)}, "ratios": {}}
    case["facts"] = facts = {"seed": row["seed"]}
    amounts = {"memory": row["traffic"], "compute": row["flops"]}
    least = {kind: amounts[kind] / limits[kind] for kind in limits}
    if len(least) == len(TARGETS):
        bound = max(least, key=least.__getitem__)
        label, target = TARGETS[bound]
        facts |= {"bound": label, "share": least[bound] / median(seconds)}
        facts["estimated_share"] = estimated_share(points.from_row(row["point"]), card, bound)
        if unverified is None:
            case["ratios"]["用时/目标"] = spread([sample * target / least[bound] for sample in seconds])
    if unverified is not None:
        facts["unverified"] = unverified
    if "torch_seconds" in row:
        case["values"]["torch.seconds"] = spread(row["torch_seconds"])
        if unverified is None:
            baseline = median(row["torch_seconds"])
            case["ratios"]["dsx/torch"] = spread([sample / baseline for sample in seconds])
    return case


def estimated_share(point: points.Point, card: dict[str, Any], bound: str) -> float | None:
    """审计估计至多占上限的几成：由这个点用到的、有主循环的头一个 kernel 的指令数得出；没有这种卡的规格为 ``None``。

    Raises:
        DsxError: ``DSX-E902``，没有装 triton。
    """
    if card["sm"] not in CARDS:
        return None
    for launch in point.table(card["sm"]).bind(point.shapes(), card["multiprocessors"]):
        found = audit(launch.kernel, card["sm"])
        if found is not None:
            guess = estimate(found)
            return guess.of_copy if bound == "memory" else guess.of_matmul
    return None


def failure(row: dict[str, Any]) -> str:
    """一项不过的核对，一句话。"""
    if "max_abs" not in row:
        return str(row["detail"])
    return (
        f"最大差 {row['max_abs']:.3g} 在 {row['coordinate']}，calc_diff {row['calc_diff']:.2e}，"
        f"可重复 {row['repeatable']}，哨兵完好 {row['guard_intact']}"
    )


def spread(samples: list[float]) -> dict[str, Any]:
    """``deepseek_export.benchmark.spread.Spread`` 的字段；它要 pydantic。"""
    return {"median": median(samples), "low": min(samples), "high": max(samples), "samples": list(samples)}
