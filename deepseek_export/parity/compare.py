"""``dsx compare``：PyTorch 与各个后端逐块比，输入与参照存成 Polygraphy 的格式，离开 dsx 也能重复。

每张图写一份断开的 ``graph.onnx``：在每个块的边界上断开，各块的输入都由 PyTorch 的值喂，所以一次运行就把所有块各自比完，
上游的错误不会传到下游。prefill 与其后的一步解码是 Polygraphy 的两次迭代。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from deepseek_export.backend import backend_named
from deepseek_export.backend.base import Run
from deepseek_export.bundle import Bundle, Manifest
from deepseek_export.bundle.disk import atomic_directory, disk_errors, output_path, write_json
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.bundle.roundings import roundings
from deepseek_export.bundle.source import open_source
from deepseek_export.capture import names
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.parity.arrays import widened
from deepseek_export.parity.bisect import Culprit, bisect_block
from deepseek_export.parity.block import Block, spread_near_ties
from deepseek_export.parity.blocks import main_blocks
from deepseek_export.parity.checks import PHASES
from deepseek_export.parity.draft import draft_blocks, draft_runs
from deepseek_export.parity.inputs import block_rows
from deepseek_export.parity.keys import block_keys
from deepseek_export.parity.polygraphy import GRAPH, Iteration, polygraphy_command, save_comparison
from deepseek_export.parity.report import Case, environment
from deepseek_export.parity.subgraph import ModelGraph, attention_dtype, feeds_for
from deepseek_export.parity.tolerances import Dtype, tolerance
from deepseek_export.progress import Progress
from deepseek_export.reference import DraftModel, Forms, ReferenceModel, load_draft, load_reference
from deepseek_export.reference.weights import Rounding

FOLDER = "reports/compare"
REPORT, BISECT = "compare.json", "bisect"


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
        commands: 断开的图 → 在 dsx 之外重复这次比较的命令；``model.trt.onnx`` 是 TensorRT 用的那张（下沉过），命令把它交给
            ONNX Runtime：它也不过，毛病就在下沉，它过而 ``trt`` 不过，毛病在插件或 TensorRT。
        culprit: 要求逐节点定位、且有块不对时，第一个不对的块里第一个不对的节点。
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
    culprit: Culprit | None = None

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
    bisect: bool = False,
    folder: Path | str | None = None,
    seed: int = 0,
    verify_weights: bool = True,
    progress: Progress | None = None,
) -> ComparisonReport:
    """逐块比较一个 bundle。

    Args:
        bundle: 要比的 bundle。
        against: 检查点目录；缺省取 manifest 里记的出处。
        backends: 后端的名字，见 :data:`~deepseek_export.backend.BACKENDS`。
        blocks: 只比这些块，见 :func:`block_choices`；缺省全部。
        bisect: 有块不对时，再逐节点找出第一个不对的节点。
        folder: 存到哪里；缺省 bundle 的 ``reports/compare``。上一次的结果会被替换。
        seed: 随机输入的种子。
        verify_weights: 先读一遍全部权重，核对 sha256，见 :meth:`~deepseek_export.bundle.Bundle.check_weights`。
        progress: 进度。

    Returns:
        报告；已写进 ``folder/compare.json``。

    Raises:
        DsxError: ``DSX-E613`` 没有这个后端；``DSX-E918`` / ``DSX-E913`` / ``DSX-E614`` / ``DSX-E920`` /
            ``DSX-E917`` 这里用不了 TensorRT；``DSX-E321`` bfloat16；``DSX-E615`` 没有这个块；``DSX-E401`` 目录里是别的东西；
            ``DSX-E404`` / ``DSX-E405`` 写不下；``DSX-E406`` / ``DSX-E408`` / ``DSX-E413`` 权重被改过，或没法证明；``DSX-E412`` 比的时候 bundle 被换掉；``DSX-E601`` / ``DSX-E602`` 检查点。
    """
    progress = progress or Progress()
    manifest = bundle.manifest
    # 一个不可用就整个拒绝，不悄悄少比一个。
    chosen = [backend_named(name) for name in backends]
    runners = {backend.name: backend.cut_runner(bundle) for backend in chosen}
    wanted = _prefixes(manifest, blocks)
    if verify_weights:
        bundle.check_weights(progress)
    checkpoint = open_source(bundle, against)
    out = output_path(folder) if folder is not None else bundle.path / FOLDER
    progress.start("加载参考模型")
    rounding = roundings(bundle)
    model = load_reference(checkpoint, Forms.for_reference(manifest.profile), manifest.dtype, rounding)
    cases: list[BlockCase] = []
    commands: dict[str, str] = {}
    culprit = None
    with atomic_directory(out, overwrite=True, marker=REPORT) as directory:
        for entry in manifest.graphs:
            prefixes = tuple(prefix for file, prefix in wanted if file == entry.file)
            if not prefixes:
                continue
            progress.start(f"PyTorch 参照：{entry.file}")
            reference, found = _reference(bundle, checkpoint, model, rounding, entry, seed)
            progress.start(f"比较 {entry.file}")
            for name, runner in runners.items():
                progress.advance(0, name)
                lowered = runner.graph(entry, _capacity(manifest, found))
                graph = ModelGraph(bundle, entry.file, lowered)
                stem = f"{Path(entry.file).stem}{runner.suffix}"
                comparison = _Comparison(bundle, entry.file, graph, found, prefixes)
                comparison.save(directory / stem)
                commands[f"{stem}.onnx"] = comparison.command(out / stem)
                rows = comparison.cases(directory / stem, name, runner.run)
                cases += rows
                bad = next((row for row in rows if not row.case.passed), None)
                if bisect and culprit is None and bad is not None:
                    progress.start(f"逐节点比较 {bad.block}")
                    block = comparison.block(bad.block, bad.phase)
                    culprit = bisect_block(
                        bundle,
                        checkpoint,
                        entry,
                        reference,
                        block,
                        graph,
                        runner.run,
                        directory / BISECT,
                        out / BISECT,
                    )
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
            culprit=culprit,
        )
        bundle.check_in_place()
        with disk_errors(directory):
            write_json(directory / REPORT, report.to_json())
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
    rounding: Mapping[str, Rounding],
    entry: GraphEntry,
    seed: int,
) -> tuple[ReferenceModel | DraftModel, list[Block]]:
    """一张图的参考实现与它的全部块。"""
    manifest, rows = bundle.manifest, block_rows(bundle.manifest, seed)
    keys = block_keys(manifest, attention_dtype(manifest))
    if entry.role == "main":
        return model, list(main_blocks(manifest, model, rows, keys))
    index = manifest.drafts.index(entry)
    drafts = [load_draft(checkpoint, i, model, manifest.dtype, rounding) for i in range(index + 1)]
    *_, run = draft_runs(manifest, model, drafts, rows)
    return run.draft, list(draft_blocks(manifest, run, keys))


def _capacity(manifest: Manifest, blocks: Sequence[Block]) -> int:
    """块的缓存有多少个位置。"""
    ports = {names.cache_input(tensor.name, 0) for tensor in manifest.cache.tensors}
    return next(block.feeds[port].shape[2] for block in blocks for port in ports & block.feeds.keys())


class _Comparison:
    """一张图的比较：断开的图、每个阶段的输入与参照。

    Args:
        bundle: 要比的 bundle。
        file: 图的文件名。
        graph: 后端跑的那张图。
        blocks: 图的全部块；不比的也提供断点上的值，接错了线的图才截得出来。
        prefixes: 比名字以这些开头的块。
    """

    def __init__(
        self,
        bundle: Bundle,
        file: str,
        graph: ModelGraph,
        blocks: Sequence[Block],
        prefixes: tuple[str, ...],
    ) -> None:
        self.bundle, self.file = bundle, file
        self.blocks: list[Block] = []
        self.near_ties: dict[tuple[str, str], int] = {}
        self.feeds: dict[str, dict[str, np.ndarray]] = {phase: {} for phase in PHASES}
        for block in blocks:
            spread, ties = spread_near_ties(block)
            self.feeds[block.phase] |= spread.feeds
            if block.name.startswith(prefixes):
                self.blocks.append(spread)
                self.near_ties[block.name, block.phase] = ties
        outputs = dict.fromkeys(output.value for block in self.blocks for output in block.outputs)
        self.graph = graph
        self.model = self.graph.cut(self.feeds[PHASES[0]], list(outputs))

    def iterations(self) -> list[Iteration]:
        """每个阶段一次。"""
        made = []
        for phase in PHASES:
            outputs = [output for block in self.blocks if block.phase == phase for output in block.outputs]
            want = {output.value: widened(output.want) for output in outputs}
            made.append(Iteration(feeds_for(self.model, self.feeds[phase]), want))
        return made

    def save(self, folder: Path) -> None:
        """存成 Polygraphy 的格式。"""
        save_comparison(folder, self.model, self.graph, self.iterations())

    def cases(self, folder: Path, backend: str, run: Run) -> list[BlockCase]:
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

    def block(self, name: str, phase: str) -> Block:
        """按名字与阶段取一个块，输入补上别的断点上的值（接错了线的块会用到）。"""
        block = next(block for block in self.blocks if (block.name, block.phase) == (name, phase))
        own = {output.value for output in block.outputs}
        feeds = {value: array for value, array in self.feeds[phase].items() if value not in own}
        return replace(block, feeds=feeds)

    def command(self, folder: Path) -> str:
        """复现命令。"""
        manifest = self.bundle.manifest
        _, rest = block_keys(manifest, attention_dtype(manifest))
        default = tolerance(*rest).max_abs
        outputs = [output for block in self.blocks for output in block.outputs]
        return polygraphy_command(folder / GRAPH, folder, default, outputs)
