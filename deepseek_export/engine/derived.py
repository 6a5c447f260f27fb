"""任意一个 bundle → 建得了引擎的 bundle：目标不是 TensorRT 的由检查点再导出一份，放在它自己的 ``engines/bundle/`` 里。

那一份是完整的 bundle：引擎在它的 ``engines/`` 里，``dsx verify``、``dsx compare``、``dsx pack`` 都能直接用它。
"""

from __future__ import annotations

import shlex
from pathlib import Path

from deepseek_export.bundle import Bundle, Manifest
from deepseek_export.bundle.by_reference import UNHASHED
from deepseek_export.bundle.description import ExportSettings
from deepseek_export.bundle.export import export_bundle
from deepseek_export.bundle.source import open_source
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.engine.flavour import Flavour
from deepseek_export.engine.record import ENGINES
from deepseek_export.errors import DsxError
from deepseek_export.profile import DsaSection, OptimizationProfile
from deepseek_export.progress import Progress
from deepseek_export.records import TENSORRT_TARGETS, ModelDtype

_FOLDER, _OPTION = "bundle", "--checkpoint"


def unbuildable_reason(manifest: Manifest) -> str | None:
    """这个 bundle 的图为什么不能直接拿去建引擎，全部原因；能建的是 ``None``。"""
    reasons = []
    if manifest.target not in TENSORRT_TARGETS:
        reasons.append(f"目标是 {manifest.target}（图没有下沉到 TensorRT）")
    if manifest.dtype == "float32":
        reasons.append("是 float32（插件核与融合注意力都没有 float32 的实现）")
    return "，".join(reasons) or None


def check_buildable(bundle: Bundle) -> None:
    """这个 bundle 的图能直接拿去建引擎吗。

    Raises:
        DsxError: ``DSX-E913``。
    """
    reason = unbuildable_reason(bundle.manifest)
    if reason is not None:
        todo = (
            f"dsx build {bundle.path} --arch smXY 由检查点另导出一份，放在 {derived_folder(bundle)}；用那一份"
        )
        raise DsxError("DSX-E913", f"{bundle.path}：{reason}", todo)


def check_stage_buildable(bundle: Bundle) -> None:
    """一个 stage 的图能直接拿去建引擎吗：由检查点另导出的是整个模型，替不了它。

    Raises:
        DsxError: ``DSX-E735``。
    """
    reason = unbuildable_reason(bundle.manifest)
    if reason is not None:
        command = _export_command(bundle, _dtype(bundle.manifest), True)
        todo = f"重新导出、切开再建：{command}"
        raise DsxError("DSX-E735", f"{bundle.path} 是一个 stage，{reason}", todo)


def derived_folder(bundle: Bundle) -> Path:
    """由 ``bundle`` 另导出的那一份放在哪里。"""
    return bundle.path / ENGINES / _FOLDER


def buildable_bundle(
    bundle: Bundle,
    flavour: Flavour,
    checkpoint: Path | str | None = None,
    progress: Progress | None = None,
    *,
    verify_weights: bool = True,
) -> Bundle:
    """建得了引擎的原样返回；否则由检查点、以同样的方案与量化另导出一份，已有而没有过时的直接用。

    另导出的那一份：目标是这种发行的（两种发行的图相同，已有的不分发行），float32 改成检查点的 dtype（也是 float32 的改成 float16），稀疏注意力的 int8 缓存改成与模型相同的 dtype，权重打包还是按引用随原来的。

    Args:
        bundle: 任意一个 bundle。
        flavour: 要用哪种 TensorRT。
        checkpoint: 检查点目录；缺省取 manifest 里记的出处。
        progress: 进度；要另导出的原因由它说出来，也记进那一份的 ``fallbacks``。
        verify_weights: 先读一遍引擎由之而来的全部权重，核对 sha256，见 :meth:`~deepseek_export.bundle.Bundle.check_weights`。

    Raises:
        DsxError: ``DSX-E601`` 找不到检查点；``DSX-E602`` 检查点与导出时不是同一个；``DSX-E116`` / ``DSX-E313``
            换了 dtype、换成这个目标之后放不下、量化不了，附自己导出的命令；``DSX-E735`` 一个 stage 建不了，要重新导出；``DSX-E401`` 那个目录里是别的东西；``DSX-E406`` / ``DSX-E408`` / ``DSX-E413`` 权重被改过，或没法证明；其余见
            :func:`~deepseek_export.bundle.export_bundle`。
    """
    progress = progress or Progress()
    if bundle.manifest.stage is not None:
        check_stage_buildable(bundle)
    manifest, reason = bundle.manifest, unbuildable_reason(bundle.manifest)
    # 用不用得到，给错了都要说。
    source = None if checkpoint is None else open_source(bundle, checkpoint, _OPTION)
    derived = bundle if reason is None else existing_derived(bundle)
    if verify_weights:
        (derived or bundle).check_weights(progress)
    if derived is not None and source is not None:
        progress.note("没有另导出，--checkpoint 用不到")
    if reason is None:
        return bundle
    profile = _profile(manifest)
    cache = "" if profile == manifest.profile else "，缓存与模型同 dtype"
    note = f"原来的 bundle {reason}：建引擎用由检查点另导出的那一份（{_dtype(manifest)}{cache}）"
    if derived is not None:
        progress.note(note)
        return derived
    if manifest.quantization is not None and manifest.quantization.calibration is not None:
        raise DsxError(
            "DSX-E660",
            f"{bundle.path} {reason}，而它的 int4 是校准过的：由检查点另导出的一份没有校准",
            f"自己导出再建：{_export_command(bundle, _dtype(manifest), True)} --calibrate FILE",
        )
    progress.start(f"{bundle.path} 的图不能直接建引擎：由检查点另导出一份")
    try:
        return export_bundle(
            (source or open_source(bundle, None, _OPTION)).path,
            derived_folder(bundle),
            ExportSettings(
                profile,
                target=flavour.target,
                dtype=_dtype(manifest),
                weights=manifest.weights.mode,
                hash_weights=UNHASHED not in manifest.fallbacks,
                quantization=_quantization(manifest),
            ),
            overwrite=True,
            progress=progress,
            notes=(note,),
        )
    except DsxError as error:
        # 原来的建议说的是 dsx export 的选项，也没有说为什么要检查点。
        advice = {
            "DSX-E601": f"{reason}，要由检查点另导出一份：用 {_OPTION} 指定检查点目录",
            "DSX-E116": f"float16 放不下，自己导出 bfloat16 的再建：{_export_command(bundle, 'bfloat16', True)}",
            "DSX-E313": f"自己导出不量化的再建：{_export_command(bundle, _dtype(manifest), False)}",
            "DSX-E401": "移开它，再 dsx build",
        }
        if error.code not in advice:
            raise
        raise DsxError(error.code, error.what, advice[error.code]) from error


def engine_bundle(bundle: Bundle) -> Bundle:
    """``bundle`` 的引擎由哪个 bundle 建成：它自己，或 :func:`buildable_bundle` 另导出的那一份。

    Raises:
        DsxError: ``DSX-E920``，要另导出，而还没有 ``dsx build`` 过，或那一份过时了、坏了；``DSX-E735``，一个 stage 建不了，要重新导出。
    """
    if bundle.manifest.stage is not None:
        check_stage_buildable(bundle)
    reason = unbuildable_reason(bundle.manifest)
    if reason is None:
        return bundle
    derived = existing_derived(bundle)
    if derived is None:
        raise DsxError(
            "DSX-E920",
            f"{bundle.path} 没有引擎，它自己建不了：{reason}",
            f"dsx build {bundle.path} --arch smXY 由检查点另导出一份来建",
        )
    return derived


def existing_derived(bundle: Bundle) -> Bundle | None:
    """已经另导出的那一份；没有、坏了，或不是由这个 bundle 的检查点、方案与量化来的，是 ``None``：再导出一次就好。"""
    manifest = bundle.manifest
    if manifest.quantization is not None and manifest.quantization.calibration is not None:
        return None  # 另导出的没有校准过
    try:
        derived = Bundle.open(derived_folder(bundle))
    except DsxError:
        return None
    found = derived.manifest
    same = (
        found.source.fingerprint == manifest.source.fingerprint
        and found.model == manifest.model
        and found.profile == _profile(manifest)
        and found.dtype == _dtype(manifest)
        and _quantization(found) == _quantization(manifest)
    )
    return derived if same else None


def _profile(manifest: Manifest) -> OptimizationProfile:
    profile = manifest.profile
    if profile.mla.cache_dtype == "int8" and manifest.model.indexer is not None:
        profile = profile.model_copy(update={"mla": profile.mla.model_copy(update={"cache_dtype": "model"})})
    return profile.model_copy(update={"dsa": DsaSection()})


def _dtype(manifest: Manifest) -> ModelDtype:
    """float32 的改成检查点自己的；检查点也是 float32 的，没有哪个更近，用 float16。

    检查点是 bfloat16 的不能改成 float16：它的激活可以超出 65504，权重放得下也会溢出（DeepSeek-V2 就是）。
    """
    if manifest.dtype != "float32":
        return manifest.dtype
    return "float16" if manifest.model.dtype == "float32" else manifest.model.dtype


def _quantization(manifest: Manifest) -> Quantization | None:
    if (entry := manifest.quantization) is None:
        return None
    # TensorRT 的 int4 放不下零点：照发布的码写的、有零点的，那里精确地成为 int8。
    kind = "int8" if any(form.zeros for form in manifest.formats.values()) else entry.kind
    return Quantization(kind=kind, block=entry.block, keep=tuple(entry.keep))


def _export_command(bundle: Bundle, dtype: ModelDtype, quantize: bool) -> str:
    """从同一个检查点、以同样的方案导出一份 TensorRT 目标的，整条命令。"""
    manifest, target = bundle.manifest, TENSORRT_TARGETS[-1]
    profile, quantization = _profile(manifest), _quantization(manifest)
    words = ["dsx", "export", manifest.source.path, "-p", profile.name]
    words += [word for override in profile.overrides for word in ("--set", override)]
    words += ["--target", target, "--dtype", dtype]
    if quantize and quantization is not None:
        words += ["--quant", quantization.kind, "--quant-block", str(quantization.block)]
        words += ["--keep", ",".join(quantization.keep)] if quantization.keep else []
    if (stage := manifest.stage) is None:
        return shlex.join([*words, "-o", f"{bundle.path}-{target}"])
    return shlex.join([*words, "--stages", str(stage.count), "-o", f"{bundle.path.parent}-{target}"])
