"""``dsx compare``：PyTorch 与各个后端逐块比，输入与参照存成 Polygraphy 的格式，离开 dsx 也能重复。

每张图写一份断开的 ``blocks.onnx``：在每个块的边界上断开，各块的输入都由 PyTorch 的值喂，所以一次运行就把所有块各自比完，
上游的错误不会传到下游。prefill 与其后的一步解码是 Polygraphy 的两次迭代。
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict

from deepseek_export.bundle import Bundle, Manifest
from deepseek_export.bundle.disk import atomic_directory, check_free_space, disk_errors
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.parity.backends import Backend, open_backends
from deepseek_export.parity.blocks import PHASES, Block, main_blocks, spread_near_ties
from deepseek_export.parity.draft import draft_blocks, draft_runs
from deepseek_export.parity.polygraphy import Iteration, polygraphy_command, save_iterations
from deepseek_export.parity.report import Case
from deepseek_export.parity.source import block_rows, environment, open_source
from deepseek_export.parity.subgraph import ModelGraph, feeds_for
from deepseek_export.parity.tolerances import TOLERANCES, Dtype
from deepseek_export.progress import Progress
from deepseek_export.reference import Forms, ReferenceModel, load_draft, load_reference

FOLDER = "reports/compare"
REPORT, GRAPH = "compare.json", "blocks.onnx"


class BlockCase(BaseModel):
    """一个后端在一个块的一个输出上的比较。

    Attributes:
        backend: 后端。
        graph: 图的文件名。
        block: 块名。
        phase: ``prefill`` 或 ``decode``。
        case: 比较的结果。
    """

    model_config = ConfigDict(extra="forbid")

    backend: str
    graph: str
    block: str
    phase: str
    case: Case


class ComparisonReport(BaseModel):
    """一次 ``dsx compare`` 的全部结果。

    Attributes:
        cases: 按后端、图、块、阶段的次序。
        folder: 存放输入、参照与断开的图的目录。
        commands: 图的文件名 → 在 dsx 之外重复这次比较的命令。
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    checkpoint: str
    profile: str
    target: str
    dtype: Dtype
    backends: list[str]
    environment: dict[str, str]
    folder: str
    commands: dict[str, str]
    cases: list[BlockCase]

    @property
    def passed(self) -> bool:
        """每一项都通过，且确实比过东西。"""
        return bool(self.cases) and all(row.case.passed for row in self.cases)

    @property
    def first_failure(self) -> BlockCase | None:
        """第一个不通过的块；块之间互不影响，所以它就是出错的那一块。"""
        return next((row for row in self.cases if not row.case.passed), None)

    def to_json(self) -> dict[str, Any]:
        """可写成 JSON 的字典，含 ``passed``。"""
        return {"passed": self.passed, **self.model_dump(mode="json")}


def compare_bundle(
    bundle: Bundle,
    against: Path | str | None = None,
    *,
    backends: Sequence[str] = ("ort",),
    blocks: Sequence[str] = (),
    folder: Path | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ComparisonReport:
    """逐块比较一个 bundle。

    Args:
        bundle: 要比的 bundle。
        against: 检查点目录；缺省取 manifest 里记的出处。
        backends: 后端的名字，见 :data:`~deepseek_export.parity.backends.BACKENDS`。
        blocks: 只比这些块，见 :func:`block_choices`；缺省全部。
        folder: 存到哪里；缺省 bundle 的 ``reports/compare``。上一次的结果会被替换。
        seed: 随机输入的种子。
        progress: 进度。

    Returns:
        报告；已写进 ``folder/compare.json``。

    Raises:
        DsxError: ``DSX-E613`` / ``DSX-E614`` 后端；``DSX-E615`` 没有这个块；``DSX-E401`` 目录里是别的东西；
            ``DSX-E404`` / ``DSX-E405`` 写不下；``DSX-E406`` 文件被改过；``DSX-E601`` / ``DSX-E602`` 检查点。
    """
    progress = progress or Progress()
    manifest = bundle.manifest
    runners = open_backends(backends)
    wanted = _prefixes(manifest, blocks)
    bundle.check_hashes(progress)
    checkpoint = open_source(bundle, against)
    out = Path(folder) if folder is not None else bundle.path / FOLDER
    progress.start("加载参考模型")
    model = load_reference(checkpoint, Forms.for_reference(manifest.profile), manifest.dtype)
    cases: list[BlockCase] = []
    commands: dict[str, str] = {}
    with atomic_directory(out, overwrite=True, marker=REPORT) as directory:
        for file, found in _reference(bundle, checkpoint, model, seed, wanted, progress):
            progress.start(f"比较 {file}")
            comparison = _Comparison(bundle, file, found)
            stem = Path(file).stem
            with disk_errors(directory):
                comparison.save(directory / stem)
            for name, run in runners.items():
                progress.advance(0, name)
                cases += comparison.cases(directory / stem, name, run)
            commands[file] = comparison.command(out / stem)
        report = ComparisonReport(
            bundle=str(bundle.path),
            checkpoint=str(checkpoint.path),
            profile=manifest.profile.name,
            target=manifest.target,
            dtype=manifest.dtype,
            backends=list(runners),
            environment=environment(),
            folder=str(out),
            commands=commands,
            cases=cases,
        )
        text = json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n"
        with disk_errors(directory):
            (directory / REPORT).write_text(text, encoding="utf-8")
    return report


def block_choices(manifest: Manifest) -> dict[str, tuple[str, str]]:
    """``--block`` 能写什么 →（图的文件名，块名的前缀）：``embed``、层号、``head``；草稿模型写它的层号或文件名。"""
    main = manifest.main.file
    choices = {"embed": (main, "embed")}
    choices |= {str(i): (main, f"layers.{i}.") for i in range(manifest.model.num_hidden_layers)}
    choices["head"] = (main, "head")
    for entry in manifest.drafts:
        choices[str(entry.layers[0])] = choices[entry.file] = (entry.file, "")
    return choices


def _prefixes(manifest: Manifest, blocks: Sequence[str]) -> list[tuple[str, str]]:
    choices = block_choices(manifest)
    for name in blocks:
        if name not in choices:
            raise DsxError("DSX-E615", f"没有块 {name!r}", f"可选的块：{'、'.join(choices)}")
    return [choices[name] for name in (blocks or choices)]


def _reference(
    bundle: Bundle,
    checkpoint: Checkpoint,
    model: ReferenceModel,
    seed: int,
    wanted: Sequence[tuple[str, str]],
    progress: Progress,
) -> Iterator[tuple[str, list[Block]]]:
    """逐张图给出要比的块；一张图一个块也不要就跳过。"""
    manifest, rows = bundle.manifest, block_rows(bundle.manifest, seed)
    for entry in manifest.graphs:
        prefixes = tuple(prefix for file, prefix in wanted if file == entry.file)
        if not prefixes:
            continue
        progress.start(f"PyTorch 参照：{entry.file}")
        if entry.role == "main":
            blocks = main_blocks(manifest, model, rows)
        else:
            index = manifest.drafts.index(entry)
            drafts = [load_draft(checkpoint, i, model, manifest.dtype) for i in range(index + 1)]
            *_, run = draft_runs(manifest, model, drafts, rows)
            blocks = draft_blocks(manifest, run)
        found = []
        for block in blocks:
            progress.advance(0, block.name)
            if block.name.startswith(prefixes):
                found.append(block)
        yield entry.file, found


@dataclass
class _Comparison:
    """一张图的比较：断开的图、每个阶段的输入与参照。"""

    bundle: Bundle
    file: str
    blocks: list[Block]
    near_ties: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, block in enumerate(self.blocks):
            self.blocks[i], ties = spread_near_ties(block)
            self.near_ties[block.name, block.phase] = ties
        graph = ModelGraph(self.bundle, self.file)
        first = [block for block in self.blocks if block.phase == PHASES[0]]
        inputs = dict.fromkeys(name for block in first for name in block.feeds)
        self.model = graph.cut(inputs, [output.value for block in first for output in block.outputs])

    def iterations(self) -> list[Iteration]:
        """每个阶段一次。"""
        made = []
        for phase in PHASES:
            blocks = [block for block in self.blocks if block.phase == phase]
            feeds = {name: array for block in blocks for name, array in block.feeds.items()}
            want = {output.value: widened(output.want) for block in blocks for output in block.outputs}
            made.append(Iteration(feeds_for(self.model, feeds), want))
        return made

    def save(self, folder: Path) -> None:
        """断开的图、它用到的权重文件、输入与参照。"""
        folder.mkdir()
        onnx.save(self.model, folder / GRAPH)
        link_weights(self.model, self.bundle.path, folder)
        save_iterations(folder, self.iterations())

    def cases(self, folder: Path, backend: str, run: Backend) -> list[BlockCase]:
        """交给一个后端跑，按块的次序比。"""
        results = run(folder / GRAPH, [iteration.feeds for iteration in self.iterations()])
        got = dict(zip(PHASES, results, strict=True))
        rows = []
        for block in self.blocks:
            for case in block.cases(got[block.phase]):
                case.near_ties += self.near_ties[block.name, block.phase]
                rows.append(
                    BlockCase(
                        backend=backend, graph=self.file, block=block.name, phase=block.phase, case=case
                    )
                )
        return rows

    def command(self, folder: Path) -> str:
        """复现命令；两个阶段的尺度不同时取大的。"""
        limits: dict[str, float] = {}
        for block in self.blocks:
            for output in block.outputs:
                scale = float(np.sqrt(np.square(output.want.astype(np.float64)).mean()))
                limit = TOLERANCES[output.key].limit(scale)
                limits[output.value] = max(limit, limits.get(output.value, 0.0))
        default = TOLERANCES["block", self.bundle.manifest.dtype].max_abs
        return polygraphy_command(folder / GRAPH, folder, default, limits)


def widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 → float32；与断开的图的输出一致。"""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def link_weights(model: onnx.ModelProto, source: Path, folder: Path) -> None:
    """让 ``folder`` 里的 ``model`` 找得到权重：硬链接，不占空间；跨文件系统时才拷贝。

    ONNX Runtime 不认指到模型目录之外的路径与符号链接。
    """
    locations = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in sorted(locations):
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / location, target)
        except OSError:
            check_free_space(target.parent, (source / location).stat().st_size)
            shutil.copyfile(source / location, target)
