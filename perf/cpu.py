"""C++ 算子库的 kernel 单独测：每秒读多少缓存、算多少，对同一次运行里这台机器的复制带宽与矩阵乘速率（CPU-7）。

    python -m perf.cpu [--quick] [--threads 2] [--result perf/results/cpu.json]

每个场景（指令集、缓存 dtype、形状）轮流各跑一遍，重复 ``--runs`` 轮，取中位数；复制与矩阵乘也是轮流里的一员，机器忙闲因此抵消。
``decode`` 一行是 S=1 的 absorb；``prefill`` 两行是同一形状的 absorb 与 naive，看 auto 选得对不对。没有库时报错退出。
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from deepseek_export.bench.environment import environment
from deepseek_export.bench.spread import Spread, interleaved
from deepseek_export.cpu_library import BUILD_COMMAND, CpuLibrary, find_library
from deepseek_export.dtypes import DTYPES
from deepseek_export.runtime.cache import ort_value
from tests.cpu_node import make_inputs, make_session

ROOT = Path(__file__).resolve().parent.parent

#: DeepSeek-V2 / V3 的头：qk_nope 128、qk_rope 64、v 128、kv_lora_rank 512。
WIDTHS: dict[str, Any] = {"dn": 128, "dr": 64, "dv": 128, "r": 512}
CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8")
COPY_BYTES = 256 << 20
MATMUL = 1024
#: 一个场景的缓存至多这么大，再大就不测。
LARGEST_CACHE = 2 << 30


def row_bytes(cache_dtype: str) -> int:
    """一个 token 的缓存占多少字节。"""
    r, dr = WIDTHS["r"], WIDTHS["dr"]
    return r + 2 * dr + 6 if cache_dtype == "int8" else DTYPES[cache_dtype].nbytes(r + dr)


class Scenario(NamedTuple):
    """一个要测的形状；``past`` 是每个序列已有的长度。"""

    isa: str
    cache_dtype: str
    B: int
    S: int
    H: int
    past: int
    form: str

    @property
    def cache_bytes(self) -> int:
        """一次调用至少要读的缓存。"""
        return self.B * (self.past + self.S) * row_bytes(self.cache_dtype)

    @property
    def flops(self) -> int:
        """按 absorb 或 naive 的算法要做的浮点运算，含 W_UK、W_UV；只数看得见的 key。"""
        dn, dr, dv, r = WIDTHS.values()
        pairs = self.S * self.past + self.S * (self.S + 1) // 2
        if self.form == "absorb":
            macs = self.S * r * (dn + dv) + pairs * (2 * r + dr)
        else:
            macs = (self.past + self.S) * r * (dn + dv) + pairs * (dn + dr + dv)
        return 2 * self.B * self.H * macs


def scenarios(isas: tuple[str, ...], quick: bool, contexts: tuple[int, ...] = ()) -> Iterator[Scenario]:
    """要测的全部场景；``contexts`` 换掉解码的上下文。"""
    contexts = contexts or ((256, 8192) if quick else (256, 1024, 4096, 8192, 16384, 32768))
    batches = (1,) if quick else (1, 2, 8)
    for isa, cache_dtype in itertools.product(isas, CACHE_DTYPES):
        for H, B, T in itertools.product((16, 128), batches, contexts):
            made = Scenario(isa, cache_dtype, B, 1, H, T - 1, "absorb")
            if made.cache_bytes <= LARGEST_CACHE and not (quick and H == 128 and T > 256):
                yield made
    for S, past in ((4, 4096), (16, 1024), (64, 1024), (256, 0), (1024, 0)):
        for form in ("absorb", "naive"):
            if not quick or S * (S + past) <= 256 * 256:
                yield Scenario(isas[0], "float32", 1, S, 16, past, form)


def prepare(library: CpuLibrary, case: Scenario, threads: int) -> Callable[[], None]:
    """一次可以反复的调用；缓存原地更新。"""
    session = make_session(library, "float32", case.cache_dtype, case.isa, case.form, threads)
    past = [case.past] * case.B
    inputs = make_inputs("float32", case.cache_dtype, case.S, case.H, case.past + case.S, past, **WIDTHS)
    o = np.empty((case.B, case.S, case.H, WIDTHS["dv"]), np.float32)
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort_value(array))
    binding.bind_ortvalue_output("o", ort_value(o))
    binding.bind_ortvalue_output("kv_cache_out", ort_value(inputs["kv_cache"]))
    # 绑定只借用数组的内存，所以闭包要留着它们。
    kept = (session, inputs, o)

    def call() -> None:
        kept[0].run_with_iobinding(binding)

    return call


def machine_probes(threads: int) -> dict[str, Callable[[], Any]]:
    """这台机器的上限：``threads`` 个线程一起复制、一起做 float32 矩阵乘。"""
    import torch

    torch.set_num_threads(threads)
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.empty(COPY_BYTES, dtype=torch.uint8)
    a, b = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    return {"copy": partial(target.copy_, source), "matmul": partial(torch.mm, a, b)}


def timed(call: Callable[[], Any]) -> float:
    """一次调用的秒数。"""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@click.command()
@click.option("--quick", is_flag=True, help="只测少数形状，两分钟以内。")
@click.option("--threads", default=2, show_default=True, help="ONNX Runtime 的线程数。")
@click.option("--runs", default=7, show_default=True, help="每个场景跑几轮。")
@click.option("--isa", "isas", multiple=True, help="只测这些指令集；缺省全部。")
@click.option(
    "--context", "contexts", multiple=True, type=int, help="解码只测这些上下文；缺省 256 到 32768。"
)
@click.option("--result", type=click.Path(path_type=Path), help="结果写到这个 JSON 文件。")
def main(
    quick: bool,
    threads: int,
    runs: int,
    isas: tuple[str, ...],
    contexts: tuple[int, ...],
    result: Path | None,
) -> None:
    """测 kernel 的带宽与算力。"""
    library = find_library()
    if library is None:
        raise click.ClickException(f"没有 C++ 算子库：{BUILD_COMMAND}")
    probes = machine_probes(threads)
    rows: list[dict[str, Any]] = []
    for case in scenarios(isas or library.isas, quick, contexts):
        calls = {"kernel": prepare(library, case, threads), **probes}
        timers = {name: partial(timed, call) for name, call in calls.items()}
        rows.append(_row(case, interleaved(timers, runs)))
        click.echo(_line(rows[-1]))
    if result is not None:
        data = {"environment": environment(threads, ROOT), "runs": runs, "rows": rows}
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _row(case: Scenario, samples: dict[str, list[float]]) -> dict[str, Any]:
    median = {name: Spread.of(values).median for name, values in samples.items()}
    # 复制一次读一遍、写一遍。
    copy_rate, matmul_rate = 2 * COPY_BYTES / median["copy"], 2 * MATMUL**3 / median["matmul"]
    read_rate, flop_rate = case.cache_bytes / median["kernel"], case.flops / median["kernel"]
    return {
        **case._asdict(),
        "seconds": samples["kernel"],
        "cache_gb_s": read_rate / 1e9,
        "gflop_s": flop_rate / 1e9,
        "copy_gb_s": copy_rate / 1e9,
        "matmul_gflop_s": matmul_rate / 1e9,
        "of_copy": read_rate / copy_rate,
        "of_matmul": flop_rate / matmul_rate,
    }


def _line(row: dict[str, Any]) -> str:
    median = Spread.of(row["seconds"]).median
    shape = f"B={row['B']} S={row['S']} H={row['H']} T={row['past'] + row['S']}"
    return (
        f"{row['isa']:12s} {row['cache_dtype']:9s} {row['form']:7s} {shape:26s} {median * 1e3:9.3f} ms  "
        f"{row['cache_gb_s']:6.2f} GB/s（复制的 {row['of_copy']:.0%}）  "
        f"{row['gflop_s']:7.1f} GFLOP/s（矩阵乘的 {row['of_matmul']:.0%}）"
    )


if __name__ == "__main__":
    main()
