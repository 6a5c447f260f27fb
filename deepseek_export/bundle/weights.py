"""加载一个 bundle 的权重里要由 dsx 动手的部分：打开按引用的检查点，按配方生成没有现成字节的 initializer。

不导入 onnx：哪些要生成由 manifest 说。怎么写见 :mod:`.by_reference`。
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from deepseek_export.bundle.bundle import Bundle, checkpoint_changed
from deepseek_export.bundle.disk import WEIGHTS_FOLDER
from deepseek_export.checkpoint import TensorStore
from deepseek_export.checkpoint.recipe import load_array


def open_referenced(bundle: Bundle) -> TensorStore:
    """打开按引用的 bundle 里的检查点，并核对指纹。

    Raises:
        DsxError: ``DSX-E408``，检查点与导出时不同；``DSX-E110`` / ``DSX-E118``，文件坏了。
    """
    store = TensorStore.open(bundle.path / WEIGHTS_FOLDER)
    recorded = {entry.name: entry for entry in bundle.manifest.source.fingerprint.files}
    for entry in store.fingerprint().files:
        if (before := recorded.pop(entry.name, None)) != entry:
            same = before is not None and before.header_sha256 == entry.header_sha256
            raise checkpoint_changed(store.directory / entry.name, "数据" if same else "大小或文件头")
    if recorded:
        raise checkpoint_changed(store.directory / next(iter(recorded)), "大小或文件头")
    return store


class BundleWeights:
    """加载一个 bundle 时要由 dsx 生成的 initializer；几张图共用的只生成一次、共用一份内存。

    打包的 bundle 没有这样的 initializer，``arrays`` 总是空的，也不碰任何文件。

    Args:
        bundle: 打开的 bundle。

    Raises:
        DsxError: 同 :func:`open_referenced`。
    """

    def __init__(self, bundle: Bundle) -> None:
        self._recipes = bundle.manifest.weights.recipes
        self._by_recipe = {name for graph in bundle.manifest.graphs for name in graph.by_recipe}
        self._store = open_referenced(bundle) if bundle.manifest.weights.mode == "reference" else None
        self._made: dict[str, np.ndarray] = {}

    def arrays(self, initializers: Iterable[str]) -> dict[str, np.ndarray]:
        """其中要生成的 initializer：名字 → 内容，逐个生成。

        Args:
            initializers: 一张图的 initializer 名；不必生成的忽略。

        Raises:
            DsxError: ``DSX-E115`` / ``DSX-E116``，权重有问题。
        """
        if self._store is None:
            return {}
        names = [name for name in initializers if name in self._by_recipe]
        for name in names:
            if name not in self._made:
                self._made[name] = load_array(name, self._recipes[name], self._store)
        return {name: self._made[name] for name in names}
