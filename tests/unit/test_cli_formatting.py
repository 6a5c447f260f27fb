"""帮助的排版、数的写法、--ids 的解析。"""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from deepseek_export.cli.formatting import HelpFormatter, described, wrap
from deepseek_export.cli.generate import parse_ids
from deepseek_export.errors import DsxError
from deepseek_export.units import parse_size, size

pytestmark = pytest.mark.unit

TEXT = "每一级都看三个量：最大绝对差、calc_diff（余弦型差异）、范数比；容差在 dsx 的容差表里，不能在命令行上放宽。"


@pytest.mark.parametrize("width", [20, 33, 60])
def test_wrap_counts_columns_not_characters(width):
    lines = wrap(TEXT, width)
    assert "".join(lines).replace(" ", "") == TEXT.replace(" ", "")
    assert all(cell_len(line) <= width for line in lines)
    assert not any(line[0] in "，。；：、）" for line in lines)


def test_wrap_keeps_a_word_longer_than_the_line():
    assert wrap("看 https://example.invalid/a/long/path 吧", 10) == [
        "看",
        "https://example.invalid/a/long/path",
        "吧",
    ]


def test_docstring_lines_are_joined_the_chinese_way():
    formatter = HelpFormatter()
    formatter.write_text("第一行\n第二行，\nOUT 目录\nof text\n\n\b\n原样：\n  dsx  x")
    assert formatter.getvalue() == "第一行第二行，OUT 目录 of text\n\n原样：\n  dsx  x\n"


def test_definition_list_wraps_inside_its_column():
    formatter = HelpFormatter()
    formatter.width = 40
    formatter.write_dl([("--a", TEXT), ("--" + "long" * 12, "短")])
    lines = formatter.getvalue().splitlines()
    assert all(cell_len(line) <= 50 for line in lines)
    assert "--" + "long" * 12 in lines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1 << 20, "1.00 MiB"),
        (549 << 20, "549 MiB"),
        (1 << 60, "1048576 TiB"),
    ],
)
def test_size(count, text):
    assert size(count) == text


def test_ids():
    assert parse_ids("0, 15,27") == [0, 15, 27]
    assert parse_ids("0" * 5000 + "7") == [7]


@pytest.mark.parametrize("text", ["9" * 19, "9" * 5000])
def test_ids_beyond_64_bits_are_out_of_any_vocabulary(text):
    with pytest.raises(DsxError) as caught:
        parse_ids(f"1,{text}")
    assert caught.value.code == "DSX-E509"
    assert "第 2 项" in caught.value.what
    assert len(caught.value.what) < 100


@pytest.mark.parametrize("text", ["", "1,,2", "1,x", "-1", "1.5", "１,2"])
def test_bad_ids_are_refused_by_position(text):
    with pytest.raises(DsxError) as caught:
        parse_ids(text)
    assert caught.value.code == "DSX-E701"
    assert repr(text) in caught.value.what


def test_what_click_adds_to_an_option_is_chinese():
    assert described("线程数。  [default: 4; 1<=x<=9; required]") == "线程数。  [缺省 4; 1<=x<=9; 必填]"
    assert described("写成 [default: 3] 的不在末尾") == "写成 [default: 3] 的不在末尾"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("1048576", 1 << 20),
        ("2GiB", 2 << 30),
        (" 1.5 gib ", 3 << 29),
        ("500MB", 500_000_000),
        ("0.0000001KB", 0),
        ("7b", 7),
        ("1TiB", 1 << 40),
        *(
            (wrong, None)
            for wrong in ("", "GiB", "2G", "2Gi", "-1", "1e9", "1,000", "2 GiB 1", "٢GiB", "9" * 19)
        ),
    ],
)
def test_sizes_are_read(text: str, count: int | None):
    """二进制与十进制的单位；看不懂的不猜。"""
    assert parse_size(text) == count
