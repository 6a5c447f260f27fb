"""在 AddressSanitizer 与 UBSan 下把 kernel 跑一遍：``python -m tests.cpu_sanitize 库``，由 test_cpu_library 在子进程里启动。"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

from deepseek_export.cpu_library import CpuLibrary
from tests.cpu_node import CACHES, NUMPY, ODD, WIDE, call, make_inputs, make_session

SHAPES = ((1, 1, 1, (0,)), (1, 3, 300, (299, 17, 0)), (5, 4, 40, (0, 35)), (70, 2, 200, (100,)))


def main(path: Path) -> None:
    """每种指令集、形式、dtype 组合、形状各一次；越界或未定义行为会使进程非零退出。"""
    native = ctypes.CDLL(str(path))
    native.dsx_cpu_isas.restype = ctypes.c_char_p
    isas = tuple(native.dsx_cpu_isas().decode().split(","))
    library = CpuLibrary(path, isas, isas[0])
    for isa, form, dtype, cache in itertools.product(isas, ("absorb", "naive"), NUMPY, CACHES):
        session = make_session(library, dtype, cache, isa, form, threads=2)
        for (S, H, T, past), widths, in_place in itertools.product(SHAPES, (ODD, WIDE), (True, False)):
            call(session, make_inputs(dtype, cache, S, H, T, past, **widths), in_place)
    print("clean")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
