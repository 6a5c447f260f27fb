"""任意一个 bundle → 建得了引擎的 bundle：建不了的由检查点再导出一份，放在它自己的 ``engines/bundle/`` 里。

那一份是完整的 bundle：引擎在它的 ``engines/`` 里，``dsx verify``、``dsx compare``、``dsx pack`` 都能直接用它。
"""

from __future__ import annotations

from pathlib import Path

from deepseek_export.bundle import Bundle, Manifest, export_bundle
from deepseek_export.bundle.source import open_source
from deepseek_export.capture import ModelDtype
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.engine.flavour import Flavour
from deepseek_export.engine.record import ENGINES
from deepseek_export.errors import DsxError
from deepseek_export.passes.pipelines import TENSORRT_TARGETS
from deepseek_export.passes.split_experts import SplitExpertsPass
from deepseek_export.profile import OptimizationProfile
from deepseek_export.progress import Progress

_BUILDABLE = ("portable", *TENSORRT_TARGETS)
_FOLDER = "bundle"


def unbuildable_reason(manifest: Manifest) -> str | None:
    """这个 bundle 的图为什么不能直接拿去建引擎；能建的是 ``None``。"""
    if manifest.target not in _BUILDABLE:
        return f"目标是 {manifest.target}，图已为别的运行时改写"
    if manifest.target == "portable" and any(
        r.name == SplitExpertsPass.name and r.count for r in manifest.passes
    ):
        return "专家权重太大，导出 portable 时已拆成几组，下沉认不出原来的一层"
    if manifest.dtype == "float32":
        return "是 float32，插件核与融合注意力都没有 float32 的实现"
    if manifest.cache.dtype == "int8":
        return "缓存是 int8，TensorRT 的注意力核只读浮点的缓存"
    return None


def check_buildable(bundle: Bundle) -> None:
    """这个 bundle 的图能直接拿去建引擎吗。

    Raises:
        DsxError: ``DSX-E913``。
    """
    reason = unbuildable_reason(bundle.manifest)
    if reason is not None:
        todo = (
            f"dsx build {bundle.path} 由检查点另导出一份建得了的，放在 {derived_folder(bundle)}；直接用那一份"
        )
        raise DsxError("DSX-E913", f"{bundle.path}：{reason}", todo)


def derived_folder(bundle: Bundle) -> Path:
    """由 ``bundle`` 另导出的那一份放在哪里。"""
    return bundle.path / ENGINES / _FOLDER


def buildable_bundle(
    bundle: Bundle,
    flavour: Flavour,
    checkpoint: Path | str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """建得了引擎的原样返回；否则由检查点、以同样的方案与量化另导出一份，已有而没有过时的直接用。

    另导出的那一份：目标是这种发行的，float32 改成 float16，int8 缓存改成与模型相同的 dtype，权重打包还是按引用随原来的。

    Args:
        bundle: 任意一个 bundle。
        flavour: 要用哪种 TensorRT。
        checkpoint: 检查点目录；缺省取 manifest 里记的出处。
        progress: 进度；要另导出的原因由它说出来，也记进那一份的 ``fallbacks``。

    Raises:
        DsxError: ``DSX-E601`` 找不到检查点；``DSX-E602`` 检查点与导出时不是同一个；其余见
            :func:`~deepseek_export.bundle.export_bundle`。
    """
    progress = progress or Progress()
    manifest = bundle.manifest
    reason = unbuildable_reason(manifest)
    if reason is None:
        return bundle
    if (derived := existing_derived(bundle)) is not None:
        return derived
    progress.start(f"{bundle.path} 的图不能直接建引擎：由检查点另导出一份")
    source = open_source(bundle, checkpoint, "--checkpoint")
    quantization = None
    if (entry := manifest.quantization) is not None:
        quantization = Quantization(kind=entry.kind, block=entry.block, keep=tuple(entry.keep))
    return export_bundle(
        source.path,
        derived_folder(bundle),
        _profile(manifest),
        target=flavour.target,
        dtype=_dtype(manifest),
        weights=manifest.weights.mode,
        quantization=quantization,
        overwrite=True,
        progress=progress,
        notes=(f"原来的 bundle {reason}：建引擎用由检查点另导出的这一份（{_dtype(manifest)}）",),
    )


def engine_bundle(bundle: Bundle) -> Bundle:
    """``bundle`` 的引擎由哪个 bundle 建成：它自己，或 :func:`buildable_bundle` 另导出的那一份。

    Raises:
        DsxError: ``DSX-E920``，要另导出，而还没有 ``dsx build`` 过，或那一份过时了；4xx 那一份坏了。
    """
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
    """已经另导出的那一份；没有，或不是由这个 bundle 的检查点、方案与量化来的，是 ``None``。"""
    folder, manifest = derived_folder(bundle), bundle.manifest
    if not (folder / "manifest.json").is_file():
        return None
    derived = Bundle.open(folder)
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
    if profile.mla.cache_dtype != "int8":
        return profile
    return profile.model_copy(update={"mla": profile.mla.model_copy(update={"cache_dtype": "model"})})


def _dtype(manifest: Manifest) -> ModelDtype:
    return "float16" if manifest.dtype == "float32" else manifest.dtype


def _quantization(manifest: Manifest) -> tuple[object, ...] | None:
    entry = manifest.quantization
    return None if entry is None else (entry.kind, entry.block, tuple(entry.keep))
