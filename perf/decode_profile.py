"""一步解码的时间花在哪里：ONNX Runtime 自己的剖析按算子汇总，外加主机循环的份额。

    python -m perf.decode_profile OUT [--depth 0] [--depth 8192] [--steps 20] [--threads 2] [--result FILE]

``OUT`` 是任何 bundle。每个深度先把缓存填到那么长（内容随机，只量时间），再跑 ``--steps`` 步。主机循环的份额是一步的墙钟时间里不在
ONNX Runtime 的 ``model_run`` 之内的那部分；剖析本身有开销，节点很多的图会把它算进主机一侧，所以那是上界。
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.bench.depth import fill_caches
from deepseek_export.bench.environment import environment
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.cpu_library import library_for
from deepseek_export.runtime import ModelSession

ROOT = Path(__file__).resolve().parent.parent
#: 打印前几名。
SHOWN = 12


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--depth", "depths", multiple=True, type=int, default=(0,), show_default=True, help="已有的长度。"
)
@click.option("--steps", default=20, show_default=True, help="每个深度跑几步。")
@click.option("--threads", default=2, show_default=True, help="ONNX Runtime 的线程数。")
@click.option("--result", type=click.Path(path_type=Path), help="结果写到这个 JSON 文件。")
def main(out: Path, depths: tuple[int, ...], steps: int, threads: int, result: Path | None) -> None:
    """剖析一步解码。"""
    bundle = Bundle.open(out)
    weights = BundleWeights(bundle)
    rows = [_profile(bundle, weights, depth, steps, threads) for depth in depths]
    for row in rows:
        click.echo(
            f"深度 {row['depth']}：一步 {row['step_ms']:.3f} ms，主机循环至多 {row['host_share']:.1%}，"
            f"{'算子库 ' + row['cpu_library'] if row['cpu_library'] else '函数体'}"
        )
        for name, milliseconds in list(row["operators_ms"].items())[:SHOWN]:
            click.echo(f"  {name:28s} {milliseconds:9.3f} ms  {milliseconds / row['run_ms']:6.1%}")
    if result is not None:
        data = {"environment": environment(threads, ROOT), "bundle": bundle.manifest.target, "rows": rows}
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _profile(bundle: Bundle, weights: BundleWeights, depth: int, steps: int, threads: int) -> dict[str, Any]:
    library = library_for(bundle.manifest.target)
    runner = OrtRunner(
        bundle.model_path,
        threads=threads,
        max_positions=bundle.manifest.model.max_position_embeddings,
        initializers=weights.arrays(bundle.model_path),
        library=library,
        profile=Path(tempfile.mkdtemp()) / "profile",
    )
    session = ModelSession(runner)
    caches = session.new_caches(1, depth + steps + 1)
    fill_caches(caches, depth, seed=0)
    walls = []
    for step in range(steps + 1):
        start = time.perf_counter()
        session.run(np.array([[1]]), np.array([depth + step]), np.array([[0]]), caches)
        walls.append((time.perf_counter() - start) * 1e3)
    runs, operators = [], defaultdict[str, float](float)
    events = runner.profile_events()
    # 第一步要分配、要把权重读进来，不算。
    began = sorted(event["ts"] for event in events if event["name"] == "model_run")[1]
    for event in events:
        if event["ts"] < began:
            continue
        if event["name"] == "model_run":
            runs.append(event["dur"] / 1e3)
        elif event["name"].endswith("_kernel_time"):
            operators[event["args"]["op_name"]] += event["dur"] / 1e3 / steps
    step_ms, run_ms = statistics.median(walls[1:]), statistics.median(runs)
    return {
        "depth": depth,
        "steps": steps,
        "cpu_library": None if library is None else library.isa,
        "step_ms": step_ms,
        "run_ms": run_ms,
        "host_share": 1 - run_ms / step_ms,
        "operators_ms": dict(sorted(operators.items(), key=lambda item: -item[1])),
    }


if __name__ == "__main__":
    main()
