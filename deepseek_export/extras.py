"""可选的依赖：编译与校验要一组，HTTP 服务要一组，运行 bundle 都用不着。"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

from deepseek_export.errors import DsxError

#: ``deepseek-export[export]`` 装的：导出、打包、校验、建引擎才要。
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "onnx_graphsurgeon", "polygraphy")
#: ``deepseek-export[serve]`` 装的：``dsx serve`` 才要。
SERVE_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
#: ``deepseek-export[ray]`` 装的里面，只有 Ray Serve 才要的。
RAY_SERVE_PACKAGES = ("aiohttp", "grpc", "opencensus")
#: ``deepseek-export[serve]`` 里的，只有 ``response_format``、强制的工具调用才要。
GRAMMAR_PACKAGES = ("llguidance",)


def require_export(what: str) -> None:
    """编译的依赖齐不齐；不导入它们。

    Args:
        what: 要做的事，写进错误里。

    Raises:
        DsxError: ``DSX-E720``，缺哪几个包，怎么装。
    """
    if missing := _missing(EXPORT_PACKAGES):
        raise DsxError(
            "DSX-E720",
            f"{what}要用 {missing}，这里没有装（只装了运行 bundle 的那一半）",
            "pip install -U 'deepseek-export[export]'",
        )


def require_serve() -> None:
    """HTTP 服务的依赖齐不齐；不导入它们。

    Raises:
        DsxError: ``DSX-E721``，缺哪几个包，怎么装。
    """
    if missing := missing_serve():
        raise DsxError(
            "DSX-E721", f"dsx serve 要用 {missing}，这里没有装", "pip install -U 'deepseek-export[serve]'"
        )


def require_grammar() -> None:
    """约束输出的依赖齐不齐；不导入它。

    Raises:
        DsxError: ``DSX-E761``，缺 llguidance，怎么装。
    """
    if missing := _missing(GRAMMAR_PACKAGES):
        raise DsxError(
            "DSX-E761", f"约束输出要用 {missing}，这里没有装", "pip install -U 'deepseek-export[serve]'"
        )


def missing_serve() -> str:
    """HTTP 服务缺哪几个包；不缺是空串。"""
    return _missing(SERVE_PACKAGES)


def require_ray() -> None:
    """Ray 装了没有；不导入它。

    Raises:
        DsxError: ``DSX-E751``，怎么装。
    """
    if _missing(("ray",)):
        raise DsxError(
            "DSX-E751", "用 Ray 起 stage 要装 ray，这里没有", "pip install -U 'deepseek-export[ray]'"
        )


def require_ray_serve() -> None:
    """Ray Serve 的依赖齐不齐；不导入它们。

    Raises:
        DsxError: ``DSX-E751``，没有装 Ray；``DSX-E752``，缺哪几个包，怎么装。
    """
    require_ray()
    if missing := _missing(RAY_SERVE_PACKAGES):
        raise DsxError(
            "DSX-E752", f"几个副本要用 Ray Serve，缺 {missing}", "pip install -U 'deepseek-export[ray]'"
        )


def _missing(names: Sequence[str]) -> str:
    return "、".join(name for name in names if not _installed(name))


def _installed(name: str) -> bool:
    with suppress(ModuleNotFoundError):
        return find_spec(name) is not None
    return False
