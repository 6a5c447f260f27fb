"""检查点 → bundle：``export`` 与 ``export_stages``。"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from deepseek_export.bundle import Bundle, WeightsMode
from deepseek_export.bundle.disk import check_free_space, check_output, output_lock, output_path
from deepseek_export.bundle.stages import STAGES_FILE, StageSet, requested_cuts
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cpu_library import LIBRARY_TARGET
from deepseek_export.errors import DsxError
from deepseek_export.extras import require_export
from deepseek_export.paths import path_kind
from deepseek_export.profile import OptimizationProfile, resolve_profile
from deepseek_export.progress import Progress
from deepseek_export.records import ModelDtype
from deepseek_export.runtime import BundleTokenizer

# 编译的一半用到时才导入：加载与生成不该等 torch、onnx。
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deepseek_export.bundle.description import ExportSettings


def export(
    checkpoint: Path | str | PreTrainedModel,
    out: Path | str,
    profile: str | Path | OptimizationProfile = "baseline",
    *,
    target: str = "portable",
    dtype: ModelDtype = "float32",
    weights: WeightsMode = "packed",
    hash_weights: bool = True,
    quantization: Quantization | Literal["checkpoint"] | None = None,
    calibrate: Path | str | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    check: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """把检查点编译成 bundle。

    Args:
        checkpoint: Hugging Face 检查点目录（config.json + safetensors），或加载好的 transformers 模型对象。模型对象先写成
            临时的检查点目录，之后走同一条路；事后 ``verify`` 要用 ``against`` 指向它 ``save_pretrained`` 出来的目录。
        out: 输出目录；要么完整出现，要么不出现。
        profile: 方案名（``mla+moe``）、TOML 文件或方案对象；缺省一切关闭。
        target: ``portable``（任何 ONNX Runtime）、``ort-cpu``、``tensorrt`` 或 ``tensorrt-rtx``。
        dtype: ``float32``、``float16``，TensorRT 的目标另有 ``bfloat16``。
        weights: ``packed`` 写成自包含的文件夹；``reference`` 不写权重，指进检查点自己的文件。
        hash_weights: 见 :class:`~deepseek_export.bundle.description.ExportSettings`。
        quantization: 只量化权重（``Quantization(kind="int8", block=32)``），目标是 ``ort-cpu``、``tensorrt`` 或 ``tensorrt-rtx``；``"checkpoint"``
            是 4 位的检查点照发布的码，其余保持浮点；缺省不量化，4 位的还原成浮点。
        calibrate: 按这个文本文件校准 int4 的码（GPTQ），预测离没有量化的更近；只用于 ``int4``、打包的权重，目录里要有 tokenizer。
        overrides: ``mla.form=absorb`` 形式的覆盖。
        overwrite: 允许替换已有的 bundle。
        check: 改名之前先校验（全部层级）。不过时按 ``fallback.on_drift``：``refuse`` 不产生 bundle；``naive`` 改用 naive
            形式的 MLA 重导一次、再校验，并记进 manifest。
        tokenizer: 只在给模型对象时用：一并放进 bundle。目录里的 tokenizer 总会带上。
        progress: 进度显示。

    Raises:
        DsxError: 见各层；``DSX-E605`` 校验不过；``DSX-E004`` 设了 ``fallback.on_drift=naive`` 而没有 ``check``；
            ``DSX-E810`` 模型对象导出不了，或 ``tokenizer`` 与目录同时给出；``DSX-E501`` 目录里的 tokenizer 读不了；``DSX-E660`` 到 ``DSX-E663`` 校准不了。
    """
    require_export("导出")
    from deepseek_export.bundle.description import ExportSettings
    from deepseek_export.bundle.export import export_bundle
    from deepseek_export.checkpoint.int4_published import as_published

    resolved = resolve_profile(profile, overrides)
    if resolved.fallback.on_drift == "naive" and not check:
        raise DsxError(
            "DSX-E004",
            "fallback.on_drift=naive 只在导出时校验才起作用，而这次没有要求校验",
            "加 --check（Python 里 check=True），或去掉 fallback.on_drift",
        )
    with _checkpoint_directory(checkpoint, out, weights, overwrite, tokenizer) as source:
        found = None
        if path_kind(Path(source) / "tokenizer.json", "DSX-E101") == "file":
            found = BundleTokenizer.load(source)  # 坏的当场说：bundle 的文件有哈希，导出之后换不了
        settings = ExportSettings(
            resolved,
            target,
            dtype,
            weights,
            hash_weights,
            as_published(quantization, source, resolved, affine=target == LIBRARY_TARGET),
        )
        if calibrate is not None:
            settings = _with_calibration(settings, Path(source), Path(calibrate), found)
        write = partial(export_bundle, source, out, overwrite=overwrite, progress=progress)
        if not check:
            return write(settings)
        accept = partial(_require_parity, progress=progress)
        try:
            return write(settings, accept=accept)
        except ParityRefused as refused:
            if resolved.fallback.on_drift != "naive":
                raise
            note = f"mla.form={resolved.mla.form} 校验不过，按 fallback.on_drift=naive 退回 naive：{refused.what}"
        mla = resolved.mla.model_copy(update={"form": "naive"})
        fallback = resolved.fallback.model_copy(update={"on_drift": "refuse"})
        naive = resolved.model_copy(update={"mla": mla, "fallback": fallback})
        return write(replace(settings, profile=naive), accept=accept, notes=(note,))


def _with_calibration(
    settings: ExportSettings, checkpoint: Path, text: Path, tokenizer: BundleTokenizer | None
) -> ExportSettings:
    """读校准的文本；不能校准的，读之前就说。"""
    from deepseek_export.bundle.calibrated import check_calibration
    from deepseek_export.calibration import read_calibration
    from deepseek_export.checkpoint import load_model_config

    check_calibration(settings)
    if tokenizer is None:
        raise DsxError(
            "DSX-E663",
            f"{checkpoint} 里没有 tokenizer.json，编码不了 {text}",
            "把模型的 tokenizer.json 放进检查点目录，或去掉 --calibrate",
        )
    config = load_model_config(checkpoint)
    limits = (config.vocab_size, config.max_position_embeddings)
    calibration = read_calibration(text, tokenizer.encode, tokenizer.bos_id, *limits)
    return replace(settings, calibration=calibration)


class ExportOptions(TypedDict, total=False):
    """:func:`export_stages` 原样交给 :func:`export` 的参数，意思与缺省都同那里。"""

    target: str
    dtype: ModelDtype
    weights: WeightsMode
    hash_weights: bool
    quantization: Quantization | Literal["checkpoint"] | None
    calibrate: Path | str | None
    check: bool


def export_stages(
    checkpoint: Path | str | PreTrainedModel,
    out: Path | str,
    stages: int | str,
    profile: str | Path | OptimizationProfile = "baseline",
    *,
    balance: Literal["bytes", "time"] = "bytes",
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    exported: Callable[[Bundle], None] = lambda bundle: None,
    progress: Progress | None = None,
    **options: Unpack[ExportOptions],
) -> StageSet:
    """把检查点编译成一套 stage：先在旁边导出整个的，再切开，切好就删。打包的因此要放得下两份权重。

    Args:
        checkpoint, profile, overrides, tokenizer, progress, **options: 见 :func:`export`；``check`` 校验的是切开之前的。
        out: 这套 stage 的目录；要么完整出现，要么不出现。
        stages, balance: 见 :func:`split`；动工之前就核对。
        overwrite: 允许替换已有的一套 stage。
        exported: 整个的导出好了、还没有切的时候调用。

    Raises:
        DsxError: 同 :func:`export` 与 :func:`split`。
    """
    require_export("导出")
    from deepseek_export.bundle.description import ExportSettings
    from deepseek_export.bundle.export import packed_bytes
    from deepseek_export.bundle.foreign import check_stages_replaceable
    from deepseek_export.bundle.split import split_bundle
    from deepseek_export.checkpoint import Checkpoint
    from deepseek_export.checkpoint.int4_published import as_published

    resolved = resolve_profile(profile, overrides)
    settings = ExportSettings(
        resolved,
        options.get("target", "portable"),
        options.get("dtype", "float32"),
        options.get("weights", "packed"),
    )
    check_stages_replaceable(output_path(out), overwrite)
    with output_lock(out, STAGES_FILE) as out:
        check_stages_replaceable(out, overwrite)  # 占住之前，别人可能刚好写完
        whole = out.with_name(f".{out.name}.whole")
        try:
            with _checkpoint_directory(checkpoint, whole, settings.weights, True, tokenizer) as source:
                opened = Checkpoint.open(source)
                requested_cuts(stages, opened.config.num_hidden_layers)
                affine = settings.target == LIBRARY_TARGET
                chosen = as_published(options.get("quantization"), source, resolved, affine)
                settings = replace(settings, quantization=chosen)
                if settings.weights == "packed":
                    check_free_space(out, 2 * packed_bytes(opened, settings))
                bundle = export(source, whole, resolved, overwrite=True, progress=progress, **options)
            exported(bundle)
            return split_bundle(whole, out, stages, balance=balance, overwrite=overwrite, progress=progress)
        finally:
            shutil.rmtree(whole, ignore_errors=True)


def _checkpoint_directory(
    checkpoint: Path | str | PreTrainedModel,
    out: Path | str,
    weights: WeightsMode,
    overwrite: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> AbstractContextManager[Path | str]:
    """要导出的检查点目录；模型对象先写成一个临时的，用完就删。"""
    if isinstance(checkpoint, (str, Path)):
        if tokenizer is not None:
            raise DsxError("DSX-E810", "给了目录，又给了 tokenizer", "去掉 tokenizer：目录里的会带上")
        return nullcontext(checkpoint)
    # 到这里才导入：transformers 是可选依赖。
    from deepseek_export.integration.model_export import saved_checkpoint

    if weights != "packed":
        raise DsxError(
            "DSX-E810",
            f"weights={weights!r}：模型对象没有可以指进去的文件",
            "去掉 weights，或先 save_pretrained 再从目录导出",
        )
    out = output_path(out)
    check_output(out, overwrite)
    return saved_checkpoint(checkpoint, out, tokenizer)


class ParityRefused(DsxError):
    """导出时的校验不过：临时目录里的 bundle 作废，``fallback.on_drift`` 决定要不要换个形式再来。"""


def _require_parity(directory: Path, progress: Progress | None) -> None:
    from deepseek_export.parity.verify import verify_bundle

    # 打包的刚写好、刚算过；按引用的由加载与 verify 来读。
    report = verify_bundle(Bundle.open(directory), verify_weights=False, progress=progress)
    failure = report.first_failure
    if failure is not None:
        raise ParityRefused(
            "DSX-E605",
            f"{failure.level} 层 {failure.name}：{failure.note}",
            "用 dsx verify 看全表；可试 --dtype float32，或 --set mla.form=naive",
        )
