"""网站的钩子（``mkdocs.yml`` 的 ``hooks``）：整理正文，建完之后核对没有一处要从外面的主机取东西。"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

#: docstring 里 Sphinx 的角色：只留名字，``~`` 开头的只留最后一段。
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc|const):<code>(~?)([\w.]+)</code>")
#: 两个汉字（或中文标点）之间的换行；浏览器会显示成空格。
_BREAK = re.compile(
    r"(?<=[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef“”])\n(?=[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef“”])"
)
#: 打开页面就会去取的；``a`` 的 ``href`` 要点了才去。
_FETCHED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "srcset",
    "form": "action",
}
_OUTSIDE = re.compile(r"^\s*(?:https?:)?//")


def on_page_content(html: str, **_: Any) -> str:
    """角色换成代码，汉字之间不留空格；代码块不动。"""
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
    return "".join(part if part.startswith("<pre") else _tidy(part) for part in parts)


def on_post_build(config: Any, **_: Any) -> None:
    """核对建好的网站。

    Raises:
        PluginError: 有一页或一个样式表要从外面的主机取东西。
    """
    if found := outside(Path(config["site_dir"])):
        raise PluginError("网站要从外面取东西：\n" + "\n".join(found))


def outside(site: Path) -> list[str]:
    """``site`` 里打开页面就要从外面的主机取的东西，``文件：地址`` 各一行。"""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            reader = _Fetched()
            reader.feed(path.read_text(encoding="utf-8"))
            addresses = reader.addresses
        elif path.suffix in (".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            addresses = re.findall(r"(?:url\(|@import )\s*['\"]?([^'\")\s]+)", text)
            addresses += re.findall(r"<(?:image|use)[^>]*href=\"([^\"]+)", text)
        else:
            continue
        found += [f"{path.relative_to(site)}：{address}" for address in addresses if _OUTSIDE.match(address)]
    return found


class _Fetched(HTMLParser):
    """一页里打开就会去取的地址；mermaid 的图由主题的脚本从外面取程序来画，也算。"""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if address := values.get(_FETCHED.get(tag, "")):
            self.addresses.append(address)
        if "mermaid" in (values.get("class") or "").split():
            self.addresses.append("//mermaid")


def _tidy(html: str) -> str:
    html = _ROLE.sub(lambda m: f"<code>{m[2].rpartition('.')[2] if m[1] else m[2]}</code>", html)
    return _BREAK.sub("", html)
