"""Python 接口：``export``、``load``、``pack``、``build``、``verify``、``compare``。命令行只是它们的一层薄壳。"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from deepseek_export.backend import backend_named
from deepseek_export.bundle import Bundle, WeightsMode, read_bundle
from deepseek_export.bundle.disk import check_free_space, check_output, output_lock, output_path
from deepseek_export.bundle.stages import STAGES_FILE, StageSet, is_stage_set, requested_cuts
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cpu_library import LIBRARY_TARGET
from deepseek_export.errors import DsxError
from deepseek_export.extras import require_export
from deepseek_export.model import CompiledModel
from deepseek_export.parity.checks import DEFAULT_STEPS, LEVELS, Level
from deepseek_export.paths import path_kind
from deepseek_export.profile import OptimizationProfile, resolve_profile
from deepseek_export.progress import Progress
from deepseek_export.records import ModelDtype
from deepseek_export.runtime import BundleTokenizer

# 编译与校验的一半用到时才导入：加载与生成不该等 torch、onnx。
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deepseek_export.bundle.description import ExportSettings
    from deepseek_export.engine.build import BuiltEngine
    from deepseek_export.engine.flavour import FlavourName
    from deepseek_export.engine.triton import TritonModel
    from deepseek_export.parity.compare import ComparisonReport
    from deepseek_export.parity.report import ParityReport


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
        calibrate: 按这个文本文件校准 int4 的码（GPTQ），困惑度的损失更小；只用于 ``int4``、打包的权重，目录里要有 tokenizer。
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

    # 权重刚写好、刚算过，不再读一遍。
    report = verify_bundle(Bundle.open(directory), verify_weights=False, progress=progress)
    failure = report.first_failure
    if failure is not None:
        raise ParityRefused(
            "DSX-E605",
            f"{failure.level} 层 {failure.name}：{failure.note}",
            "用 dsx verify 看全表；可试 --dtype float32，或 --set mla.form=naive",
        )


def load(
    bundle: Path | str,
    threads: int | None = None,
    backend: str = "ort",
    *,
    speculative_floor: bool = True,
    verify_weights: bool = False,
    progress: Progress | None = None,
    cluster: ClusterSettings | None = None,
) -> CompiledModel:
    """加载 bundle，准备生成；别人正在替换它的话，得到的是旧的或新的，不会一半一半。

    一套 stage（``dsx split`` 的输出目录）同样加载：在本机上给每个 stage 起一个进程，``CompiledModel.close`` 停掉它们。

    Args:
        bundle: ``export`` 的输出目录，或 ``split`` 的。
        threads: 线程数；缺省由 ONNX Runtime 决定。
        backend: ``ort`` 是 ONNX Runtime CPU；``trt`` 是 ``dsx build`` 为当前 GPU 建的引擎。
        speculative_floor: 投机解码不划算时退回普通解码；``False`` 一直投机。没有草稿模型时不起作用。
        verify_weights: 先读一遍全部权重，核对 sha256；缺省不读，只核对其余的文件（按引用的另抽查每个张量的几处）。
        progress: 核对权重的进度。
        cluster: 流水线的参数；只对一套 stage 起作用。

    Raises:
        DsxError: 4xx bundle 有问题，其中 ``DSX-E412`` 是接连几次读到一半被换掉；``DSX-E121`` 结束生成的 token 不能用；``DSX-E507`` / ``DSX-E508`` 模型加载失败；``DSX-E917`` / ``DSX-E918`` / ``DSX-E920``
            引擎用不了；一套 stage 另有 ``DSX-E741``，不完整，``DSX-E744``，进程起不来。
    """
    if is_stage_set(bundle):
        stages = StageSet.open(bundle)
        if verify_weights:
            stages.check_weights(progress or Progress())
        pipeline = PipelineBackend(stages, backend_named(backend), cluster)
        return CompiledModel(stages.bundle, threads, pipeline, speculative_floor)

    def read(opened: Bundle) -> CompiledModel:
        if (stage := opened.manifest.stage) is not None and stage.count > 1:
            raise DsxError(
                "DSX-E748",
                f"{opened.path} 是 {stage.count} 个 stage 里的第 {stage.index} 个，单独生成不了",
                "给整套 stage 的目录（里面有 stages.json）",
            )
        if verify_weights:
            opened.check_weights(progress or Progress())
        return CompiledModel(opened, threads, backend, speculative_floor)

    return read_bundle(bundle, read)


def pack(bundle: Path | str, *, verify_weights: bool = True, progress: Progress | None = None) -> Bundle:
    """把按引用的 bundle 变成自包含的；见 :func:`~deepseek_export.bundle.pack.pack_bundle`。"""
    require_export("打包")
    from deepseek_export.bundle.pack import pack_bundle

    return pack_bundle(bundle, progress, verify_weights=verify_weights)


def pack_stages(
    stages: Path | str, *, verify_weights: bool = True, progress: Progress | None = None
) -> StageSet:
    """把一套按引用的 stage 变成自包含的；见 :func:`~deepseek_export.bundle.pack.pack_stages`。"""
    require_export("打包")
    from deepseek_export.bundle.pack import pack_stages

    return pack_stages(stages, progress, verify_weights=verify_weights)


def pack_triton(
    bundle: Path | str,
    repository: Path | str,
    name: str | None = None,
    *,
    slots: int = 8,
    context: int | None = None,
    engine: str | None = None,
    overwrite: bool = False,
    verify_weights: bool = True,
    progress: Progress | None = None,
) -> TritonModel:
    """写成 Triton Inference Server 的模型仓库里的一个模型；参数见 :func:`~deepseek_export.engine.triton.write_triton`，名字缺省是目录名。"""
    require_export("写 Triton 的模型仓库")
    from deepseek_export.engine.triton import write_triton

    opened = Bundle.open(bundle)
    with opened.steady():
        if verify_weights:
            opened.check_weights(progress or Progress())
        return write_triton(
            opened,
            Path(repository),
            opened.path.resolve().name if name is None else name,
            slots=slots,
            context=context,
            engine=engine,
            overwrite=overwrite,
        )


def split(
    bundle: Path | str,
    out: Path | str,
    stages: int | str,
    *,
    balance: Literal["bytes", "time"] = "bytes",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> StageSet:
    """把 bundle 在层的边上切成一套 stage；见 :func:`~deepseek_export.bundle.split.split_bundle`。"""
    require_export("切分")
    from deepseek_export.bundle.split import split_bundle

    return split_bundle(bundle, out, stages, balance=balance, overwrite=overwrite, progress=progress)


def build(
    bundle: Path | str,
    sms: Sequence[int],
    *,
    flavour: FlavourName | None = None,
    shapes: str = "",
    checkpoint: Path | str | None = None,
    verify_weights: bool = True,
    progress: Progress | None = None,
) -> list[BuiltEngine]:
    """为几种 SM 各建一个 TensorRT 引擎；``rtx`` 不需要 GPU。

    Args:
        bundle: ``export`` 的输出目录；目标不是 TensorRT 的、float32 的，由检查点另导出一份来建，见
            :func:`~deepseek_export.engine.derived.buildable_bundle`。一套 stage 则每个 stage 建一个，见
            :func:`~deepseek_export.engine.stages.build_stages`。
        sms: 目标计算能力，例如 ``[89, 120]``；重复的只建一次。一套 stage 给一个，各 stage 都用；或一个 stage 一个。
        flavour: ``rtx`` 或 ``tensorrt``；缺省用装了的那个，先看 ``rtx``。
        shapes: 优化配置的形状，写法同 ``--profile-shapes``；缺省见 :class:`~deepseek_export.engine.shapes.ProfileShapes`。
        checkpoint: 要另导出时的检查点目录；缺省取 manifest 里记的出处。
        verify_weights: 先读一遍全部权重，核对 sha256。
        progress: 进度。

    Returns:
        每种 SM（一套 stage 是每个 stage）一个，按次序；``bundle`` 属性是实际由之建成的那个。

    Raises:
        DsxError: ``DSX-E910`` / ``DSX-E911`` 没有装 TensorRT 或缺库；4xx bundle 有问题；``DSX-E919`` 形状不对；``DSX-E912`` 有一种 SM
            建不了，都没有开始；``DSX-E735`` / ``DSX-E736`` 是一套 stage 的，图不能直接建、SM 的个数不对；其余见 ``buildable_bundle`` 与 :func:`~deepseek_export.engine.build.build_engine`。
    """
    require_export("建引擎")
    from deepseek_export.engine.build import build_engine
    from deepseek_export.engine.derived import buildable_bundle
    from deepseek_export.engine.flavour import check_arch, choose
    from deepseek_export.engine.flavour import load as load_tensorrt
    from deepseek_export.engine.shapes import ProfileShapes
    from deepseek_export.engine.stages import build_stages

    chosen = choose(flavour)
    wanted = list(dict.fromkeys(sms))
    stages = StageSet.open(bundle) if is_stage_set(bundle) else None
    opened = Bundle.open(bundle) if stages is None else stages.bundle
    parsed = ProfileShapes.parse(shapes, opened.manifest.model.max_position_embeddings)
    # 都先看一遍：不要建好前几个才发现后面的建不了。
    for sm in wanted:
        check_arch(chosen, load_tensorrt(chosen), sm)
    if stages is not None:
        if checkpoint is not None:
            (progress or Progress()).note("一套 stage 不另导出，--checkpoint 用不到")
        return build_stages(stages, sms, chosen, parsed, progress, verify_weights=verify_weights)
    source = buildable_bundle(opened, chosen, checkpoint, progress, verify_weights=verify_weights)
    return [build_engine(source, sm, chosen, parsed, progress) for sm in wanted]


def verify(
    bundle: Path | str,
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
    """证明 bundle 与 PyTorch 相等；参数见 :func:`~deepseek_export.parity.verify.verify_bundle`。

    一套 stage 连起来比 model、tokens 两级，每个 stage 再单独比。
    """
    require_export("校验")
    from deepseek_export.parity.verify import verify_bundle

    run = partial(
        verify_bundle,
        against=against,
        levels=levels,
        prompts=prompts,
        steps=steps,
        seed=seed,
        text=text,
        backend=backend,
        verify_weights=verify_weights,
        progress=progress,
    )
    if is_stage_set(bundle):
        stages = StageSet.open(bundle)
        with PipelineBackend(stages, backend_named(backend)) as pipeline:
            return run(stages.bundle, stages=stages, whole=pipeline)
    opened = Bundle.open(bundle)
    with opened.steady():
        return run(opened)


def compare(
    bundle: Path | str,
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
    """PyTorch 与各后端逐块比；参数见 :func:`~deepseek_export.parity.compare.compare_bundle`。"""
    require_export("逐块比较")
    from deepseek_export.parity.compare import compare_bundle

    opened = Bundle.open(bundle)
    with opened.steady():
        return compare_bundle(
            opened,
            against,
            backends=backends,
            blocks=blocks,
            bisect=bisect,
            folder=folder,
            seed=seed,
            verify_weights=verify_weights,
            progress=progress,
        )
