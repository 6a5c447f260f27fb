"""真实规模的导出（EXPORT-25）与切分（CLUSTER-36）：DeepSeek-V3 671B、同样大的 V3.2 按引用，40 亿参数打包、杀掉再接着写。

检查点由 ``tools/make_checkpoint.py --like`` 现造：671B 的是稀疏文件，几乎不占磁盘；40 亿参数的是真的随机权重，连同两份 float16 bundle
约需 26 GB 磁盘。内存取子进程的峰值常驻集（含映射进来的文件页）。捕获缓存一律关掉，量的是第一次导出。
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from deepseek_export.benchmark.spread import Spread
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.graph import check_onnx
from deepseek_export.bundle.stages import StageSet
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.progress import Progress
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace, parameter_count
from tools.make_checkpoint import write_like

TITLE = "真实规模的导出"
#: 承诺的上限，比值以它们为分母。
SECONDS, REFERENCE_PEAK, PACKED_PEAK = 60.0, 2e9, 1.5e9
_FIELDS = ("seconds", "cpu_seconds", "peak")
#: 按引用导出的：格子里的名字 → ``--like`` 的名字；两者只差索引器。
_LIKE = {"V3": "deepseek-v3", "V3.2": "deepseek-v3.2"}


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        layers: 按引用导出的 DeepSeek-V3、V3.2 的层数，61 是完整的。
        runs: 各导出几遍，V3 的再切几遍。
        stages: 切成几个 stage。
        packed_layers: 打包导出的 V2-Lite 的层数：1 层稠密加 6 层 MoE 是 40.0 亿参数。
        kills: 在随机的时刻 SIGKILL 几次，再接着写完。
        seed: 在哪些时刻杀。
    """

    layers: int = 61
    runs: int = 3
    stages: int = 8
    packed_layers: int = 7
    kills: int = 3
    seed: int = 0


FULL = Scenario()
QUICK = Scenario(layers=4, runs=1, stages=2, packed_layers=2, kills=1)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """几项都测；线程数与它们无关。

    Raises:
        RuntimeError: 导出、切分失败，或本该被杀的没有被杀。
    """
    scenario = QUICK if quick else FULL
    cases = [_reference(workspace.folder, scenario, name) for name in _LIKE]
    cases += [measured(workspace.folder, scenario) for measured in (_split, _packed)]
    return SuiteResult(suite="scale", title=TITLE, scenario=asdict(scenario), cases=cases)


def _reference(folder: Path, scenario: Scenario, name: str) -> Case:
    """按引用导出几遍，核对 onnx.checker 与算子个数。"""
    checkpoint, out = folder / name, folder / f"{name}-bundle"
    write_like(checkpoint, _LIKE[name], scenario.layers, None, sparse=True)
    samples = []
    for _ in range(scenario.runs):
        shutil.rmtree(out, ignore_errors=True)
        samples.append(_export(checkpoint, out, "-p", "full", "--weights", "reference", "--no-hash-weights"))
    bundle = Bundle.open(out)
    config, main = bundle.manifest.model, bundle.manifest.main
    for graph in bundle.manifest.graphs:
        check_onnx(out / graph.file)
        gates = sum(map(config.is_moe_layer, graph.layers))
        wanted = expected_nodes(config, graph.layers)
        found = {op: graph.op_counts.get(f"dsx::{op}", 0) for op in wanted}
        if found != wanted or graph.op_counts["dsx::MoeExperts"] % gates:
            raise RuntimeError(f"{graph.file} 的算子个数不对：{graph.op_counts}")
    shards = list(checkpoint.glob("*.safetensors"))
    facts = {
        "layers": config.num_hidden_layers,
        "mtp_layers": len(bundle.manifest.drafts),
        "experts": config.n_routed_experts,
        "shards": len(shards),
        "checkpoint_bytes": sum(file.stat().st_size for file in shards),
        "weight_bytes": sum(recipe.nbytes for recipe in bundle.manifest.weights.recipes.values()),
        "onnx_bytes": {graph.file: (out / graph.file).stat().st_size for graph in bundle.manifest.graphs},
        "expert_groups_per_moe_layer": main.op_counts["dsx::MoeExperts"] / config.num_moe_layers,
    }
    values = {f"dsx reference.{key}": Spread.of([sample[key] for sample in samples]) for key in _FIELDS}
    ratios = {
        "用时/60 s": values["dsx reference.seconds"].scaled(1 / SECONDS),
        "峰值/2 GB": values["dsx reference.peak"].scaled(1 / REFERENCE_PEAK),
    }
    return Case(name=f"按引用：{name} {scenario.layers} 层", values=values, ratios=ratios, facts=facts)


def expected_nodes(config: ModelConfig, layers: Sequence[int]) -> dict[str, int]:
    """``layers`` 这几层该有几个注意力、索引器、gate：一层一个，自己排名的层另有一个索引器。"""
    ranked = sum(map(config.runs_indexer, layers))
    sparse = config.indexer is not None
    return {
        "MlaAttention": 0 if sparse else len(layers),
        "SparseMlaAttention": len(layers) if sparse else 0,
        "LightningIndexer": ranked if sparse else 0,
        "MoeGate": sum(map(config.is_moe_layer, layers)),
    }


def _split(folder: Path, scenario: Scenario) -> Case:
    """把 :func:`_reference` 导出的切几遍：每个 stage 只链接用得到的分片。"""
    bundle, out = folder / "V3-bundle", folder / "V3-stages"
    samples = []
    for _ in range(scenario.runs):
        shutil.rmtree(out, ignore_errors=True)
        samples.append(_dsx("split", str(bundle), "--stages", str(scenario.stages), "-o", str(out)))
    stages = StageSet.open(out)
    opened = [Bundle.open(directory) for directory in stages.directories]
    values = {f"dsx split.{key}": Spread.of([sample[key] for sample in samples]) for key in _FIELDS}
    names = [item.directory for item in stages.record.stages]
    return Case(
        name=f"切成 {scenario.stages} 个 stage：V3 {scenario.layers} 层",
        values=values,
        ratios={"峰值/2 GB": values["dsx split.peak"].scaled(1 / REFERENCE_PEAK)},
        facts={
            "stage_bytes": {item.directory: item.weight_bytes for item in stages.record.stages},
            "stage_layers": {item.directory: len(item.layers) for item in stages.record.stages},
            "stage_shards": {name: len(_shards(one)) for name, one in zip(names, opened, strict=True)},
            "stage_shard_bytes": {
                name: sum(file.stat().st_size for file in _shards(one))
                for name, one in zip(names, opened, strict=True)
            },
        },
    )


def _shards(bundle: Bundle) -> list[Path]:
    """一个 stage 链接的检查点分片。"""
    return [bundle.path / name for name in bundle.manifest.weights.files if name.endswith(".safetensors")]


def _packed(folder: Path, scenario: Scenario) -> Case:
    """一次写完；再在随机时刻 SIGKILL 几次、接着写完；两份的哈希相同。"""
    checkpoint, once, killed = folder / "v2-lite", folder / "once", folder / "killed"
    write_like(checkpoint, "v2-lite", scenario.packed_layers, None)
    options = ("-p", "mla+moe", "--dtype", "float16")
    whole = _export(checkpoint, once, *options)
    total = (once / "weights/model.safetensors").stat().st_size
    rng, kills = random.Random(scenario.seed), []
    for target in sorted(rng.uniform(0.02, 0.98) * total for _ in range(scenario.kills)):
        found = _export(checkpoint, killed, *options, kill_when=partial(_has_written, killed, target))
        kills.append(found | {"killed_at_bytes": _written(killed)})
    last = _export(checkpoint, killed, *options)
    bundles = [Bundle.open(path) for path in (once, killed)]
    if bundles[0].manifest.files != bundles[1].manifest.files:
        raise RuntimeError("杀掉再接着写完的，与一次写完的不同")
    bundles[1].check_weights(Progress())
    parts = {"dsx packed": whole, "dsx resumed": last}
    values = {f"{name}.{key}": Spread.of([one[key]]) for name, one in parts.items() for key in _FIELDS}
    peaks = Spread.of([one["peak"] for one in parts.values()])
    return Case(
        name=f"打包：V2-Lite {scenario.packed_layers} 层",
        values=values,
        ratios={"峰值/1.5 GB": peaks.scaled(1 / PACKED_PEAK)},
        facts={
            "parameters": parameter_count(checkpoint),
            "weight_bytes": total,
            "kills": kills,
        },
    )


def _export(
    checkpoint: Path, out: Path, *options: str, kill_when: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """跑一次 ``dsx export``。"""
    return _dsx("export", str(checkpoint), *options, "-o", str(out), kill_when=kill_when)


def _dsx(*words: str, kill_when: Callable[[], bool] | None = None) -> dict[str, Any]:
    """跑一次 ``dsx``：用时、CPU 用时、峰值常驻内存；``kill_when`` 成立时 SIGKILL 它。"""
    command = ("-m", "deepseek_export.cli.main", *words)
    began = perf_counter()
    variables = {**os.environ, "DSX_NO_CACHE": "1"}
    process = subprocess.Popen((sys.executable, *command), stdout=subprocess.DEVNULL, env=variables)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if kill_when is not None and kill_when():
            process.send_signal(signal.SIGKILL)
        sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (0 if kill_when is None else -signal.SIGKILL):
        raise RuntimeError(f"dsx {words[0]} 的退出码是 {process.returncode}")
    seconds = (perf_counter() - began, usage.ru_utime + usage.ru_stime)
    return dict(zip(_FIELDS, (*seconds, usage.ru_maxrss * 1024), strict=True))


def _has_written(out: Path, target: float) -> bool:
    return _written(out) >= target


def _written(out: Path) -> int:
    """``out`` 的临时目录里已经写了多少权重。"""
    files = out.parent.glob(f".{out.name}.tmp-*/weights/model.safetensors")
    return max((file.stat().st_size for file in files), default=0)
