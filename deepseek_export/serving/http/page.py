"""试用的那一页：一个静态文件，不从外面取东西。"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path

#: 整个文件。
PAGE = Path(__file__).with_name("page.html").read_bytes()


def _allowed(tag: str) -> str:
    """页里自己的那一段脚本或样式；浏览器只认哈希对得上的。"""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), PAGE, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'"


#: 只连这个服务，只跑页里的脚本，不许放进别人的网页。
PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_allowed('script')}; style-src {_allowed('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
