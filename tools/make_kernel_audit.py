"""重新生成 docs/gpu.md 里的机器码一节：``dsx doctor --kernels`` 的表。列着的 kernel 与块由测试核对，数字随 Triton 的版本变。"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from deepseek_export.kernels.audit import CARDS, audits, balance, estimate
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.table import SMS

PAGE = Path(__file__).resolve().parent.parent / "docs/gpu.md"
BEGIN, END = "<!-- 机器码：由 tools/make_kernel_audit.py 生成 -->", "<!-- 机器码：完 -->"

_HEAD = """\
每一行是一个 kernel 主循环的一次迭代，读自编译好的机器码（`dsx doctor --kernels`），不需要 GPU。乘加是张量核实际做的除以该做的，1 是恰好；
重叠是算的时候还有几组拷贝在路上；溢出是读写本地内存的指令。

后两列是**估计**：由指令数与那张卡的规格得出，没有在 GPU 上量过。算力一列假定数据都已在片上，带宽一列假定数据都从显存来；`python -m perf.gpu.accept` 在卡上跑过一次，
才知道它们对不对。
"""
_BALANCE = """\
注意力的活由各个程序均分，至多差一块行看一块 key。下面是 B 从 1 到 256 里最差的一个，缓存 8192：从开始到最后一个程序结束，各 SM 空着的时间占几成。B 小的时候活不够分，
差一格就显得多。由启动表的算式得出，没有在 GPU 上量过。
"""


def section() -> str:
    """两个标记之间的全文。"""
    lines = [
        "| SM（卡） | kernel | 块 | 乘加 | 重叠 | 溢出 | 至多占算力 | 至多占带宽 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in audits(SMS):
        guess = estimate(found)
        cells = (
            f"sm{found.sm}（{CARDS[found.sm].title}）",
            f"`{found.function}`",
            found.tile,
            "数不出" if found.work is None else f"{found.work:.2f}",
            str(found.in_flight or "无"),
            str(found.spills),
            f"{guess.of_matmul:.0%}",
            f"{guess.of_copy:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [_HEAD, *_wide(lines), "", f"Triton {version('triton')}。", "", _BALANCE, *_wide(_idle())]
    )


def _wide(table: Iterable[str]) -> Iterator[str]:
    """一张表，格子里不折行，宽了横着滚（docs/assets/site.css）。"""
    yield from ('<div class="numbers" markdown>', "", *table, "", "</div>")


def _idle() -> Iterator[str]:
    """B 从 1 到 256，各 SM 空着的时间最多占几成。"""
    yield "| 卡 | SM 个数 | H=16，等长 | H=16，长短不齐 | H=128，等长 | H=128，长短不齐 |"
    yield "|---|---|---|---|---|---|"
    for sm, card in CARDS.items():
        cells = []
        for heads in (16, 128):
            table = latent_attention_launch(sm, heads, 512, 64, 0.1147, "bfloat16")
            for ragged in (False, True):
                worst = max(
                    balance(table, ragged_lens(batch) if ragged else [8191] * batch, 8192, card.sms).idle
                    for batch in range(1, 257)
                )
                cells.append(f"{worst:.0%}")
        yield f"| {card.title} | {card.sms} | {' | '.join(cells)} |"


def ragged_lens(batch: int) -> list[int]:
    """``batch`` 个长短不齐、总是一样的长度，0 到 8191。"""
    return [(row * 2654435761 + 4096) % 8192 for row in range(batch)]


def main() -> None:
    """改写那一节，别的不动。"""
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{section()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
