"""重新生成 docs/gpu.md 里的机器码一节：``dsx doctor --kernels`` 的表。列着的 kernel 与块由测试核对，数字随 Triton 的版本变。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from deepseek_export.kernels.audit import CARDS, LoopAudit, audit, audits, balance, estimate
from deepseek_export.kernels.compile import compile_kernel
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.machine_code import Instruction, disassemble, main_loop
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
注意力的活由各个程序均分：平均一个程序有 16 块 key 的，至多差一块；更少的，至多差一个 key。下面是 B 从 1 到 256 里最差的一个，缓存 8192：从开始到最后一个程序结束，各 SM 空着的时间
占几成。算的是看几个 key；一段不是整块的，末尾那次迭代少搬几行，却照样是一次迭代。由启动表的算式得出，没有在 GPU 上量过。
"""


_SLOTS = """\
H=128 的主循环：sm90 的 {tile} 一次迭代一个 warp 发 {total} 条指令，张量核算完这一块的时间里一个 warp 分得到 {tensor:.0f} 条，是 {share:.0%}，目标八成。各做什么在下表：每条 `HGMMA`
要把两个操作数的描述符搬进统一寄存器，累加器每次迭代乘一遍新旧最大值之差。B200 的张量核快一倍，要发的指令没有少一半（{other_total:.0f} 条对 {other:.0f} 条），所以只有 {other_share:.0%}；
一次 64 个 key 能摊薄它们，可两段放不进共享内存，算的时候就没有拷贝在路上。
"""
ATTENTION = "latent_attention_partial"
#: 指令做什么 → 助记符。
_KINDS = {
    "张量核（`HGMMA`）": {"HGMMA"},
    "操作数的描述符": {"R2UR", "UMOV", "UIADD3"},
    "浮点：缩放累加器、softmax、舍入": {"FMUL", "FFMA", "FADD", "FMNMX", "FSEL", "FSETP", "MUFU", "F2FP"},
    "地址、下标、条件": {
        "IMAD",
        "VIADD",
        "IADD3",
        "LEA",
        "ISETP",
        "SEL",
        "LOP3",
        "SHF",
        "PLOP3",
        "VIADDMNMX",
        "MOV",
        "UISETP",
    },
    "共享内存与跨线程的归约": {"LDS", "STS", "SHFL", "STSM", "LDSM"},
    "异步拷贝": {"LDGSTS", "LDGDEPBAR", "DEPBAR"},
    "读写本地内存": {"LDL", "STL"},
}
_REST = "同步、跳转与其余"


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
    slots, idle = ["", _slots_note(), *_wide(_slots())], ["", _BALANCE, *_wide(_idle())]
    return "\n".join([_HEAD, *_wide(lines), "", f"Triton {version('triton')}。", *slots, *idle])


def _wide(table: Iterable[str]) -> Iterator[str]:
    """一张表，格子里不折行，宽了横着滚（docs/assets/site.css）。"""
    yield from ('<div class="numbers" markdown>', "", *table, "", "</div>")


def _many_heads(sm: int) -> tuple[LoopAudit, list[Instruction], float]:
    """H=128 的主循环，与张量核算完一块的时间里一个 warp 分得到几条指令。"""
    table = latent_attention_launch(sm, 128, 512, 64, 0.1147, "bfloat16")
    spec = next(one for one in table.variants[-1].launches if one.kernel.function == ATTENTION).kernel
    found = audit(spec, sm)
    assert found is not None
    body = main_loop(disassemble(compile_kernel(spec, sm).cubin))
    return found, body, estimate(found).tensor * 4 / (found.threads // 32)


def _slots_note() -> str:
    (found, body, tensor), (other, _, fewer) = (_many_heads(sm) for sm in (90, 100))
    return _SLOTS.format(
        tile=found.tile,
        total=len(body),
        tensor=tensor,
        share=estimate(found).of_matmul,
        other_total=other.instructions,
        other=fewer,
        other_share=estimate(other).of_matmul,
    )


def _slots() -> Iterator[str]:
    """一次迭代的指令各做什么。"""
    _, body, _ = _many_heads(90)
    kinds = (next((kind for kind, names in _KINDS.items() if _mnemonic(one) in names), _REST) for one in body)
    counts = Counter(kinds)
    yield "| 做什么 | 几条 |"
    yield "|---|---|"
    for kind in (*_KINDS, _REST):
        yield f"| {kind} | {counts[kind]} |"


def _mnemonic(one: Instruction) -> str:
    return one.name.partition(".")[0]


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
