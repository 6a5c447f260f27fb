"""引擎建多久、占多少内存、plan 多大，对层数（TRT-10）；用 TensorRT-RTX，不需要 GPU。:mod:`perf.suites.compile` 的几格。

模型是 DeepSeek-V3 的头数与 MLA 维度（16 头，512/64/128/128），隐藏宽度与专家缩小：层数与图的形状决定建引擎的时间，权重的大小只
决定拷贝。各种层数交替建，每次都是新进程；时间是解析加构建，不含导出与编译 kernel（先编译一遍，留在这次测量自己的磁盘缓存里）。
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek_export import api
from deepseek_export.benchmark.spread import Spread, interleaved
from deepseek_export.checkpoint.synthetic import DEMO_CONFIG, write_checkpoint
from deepseek_export.engine.flavour import FLAVOURS, parse_arch
from perf import isolate
from perf.results import Case

#: 报告里那几格的名字以它开头。
CASE = "引擎"
ARCH = "sm89"
_FLAVOUR = FLAVOURS["rtx"]
_SHAPE: dict[str, Any] = {
    **DEMO_CONFIG,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
}


def cases(folder: Path, depths: Sequence[int], runs: int, arch: str = ARCH) -> list[Case]:
    """每种层数一格；没有装 TensorRT-RTX 时只有一格，写明没有测。

    Args:
        folder: 检查点、bundle 与 kernel 的缓存放在这里。
        depths: 层数。
        runs: 每种建几遍。
        arch: 为哪种 SM 建。
    """
    version = _FLAVOUR.version()
    if version is None:
        return [Case(name=f"{CASE}：没有装 {_FLAVOUR.module}，没有测", values={})]
    bundles = {str(layers): _make_bundle(layers, folder) for layers in depths}
    cache = str(folder / "cache")

    def sampler(bundle: Path) -> Callable[[], dict[str, Any]]:
        return lambda: isolate.call(f"{__name__}:build", bundle=str(bundle), arch=arch, cache=cache)

    samplers = {name: sampler(bundle) for name, bundle in bundles.items()}
    next(iter(samplers.values()))()  # 只为编译 kernel，几种层数用的是同样几个
    return [
        Case(
            name=f"{CASE} {layers} 层",
            values={
                f"dsx.{key}": Spread.of([sample[key] for sample in samples])
                for key in ("seconds", "peak", "plan_bytes")
            },
            facts={
                "layers": int(layers),
                "arch": arch,
                "tensorrt_rtx": version,
                "engine_layers": samples[0]["engine_layers"],
            },
        )
        for layers, samples in interleaved(samplers, runs, warmup=0).items()
    ]


def _make_bundle(layers: int, folder: Path) -> Path:
    """``layers`` 层的 tensorrt-rtx bundle，float16。"""
    checkpoint, out = folder / f"checkpoint-{layers}", folder / f"out-{layers}"
    write_checkpoint(checkpoint, {**_SHAPE, "num_hidden_layers": layers})
    api.export(checkpoint, out, "mla+moe", target=_FLAVOUR.target, dtype="float16")
    return out


def build(bundle: str, arch: str, cache: str) -> Callable[[], dict[str, Any]]:
    """子进程里：``dsx build``；kernel 的缓存用 ``cache``。"""
    from deepseek_export.bundle import Bundle
    from deepseek_export.engine.build import build_engine
    from deepseek_export.engine.shapes import ProfileShapes

    os.environ |= {"DSX_NO_CACHE": "0", "DSX_HOME": cache}
    opened = Bundle.open(bundle)
    shapes = ProfileShapes.parse("", opened.manifest.model.max_position_embeddings)

    def work() -> dict[str, Any]:
        plan = build_engine(opened, parse_arch(arch), _FLAVOUR, shapes).record.plans["model.plan"]
        layers = {profile: sum(counts.values()) for profile, counts in plan.layers.items()}
        return {"seconds": plan.seconds, "plan_bytes": plan.bytes, "engine_layers": layers}

    return work
