"""一个旧 bundle 里哪些文件不是 dsx 写的：``--overwrite`` 会连它们一起删掉，所以先要说。"""

from __future__ import annotations

import json
from pathlib import Path

from deepseek_export.bundle.disk import check_output, disk_errors
from deepseek_export.errors import DsxError

#: 整个归 dsx 的文件夹：引擎与报告，``files`` 不列它们。
_OWN_FOLDERS = ("engines", "reports")
_LISTED = 5
_STAGES_FILE = "stages.json"


def check_replaceable(out: Path, overwrite: bool) -> None:
    """:func:`~deepseek_export.bundle.disk.check_output`，另外要替换的 bundle 里没有别人的文件。

    Raises:
        DsxError: ``DSX-E401``；``DSX-E405`` 看不了。
    """
    check_output(out, overwrite)
    with disk_errors(out):
        foreign = foreign_files(out)
    if foreign:
        raise _foreign(out, foreign)


def foreign_files(bundle: Path) -> list[str]:
    """不是 dsx 写的文件（连同符号链接），相对 ``bundle`` 的路径；不是 bundle 的目录没有。

    manifest 是哪个版本写的都行，只看它列了哪些文件；读不懂的一个也没有列。
    """
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        return []
    own = {manifest.name, *_listed(manifest)}
    found = (path for path in sorted(bundle.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(bundle) for path in found]
    return [
        name.as_posix() for name in names if name.parts[0] not in _OWN_FOLDERS and name.as_posix() not in own
    ]


def check_stages_replaceable(out: Path, overwrite: bool) -> None:
    """同 :func:`check_replaceable`，要替换的是一套 stage。

    Raises:
        DsxError: ``DSX-E401``；``DSX-E405`` 看不了。
    """
    check_output(out, overwrite, _STAGES_FILE)
    if not (out / _STAGES_FILE).is_file():
        return
    with disk_errors(out):
        own = {_STAGES_FILE, *_OWN_FOLDERS, *_listed(out / _STAGES_FILE)}
        foreign = []
        for path in sorted(out.iterdir()):
            if (path / "manifest.json").is_file():
                foreign += [f"{path.name}/{name}" for name in foreign_files(path)]
            elif path.name not in own:
                foreign.append(path.name)
    if foreign:
        raise _foreign(out, foreign)


def _foreign(out: Path, found: list[str]) -> DsxError:
    shown = "、".join(found[:_LISTED]) + (f" 等 {len(found)} 个" if len(found) > _LISTED else "")
    what = f"{out} 里有不是 dsx 写的文件，替换会删掉它们：{shown}"
    return DsxError("DSX-E401", what, "把它们移走，再加 --overwrite；或换一个输出位置")


def _listed(manifest: Path) -> set[str]:
    try:
        data = json.loads(manifest.read_bytes())
        return {*data["files"], *data.get("weights", {"files": ()})["files"]}
    except (ValueError, RecursionError, KeyError, TypeError):
        return set()
