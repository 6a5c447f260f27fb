"""画 ``docs/architecture.svg``：包里的每个房间一行，上面的只导入下面的。

    python -m tools.draw_rooms

层取自 ``pyproject.toml`` 里 import-linter 的约定，一句话的说明取自各房间自己的模块说明，所以图不会与代码走样；测试核对它是最新的。
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/architecture.svg"

#: 房间按数据流经的次序分成几组，各用一种颜色（:data:`_STYLE` 里的类，亮暗各一套）；次序同层，自上而下。
GROUPS = {
    "out": (
        "给人用的",
        (
            "cli",
            "inspection",
            "report",
            "benchmark",
            "replicas",
            "api",
            "model",
            "cluster",
            "serving",
            "integration",
        ),
    ),
    "run": ("证明与运行", ("parity", "runtime", "formats", "backend")),
    "mid": ("编译", ("engine", "kernels", "bundle", "passes", "capture", "calibration", "reference", "ops")),
    "in": ("读检查点、定方案", ("plan", "checkpoint", "profile")),
    "any": ("谁都用得着的小件", ()),
}
_STYLE = """\
<style>
  .page { fill: #ffffff } .name { fill: #1f2328; font-size: 15px; font-weight: 600 } .words { fill: #3d444d; font-size: 14px }
  .group { fill: #59636e; font-size: 13px } .out { fill: #dbe7f5 } .run { fill: #dff0e0 } .mid { fill: #f7ead8 }
  .in { fill: #eee7f4 } .any { fill: #ececec }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .name { fill: #e6edf3 } .words { fill: #c9d1d9 } .group { fill: #b1bac4 } .out { fill: #16283f }
    .run { fill: #14301b } .mid { fill: #3a2c17 } .in { fill: #2d2439 } .any { fill: #21262d }
  }
</style>"""
_WIDTH, _ROW, _LEFT, _NAME, _TOP = 1080, 34, 28, 128, 20


class Room(NamedTuple):
    """一个房间：名字、一句话的说明、属于哪一组。"""

    name: str
    purpose: str
    color: str


def rooms() -> list[Room]:
    """全部房间，高的在前。"""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(c["layers"] for c in linter["contracts"] if c.get("containers") == ["deepseek_export"])
    colors = {name: color for color, (_, names) in GROUPS.items() for name in names}
    return [Room(name, _purpose(name), colors.get(name, list(GROUPS)[-1])) for name in layers]


def draw(found: list[Room]) -> str:
    """SVG 全文；字体用系统自带的，颜色随看的人的主题，尺寸固定，同样的输入得到同样的字节。"""
    height = _TOP * 2 + _ROW * len(found)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-label="deepseek_export 的房间，上面的只导入下面的" '
        "font-family=\"system-ui, 'Noto Sans CJK SC', sans-serif\">",
        _STYLE,
        f'<rect width="{_WIDTH}" height="{height}" class="page"/>',
    ]
    for index, room in enumerate(found):
        y = _TOP + index * _ROW
        lines += [
            f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - 2 * _LEFT}" height="{_ROW - 4}" rx="4" class="{room.color}"/>',
            f'<text x="{_LEFT + 12}" y="{y + 20}" class="name">{room.name}</text>',
            f'<text x="{_LEFT + _NAME}" y="{y + 20}" class="words">{escape(room.purpose)}</text>',
        ]
    for color, (title, _) in GROUPS.items():
        rows = [index for index, room in enumerate(found) if room.color == color]
        y = _TOP + rows[0] * _ROW + 20
        lines.append(
            f'<text x="{_WIDTH - _LEFT - 12}" y="{y}" class="group" text-anchor="end">{title}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _purpose(name: str) -> str:
    """模块说明的第一句，去掉标记。"""
    folder = ROOT / "deepseek_export" / name
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
    plain = re.sub(r":mod:`~?([^`]*)`", r"\1", first).replace("``", "")
    return re.split(r"。|；", plain)[0]


if __name__ == "__main__":
    PICTURE.write_text(draw(rooms()), encoding="utf-8")
