"""试用的那一页：在无头的 Chromium 里，手机与桌面，真的问一句。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.serving.http.keys import KeyRing
from deepseek_export.serving.http.page import PAGE
from tests.browser import CHROMIUM, WHY_NOT, Browser
from tests.serving_http import NAME, Running, loader

pytestmark = pytest.mark.integration
in_browser = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)

ANSWERED = (
    "!document.getElementById('stop').offsetParent && document.querySelectorAll('.assistant').length === {}"
)
SAID = "[...document.querySelectorAll('.said')].map((one) => one.textContent)"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """一个标签页。"""
    with Browser(tmp_path / "chromium") as one:
        yield one


def ready(browser: Browser) -> None:
    """连上了，没有随机。"""
    browser.until("!document.getElementById('send').disabled")
    browser.js("document.getElementById('temperature').value = 0; document.getElementById('text').focus()")


def test_the_page_is_one_file_that_names_no_host(trained_bundle: Path):
    """SERVE-54：没有密钥也打得开；里面没有外面的地址；别的路径照样要密钥。"""
    with Running(loader(trained_bundle), keys=KeyRing(["k"])) as running:
        got = running.get("/")
        assert got.status_code == 200
        assert got.content == PAGE
        assert "frame-ancestors 'none'" in got.headers["content-security-policy"]
        assert "unsafe" not in got.headers["content-security-policy"]
        assert running.get("/v1/models").status_code == 401
    assert not re.findall(rb"(?:https?:)?//[\w.-]+\.\w+", PAGE)


@in_browser
@pytest.mark.parametrize(("width", "height", "dark"), [(1200, 800, False), (390, 780, True)])
def test_a_conversation(browser: Browser, trained_bundle: Path, width: int, height: int, dark: bool):
    """SERVE-54：两问两答，第二问接着说；没有横向的滚动条，没有抱怨，没有连别处；亮暗随系统，也能改。"""
    model = deepseek_export.load(trained_bundle, threads=1)
    want = model.generate("《论语》", chat=True, max_new_tokens=200).text
    with Running(loader(trained_bundle)) as running:
        browser.open(running.url, width, height, dark)
        ready(browser)
        browser.type("《论语》")
        browser.until(ANSWERED.format(1))
        assert browser.js(SAID) == ["《论语》", *want]
        browser.type("<b>明月</b>")
        browser.until(ANSWERED.format(2))
        assert browser.js(SAID)[2] == "<b>明月</b>"
        assert "现成" in browser.js("document.querySelectorAll('.note')[1].textContent")
        assert running.engine.stats.hit_tokens > 0
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        back = "getComputedStyle(document.body).backgroundColor"
        followed = browser.js(back)
        other = "light" if dark else "dark"
        browser.js(
            f"theme.value = '{other}'; theme.dispatchEvent(new Event('change'));"
            "document.getElementById('fresh').click()"
        )
        assert browser.js(back) != followed
        assert browser.js(SAID) == []
        assert browser.js("document.getElementById('model').value") == NAME
    assert browser.complaints == []
    assert {url.startswith((running.url, "data:")) for url in browser.urls if url != "about:blank"} == {True}


@in_browser
def test_stopping_and_keys(browser: Browser, trained_bundle: Path):
    """SERVE-54：密钥不对说一声，填上就能用；停下之后引擎里没有请求。"""
    with Running(loader(trained_bundle, slots=1), keys=KeyRing(["sk-1"])) as running:
        browser.open(running.url, 1200, 800)
        browser.until("document.getElementById('empty').textContent.includes('API 密钥')")
        assert browser.js("document.activeElement.id") == "key"
        browser.type("sk-1", enter=False)
        browser.js("key.dispatchEvent(new Event('change'))")
        ready(browser)
        browser.js(
            "window.slow = fetch; fetch = (url, options) => slow(url, options && options.body ?"
            "{...options, body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true})} : options)"
        )
        browser.type("《论语》")
        browser.until("document.getElementById('stop').offsetParent && " + SAID + "[1].length > 4")
        browser.js("document.getElementById('stop').click()")
        browser.until(ANSWERED.format(1))
        assert "停下了" in browser.js("document.querySelector('.note').textContent")
        running.idle()
        assert running.engine.stats.finished["cancelled"] == 1
        assert browser.js("sessionStorage.getItem('dsx.key')") == "sk-1"
        assert browser.js("localStorage.getItem('dsx.key')") is None
