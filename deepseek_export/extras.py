"""可选的依赖：编译与校验要的一组，运行 bundle 用不着。"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec

from deepseek_export.errors import DsxError

#: ``deepseek-export[export]`` 装的：导出、打包、校验、建引擎才要。
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "onnx_graphsurgeon", "polygraphy")


def require_export(what: str) -> None:
    """编译的依赖齐不齐；不导入它们。

    Args:
        what: 要做的事，写进错误里。

    Raises:
        DsxError: ``DSX-E720``，缺哪几个包，怎么装。
    """
    missing = [name for name in EXPORT_PACKAGES if not _installed(name)]
    if missing:
        raise DsxError(
            "DSX-E720",
            f"{what}要用 {'、'.join(missing)}，这里没有装（只装了运行 bundle 的那一半）",
            "pip install -U 'deepseek-export[export]'",
        )


def _installed(name: str) -> bool:
    with suppress(ModuleNotFoundError):
        return find_spec(name) is not None
    return False
