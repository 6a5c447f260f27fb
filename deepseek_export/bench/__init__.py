"""基准测试：``dsx bench`` 的全部实现，``perf/`` 的各套场景也用它的计时、环境与内存。"""

from deepseek_export.bench.bundle import BenchReport, Scenario, bench_bundle
from deepseek_export.bench.environment import environment
from deepseek_export.bench.memory import MemorySample, memory_in_subprocess
from deepseek_export.bench.spread import Spread, interleaved, paired_ratio

__all__ = [
    "BenchReport",
    "MemorySample",
    "Scenario",
    "Spread",
    "bench_bundle",
    "environment",
    "interleaved",
    "memory_in_subprocess",
    "paired_ratio",
]
