"""61 层的引擎建多久、占多少内存（TRT-10）；用 TensorRT-RTX，不需要 GPU。

    python perf/tensorrt_build.py [--runs 3] [--arch sm89] [--out perf/results/tensorrt_build.json]

模型是 DeepSeek-V3 的层数、头数与 MLA 维度（16 头，512/64/128/128），隐藏宽度与专家缩小：层数与图的形状决定建引擎的时间，权重的大小只
决定拷贝。4 层与 61 层交替跑，每次都是新进程；时间是解析加构建，不含导出与编译 kernel（先编译一遍，留在磁盘缓存里）。
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import deepseek_export
from deepseek_export.checkpoint.synthetic import DEMO_CONFIG, write_checkpoint
from deepseek_export.engine.flavour import choose

_SCRIPT = """
import json, sys
from deepseek_export.bundle import Bundle
from deepseek_export.engine.build import build_engine
from deepseek_export.engine.flavour import choose, parse_arch
from deepseek_export.engine.shapes import ProfileShapes
bundle = Bundle.open(sys.argv[1])
shapes = ProfileShapes.parse("", bundle.manifest.model.max_position_embeddings)
record = build_engine(bundle, parse_arch(sys.argv[2]), choose("rtx"), shapes).record
plan = record.plans["model.plan"]
print(json.dumps({"seconds": plan.seconds, "peak_rss": record.peak_rss_bytes, "plan_bytes": plan.bytes,
                  "layers": plan.layers}))
"""

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


def make_bundle(layers: int, directory: Path) -> Path:
    """``layers`` 层的 tensorrt-rtx bundle，float16。"""
    checkpoint, out = directory / f"checkpoint-{layers}", directory / f"out-{layers}"
    write_checkpoint(checkpoint, {**_SHAPE, "num_hidden_layers": layers})
    deepseek_export.export(checkpoint, out, "mla+moe", target="tensorrt-rtx", dtype="float16")
    return out


@click.command()
@click.option("--runs", default=3, show_default=True, help="每种层数跑几遍。")
@click.option("--arch", default="sm89", show_default=True, help="为哪种 SM 建。")
@click.option("--out", type=click.Path(path_type=Path), help="结果追加到这个 JSON 文件。")
def main(runs: int, arch: str, out: Path | None) -> None:
    """比较 4 层与 61 层的引擎。"""
    samples: dict[int, list[dict]] = {4: [], 61: []}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {layers: make_bundle(layers, Path(folder)) for layers in samples}
        for attempt in range(runs + 1):
            for layers, results in samples.items():  # 交替：机器变慢时两边一起慢
                command = [sys.executable, "-c", _SCRIPT, str(bundles[layers]), arch]
                done = subprocess.run(command, capture_output=True, check=True)
                if attempt:  # 第一遍只为编译 kernel
                    results.append(json.loads(done.stdout.splitlines()[-1]))
    for layers, results in samples.items():
        seconds = [result["seconds"] for result in results]
        peak = max(result["peak_rss"] for result in results)
        click.echo(
            f"{layers:3d} 层：{statistics.median(seconds):.1f} s（{min(seconds):.1f}–{max(seconds):.1f}），"
            f"峰值常驻内存 {peak / 1e9:.2f} GB，plan {results[0]['plan_bytes'] / 1e6:.0f} MB，"
            f"解码 {sum(results[0]['layers']['decode'].values())} 层"
        )
    if out is not None:
        history = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        environment = {"python": platform.python_version(), "tensorrt_rtx": choose("rtx").version()}
        history.append({"environment": environment, "arch": arch, "samples": samples})
        out.write_text(json.dumps(history, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
