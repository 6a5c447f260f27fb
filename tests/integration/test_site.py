"""网站建得起来，不从外面取东西，中文搜得到。"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs_site import on_page_content, outside

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_strictly(tmp_path: Path):
    """``make docs`` 的命令：没有断了的链接与锚点，每一页都在导航里，docstring 的参考生成了，搜索按中文的词切。"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "把检查点编译成 bundle" in (tmp_path / "api.html").read_text(encoding="utf-8")
    index = json.loads((tmp_path / "search/search_index.json").read_text(encoding="utf-8"))
    assert index["config"]["lang"] == ["zh", "en"]
    assert any("投机\u200b解码" in page["text"] + page["title"] for page in index["docs"])


def test_things_from_outside_are_found(tmp_path: Path):
    """外面的脚本、样式、图、字体与 mermaid 都认得出，点了才去的链接不算。"""
    (tmp_path / "a.html").write_text(
        '<a href="https://example.org">x</a><script src="//cdn.example.org/a.js"></script><img src="b.png">'
        '<link rel="stylesheet" href="https://fonts.example.org/c.css"><pre class="mermaid">x</pre>',
        encoding="utf-8",
    )
    (tmp_path / "d.css").write_text("a { background: url('https://example.org/e.png') }", encoding="utf-8")
    assert outside(tmp_path) == [
        "a.html：//cdn.example.org/a.js",
        "a.html：https://fonts.example.org/c.css",
        "a.html：//mermaid",
        "d.css：https://example.org/e.png",
    ]


def test_prose_is_tidied_and_code_is_not():
    """汉字之间的换行不变成空格，Sphinx 的角色只留名字；代码块原样。"""
    html = "<p>汉字\n汉字 :class:<code>~a.B</code> end\nword</p><pre>汉字\n汉字</pre>"
    assert on_page_content(html) == "<p>汉字汉字 <code>B</code> end\nword</p><pre>汉字\n汉字</pre>"
