"""``dsx verify``：逐项比较 :func:`~deepseek_export.parity.checks.checks` 列出的，结果写进 ``reports/parity.json``。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from deepseek_export.backend import backend_named
from deepseek_export.backend.base import Backend
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import keeping, write_report
from deepseek_export.bundle.roundings import roundings
from deepseek_export.bundle.source import open_source
from deepseek_export.bundle.stages import StageSet
from deepseek_export.errors import DsxError
from deepseek_export.parity.checks import DEFAULT_STEPS, LEVELS, Check, Level, checks, requested
from deepseek_export.parity.context import Context
from deepseek_export.parity.inputs import prompt_rows, read_passage
from deepseek_export.parity.levels import RUN
from deepseek_export.parity.polygraphy import save_model_comparison
from deepseek_export.parity.report import Case, ParityReport, environment
from deepseek_export.parity.stages import NOT_CUT, stage_cases
from deepseek_export.parity.subgraph import attention_dtype
from deepseek_export.progress import Progress
from deepseek_export.reference import Forms, load_reference
from deepseek_export.runtime import BundleTokenizer


def verify_bundle(
    bundle: Bundle,
    against: Path | str | None = None,
    *,
    levels: Sequence[Level] = LEVELS,
    prompts: Sequence[str] | None = None,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    text: Path | str | None = None,
    backend: str = "ort",
    verify_weights: bool = True,
    progress: Progress | None = None,
    stages: StageSet | None = None,
    whole: Backend | None = None,
) -> ParityReport:
    """验证一个 bundle 与 PyTorch 相等；权重量化过的，另量它比未量化的差多少。

    Args:
        bundle: 要验证的 bundle。
        against: 检查点目录；缺省取 manifest 里记的出处。
        levels: 要比的层级。
        prompts: 文本 prompt；缺省用内置的，没有 tokenizer 时用随机 token。
        steps: tokens 层续写的长度。
        seed: 随机输入的种子。
        text: 量化的 bundle 在这个文件的文本上比困惑度，float16 的在它上面看激活的范围。
        backend: model、tokens 两级在哪里运行；``trt`` 时 op、block 两级与草稿模型仍在 ONNX Runtime 上比，引擎里没有它们的边界，
            bfloat16 的 bundle 就不比这些。
        verify_weights: 先读一遍全部权重，核对 sha256，见 :meth:`~deepseek_export.bundle.Bundle.check_weights`。
        progress: 进度。
        stages, whole: ``bundle`` 是一套 stage 的整个模型时：哪一套，以及把它连起来跑的后端；``backend`` 跑单独的每个 stage。

    Returns:
        报告；已写进 ``reports/parity.json``。

    Raises:
        DsxError: ``DSX-E601`` 找不到检查点；``DSX-E602`` 检查点与导出时不是同一个；``DSX-E603`` transformers 太旧；
            ``DSX-E604`` 给的 prompt 用不了；``DSX-E606`` ``text`` 用不了；``DSX-E607`` 没有这个层级，或要的层级没有可比的；
            ``DSX-E406`` / ``DSX-E408`` / ``DSX-E413`` 权重被改过，或没法证明；``DSX-E412`` 校验的时候 bundle 被换掉；``DSX-E321`` 要比的只能在
            ONNX Runtime 上比，而 bundle 是 bfloat16；``DSX-E918`` / ``DSX-E920`` ``trt`` 而没有 GPU、没有引擎；
            ``DSX-E404`` / ``DSX-E405`` 报告写不下，是 :class:`~deepseek_export.errors.UnwrittenReport`，带着比完的结果。
    """
    progress = progress or Progress()
    levels = requested(levels)
    alone = backend_named(backend)
    chosen = whole or alone
    bundle = chosen.prepared(bundle)  # 前面的层级要好几分钟，不该跑完才说没有 GPU、没有引擎
    manifest = bundle.manifest
    if not {"model", "tokens"} & set(levels):
        backend_named("ort").prepared(bundle)  # 断开的图只在它上面比
    if verify_weights:
        (bundle if stages is None else stages).check_weights(progress)
    checkpoint = open_source(bundle, against)
    tokenizer = BundleTokenizer.load(bundle.path)
    rows = prompt_rows(manifest, tokenizer, prompts, steps, seed)
    passage = None if text is None else read_passage(bundle, tokenizer, Path(text))

    progress.start("加载参考模型")
    forms = Forms.for_reference(manifest.profile)
    holders = () if stages is None else [Bundle.open(directory) for directory in stages.directories]
    rounding = roundings(bundle, holders)
    model = load_reference(checkpoint, forms, manifest.dtype, rounding)
    context = Context(
        bundle, checkpoint, model, rounding, tokenizer, chosen, rows, passage, steps, seed, progress
    )
    lengths = [len(row) for row in rows]
    planned = checks(manifest, chosen.limits(bundle), levels, lengths, attention_dtype(manifest))
    if stages is not None:
        planned = [_without_cuts(check, manifest.main.file) for check in planned]
    if all(check.skipped for check in planned):
        raise DsxError(
            "DSX-E607",
            f"{bundle.path} 在 {'、'.join(levels)} 级没有可比的：{planned[-1].notes[-1]}",
            "加上 model 级",
        )
    cases: list[Case] = []
    for check in planned:
        if not check.skipped:
            progress.start(f"校验 {check.level}：{check.graph}", check.steps)
            cases += RUN[check.level](check, context)
        context.note(*check.notes)
    if stages is not None and "model" in levels:
        progress.start("校验每个 stage", len(stages.directories))
        cases += stage_cases(stages, alone, context)
    context.note(*(note for session in context.sessions for note in session.notes))
    compared = {check.level for check in planned if not check.skipped}
    report = ParityReport(
        bundle=str(bundle.path),
        checkpoint=str(checkpoint.path),
        profile=manifest.profile.name,
        target=manifest.target,
        dtype=manifest.dtype,
        oracle=context.oracle_name,
        environment=environment(),
        levels=[level for level in get_args(Level) if level in compared],
        cases=cases,
        notes=context.notes,
        loss=context.loss,
        activations=context.activations,
    )
    if not manifest.quantization and stages is None:
        with keeping(report):
            report.polygraphy = save_model_comparison(bundle, model, context.block_rows)
    bundle.check_in_place()  # 换掉了的，前面读的未必是同一个，报告也不该写进新的里
    with keeping(report):
        write_report(bundle.path / "reports/parity.json", report.to_json())
    return report


def _without_cuts(check: Check, main: str) -> Check:
    """要从整张图里截的不比。"""
    whole = check.graph == main and check.level in ("model", "tokens")
    return check if whole else replace(check, notes=(NOT_CUT,), skipped=True)
