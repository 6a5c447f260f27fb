"""API 密钥：从文件或环境变量来，只留哈希，比的时间不随内容变。"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from deepseek_export.errors import DsxError
from deepseek_export.paths import read_text

#: 环境变量，几个密钥用逗号隔开。
VARIABLE = "DSX_API_KEYS"


class KeyRing:
    """认得哪些密钥。原文不留：日志、报错、内存转储里都不会有。

    Args:
        keys: 密钥；一个也没有就谁都放行。
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple({_digest(key.encode()) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admits(self, authorization: bytes | None) -> bool:
        """``Authorization`` 头里的密钥对不对；每个都比一遍，不在对上时提前停。"""
        scheme, _, key = (authorization or b"").partition(b" ")
        given, found = _digest(key.strip()), False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return not self._digests or (found and scheme.lower() == b"bearer")


def read_keys(file: Path | None, environ: Mapping[str, str] = os.environ) -> KeyRing:
    """文件里的与环境变量里的合在一起。

    Args:
        file: 一行一个，空行与 ``#`` 开头的行不算；``None`` 没有文件。
        environ: 环境变量。

    Raises:
        DsxError: ``DSX-E730``，打不开、给了却一个也没有，或不能放进 HTTP 头。
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = read_text(file).splitlines()
        except (OSError, ValueError) as error:
            raise _refused(f"{file} 读不了：{error}") from error
        keys += _checked(str(file), ["" if line.lstrip().startswith("#") else line.strip() for line in lines])
    if VARIABLE in environ:
        keys += _checked(VARIABLE, [part.strip() for part in environ[VARIABLE].split(",")])
    return KeyRing(keys)


def _checked(where: str, lines: list[str]) -> list[str]:
    for number, line in enumerate(lines, start=1):
        if not (line.isascii() and line.isprintable()) or " " in line:
            raise _refused(f"{where} 的第 {number} 项里有空白、控制字符或不是 ASCII 的字符")
    keys = [line for line in lines if line]
    if not keys:
        raise _refused(f"{where} 里一个密钥也没有")
    return keys


def _refused(what: str) -> DsxError:
    return DsxError("DSX-E730", what, "一行一个，只用可见的 ASCII 字符；不要密钥就不给它")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
