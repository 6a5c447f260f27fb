"""PyTorch 的 exporter 每次都重新解析 onnxscript 的全部翻译函数，占一次追踪的四分之一（0.4 秒）；这里解析一次，之后给副本。"""

from __future__ import annotations

import copy
import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch


def parsed_once() -> AbstractContextManager[Any]:
    """在里面调用 ``torch.onnx.export``，翻译表只在第一次解析；结果不变。

    翻译表是 PyTorch 的内部类；换了版本找不到它，就照常每次重新解析，只是慢一些。
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return nullcontext()
    return patch.object(ONNXRegistry, "from_torchlib", staticmethod(_copies_of(ONNXRegistry.from_torchlib)))


@functools.cache
def _copies_of(parse: Any) -> Any:
    """``parse`` 的替身；``custom_translation_table`` 往表里加东西，所以各次导出各用一份副本。"""
    parsed = functools.cache(parse)

    def registry(*arguments: Any, **options: Any) -> Any:
        known = parsed(*arguments, **options)
        own = copy.copy(known)
        own.functions = {target: list(found) for target, found in known.functions.items()}
        return own

    return registry
