"""各套场景：名字 → 模块。每个模块有 ``TITLE`` 与 ``run(workspace, quick, threads)``。"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: 次序就是报告里的次序。
SUITES: Mapping[str, str] = MappingProxyType(
    {
        "mla-memory": "perf.suites.mla_memory",
        "mla-decode": "perf.suites.mla_decode",
        "sparse": "perf.suites.sparse",
        "mtp": "perf.suites.mtp",
        "moe": "perf.suites.moe",
        "moe-quality": "perf.suites.moe_quality",
        "compile": "perf.suites.compile",
        "peers": "perf.suites.peers",
        "peers-torch": "perf.suites.peers_torch",
        "serve": "perf.suites.serve",
        "cluster": "perf.suites.cluster",
        "cluster-model": "perf.suites.cluster_model",
        "apply": "perf.suites.apply",
        "cpu-kernel": "perf.suites.cpu_kernel",
        "decode-profile": "perf.suites.decode_profile",
        "int8-cache": "perf.suites.int8_cache",
        "quant": "perf.suites.quant",
        "scale": "perf.suites.scale",
        "engine-memory": "perf.suites.engine_memory",
        "gpu": "perf.suites.gpu",
    }
)
