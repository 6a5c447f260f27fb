"""量化的 bundle 里，每个权重实际是多少：没有校准的由检查点再算一遍，校准得来的码从权重文件里读。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.checkpoint import TensorStore
from deepseek_export.checkpoint.recipe import Recipe, load_array, load_quantized
from deepseek_export.checkpoint.restored import separated
from deepseek_export.checkpoint.weight_only import BlockFormat, loaded_steps
from deepseek_export.errors import DsxError
from deepseek_export.reference.weights import Rounding

#: 还原的权重与检查点的相对误差至多这么大；绑错、排错的大约是 1.4，校准得来的大约是 0.1。
MOST_DIFFERENT = 0.5


def roundings(bundle: Bundle, holders: Iterable[Bundle] = ()) -> dict[str, Rounding]:
    """权重名 → 检查点的值怎么变成 bundle 里的值。

    Args:
        bundle: manifest 说了量化了哪些、什么格式。
        holders: 权重文件在哪里；缺省就是 ``bundle``，一套 stage 是各个 stage。

    Returns:
        名字同 :attr:`~deepseek_export.bundle.manifest.Manifest.formats`；校准过的以 ``DSX-E664`` 拒绝与检查点对不上的码。
    """
    manifest = bundle.manifest
    made: dict[str, Rounding] = {name: partial(_again, form) for name, form in manifest.formats.items()}
    entry = manifest.quantization
    if entry is None or entry.calibration is None:
        return made
    stored = _StoredCodes(tuple(holders) or (bundle,))
    for name, form in manifest.formats.items():
        if form.kind == "int4":
            made[name] = partial(stored.rounded, form)
    return made


def _again(form: BlockFormat, name: str, recipe: Recipe, store: TensorStore) -> np.ndarray:
    """由检查点再算一遍。"""
    return load_quantized(name, recipe, form, store)


class _StoredCodes:
    """权重文件里的码，按检查点的张量名取。"""

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self._found: dict[str, tuple[str, Mapping[str, Recipe], TensorStore]] = {}
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})
        for bundle in bundles:
            weights = bundle.manifest.weights
            store = TensorStore.of(bundle.path, weights.files)
            for name, recipe in weights.recipes.items():
                if recipe.calibrated and recipe.op == "codes" and name in store:
                    self._found |= dict.fromkeys(recipe.sources, (name, weights.recipes, store))

    def rounded(self, form: BlockFormat, name: str, recipe: Recipe, store: TensorStore) -> np.ndarray:
        """``recipe`` 是浮点的：一个来源，或叠放的几个；照发布的码写的没有校准，由检查点再算一遍。"""
        if recipe.sources[0] not in self._found:
            return _again(form, name, recipe, store)
        plain = load_array(name, recipe, store)
        rows = plain.reshape(len(recipe.sources), -1, recipe.shape[-1])
        found = [self._of(source, one) for source, one in zip(recipe.sources, rows, strict=True)]
        return np.stack(found).reshape(recipe.shape).astype(plain.dtype, copy=False)

    def _of(self, source: str, weights: np.ndarray) -> np.ndarray:
        name, recipes, store = self._found[source]
        if self._last[0] != name:
            self._last = (name, _restored(name, recipes, store))
        values = self._last[1][source]
        wide = weights.astype(np.float32, copy=False)
        gap = float(np.linalg.norm(values - wide)) / max(float(np.linalg.norm(wide)), 1e-30)
        if not gap <= MOST_DIFFERENT:
            raise DsxError(
                "DSX-E664",
                f"{name} 还原出的 {source} 与检查点相差 {gap:.2f}（相对），至多 {MOST_DIFFERENT}",
                "码绑错了，或检查点不是导出时的那一个：重新导出",
            )
        return values


def _restored(name: str, recipes: Mapping[str, Recipe], store: TensorStore) -> dict[str, np.ndarray]:
    """一个 initializer 里的码 → 每个来源的权重，float32。"""
    codes = recipes[name]
    assert codes.of is not None
    assert codes.form is not None
    signed, shape = codes.dtype != "uint8", codes.of.shape
    steps = loaded_steps(store.read(name), codes.form, shape, signed)
    scales = store.read(f"{name}.scales").astype(np.float32).reshape(*shape[:-1], -1)
    wide = np.repeat(scales, codes.form.block, axis=-1)[..., : shape[-1]]
    return separated(codes.of, steps * wide)
