"""校准过的 int4：导出时码暂存在哪里，之后怎么从权重文件里读回来。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepseek_export.bundle.description import ExportSettings
from deepseek_export.bundle.disk import disk_errors
from deepseek_export.bundle.manifest import CalibrationEntry
from deepseek_export.calibration import (
    DAMPING,
    CalibrationText,
    Formats,
    calibrate,
    codes_bytes,
    is_calibrated,
    shapes,
)
from deepseek_export.checkpoint import Checkpoint, TensorStore
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress

#: 没有压成四位的码，导出完就删。
_SCRATCH = "calibrated.safetensors"


@dataclass(frozen=True)
class WeightSource:
    """写权重时读哪里。

    Attributes:
        recipes: initializer 名 → 配方；校准了的写明。
        store: 检查点张量，连同校准得来的码。
        entry: 写进 manifest 的；没有校准是 ``None``。
    """

    recipes: dict[str, Recipe]
    store: TensorStore
    entry: CalibrationEntry | None = None

    @property
    def fallbacks(self) -> Sequence[str]:
        """见过的 token 太少的，写进 ``fallbacks``。"""
        found = [] if self.entry is None else self.entry.nearest
        if not found:
            return ()
        return (
            f"校准：{len(found)} 个权重见过的 token 太少，照常取最近的码，例如 {found[0]}；校准的文本长一些就有",
        )


def check_calibration(settings: ExportSettings) -> None:
    """校准只用于 int4、打包的权重。

    Raises:
        DsxError: ``DSX-E660``。
    """
    quantization = settings.quantization
    if quantization is None or quantization.kind != "int4":
        kind = "没有量化" if quantization is None else quantization.kind
        raise DsxError(
            "DSX-E660",
            f"校准只用于 int4，这次是 {kind}",
            "加 --quant int4，或去掉 --calibrate：int8 的损失本来就小",
        )
    if settings.weights != "packed":
        raise DsxError(
            "DSX-E660",
            "按引用的权重在加载时由检查点算出，放不下校准得来的码",
            "用 --weights packed，或去掉 --calibrate",
        )


def scratch_bytes(recipes: Mapping[str, Recipe], checkpoint: Checkpoint) -> int:
    """校准时临时占多少磁盘。"""
    formats = Formats.of(recipes).calibrated
    sizes = shapes(checkpoint)
    return codes_bytes({name: sizes[name] for name in formats}, formats)


@contextmanager
def weight_source(
    checkpoint: Checkpoint,
    recipes: dict[str, Recipe],
    text: CalibrationText | None,
    modules: int,
    directory: Path,
    progress: Progress,
    watch: Callable[[str], AbstractContextManager[None]],
) -> Iterator[WeightSource]:
    """要校准就先校准；退出时删掉暂存的码。

    Args:
        checkpoint: 检查点。
        recipes: 导出的配方，已经过 ``bind_recipes``。
        text: 校准的文本；``None`` 不校准。
        modules: 导出了几个 MTP 模块。
        directory: 暂存在这里面。
        progress: 进度。
        watch: 校准用时记到哪里。

    Raises:
        DsxError: ``DSX-E404`` 磁盘写满；``DSX-E660`` 没有 int4 的权重；``DSX-E662`` 文本让模型溢出；其余见 ``calibrate``。
    """
    if text is None:
        yield WeightSource(recipes, checkpoint.store)
        return
    marked = {
        name: recipe.model_copy(update={"calibrated": True}) if is_calibrated(recipe) else recipe
        for name, recipe in recipes.items()
    }
    if not any(recipe.calibrated for recipe in marked.values()):
        raise DsxError("DSX-E660", "没有一个 int4 的权重，校准没有用处", "去掉 --calibrate，或少保留一些")
    path = directory / _SCRATCH
    try:
        with disk_errors(path), watch("calibration"):
            found = calibrate(checkpoint, recipes, text, path, modules, progress)
        entry = CalibrationEntry(
            method="gptq",
            file=text.file,
            sha256=text.sha256,
            tokens=text.tokens,
            windows=len(text.windows),
            damping=DAMPING,
            tensors=len(found.weights),
            nearest=sorted(found.nearest),
        )
        yield WeightSource(marked, checkpoint.store.joined(TensorStore.of(directory, [_SCRATCH])), entry)
    finally:
        path.unlink(missing_ok=True)
