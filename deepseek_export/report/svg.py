"""SVG 的零件：标签、文字有多宽、一张图的外壳。颜色都是 ``theme.css`` 里的变量，文字仍是文字。"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

#: 一张图的宽，像素：手机上几乎原大，桌面上并排放得下两张。
WIDTH = 460.0
FONT = 12.0
#: 系列的颜色有几种，``.f0`` …… ``.f6``。
COLOURS = 7
#: 西文一个字符平均多宽（em）：各家无衬线字体取宽的。
_LATIN = 0.58
#: XML 1.0 里不许出现的控制字符。
_FORBIDDEN = {code: "\ufffd" for code in range(32) if code not in (9, 10, 13)}

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Picture:
    """一张图。

    Attributes:
        title: 图名；读屏软件念它。
        description: 一两句话说图里是什么。
        width, height: 像素。
        body: 里面的标签。
    """

    title: str
    description: str
    width: float
    height: float
    body: str

    def __html__(self) -> str:
        """放进网页；样式由网页给。"""
        return self._svg(self.body)

    def standalone(self) -> str:
        """单独成一个文件：自带样式与底色，随看的人的主题变，放进 ``<img>`` 也行。"""
        page = tag("rect", width=self.width, height=self.height, class_="page")
        return self._svg(f"<style>{theme()}</style>{page}{self.body}") + "\n"

    def _svg(self, body: str) -> str:
        names = tag("title", text_of(self.title)) + tag("desc", text_of(self.description))
        return tag(
            "svg",
            names + body,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {_number(self.width)} {_number(self.height)}",
            width=self.width,
            height=self.height,
            class_="chart",
            role="img",
            aria_label=f"{self.title}。{self.description}",
        )


@cache
def theme() -> str:
    """``theme.css``：两种主题的颜色与图里各类标签的样式，网页与单独的图共用。"""
    return Path(__file__).with_name("theme.css").read_text(encoding="utf-8")


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """一个标签；``content`` 已经是标签，``class_`` 写成 ``class``，下划线写成连字符，``None`` 的不写。"""
    shown = {
        key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None
    }
    head = "".join(
        f" {key}={quoteattr(clean(_number(value) if isinstance(value, float) else str(value)))}"
        for key, value in shown.items()
    )
    return f"<{name}{head}>{content}</{name}>" if content else f"<{name}{head}/>"


def text(
    x: float,
    y: float,
    words: str,
    anchor: Anchor = "start",
    class_: str | None = None,
    size: float | None = None,
) -> str:
    """一行文字，``y`` 是基线。"""
    return tag(
        "text",
        text_of(words),
        x=float(x),
        y=float(y),
        text_anchor=None if anchor == "start" else anchor,
        class_=class_,
        font_size=size,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "grid") -> str:
    """一条线段。"""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def rect(
    x: float, y: float, width: float, height: float, class_: str, note: str = "", radius: float = 0.0
) -> str:
    """一个矩形；``note`` 是鼠标停在上面时的话。"""
    inside = tag("title", text_of(note)) if note else ""
    size = {"x": float(x), "y": float(y), "width": max(float(width), 0.0), "height": float(height)}
    return tag("rect", inside, **size, class_=class_, rx=radius or None)


def path(points: Iterable[tuple[float, float]], class_: str, closed: bool = False) -> str:
    """一条折线；``closed`` 时首尾相接。"""
    steps = " ".join(f"{'M' if i == 0 else 'L'}{_number(x)} {_number(y)}" for i, (x, y) in enumerate(points))
    return tag("path", d=steps + ("Z" if closed else ""), class_=class_)


def clean(words: str) -> str:
    """去掉 XML 里不许有的控制字符：路径、张量名可能带着。"""
    return words.encode("utf-8", "replace").decode("utf-8").translate(_FORBIDDEN)


def text_of(words: str) -> str:
    """转义过的文字。"""
    return escape(clean(words))


def text_width(words: str, size: float = FONT) -> float:
    """画出来大约多宽，像素：汉字一个字一 em，西文按 :data:`_LATIN`。"""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in words)
    return size * (wide + _LATIN * (len(words) - wide))


def shortened(words: str, width: float, size: float = FONT) -> str:
    """放不下就省去中间：名字的头尾最有用。"""
    if text_width(words, size) <= width:
        return words
    for kept in range(len(words) - 1, 0, -1):
        head = (kept + 1) // 2
        short = words[:head] + "…" + words[len(words) - (kept - head) :]
        if text_width(short, size) <= width:
            return short
    return "…"


def wrapped(words: str, width: float, size: float = FONT) -> list[str]:
    """按宽度折行；在空格、标点、汉字之后断。"""
    lines, current, piece = [], "", ""
    for char in f"{words} ":
        piece += char
        if char.isascii() and char not in " /,.":
            continue
        if current and text_width(current + piece.rstrip(), size) > width:
            lines.append(current.rstrip())
            current = ""
        current += piece
        piece = ""
    return [*lines, current.rstrip()]


def legend(entries: Sequence[tuple[str, str]], x: float, y: float, width: float) -> tuple[str, float]:
    """图例：一格一个，放不下就换行。

    Args:
        entries: （画好的、以 0,0 为中心的记号，名字）。
        x: 左边。
        y: 第一行的中线。
        width: 能用多宽。

    Returns:
        标签，与占了多高。
    """
    made, left, top = [], x, y
    for mark, name in entries:
        wide = 20 + text_width(name) + 14
        if left > x and left + wide - 14 > x + width:
            left, top = x, top + 18
        made.append(tag("g", mark, transform=f"translate({_number(left + 7)} {_number(top)})"))
        made.append(text(left + 20, top + 4, name))
        left += wide
    return "".join(made), top - y + 18


def dot(x: float, y: float, slot: int, shape: int = 0, class_: str = "", note: str = "") -> str:
    """一个点；``shape`` 0 圆、1 方、2 菱：不靠颜色也分得开。"""
    inside = tag("title", text_of(note)) if note else ""
    name = f"f{slot % COLOURS} {class_}".strip()
    if shape == 0:
        return tag("circle", inside, cx=float(x), cy=float(y), r=4.0, class_=name)
    turned = f"rotate(45 {_number(x)} {_number(y)})" if shape == 2 else None
    return tag("rect", inside, x=x - 3.5, y=y - 3.5, width=7.0, height=7.0, class_=name, transform=turned)


def _number(value: object) -> str:
    """坐标：两位小数，去掉多余的零。"""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
