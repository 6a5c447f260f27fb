"""C++ 算子库的注意力 kernel（CPU-7）：每秒读多少缓存、算多少，对同一次运行里这台机器的复制带宽与矩阵乘速率。

一格里的各种缓存（prefill 是两种形式）与复制、矩阵乘轮流各跑一遍，机器忙闲因此抵消。指令集是库选的那一个，``DSX_CPU_ISA`` 另指。
解码是 S=1 的 absorb；prefill 是同一形状的 absorb 与 naive，看 auto 选得对不对。
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import onnxruntime as ort
import torch

from deepseek_export.benchmark.spread import Spread, interleaved
from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.dtypes import DTYPES
from perf.results import Case, SuiteResult
from perf.workload.library import require_library
from perf.workload.workspace import Workspace
from tools.cpu_node import CACHES, bind, make_inputs, make_session

TITLE = "C++ 注意力 kernel 与这台机器的上限"
#: DeepSeek-V2 / V3 的头：qk_nope 128、qk_rope 64、v 128、kv_lora_rank 512。
WIDTHS: dict[str, Any] = {"dn": 128, "dr": 64, "dv": 128, "r": 512}
COPY, MATMUL = "copy", "matmul"
COPY_BYTES = 256 << 20
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        heads, batches, contexts: 解码的每一种组合一格，各种缓存都测；``contexts`` 含这一步的 token。
        prefills: 16 个头、float32 缓存的（S，已有的长度），两种形式都测。
    """

    heads: tuple[int, ...] = (16, 128)
    batches: tuple[int, ...] = (1, 2, 8)
    contexts: tuple[int, ...] = (8192, 32768)
    prefills: tuple[tuple[int, int], ...] = ((4, 4096), (16, 1024), (64, 1024), (256, 0), (1024, 0))
    runs: int = 5


FULL = Scenario()
QUICK = Scenario(heads=(16,), batches=(1,), contexts=(8192,), prefills=((16, 1024),), runs=3)


class Shape(NamedTuple):
    """一次调用；``past`` 是每个序列已有的长度。"""

    B: int
    S: int
    H: int
    past: int

    def cache_bytes(self, cache_dtype: str) -> int:
        """至少要读的缓存。"""
        r, dr = WIDTHS["r"], WIDTHS["dr"]
        row = r + 2 * dr + 6 if cache_dtype == "int8" else DTYPES[cache_dtype].nbytes(r + dr)
        return self.B * (self.past + self.S) * row

    def flops(self, form: str) -> int:
        """按 absorb 或 naive 的算法要做的浮点运算，含 W_UK、W_UV；只数看得见的 key。"""
        dn, dr, dv, r = WIDTHS.values()
        pairs = self.S * self.past + self.S * (self.S + 1) // 2
        if form == "absorb":
            macs = self.S * r * (dn + dv) + pairs * (2 * r + dr)
        else:
            macs = (self.past + self.S) * r * (dn + dv) + pairs * (dn + dr + dv)
        return 2 * self.B * self.H * macs


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部格子。

    Raises:
        FileNotFoundError: 没有 C++ 算子库。
    """
    scenario, library = QUICK if quick else FULL, require_library()
    probes = machine_ceilings(threads)
    cases = []
    for name, shape, series in _cells(scenario):
        calls = {key: _call(library, shape, *kind, threads) for key, kind in series.items()} | probes
        samples = interleaved({key: partial(timed, call) for key, call in calls.items()}, scenario.runs)
        cases.append(case(name, shape, series, {key: Spread.of(found) for key, found in samples.items()}))
    return SuiteResult(suite="cpu-kernel", title=TITLE, scenario=asdict(scenario), cases=cases)


def _cells(scenario: Scenario) -> Iterator[tuple[str, Shape, dict[str, tuple[str, str]]]]:
    """名字、形状、系列 →（缓存 dtype，形式）。"""
    for H, B, T in itertools.product(scenario.heads, scenario.batches, scenario.contexts):
        yield f"decode H{H} B{B} T{T}", Shape(B, 1, H, T - 1), {dtype: (dtype, "absorb") for dtype in CACHES}
    for S, past in scenario.prefills:
        forms = {form: ("float32", form) for form in ("absorb", "naive")}
        yield f"prefill S{S} T{past + S}", Shape(1, S, 16, past), forms


def case(name: str, shape: Shape, series: dict[str, tuple[str, str]], seconds: dict[str, Spread]) -> Case:
    """一格；比值是用时对下限：以复制的带宽读完缓存、以矩阵乘的速率算完，取大的。"""
    copied, multiplied = 2 * COPY_BYTES, 2 * MATMUL_SIZE**3  # 复制一次读一遍、写一遍
    copy, matmul = seconds[COPY].median / copied, seconds[MATMUL].median / multiplied
    ratios = {
        f"{key}/下限": seconds[key].scaled(
            1 / max(shape.cache_bytes(dtype) * copy, shape.flops(form) * matmul)
        )
        for key, (dtype, form) in series.items()
    }
    values = {f"{key}.seconds": seconds[key] for key in series}
    for key, field, amount in ((COPY, "gb_s", copied), (MATMUL, "gflop_s", multiplied)):
        values[f"{key}.{field}"] = Spread.of([amount / sample / 1e9 for sample in seconds[key].samples])
    return Case(name=name, values=values, ratios=ratios)


def _call(library: CpuLibrary, shape: Shape, cache_dtype: str, form: str, threads: int) -> Callable[[], Any]:
    """一次可以反复的调用；缓存原地更新。"""
    B, S, H, past = shape
    session = make_session(library, "float32", cache_dtype, library.isa, form, threads)
    inputs = make_inputs("float32", cache_dtype, S, H, past + S, [past] * B, **WIDTHS)
    binding, o = bind(session, inputs, inputs["kv_cache"])
    return partial(_run, session, binding, (inputs, o))


def _run(session: ort.InferenceSession, binding: ort.IOBinding, borrowed: object) -> None:
    """绑定只借用数组的内存，所以 ``borrowed`` 与这次调用同寿。"""
    session.run_with_iobinding(binding)


def machine_ceilings(threads: int) -> dict[str, Callable[[], Any]]:
    """这台机器的上限：``threads`` 个线程一起复制、一起做 float32 矩阵乘。"""
    torch.set_num_threads(threads)
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.empty(COPY_BYTES, dtype=torch.uint8)
    a, b = torch.randn(MATMUL_SIZE, MATMUL_SIZE), torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    return {COPY: partial(target.copy_, source), MATMUL: partial(torch.mm, a, b)}


def timed(call: Callable[[], Any]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began
