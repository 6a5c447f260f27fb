"""由检查点导出、留着以后再用的 bundle：``dsx serve CKPT``、``dsx chat CKPT`` 用它。

放在 :func:`~deepseek_export.disk_cache.home` 的 ``bundles``，名字由检查点的身份与导出的选项决定，变了一样就是另一份；整个删掉随时可以。
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.bundle.stages import is_stage_set
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.disk_cache import home
from deepseek_export.errors import DsxError
from deepseek_export.paths import MAX_LARGE_TEXT, path_kind, read_regular
from deepseek_export.progress import Progress
from deepseek_export.version import __version__

#: 等别人写完，隔这么多秒看一次。
_POLL_S = 0.5
#: 权重之外决定 bundle 内容的文件：config.json、分词器、聊天模板。
_SMALL_FILES = frozenset({".json", ".jinja", ".model", ".txt"})


def is_checkpoint(path: Path) -> bool:
    """``path`` 是 Hugging Face 检查点目录，不是 bundle，也不是一套 stage：有 config.json，没有 manifest.json、stages.json。

    Raises:
        DsxError: ``DSX-E402``，看不了。
    """
    return (
        path_kind(path / "manifest.json", "DSX-E402") == "missing"
        and not is_stage_set(path)
        and path_kind(path / "config.json", "DSX-E402") == "file"
    )


def cached_path(checkpoint: Path, options: Mapping[str, object]) -> Path:
    """这个检查点以这些选项导出的那一份放在哪里；不一定存在。

    Args:
        checkpoint: 检查点目录。
        options: 导出的选项，能写成 JSON。

    Raises:
        DsxError: 1xx，检查点打不开。
    """
    fingerprint = TensorStore.open(checkpoint).fingerprint()
    try:
        small = {
            file.name: hashlib.sha256(read_regular(file, MAX_LARGE_TEXT)).hexdigest()
            for file in sorted(checkpoint.iterdir())
            if file.suffix in _SMALL_FILES and path_kind(file, "DSX-E101") == "file"
        }
    except OSError as error:
        what = f"{error.filename or checkpoint} 读不了：{error.strerror}"
        raise DsxError("DSX-E101", what, "检查权限；检查点里多余的大文件移开") from error
    identity = {
        "dsx": __version__,
        "fingerprint": fingerprint.model_dump(),
        "files": small,
        "options": dict(options),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return home() / "bundles" / f"{checkpoint.resolve().name}-{digest[:16]}"


def cached_bundle(
    checkpoint: Path,
    options: Mapping[str, object],
    write: Callable[[Path, bool], object],
    progress: Progress,
) -> Path:
    """这个检查点以这些选项导出的 bundle：有就用，没有就导出；别人正在导出同一份，就等它写完。

    Args:
        checkpoint: 检查点目录。
        options: 导出的选项，能写成 JSON；与 ``write`` 用的相同。
        write: 导出到给定的目录，第二个参数说可不可以替换那里的。
        progress: 说明等谁、为什么重新导出。

    Returns:
        bundle 的目录。

    Raises:
        DsxError: 1xx，检查点打不开；``DSX-E407``，缓存与检查点不在同一个文件系统；其余见 ``write``。
    """
    out = cached_path(checkpoint, options)
    reuse, told = os.environ.get("DSX_NO_CACHE", "0") == "0", False
    while True:
        usable = _usable(out, progress) if reuse else False
        if usable:
            return out
        try:
            write(out, usable is False)
            return out
        except DsxError as error:
            if error.code == "DSX-E407":
                todo = f"把环境变量 DSX_HOME 设到检查点所在的文件系统；或先 dsx export {checkpoint} -o OUT"
                raise DsxError(error.code, error.what, todo) from error
            if error.code == "DSX-E411":
                if not told:
                    progress.note(f"{error.what}，等它写完")
                told = True
                time.sleep(_POLL_S)
            elif error.code != "DSX-E401" or usable is False:  # 看的时候还没有，写的时候别人刚写完：再看一次
                raise


def _usable(out: Path, progress: Progress) -> bool | None:
    """``out`` 能不能用；``None`` 是还没有。"""
    if path_kind(out, "DSX-E402") == "missing":
        return None
    try:
        Bundle.open(out)
    except DsxError as error:
        progress.note(f"缓存的 {out} 用不了（{error.code}：{error.what}），重新导出")
        return False
    return True
