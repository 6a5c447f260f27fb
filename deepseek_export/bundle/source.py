"""bundle 的出处：导出它的检查点还在不在、是不是同一个。"""

from __future__ import annotations

from pathlib import Path

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.paths import path_kind


def open_source(bundle: Bundle, given: Path | str | None, option: str = "--against") -> Checkpoint:
    """打开导出这个 bundle 的检查点；缺省取 manifest 里记的出处。

    Args:
        bundle: 打开的 bundle。
        given: 检查点目录；检查点挪过地方时要给。
        option: 命令行上给它的选项，写进错误里。

    Raises:
        DsxError: ``DSX-E601`` 找不到、不是目录或看不了；``DSX-E602`` 与导出时不是同一个；1xx 打不开。
    """
    source = bundle.manifest.source
    path = Path(source.path) if given is None else Path(given)
    if (kind := path_kind(path, "DSX-E601")) != "directory":
        got = "不存在" if kind == "missing" else "不是目录"
        what = f"检查点 {path} {got}（manifest 记的出处是 {source.path}）"
        raise DsxError("DSX-E601", what, f"用 {option} 指定检查点目录")
    checkpoint = Checkpoint.open(path)
    if checkpoint.config != bundle.manifest.model or checkpoint.store.fingerprint() != source.fingerprint:
        raise DsxError(
            "DSX-E602",
            f"{path} 与导出时的检查点不是同一个（config、文件头或权重不同）",
            "给对检查点，或重新导出",
        )
    return checkpoint
