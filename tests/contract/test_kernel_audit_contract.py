"""specs/kernels 的 KERNEL-9：编译出来的机器码，主循环里没有多余的活。不需要 GPU。"""

from __future__ import annotations

import os

import pytest

from deepseek_export.errors import DsxError
from deepseek_export.kernels import machine_code
from deepseek_export.kernels.audit import CARDS, FORMATS, LoopAudit, audits, balance, estimate
from deepseek_export.kernels.latent_attention_launch import LEAST, latent_attention_launch
from deepseek_export.kernels.machine_code import Instruction, disassemble, main_loop
from deepseek_export.kernels.table import SMS
from tests.integration.cli import dsx, last_json
from tools.make_kernel_audit import PAGE, ragged_lens

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

pytest.importorskip("triton", reason="没有装 kernels（triton）")

#: 做不到的：(函数, 块) → 哪几种 SM 上、哪几条。
#: 32 行的块放进 99 KiB 只能一次 16 个 key：分数只有 2×2 个 16×8 小块，四个 warp 里两个重算 QKᵀ；换来两段在路上。
#: 收集的行各有自己的地址，占寄存器：32 行的块在 sm80 溢出三次；再小的块要多读几遍选中的行。
#: Hopper 64 行的块：累加器占满寄存器，循环里要读回几个地址。
KNOWN = {
    ("latent_attention_partial", "32x16"): {sm: {"work"} for sm in (86, 89, 120, 121)},
    ("sparse_latent_attention_partial", "32x16"): {sm: {"work"} for sm in (86, 89, 120, 121)},
    ("sparse_latent_attention_partial", "32x32"): {80: {"spills"}},
    ("latent_attention_partial", "64x32"): {90: {"spills"}},
}


def problems(found: LoopAudit) -> set[str]:
    """哪几条没有做到；数不出乘加的不算。"""
    broken = {
        "work": found.work is not None and found.work != 1,
        "overlap": found.in_flight == 0,
        "spills": found.spills > 0,
        "narrow": found.narrow > 0,
    }
    return {name for name, bad in broken.items() if bad}


#: 权重是码的：scale 一行只有几个字节，一条拷贝不到 128 位；它们的块、码、``narrow`` 之外做不到的另列。
QUANTIZED = ("quantized_gate_up", "quantized_down", "quantized_linear")
NAMES = ("int8", "int4", "e4m3")
#: 函数 → 各变体的块，哪几种码。
QUANTIZED_TILES = {
    "quantized_gate_up": (("16x64", "64x64"), NAMES),
    "quantized_down": (("16x128", "64x128"), NAMES),
    "quantized_linear": (("16x64", "64x64", "64x128"), ("int8", "e4m3")),
}
QUANTIZED_ROWS = {
    (function, f"{tile} {name}")
    for function, (tiles, names) in QUANTIZED_TILES.items()
    for tile in tiles
    for name in names
}


def int8_cache_tiles(sm: int) -> list[str]:
    """int8 缓存的注意力各变体的块。"""
    table = latent_attention_launch(sm, 128, 512, 64, 0.1147, "bfloat16", "int8")
    found = [dict(one.constants) for one in table.kernels if one.function == "latent_attention_partial"]
    return [f"{one['BLOCK_M']}x{one['BLOCK_N']}" for one in found]


@pytest.fixture(scope="module")
def found() -> dict[int, list[LoopAudit]]:
    return {sm: list(audits([sm], (), ("bfloat16",))) for sm in SMS}


@pytest.mark.parametrize("sm", sorted(SMS))
def test_main_loops_do_nothing_twice(sm: int, found: dict[int, list[LoopAudit]]) -> None:
    """KERNEL-9：每种 SM 上的每个 kernel；列着的做不到，也只做不到那几条。"""
    sparse = {"index_topk_scores", "sparse_latent_attention_partial"}
    assert {one.function for one in found[sm]} == {"latent_attention_partial", "gate_up", "down"} | sparse
    for one in found[sm]:
        want = KNOWN.get((one.function, one.tile), {}).get(sm, set())
        assert problems(one) == want, one
        guess = estimate(one)
        assert 0 < guess.of_matmul <= 1, one
        assert 0 < guess.of_copy <= 1, one


def test_many_heads_fill_the_tensor_slots_of_hopper(found: dict[int, list[LoopAudit]]) -> None:
    """KERNEL-9：H=128 的主循环，Hopper 上张量核算完一块的时间里，指令发得完的不少于八成。"""
    (loop,) = (one for one in found[90] if (one.function, one.tile) == ("latent_attention_partial", "64x32"))
    assert estimate(loop).of_matmul >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("sm", sorted(SMS))
def test_quantized_loops_widen_in_registers(sm: int) -> None:
    """KERNEL-9：权重是码的，乘加恰好，不溢出，等拷贝时下一组在路上；搬的就是码与 scale。sm100 的还没有做到。"""
    found = [one for one in audits([sm]) if one.function in QUANTIZED]
    assert {(one.function, one.tile) for one in found} == QUANTIZED_ROWS
    for one in found:
        assert one.unrolled == 1, one
        if sm != 100:
            assert problems(one) <= {"narrow"}, one


#: int8 缓存的注意力做不到的：块 → 哪几种 SM 上、哪几条。
#: 99 KiB 的卡：同浮点的 32x16，8 个 warp 里一半重算 QKᵀ，换来两段在路上、不溢出。
#: 一次 64 个 key 的：scale 的那一段只有 1 KiB，摊到 256 个线程一条不到 128 位。
#: Hopper、Blackwell：展宽的码与累加器占满寄存器，循环里要读回几个。
KNOWN_INT8: dict[str, dict[int, set[str]]] = {
    "16x32": {sm: {"work"} for sm in (86, 89, 120, 121)},
    "32x32": {sm: {"work"} for sm in (86, 89, 120, 121)},
    "16x64": {80: {"narrow"}, 90: {"narrow", "spills"}, 100: {"narrow", "spills"}},
    "32x64": {80: {"narrow"}},
    "64x32": {90: {"spills"}, 100: {"spills"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("sm", sorted(SMS))
def test_int8_cache_is_widened_in_registers(sm: int) -> None:
    """KERNEL-13：int8 缓存的注意力：搬的恰好是这几行的字节，都是 128 位；乘加恰好，不溢出，等拷贝时下一组在路上。列着的做不到。"""
    found = [one for one in audits([sm], (), ("int8",)) if one.tile.endswith(" int8")]
    assert [one.tile.removesuffix(" int8") for one in found] == int8_cache_tiles(sm)
    for one in found:
        want = KNOWN_INT8.get(one.tile.removesuffix(" int8"), {}).get(sm, set())
        assert problems(one) == want, one
        assert one.copied == int(one.tile.split()[0].split("x")[1]) * 656
        assert one.unrolled == 1, one


def test_the_known_list_names_tiles_that_exist(found: dict[int, list[LoopAudit]]) -> None:
    tiles = {(one.function, one.tile, one.sm) for some in found.values() for one in some}
    assert {(*key, sm) for key, sms in KNOWN.items() for sm in sms} <= tiles
    assert set(CARDS) == set(SMS)


def test_an_estimate_adds_what_does_not_overlap() -> None:
    """不重叠的，搬运与计算相加；重复的乘加算进张量核的周期。"""
    loop = LoopAudit("f", "16x32", 90, 128, 0, 2.0, 1, 1, 0, 0, 40.0, 2048 * 100, 1000)
    card = CARDS[90]
    memory = 1000 / (card.bandwidth / card.sms / card.clock)
    overlapping = estimate(loop)
    assert (overlapping.tensor, overlapping.issue) == (200.0, 40.0)
    assert overlapping.of_matmul == 0.5
    assert overlapping.of_copy == pytest.approx(memory / max(200.0, memory))
    alone = estimate(LoopAudit("f", "16x32", 90, 128, 0, 2.0, 1, 0, 0, 0, 40.0, 2048 * 100, 1000))
    assert alone.of_copy == pytest.approx(memory / (memory + 200.0))


def test_the_loop_is_the_innermost_one_with_the_tensor_cores() -> None:
    code: list[tuple[str | None, Instruction]] = [
        (".L_x_0", Instruction("MOV", "")),
        (".L_x_1", Instruction("HMMA.16816.F32.BF16", " R0")),
        (None, Instruction("LDGSTS.E.BYPASS.128", " [R1]")),
        (None, Instruction("LDGSTS.E.64", " [R1]")),
        (None, Instruction("DEPBAR.LE", " SB0, 0x2 ;")),
        (None, Instruction("STL.64", " [R1], R2")),
        (None, Instruction("BRA", " `(.L_x_1) ;")),
        (None, Instruction("BRA", " `(.L_x_0) ;")),
        (".L_x_2", Instruction("BRA", " `(.L_x_2);")),
    ]
    body = main_loop(code)
    assert body[0].name == "HMMA.16816.F32.BF16"
    assert len(body) == 6
    assert [one.fmas for one in body][:2] == [2048, 0]
    assert [one.copied for one in body] == [0, 16, 8, 0, 0, 0]
    assert [one.in_flight for one in body if one.in_flight is not None] == [2]
    assert [one.spills for one in body].count(True) == 1
    assert Instruction("HGMMA.64x256x16.F32.BF16", "").fmas == 64 * 256 * 16 // 4
    assert main_loop(code[:1]) == [code[0][1]]
    # 流水线的头也有张量核指令：外层的总数更多，一次迭代却在里层。
    peeled = [code[0], (None, Instruction("HMMA.16816.F32.BF16", " R0")), *code[1:]]
    assert main_loop(peeled) == body


#: 卖过的卡各有几个 SM，同一种 SM 的不止一种。
CARD_SMS = {
    80: (108,),
    86: (84, 82, 68),
    89: (142, 128, 76),
    90: (132, 114, 78),
    100: (148,),
    120: (188, 170),
    121: (48,),
}


@pytest.mark.parametrize("sm", sorted(SMS))
@pytest.mark.parametrize("heads", [16, 128])
def test_no_processor_idles(sm: int, heads: int) -> None:
    """KERNEL-11：B 从 1 到 256，等长的与长短悬殊的：活最多的程序比平均至多多一格；平均每个 SM 有 16 个 key 可看，空着的就不到一成。"""
    table = latent_attention_launch(sm, heads, 512, 64, 0.1147, "bfloat16")
    for sms in CARD_SMS[sm]:
        for batch in range(1, 257):
            for lens in (
                [8191] * batch,
                ragged_lens(batch),
                [32767, *[63] * (batch - 1)],
            ):
                found = balance(table, lens, 32768, sms)
                cells = (1 - found.idle) * sms * found.most
                assert found.most - 1 < cells / found.programs + 1e-6
                if cells * found.unit / sms >= LEAST:
                    assert found.idle < 0.1, (sms, batch)


def test_machine_code_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DsxError, match="DSX-E902"):
        disassemble(b"not a cubin")
    monkeypatch.setattr(machine_code, "_nvdisasm", lambda: "/bin/false")
    with pytest.raises(DsxError, match="nvdisasm"):
        disassemble(b"")


def test_doctor_lists_every_kernel(
    found: dict[int, list[LoopAudit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KERNEL-9：``dsx doctor --kernels`` 的表与 JSON，说明哪些是估计。"""
    monkeypatch.setattr("deepseek_export.cli.kernel_audit.audits", lambda sms: found[sms[0]])
    shown = dsx("doctor", "--kernels", env={**os.environ, "COLUMNS": "120"}).stdout
    assert "没有在 GPU 上量过" in shown
    assert "latent_attention_partial" in shown
    rows = last_json(dsx("doctor", "--kernels", "--json"))["kernels"]
    assert [(row["sm"], row["function"], row["tile"]) for row in rows] == [
        (one.sm, one.function, one.tile) for some in found.values() for one in some
    ]
    assert all(row["card"] == CARDS[row["sm"]].title for row in rows)


def test_the_page_lists_what_is_compiled(found: dict[int, list[LoopAudit]]) -> None:
    """docs/gpu.md 的那张表列着每一个，权重是码的在每种 SM 的末尾；数字随 Triton 的版本变，不核对。"""
    page = PAGE.read_text(encoding="utf-8")
    listed = [line.split(" | ") for line in page.splitlines() if line.startswith("| sm")]
    coded = [row for row in listed if row[1] == "`latent_attention_partial`" and row[2].endswith(" int8")]
    assert [row[2].removesuffix(" int8") for row in coded] == [
        tile for sm in SMS for tile in int8_cache_tiles(sm)
    ]
    listed = [row for row in listed if row not in coded]
    rows = [row for row in listed if row[1].strip("`") not in QUANTIZED]
    assert len(NAMES) == len(FORMATS)
    assert len(listed) - len(rows) == len(QUANTIZED_ROWS) * len(SMS)
    assert [(row[0].split("（")[0][2:], row[1], row[2]) for row in rows] == [
        (f"sm{one.sm}", f"`{one.function}`", one.tile) for some in found.values() for one in some
    ]
