"""``dsx doctor --kernels``：每个 kernel 在每种 SM 上的机器码。"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deepseek_export.cli.console import console, table
from deepseek_export.cli.progress import CliProgress
from deepseek_export.kernels.audit import CARDS, audits, estimate
from deepseek_export.kernels.table import SMS


def audit_kernels(progress: CliProgress) -> list[dict[str, Any]]:
    """一行一个 kernel：审计的各项，``estimate`` 是估计，``card`` 是估计用的卡。

    Raises:
        DsxError: ``DSX-E902``，没有 Triton。
    """
    progress.start("编译 kernel，读机器码", len(SMS))
    rows = []
    for sm in SMS:
        for found in audits([sm]):
            rows.append(asdict(found) | {"estimate": asdict(estimate(found)), "card": CARDS[sm].title})
        progress.advance(detail=f"sm{sm}")
    return rows


def print_kernels(rows: list[dict[str, Any]]) -> None:
    """一张表。"""
    out = console()
    out.print()
    made = table(
        "插件的 kernel（一次迭代；后两列是估计，没有在 GPU 上量过）",
        "SM",
        "kernel",
        "块",
        "乘加",
        "重叠",
        "溢出",
        "指令",
        "≤ 算力",
        "≤ 带宽",
        optional=("指令",),
    )
    for row in rows:
        guess = row["estimate"]
        made.add_row(
            f"sm{row['sm']}",
            row["function"],
            row["tile"],
            "?" if row["work"] is None else f"{row['work']:.2f}",
            str(row["in_flight"]) if row["in_flight"] else "无",
            str(row["spills"]),
            f"{row['instructions']:.0f}",
            f"{guess['of_matmul']:.0%}",
            f"{guess['of_copy']:.0%}",
        )
    out.print(made)
    out.print("乘加：实际的除以该有的，1 为恰好。重叠：算的时候还有几组拷贝在路上。")
