"""真实规模的导出：DeepSeek-V3 671B 按引用，40 亿参数打包、杀掉再接着写（EXPORT-25）。

    python perf/scale.py [--part reference] [--part packed] [--runs 3] [--scratch DIR] [--out perf/results/scale.json]

检查点由 ``tools/make_checkpoint.py --like`` 现造：671B 的是稀疏文件，几乎不占磁盘；40 亿参数的是真的随机权重，连同两份 float16 bundle
约需 26 GB 磁盘。内存取子进程的峰值常驻集（含映射进来的文件页）。捕获缓存一律关掉（``DSX_NO_CACHE``），量的是第一次导出。
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from deepseek_export.bench.environment import environment
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.graph import check_onnx
from deepseek_export.progress import Progress

_ROOT = Path(__file__).resolve().parents[1]
_MAKER = _ROOT / "tools/make_checkpoint.py"
_DSX = (sys.executable, "-m", "deepseek_export.cli.main")
_PACKED_LAYERS = 7  # V2-Lite 的 1 层稠密加 6 层 MoE：40.0 亿参数
_KILLS = 3


def measured(command: Sequence[str], kill_when: Callable[[], bool] | None = None) -> dict[str, Any]:
    """跑一个命令：退出码、用时、CPU 用时、峰值常驻内存；``kill_when`` 成立时 SIGKILL 它。"""
    start = time.perf_counter()
    variables = {**os.environ, "DSX_NO_CACHE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=variables)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if kill_when is not None and kill_when():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit": process.returncode,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss": usage.ru_maxrss * 1024,
    }


def make(out: Path, *options: str) -> None:
    """造检查点。"""
    subprocess.run([sys.executable, str(_MAKER), *options, str(out)], check=True, stdout=subprocess.DEVNULL)


def reference(scratch: Path, runs: int) -> dict[str, Any]:
    """671B：按引用导出几遍，逐遍核对 onnx.checker 与算子个数。"""
    checkpoint, out = scratch / "v3", scratch / "v3-bundle"
    make(checkpoint, "--like", "deepseek-v3", "--sparse-files")
    samples = []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["export", str(checkpoint), "-p", "full", "--weights", "reference"]
        arguments += ["--no-hash-weights", "-o", str(out)]
        samples.append(measured([*_DSX, *arguments]))
        if samples[-1]["exit"]:
            raise SystemExit(f"导出失败，退出码 {samples[-1]['exit']}")
    bundle = Bundle.open(out)
    config = bundle.manifest.model
    for graph in bundle.manifest.graphs:
        check_onnx(out / graph.file)
        moe = sum(map(config.is_moe_layer, graph.layers))
        assert graph.op_counts["dsx::MlaAttention"] == len(graph.layers)
        assert graph.op_counts["dsx::MoeGate"] == moe
        assert graph.op_counts["dsx::MoeExperts"] % moe == 0
    main = bundle.manifest.main
    files = list(checkpoint.glob("*.safetensors"))
    return {
        "model": "deepseek-v3",
        "layers": config.num_hidden_layers,
        "mtp_layers": len(bundle.manifest.drafts),
        "experts": config.n_routed_experts,
        "shards": len(files),
        "checkpoint_bytes": sum(file.stat().st_size for file in files),
        "weight_bytes": sum(recipe.nbytes for recipe in bundle.manifest.weights.recipes.values()),
        "onnx_bytes": {graph.file: (out / graph.file).stat().st_size for graph in bundle.manifest.graphs},
        "mla_per_layer": main.op_counts["dsx::MlaAttention"] / config.num_hidden_layers,
        "moe_gates_per_moe_layer": main.op_counts["dsx::MoeGate"] / config.num_moe_layers,
        "expert_groups_per_moe_layer": main.op_counts["dsx::MoeExperts"] / config.num_moe_layers,
        "samples": samples,
    }


def packed(scratch: Path, seed: int) -> dict[str, Any]:
    """40 亿参数：一次写完；再在随机时刻 SIGKILL 几次、接着写完；两份的哈希相同。"""
    checkpoint, once, killed = scratch / "4b", scratch / "once", scratch / "killed"
    make(checkpoint, "--like", "v2-lite", "--layers", str(_PACKED_LAYERS))
    arguments = ["export", str(checkpoint), "-p", "mla+moe", "--dtype", "float16", "-o"]
    whole = measured([*_DSX, *arguments, str(once)])
    total = (once / "weights/model.safetensors").stat().st_size
    rng, kills = random.Random(seed), []
    for target in sorted(rng.uniform(0.02, 0.98) * total for _ in range(_KILLS)):
        run = measured([*_DSX, *arguments, str(killed)], partial(_has_written, killed, target))
        if run["exit"] != -signal.SIGKILL:
            raise SystemExit(f"本该被杀，却以 {run['exit']} 退出")
        kills.append(run | {"killed_at_bytes": _written(killed)})
    last = measured([*_DSX, *arguments, str(killed)])
    bundles = [Bundle.open(path) for path in (once, killed)]
    assert bundles[0].manifest.files == bundles[1].manifest.files
    bundles[1].check_weights(Progress())
    return {
        "model": f"v2-lite, {_PACKED_LAYERS} layers",
        "parameters": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) // 2,
        "weights_file_bytes": total,
        "whole": whole,
        "kills": kills,
        "last": last,
        "hashes_equal": True,
    }


def _has_written(out: Path, target: float) -> bool:
    return _written(out) >= target


def _written(out: Path) -> int:
    """``out`` 的临时目录里已经写了多少权重。"""
    files = out.parent.glob(f".{out.name}.tmp-*/weights/model.safetensors")
    return max((file.stat().st_size for file in files), default=0)


@click.command()
@click.option(
    "--part",
    "parts",
    type=click.Choice(["reference", "packed"]),
    multiple=True,
    help="只跑一项；缺省两项都跑。",
)
@click.option("--runs", default=3, show_default=True, help="671B 导出几遍。")
@click.option("--seed", default=0, show_default=True, help="在哪些时刻杀。")
@click.option(
    "--scratch", type=click.Path(path_type=Path), help="放检查点与 bundle 的目录；缺省是系统临时目录。"
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="结果写进这个 JSON 文件，保留其中没有重跑的那一项。"
)
def main(parts: tuple[str, ...], runs: int, seed: int, scratch: Path | None, out: Path | None) -> None:
    """量 671B 的按引用导出与 40 亿参数的打包导出。"""
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    for part in parts or ("reference", "packed"):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            machine = environment(None, _ROOT)
            result = reference(Path(folder), runs) if part == "reference" else packed(Path(folder), seed)
        results[part] = result | {"environment": machine}
        click.echo(_line(part, result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _line(part: str, result: dict[str, Any]) -> str:
    if part == "packed":
        peaks = [result["whole"]["peak_rss"], result["last"]["peak_rss"]]
        return (
            f"{result['parameters'] / 1e9:.2f}B 打包：{result['whole']['seconds']:.1f} s，峰值常驻 "
            f"{max(peaks) / 1e6:.0f} MB；SIGKILL {len(result['kills'])} 次后接着写完，哈希相同"
        )
    seconds = [sample["seconds"] for sample in result["samples"]]
    cpu = [sample["cpu_seconds"] for sample in result["samples"]]
    peak = max(sample["peak_rss"] for sample in result["samples"])
    return (
        f"{result['layers']} 层、{result['experts']} 专家、{result['shards']} 个分片：导出 "
        f"{statistics.median(seconds):.1f} s（{min(seconds):.1f}–{max(seconds):.1f}，CPU {min(cpu):.1f}–{max(cpu):.1f} s），"
        f"峰值常驻 {peak / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
