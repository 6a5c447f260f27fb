"""一次 ``dsx verify`` 里各层级共用的东西；费时的到用时才加载，只加载一次。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from deepseek_export.backend.base import Backend
from deepseek_export.bundle import Bundle, BundleWeights, Manifest
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.parity.checks import Check
from deepseek_export.parity.draft import DraftRun, draft_runs
from deepseek_export.parity.inputs import block_rows
from deepseek_export.parity.oracle import Oracle, ReferenceOracle, make_oracle
from deepseek_export.parity.report import ActivationRange, QuantLoss
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.progress import Progress
from deepseek_export.reference import ReferenceModel, load_draft
from deepseek_export.reference.weights import Rounding
from deepseek_export.runtime import (
    BundleTokenizer,
    DraftSession,
    Generator,
    ModelSession,
    open_session,
    open_speculative,
)


@dataclass
class Context:
    """比较双方与输入。

    Attributes:
        bundle: 被验证的 bundle。
        checkpoint: 对照的检查点。
        model: 同一个方案、同样权重的参考模型。
        rounding: 权重名 → 检查点的值怎么变成 bundle 里的，见 :mod:`~deepseek_export.bundle.roundings`。
        tokenizer: bundle 的，没有就是 ``None``。
        backend: 整个模型在哪里运行。
        rows: 各条 prompt 的 token。
        passage: 测困惑度的文本：文件名与 token；``None`` 不测。
        steps: 续写多少个 token。
        seed: 随机输入的种子。
        progress: 进度。
        notes: 要写进报告的话。
        loss: 量化的损失，由 loss 级写下。
        activations: 激活的范围，由 activations 级写下。
        oracle_name: 基准的名字；还没有加载就是 dsx 参考模型。
        sessions: 打开了的会话，它们有话要说。
    """

    bundle: Bundle
    checkpoint: Checkpoint
    model: ReferenceModel
    rounding: Mapping[str, Rounding]
    tokenizer: BundleTokenizer | None
    backend: Backend
    rows: Sequence[Sequence[int]]
    passage: tuple[str, Sequence[int]] | None
    steps: int
    seed: int
    progress: Progress
    notes: list[str] = field(default_factory=list)
    loss: QuantLoss | None = None
    activations: ActivationRange | None = None
    oracle_name: str = "dsx reference"
    sessions: list[ModelSession | DraftSession] = field(default_factory=list)
    _graphs: dict[str, ModelGraph] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        """bundle 的 manifest。"""
        return self.bundle.manifest

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """一步；:attr:`Check.steps` 说一共几步。"""
        self.progress.advance(0, name)
        yield
        self.progress.advance(1, name)

    def note(self, *lines: str) -> None:
        """写进报告，说过的不再说。"""
        lines = tuple(line.replace("{oracle}", self.oracle_name) for line in lines)
        self.notes += [line for line in dict.fromkeys(lines) if line not in self.notes]

    def graph(self, file: str) -> ModelGraph:
        """bundle 里的一张图，供截取。"""
        if file not in self._graphs:
            self._graphs[file] = ModelGraph(self.bundle, file)
        return self._graphs[file]

    @cached_property
    def block_rows(self) -> list[list[int]]:
        """逐块比较用的等长 token 序列。"""
        return block_rows(self.manifest, self.seed)

    @cached_property
    def draft_runs(self) -> dict[str, DraftRun]:
        """草稿模型的文件名 → 它的参考实现与输入。"""
        manifest = self.manifest
        drafts = [
            load_draft(self.checkpoint, i, self.model, manifest.dtype, self.rounding)
            for i in range(len(manifest.drafts))
        ]
        runs = draft_runs(manifest, self.model, drafts, self.block_rows)
        return {run.entry.file: run for run in runs}

    @cached_property
    def _weights(self) -> BundleWeights:
        return BundleWeights(self.bundle)

    @cached_property
    def generator(self) -> Generator:
        """整个主模型，不投机。"""
        session = open_session(self.backend, self.bundle, self._weights)
        self.sessions.append(session)
        return Generator(session, self.tokenizer, (), session.limits.prefill_chunk)

    @cached_property
    def speculative(self) -> Generator:
        """投机的生成器；有草稿模型才用得着。"""
        generator = open_speculative(
            self.backend,
            self.bundle,
            self._weights,
            self.generator.session,
            self.tokenizer,
            floor=False,  # 校验要一直投机，不因不划算而退回
        )
        assert generator is not None
        self.sessions += generator.drafts
        return generator

    @cached_property
    def oracle(self) -> Oracle:
        """没有舍入的基准。"""
        self.progress.advance(0, "加载基准")
        oracle, missing = make_oracle(self.checkpoint, self.manifest.dtype)
        for line in missing:
            self.progress.note(line)
        self.note(*missing)
        self.oracle_name = oracle.name
        return oracle

    @cached_property
    def rounded(self) -> Oracle:
        """权重与缓存同 bundle 一样舍入的参考模型。"""
        return ReferenceOracle.for_bundle(self.checkpoint, self.manifest, self.rounding)

    def want(self, check: Check) -> Oracle:
        """``check`` 与谁比；不直接与基准比的，报告也要写明基准是谁。"""
        oracle = self.oracle
        return self.rounded if check.against == "rounded" else oracle
