"""权重是码的 kernel 共用的：一种码怎么写，在启动表里是哪几个编译期常数。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.kernels.table import KernelDtype, Problem, check_dtype, check_sm
from deepseek_export.ops.spec import OpSpec, TypeVar

CodeDtype = Literal["int8", "int4", "float8_e4m3fn"]

#: 码里 scale 自成一种 dtype 的：发布的 FP8 检查点，scale 是 float32。
E4M3: CodeDtype = "float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class CodeFormat:
    """码的写法：权重 [N, K] 每 ``rows`` 行、``columns`` 列一个 scale。

    Attributes:
        codes: 码的 dtype；int4 的两个一字节，低位在前；e4m3 的类型是 int8，每个字节是一个。
        columns: 沿输入维每多少个码共用一个 scale；e4m3 的是 2 的幂，不小于 16。
        rows: 多少行共用一个 scale。
    """

    codes: CodeDtype
    columns: int
    rows: int = 1

    def constants(self) -> Mapping[str, int]:
        """kernel 的编译期常数。"""
        bits, e4m3 = DTYPES[self.codes].bits, int(self.codes == E4M3)
        return {"BITS": bits, "E4M3": e4m3, "SCALED": self.columns, "TALL": self.rows}

    def dtypes(self, dtype: str) -> Mapping[TypeVar, str]:
        """契约里码与 scale 的类型变量 → dtype；``dtype`` 是模型的。"""
        if self.codes == E4M3:
            return {"Q": "int8", "S": "float32"}
        return {"Q": self.codes, "S": dtype}

    def step(self, inner: int) -> int:
        """一次迭代几列：不超过 ``inner``；e4m3 的 scale 乘在积上，一段之内只能有一个。"""
        return min(inner, self.columns) if self.codes == E4M3 else inner


def coded_problem(
    op: OpSpec,
    sm: int,
    sizes: Mapping[str, int],
    blocked: Sequence[str],
    dtype: KernelDtype,
    form: CodeFormat,
) -> Problem:
    """权重是码的算子的一个问题：``x`` 与输出是 16 位的，码与 scale 照 ``form``。

    Args:
        op, sm, sizes: 见 :class:`~deepseek_export.kernels.table.Problem`。
        blocked: 其中哪几维分块；scale 的各维由它们得出。
        dtype: ``x`` 与输出的 dtype。
        form: 码的写法。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 或码不支持。
    """
    check_sm(sm)
    check_dtype(op, "x", dtype, ("float16", "bfloat16"))
    known = ("int8", "int4", E4M3)
    if form.codes not in known:
        raise DsxError("DSX-E903", f"权重的码是 {form.codes}", f"kernel 支持 {'、'.join(known)}")
    blocks = {f"{dim}/block_size": -(-sizes[dim] // form.columns) for dim in blocked}
    blocks |= {f"{dim}/block_rows": -(-sizes[dim] // form.rows) for dim in blocked}
    return Problem(op, sm, {**sizes, **blocks}, {"T": dtype, **form.dtypes(dtype)})
