"""perf/gpu/run.py 的报告：JSON → Markdown。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BOUNDS = {"memory": "带宽", "compute": "算力"}


def markdown(report: dict[str, Any]) -> str:
    """环境、核对、上限、两张计时表。"""
    environment = report["environment"]
    checks = report["correctness"]
    failed = [row for row in checks if not row["ok"]]
    lines = [
        f"# {environment['card']}，{environment['date']}",
        "",
        "、".join(f"{name} {value}" for name, value in environment.items() if name not in ("card", "date")),
        "",
        f"命令：`python perf/gpu/run.py`，用时 {report['seconds']} 秒。",
        "",
        "## 核对",
        "",
        f"{len(checks) - len(failed)} / {len(checks)} 通过。随机输入，输出与 workspace 预先填满 NaN，"
        "直接启动与 CUDA graph 重放逐位相同。",
        "",
    ]
    lines += [
        f"- 不过：{row['case']}（{row['dtype']}）最大差 {row['max_abs']:.3g} 在 {row['coordinate']}，"
        f"calc_diff {row['calc_diff']:.2e}，可重复 {row['repeatable']}，哨兵完好 {row['guard_intact']}"
        for row in failed
    ]
    if "ceilings" not in report:
        return "\n".join([*lines, "", "核对不过，没有计时。"]) + "\n"
    ceilings, engine = report["ceilings"], report["engine"]
    lines += [
        "## 计时（bfloat16，中位数）",
        "",
        f"同一张卡当场测得的上限：拷贝 {ceilings['copy_gb_s']:.0f} GB/s，"
        f"方阵乘法 {ceilings['matmul_tflop_s']:.0f} TFLOP/s。",
        "占比是相对离得更近的那个上限；目标：带宽 80 %，算力 60 %。",
        "",
        "### LatentAttention",
        "",
        *_table(
            ("H", "B", "S", "T", "微秒", "GB/s", "TFLOP/s", "受限于", "占比", "达标"),
            [(row["H"], row["B"], row["S"], row["T"], *_rates(row)) for row in report["attention"]],
        ),
        "",
        "### MoeExperts",
        "",
        "torch 一列是排序好之后逐专家三次 matmul，每个专家的 token 数事先取到主机。",
        "",
        *_table(
            ("形状", "N", "专家", "微秒", "GB/s", "TFLOP/s", "受限于", "占比", "达标", "torch 微秒", "倍数"),
            [
                (row["shape"], row["N"], row.get("active_experts", "-"), *_rates(row), *_baseline(row))
                for row in report["experts"]
            ],
        ),
        "",
        "### 引擎",
        "",
        engine["skipped"] if "skipped" in engine else _engine(engine),
    ]
    return "\n".join(lines) + "\n"


def _engine(engine: dict[str, Any]) -> str:
    if "error" in engine:
        return f"没有跑成：{engine['error']}"
    verified = "逐层校验通过" if engine["verified"] else f"校验不过：{engine['first_failure']}"
    return (
        f"{engine['flavour']} {engine['version']}，{engine['bundle']}：{verified}，"
        f"batch 1 解码 {engine['decode_tokens_s']} token/s"
    )


def _rates(row: dict[str, Any]) -> tuple[str, ...]:
    if row.get("skipped"):
        return ("未测", "-", "-", "-", "-", "-")
    return (
        f"{row['time_us']['median']:.1f}",
        f"{row['gb_s']:.0f}",
        f"{row['tflop_s']:.1f}",
        _BOUNDS[row["bound"]],
        f"{row['share']:.0%}",
        "是" if row["share"] >= row["target"] else "否",
    )


def _baseline(row: dict[str, Any]) -> tuple[str, str]:
    if row.get("skipped"):
        return ("-", "-")
    return (f"{row['torch']['median']:.1f}", f"{row['speedup']:.2f}")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]
