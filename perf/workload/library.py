"""测量要用的 C++ 算子库。"""

from __future__ import annotations

from deepseek_export.cpu_library import BUILD_COMMAND, CpuLibrary, find_library


def require_library() -> CpuLibrary:
    """这台机器的算子库。

    Raises:
        FileNotFoundError: 没有构建。
    """
    library = find_library()
    if library is None:
        raise FileNotFoundError(
            f"没有 C++ 算子库：先 {BUILD_COMMAND}，两核上约半分钟，编译过一次的从缓存取，不到一秒"
        )
    return library
