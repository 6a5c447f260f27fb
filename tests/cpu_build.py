"""测试用的算子库：``plugins/cpu/build.py`` 不在包里，按路径装载。"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest

from deepseek_export.cpu_library import INSTALLED, CpuLibrary, find_library

SOURCES = Path(__file__).resolve().parent.parent / "plugins/cpu"


@functools.cache
def builder():
    """``plugins/cpu/build.py``，它不在包里。"""
    spec = importlib.util.spec_from_file_location("build_cpu", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_library() -> CpuLibrary:
    """构建好的库；没有就跳过并说明原因。"""
    found = next(INSTALLED.glob("libdsx_cpu.*"), None)
    if found is None:
        try:
            builder().build()
        except builder().Unavailable as reason:
            pytest.skip(f"C++ 算子库没有构建：{reason}")
    made = find_library()
    assert made is not None
    return made
