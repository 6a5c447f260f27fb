"""编译的开销：导出的时间与内存峰值对参数量，捕获的时间对层数（EXPORT-6），建引擎的时间、内存、plan 大小对层数（TRT-10）。

每个样本一个进程，磁盘缓存关着；各系列不交替：对照一遍就要几分钟。
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.bundle.manifest import WeightsMode
from deepseek_export.records import ModelDtype
from perf import isolate
from perf.results import Case, SuiteResult
from perf.workload import engine_build
from perf.workload.workspace import Workspace, parameter_count
from tools.make_checkpoint import CONFIGS

TITLE = "编译的开销"
#: 按引用不写权重，打包与对照都写成 float32。
REFERENCE, PACKED, PEER = "dsx reference", "dsx packed", "transformers OnnxExporter"


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        sizes: 合成检查点（bfloat16，稀疏文件），按引用导出成 float16，不写也不读权重。
        packed_sizes: 其中也打包成 float32 的，与对照写的大小相同。
        packed_runs: 打包跑几遍。
        peer_sizes: 其中 transformers 的 OnnxExporter 也试的：它要把权重载入内存，写成 float32。
        depths: 捕获时间比的两种层数。
        engine_depths: 建引擎的层数；没有装 TensorRT-RTX 就写明没有测。
        engine_runs: 每种引擎建几遍：61 层一遍就要几分钟，内存与大小每遍都一样。
        runs: 其余每种跑几遍；OnnxExporter 一遍就要几分钟，只跑一遍。
    """

    sizes: tuple[str, ...] = ("0.1B", "0.9B", "4B")
    packed_sizes: tuple[str, ...] = ("0.1B", "0.9B")
    packed_runs: int = 2
    peer_sizes: tuple[str, ...] = ("0.1B", "0.9B")
    depths: tuple[int, int] = (4, 61)
    engine_depths: tuple[int, ...] = (8, 27, 61)
    engine_runs: int = 2
    runs: int = 3


FULL = Scenario()
QUICK = Scenario(
    sizes=("0.1B",),
    packed_sizes=("0.1B",),
    packed_runs=1,
    peer_sizes=(),
    engine_depths=(8,),
    engine_runs=1,
    runs=1,
)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测导出与捕获；线程数与它们无关。"""
    scenario = QUICK if quick else FULL
    cases = [_size(workspace, size, scenario) for size in scenario.sizes]
    cases.append(_depth(scenario))
    cases += engine_build.cases(workspace.folder, scenario.engine_depths, scenario.engine_runs)
    return SuiteResult(suite="compile", title=TITLE, scenario=asdict(scenario), cases=cases)


def _size(workspace: Workspace, size: str, scenario: Scenario) -> Case:
    checkpoint = workspace.checkpoint(size, sparse=True)
    facts: dict[str, Any] = {"parameters": parameter_count(checkpoint), "written": {}}
    values: dict[str, Spread] = {}

    def measure(name: str, runs: int, function: str, **arguments: str) -> None:
        samples = [
            isolate.call(
                f"{__name__}:{function}",
                checkpoint=str(checkpoint),
                out=str(workspace.folder / "export"),
                **arguments,
            )
            for _ in range(runs)
        ]
        values.update(_values(name, samples))
        facts["written"][name] = samples[0]["written"]

    measure(REFERENCE, scenario.runs, "export", weights="reference", dtype="float16")
    if size in scenario.packed_sizes:
        measure(PACKED, scenario.packed_runs, "export", weights="packed", dtype="float32")
    if size in scenario.peer_sizes:
        try:
            measure(PEER, 1, "peer_export")
        except RuntimeError as error:  # 对照做不到也是结果：原话写进报告
            facts["peer_error"] = str(error)
    return Case(name=size, values=values, facts=facts)


def _depth(scenario: Scenario) -> Case:
    def sampler(layers: int) -> Callable[[], dict[str, Any]]:
        return lambda: isolate.call("perf.suites.compile:capture", layers=layers)

    shallow, deep = (f"{layers} 层" for layers in scenario.depths)
    runners = {f"{layers} 层": sampler(layers) for layers in scenario.depths}
    samples = interleaved(runners, scenario.runs, warmup=0)
    values = {key: value for name, found in samples.items() for key, value in _values(name, found).items()}
    return Case(
        name=f"V3 {deep} / {shallow}",
        values=values,
        ratios={"capture": paired_ratio(values[f"{deep}.seconds"], values[f"{shallow}.seconds"])},
        facts={"nodes": {name: found[0]["nodes"] for name, found in samples.items()}},
    )


def _values(name: str, samples: list[dict[str, Any]]) -> dict[str, Spread]:
    return {f"{name}.{key}": Spread.of([s[key] for s in samples]) for key in ("seconds", "peak")}


def export(
    checkpoint: str, out: str, weights: WeightsMode, dtype: ModelDtype
) -> Callable[[], dict[str, Any]]:
    """子进程里：``dsx export -p mla+moe``。"""
    from deepseek_export import api

    shutil.rmtree(out, ignore_errors=True)

    def work() -> dict[str, Any]:
        # 按引用的也不读一遍检查点来算哈希：这里量的是编译。
        api.export(
            checkpoint,
            out,
            "mla+moe",
            target="ort-cpu",
            dtype=dtype,
            weights=weights,
            hash_weights=False,
        )
        return {"written": _written(out)}

    return work


def peer_export(checkpoint: str, out: str) -> Callable[[], dict[str, Any]]:
    """子进程里：transformers 的 OnnxExporter，连同把权重载入与写成 float32：dsx 打包的时间也含读与写，按引用的不含写。"""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir()

    def work() -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        ids = torch.zeros((1, 8), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).save_pretrained(out)
        return {"written": _written(out)}

    return work


def _written(out: str) -> int:
    """新写的字节；按引用的 bundle 里权重是指向检查点的硬链接，不算。"""
    files = (path.stat() for path in Path(out).rglob("*") if path.is_file())
    return sum(file.st_size for file in files if file.st_nlink == 1)


def capture(layers: int) -> Callable[[], dict[str, Any]]:
    """子进程里：捕获 V3 真实宽度、``layers`` 层的计算图，不碰权重。"""
    from deepseek_export.capture import capture_model
    from deepseek_export.checkpoint import parse_model_config
    from deepseek_export.profile import resolve_profile

    published = json.loads(CONFIGS.read_text(encoding="utf-8"))["V3"] | {"num_hidden_layers": layers}
    config = parse_model_config(published, "V3")

    def work() -> dict[str, Any]:
        captured = capture_model(config, resolve_profile("mla+moe"), "float32")
        return {"nodes": len(captured.proto.graph.node)}

    return work
