"""权重文件读过一遍、与 manifest 相符的记录：取自下载记录的 sha256 加载时要核对一次，核对过的不必再读。

记录在 :data:`COMPARED_FILE`，认的是文件本身（设备、inode、大小、mtime）：拷到别处的、改过的都不算核对过。
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from deepseek_export.bundle.disk import write_report
from deepseek_export.bundle.manifest import BundleFile
from deepseek_export.paths import MAX_LARGE_TEXT, read_text

COMPARED_FILE = "reports/compared-weights.json"


class Compared(BaseModel):
    """核对的时候一个文件是什么样。"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    device: int
    inode: int
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, sha256: str, status: os.stat_result) -> Compared:
        """``status`` 取自读之前：边读边改的，之后看就不是它了。"""
        return cls(
            sha256=sha256,
            device=status.st_dev,
            inode=status.st_ino,
            bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
        )


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    files: dict[BundleFile, Compared]


def read_compared(bundle: Path) -> dict[str, Compared]:
    """核对过的文件；没有记录、读不了、写坏了，就是一个也没有核对过。"""
    try:
        return dict(_Record.model_validate_json(read_text(bundle / COMPARED_FILE, MAX_LARGE_TEXT)).files)
    except (OSError, ValidationError, UnicodeDecodeError):
        return {}


def write_compared(bundle: Path, files: Mapping[str, Compared]) -> None:
    """记下核对过的文件，换掉原来的记录。

    Raises:
        DsxError: ``DSX-E404`` / ``DSX-E405``，bundle 写不了。
    """
    write_report(bundle / COMPARED_FILE, _Record(files=dict(files)).model_dump(mode="json"))
