"""``verify`` 与 ``compare`` 的话，终端与网页共用：一组比较的汇总，一处不通过的详情，量化的损失。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_export.parity.report import Case, QuantLoss

#: 三个量与近平局的列名，与 :func:`cells` 一一对应。
COLUMNS = ("最大绝对差", "calc_diff", "|范数比 - 1|", "近平局")


def worst(cases: Sequence[Case]) -> dict[str, Any]:
    """一组比较的汇总；三个量各取最差的。"""
    measures = [case.measure for case in cases if case.measure is not None]
    return {
        "cases": len(cases),
        "failed": sum(not case.passed for case in cases),
        "near_ties": sum(case.near_ties for case in cases),
        "max_abs": max((m.max_abs for m in measures), default=None),
        "calc_diff": max((m.calc_diff for m in measures), default=None),
        "norm_ratio": max((m.norm_ratio for m in measures), key=lambda ratio: abs(ratio - 1), default=None),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """:func:`worst` 的结果在表里的样子。"""
    drift = None if row["norm_ratio"] is None else abs(row["norm_ratio"] - 1)
    numbers = (row["max_abs"], row["calc_diff"], drift)
    return ["-" if value is None else f"{value:.2e}" for value in numbers] + [str(row["near_ties"])]


def failure_rows(case: Case) -> list[tuple[str, str]]:
    """一处不通过：说明、坐标、那里的两个值、三个量与各自的限。"""
    rows = [("说明", case.note)] if case.note else []
    if case.measure is None or case.tolerance is None:
        return rows
    m, limit = case.measure, case.tolerance
    return [
        *rows,
        (
            "最大绝对差",
            f"{m.max_abs:.3e}（限 {limit.limit(m.scale):.1e}），坐标 {list(m.coordinate)}："
            f"得到 {m.got:.7g}，PyTorch 是 {m.want:.7g}",
        ),
        ("calc_diff", f"{m.calc_diff:.3e}（限 {limit.calc_diff:.1e}）"),
        ("范数比", f"{m.norm_ratio:.6f}（限 1 ± {limit.norm:.1e}）"),
    ]


def loss_rows(loss: QuantLoss) -> list[tuple[str, str]]:
    """只量化权重的代价：格式、logits 的相对误差、困惑度。"""
    rows = [("格式", f"{loss.kind}，每 {loss.block} 个一块")]
    if loss.relative_error_before_a_flip is not None:
        share = f"{loss.before_a_flip} / {loss.tokens} 个 token"
        rows.append(("路由分叉之前", f"{share}，logits 相对误差 {loss.relative_error_before_a_flip:.2e}"))
    rows.append(("全部 token", f"logits 相对误差 {loss.relative_error:.2e}"))
    if (p := loss.perplexity) is not None:
        change = f"{p.bundle / p.unquantized - 1:+.2%}"
        rows.append(
            (
                f"困惑度（{p.text}）",
                f"{p.bundle:.4g}，未量化 {p.unquantized:.4g}（{change}），{p.tokens} 个 token",
            )
        )
    return rows
