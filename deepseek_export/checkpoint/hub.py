"""检查点的一个文件发布时的 SHA-256：取自 Hugging Face 下载时留下的记录，不读文件，也不要 huggingface_hub。

记录只说下载的应当是什么，不说盘上的现在是什么：用它的要在真正用到内容之前读一遍来比。
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from deepseek_export.paths import MAX_TEXT, read_text

#: LFS（与 Xet）文件的 etag 是内容的 SHA-256；小文件的是 git 的 SHA-1，40 位，用不上。
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: 缓存里一个仓库的目录名；``models--deepseek-ai--DeepSeek-V3``。
_REPOSITORY = re.compile(r"models--.+")
#: 快照到 blob 一步，blob 到各仓库共用的又一步；再多就不是缓存了。
_HOPS = 4
#: 记录写好之后 mtime 可以晚这么多秒：有的文件系统只精确到秒。huggingface_hub 也这样算。
_SLACK_S = 1.0


def published_sha256(file: Path) -> str | None:
    """下载时的记录里 ``file`` 的 SHA-256；没有记录、不是 SHA-256、或记录之后文件又改过，是 ``None``。

    1. 在缓存里：``models--X--Y/snapshots/REV/NAME`` 是符号链接，指向 ``blobs/`` 里以 SHA-256 为名的那一个。它自己可以又是链接
       （各仓库共用的一份）：那边的名字是 Xet 的哈希，不是 SHA-256，所以逐步看，不看最后到了哪里。
    2. 下载到目录：``DIR/.cache/huggingface/download/NAME.metadata`` 三行：提交、etag、时刻。
    """
    try:
        return _from_cache(file) or _from_metadata(file)
    except (OSError, ValueError):  # 看不了、写坏了的记录等于没有：照常读文件
        return None


def _from_cache(file: Path) -> str | None:
    for _ in range(_HOPS):
        # 目录也可以是链接：.. 从它真正的位置算起。
        file = file.parent.resolve() / file.name
        folder = file.parent
        if folder.name == "blobs" and _REPOSITORY.fullmatch(folder.parent.name):
            return _sha256(file.name)
        if not file.is_symlink():
            return None
        file = file.parent / os.readlink(file)
    return None


def _from_metadata(file: Path) -> str | None:
    file = file.parent.resolve() / file.name
    for folder in file.parents:
        record = folder / ".cache/huggingface/download" / f"{file.relative_to(folder)}.metadata"
        if record.is_file():
            _, etag, written = read_text(record, MAX_TEXT).split("\n")[:3]
            moment = float(written)
            current = math.isfinite(moment) and file.stat().st_mtime - _SLACK_S <= moment
            return _sha256(etag.strip()) if current else None
    return None


def _sha256(name: str) -> str | None:
    return name if _SHA256.fullmatch(name) else None
