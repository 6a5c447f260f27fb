"""在 AddressSanitizer 与 UBSan 下把 kernel 跑一遍：``python -m tests.cpu_sanitize 库``，由 test_cpu_library 在子进程里启动。"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

from deepseek_export.cpu_library import CpuLibrary
from tests.quant_node import call as call_quant
from tests.quant_node import experts_inputs, experts_session, linear_inputs, linear_session
from tests.sparse_node import SHAPES as SPARSE_SHAPES
from tests.sparse_node import attend, attention_inputs, index_inputs, select
from tools.cpu_node import CACHES, COMPUTES, ODD, WIDE, call, make_inputs, make_session

QUANT_SHAPES = (((1,), 256, 70), ((2,), 320, 9), ((3,), 96, 33), ((2, 3), 70, 5), ((23,), 160, 67))
SHAPES = ((1, 1, 1, (0,)), (1, 3, 300, (299, 17, 0)), (5, 4, 40, (0, 35)), (70, 2, 200, (100,)))


def main(path: Path) -> None:
    """每种指令集、形式、dtype 组合、形状各一次，int8、int4 的线性层与专家每种块大小各一次，稀疏注意力的两个算子同样各种组合；越界或未定义行为会使进程非零退出。"""
    native = ctypes.CDLL(str(path))
    native.dsx_cpu_isas.restype = ctypes.c_char_p
    isas = tuple(native.dsx_cpu_isas().decode().split(","))
    library = CpuLibrary(path, isas, isas[0])
    for isa, form, dtype, cache in itertools.product(isas, ("absorb", "naive"), COMPUTES, CACHES):
        session = make_session(library, dtype, cache, isa, form, threads=2)
        for (S, H, T, past), widths, in_place in itertools.product(SHAPES, (ODD, WIDE), (True, False)):
            call(session, make_inputs(dtype, cache, S, H, T, past, **widths), in_place)
    for isa in isas:  # 跨几段、各段都不满
        session = make_session(library, "float32", "int8", isa, "absorb", threads=2)
        call(session, make_inputs("float32", "int8", 3, 3, 150, (140, 0), dn=5, dr=270, dv=7, r=590))
    for isa, (S, past) in itertools.product(
        isas, ((1, (30,)), (3, (29, 0, 7)))
    ):  # int8 的 w_kv_b，行少与行多
        session = make_session(library, "float32", "bfloat16", isa, "absorb", 2, "int8")
        given = WIDE | {"dn": 19, "dv": 6, "r": 96, "weight_dtype": "int8"}
        call(session, make_inputs("float32", "bfloat16", S, 3, 40, past, **given))
    formats = ((8, False), (4, False), (4, True))
    for isa, (bits, affine), block, (rows, K, N) in itertools.product(
        isas, formats, (32, 64, 128), QUANT_SHAPES
    ):
        session = linear_session(library, bits, K, N, block, isa, 2, affine)
        call_quant(session, linear_inputs(bits, rows, K, N, block, affine=affine))
    for isa, (bits, affine), block, N in itertools.product(isas, formats, (32, 64, 128), (1, 30)):
        inputs = experts_inputs(bits, N, 256, 128, 5, 2, block, affine=affine)
        call_quant(experts_session(library, bits, 2, block, isa, 2, affine), inputs)
    for isa, dtype, (S, T, past), in_place in itertools.product(
        isas, COMPUTES, SPARSE_SHAPES[1:4], (True, False)
    ):
        for cache in CACHES:
            select(library, index_inputs(dtype, cache, S, T, past), 24, isa, 2, in_place)
        for cache, H in itertools.product(CACHES, (3, 70)):
            attend(library, attention_inputs(dtype, cache, S, T, past, H, 24, ODD), isa, 2, in_place)
    print("clean")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
