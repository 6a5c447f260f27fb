"""``dsx verify``：四个层级依次比，结果写进 ``reports/parity.json``。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_export.backend import backend_named
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.disk import write_report
from deepseek_export.bundle.source import open_source
from deepseek_export.errors import DsxError
from deepseek_export.parity.blocks import block_cases, block_rows, main_block_count, main_blocks
from deepseek_export.parity.draft import draft_cases, draft_runs
from deepseek_export.parity.logits import narrow_cache
from deepseek_export.parity.loss import loss_cases, read_passage
from deepseek_export.parity.model import cache_loss_cases, model_cases
from deepseek_export.parity.ops import op_cases
from deepseek_export.parity.oracle import ReferenceOracle, make_oracle
from deepseek_export.parity.polygraphy import save_model_comparison
from deepseek_export.parity.report import LEVELS, Case, Level, ParityReport, environment
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tokens import token_cases
from deepseek_export.progress import Progress
from deepseek_export.reference import Forms, load_draft, load_reference
from deepseek_export.runtime import (
    BundleTokenizer,
    Generator,
    open_session,
    open_speculative,
)

#: 有 tokenizer 时用真文本：中文、英文、代码，长度不等。
DEFAULT_PROMPTS = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)",
)
_RANDOM_LENGTHS = (29, 16, 5)
_MAX_PROMPT = 96
DEFAULT_STEPS = 64


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
) -> ParityReport:
    """验证一个 bundle 与 PyTorch 相等；权重量化过的，另量它比未量化的差多少。

    Args:
        bundle: 要验证的 bundle。
        against: 检查点目录；缺省取 manifest 里记的出处。
        levels: 要比的层级。
        prompts: 文本 prompt；缺省用内置的，没有 tokenizer 时用随机 token。
        steps: tokens 层续写的长度。
        seed: 随机输入的种子。
        text: 在这个文件的文本上比困惑度；只用于权重量化过的 bundle。
        backend: model、tokens 两级在哪里运行；``trt`` 时 op、block 两级与草稿模型仍在 ONNX Runtime 上比，引擎里没有它们的边界，
            bfloat16 的 bundle 就不比这些。
        verify_weights: 先读一遍全部权重，核对 sha256，见 :meth:`~deepseek_export.bundle.Bundle.check_weights`。
        progress: 进度。

    Returns:
        报告；已写进 ``reports/parity.json``。

    Raises:
        DsxError: ``DSX-E601`` 找不到检查点；``DSX-E602`` 检查点与导出时不是同一个；``DSX-E603`` transformers 太旧；
            ``DSX-E604`` 给的 prompt 用不了；``DSX-E606`` ``text`` 用不了；``DSX-E406`` / ``DSX-E408`` / ``DSX-E413`` 权重被改过，
            或没法证明；``DSX-E412`` 校验的时候 bundle 被换掉；``DSX-E321`` 要比的只能在
            ONNX Runtime 上比，而 bundle 是 bfloat16；``DSX-E918`` / ``DSX-E920`` ``trt`` 而没有 GPU、没有引擎；
            ``DSX-E404`` / ``DSX-E405`` 报告写不下。
    """
    progress = progress or Progress()
    chosen = backend_named(backend)
    bundle = chosen.prepared(bundle)  # 前面的层级要好几分钟，不该跑完才说没有 GPU、没有引擎
    manifest = bundle.manifest
    levels = [level for level in LEVELS if level in levels]
    cases: list[Case] = []
    notes: list[str] = []
    on_onnxruntime = manifest.dtype != "bfloat16"
    if not on_onnxruntime:
        levels = [level for level in levels if backend == "trt" and level in ("model", "tokens")]
        if not levels:
            backend_named("ort").prepared(bundle)
        notes.append(
            "bfloat16 只在引擎上比整个模型：op、block 与草稿模型的逐块比较要 ONNX Runtime，它没有 bfloat16 的算子"
        )
    if verify_weights:
        bundle.check_weights(progress)
    checkpoint = open_source(bundle, against)
    tokenizer = BundleTokenizer.load(bundle.path)
    rows = _rows(bundle, tokenizer, prompts, steps, seed)
    passage = None if text is None else read_passage(bundle, tokenizer, Path(text))

    progress.start("加载参考模型")
    forms = Forms.for_reference(manifest.profile)
    model = load_reference(checkpoint, forms, manifest.dtype, manifest.formats)
    graph = ModelGraph(bundle)
    if "op" in levels:
        progress.start("校验 op")
        for entry in manifest.graphs:
            opened = graph if entry.role == "main" else ModelGraph(bundle, entry.file)
            cases += op_cases(bundle, checkpoint, entry, opened, seed, lambda name: progress.advance(0, name))
        if not cases:
            notes.append("op 层没有可比的：这个方案没有 dsx:: 算子")
    tokens = block_rows(manifest, seed)
    if "block" in levels:
        progress.start("校验 block", main_block_count(manifest))
        blocks = main_blocks(manifest, model, tokens)
        cases += block_cases(graph, blocks, lambda name: progress.advance(1, name))
    if manifest.drafts and on_onnxruntime and ("block" in levels or "model" in levels):
        progress.start("校验 MTP 草稿模型", len(manifest.drafts))
        drafts = [
            load_draft(checkpoint, i, model, manifest.dtype, manifest.formats)
            for i in range(len(manifest.drafts))
        ]
        runs = draft_runs(manifest, model, drafts, tokens)
        cases += draft_cases(bundle, runs, levels, lambda name: progress.advance(1, name))
    oracle_name, loss = "dsx reference", None
    if "model" in levels or "tokens" in levels:
        progress.start("加载基准与 bundle")
        oracle, missing = make_oracle(checkpoint, manifest.dtype)
        oracle_name = oracle.name
        for line in missing:
            progress.note(line)
        notes += missing
        weights, speculative = BundleWeights(bundle), None
        session = open_session(chosen, bundle, weights)
        generator = Generator(session, tokenizer, (), session.limits.prefill_chunk)
        if session.limits.max_batch is not None and session.limits.max_batch < len(rows):
            notes.append(
                f"引擎的批大小至多 {session.limits.max_batch}：model、tokens 两级只比前 {session.limits.max_batch} 条"
            )
            rows = rows[: session.limits.max_batch]
        narrow = narrow_cache(manifest)
        same = oracle
        if manifest.quantization is not None or narrow is not None:
            same = ReferenceOracle.for_bundle(checkpoint, manifest)
        advance = lambda name: progress.advance(0, name)  # noqa: E731
        if "model" in levels:
            progress.start("校验 model")
            limit = session.limits.logits_rows
            if limit is not None and limit < max(map(len, rows)):
                notes.append(f"引擎一次至多给 {limit} 行 logits：model 级里一次走完的，其实 {limit} 个一段")
            cases += model_cases(manifest, generator, same, model, rows, advance)
        if manifest.quantization is not None and not on_onnxruntime:
            levels = [level for level in levels if level != "tokens"]
            notes.append(
                "量化的 bfloat16 bundle 只比 model：换一个 token 不算错；量化的代价要逐层看路由，引擎里看不到"
            )
        elif manifest.quantization is not None:
            progress.start("量化损失")
            levels = [level for level in levels if level != "tokens"] + ["loss"]
            notes.append("量化的 bundle 不逐 token 比：权重变了，换一个 token 不算错；代价见 loss 一行")
            plain = load_reference(checkpoint, forms, manifest.dtype)
            more, loss = loss_cases(bundle, generator, graph, oracle, plain, rows, passage, advance)
            cases += more
        elif narrow is not None and "model" in levels:
            progress.start("窄缓存的损失")
            levels.append("loss")
            notes.append(
                f"缓存是 {narrow}，比模型的 {manifest.dtype} 窄：model、tokens 的基准是同样缓存的 dsx 参考模型，"
                f"舍入的代价（对 {oracle.name}）见 loss 一行"
            )
            cases += cache_loss_cases(manifest, generator, oracle, model, rows, advance)
        if "tokens" in levels:
            progress.start("校验 tokens")
            speculative = open_speculative(chosen, bundle, weights, session, tokenizer)
            if speculative is not None and speculative.verify_mode == "rejection":
                speculative = None
                notes.append(
                    "mtp.verify=rejection 的输出是随机的，不与 greedy 比；分布由 specs/mtp 的测试证明"
                )
            if speculative is not None:
                speculative.floor = None  # 校验要一直投机，不因不划算而退回
            cases += token_cases(manifest, generator, speculative, same, model, rows, steps, advance)
        drafts_used = [] if speculative is None else speculative.drafts
        notes += dict.fromkeys(note for s in (session, *drafts_used) for note in s.notes)
    report = ParityReport(
        bundle=str(bundle.path),
        checkpoint=str(checkpoint.path),
        profile=manifest.profile.name,
        target=manifest.target,
        dtype=manifest.dtype,
        oracle=oracle_name,
        environment=environment(),
        levels=list(levels),
        cases=cases,
        notes=notes,
        loss=loss,
        polygraphy=None if manifest.quantization else save_model_comparison(bundle, model, tokens),
    )
    bundle.check_in_place()  # 换掉了的，前面读的未必是同一个，报告也不该写进新的里
    write_report(bundle.path / "reports/parity.json", report.to_json())
    return report


def _rows(bundle, tokenizer, prompts, steps: int, seed: int) -> list[list[int]]:
    """要比的 token 序列；截到模型的最大长度以内。"""
    config = bundle.manifest.model
    limit = min(_MAX_PROMPT, config.max_position_embeddings - steps)
    if limit < 1:
        raise DsxError(
            "DSX-E604",
            f"续写 {steps} 个 token 放不进 max_position_embeddings = {config.max_position_embeddings}",
            "减小 --steps",
        )
    if prompts and tokenizer is None:
        raise DsxError(
            "DSX-E604", "bundle 没有 tokenizer，用不了文本 prompt", "去掉 --prompt，用随机 token 校验"
        )
    if tokenizer is not None:
        rows = [tokenizer.encode(text)[:limit] for text in prompts or DEFAULT_PROMPTS]
    else:
        rng = np.random.default_rng(seed)
        rows = [rng.integers(0, config.vocab_size, min(n, limit)).tolist() for n in _RANDOM_LENGTHS]
    if not all(rows):
        raise DsxError("DSX-E604", "有一条 prompt 编码后是空的", "换一条不为空的 --prompt")
    return rows
