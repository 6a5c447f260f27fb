"""bundle：导出的产物，一个自包含的目录。

本包的 ``__init__`` 只有读的一半，不导入 torch 与 onnx；写的一半是 :mod:`.export` 与 :mod:`.pack`。
"""

from deepseek_export.bundle.bundle import Bundle, read_bundle
from deepseek_export.bundle.manifest import Manifest, WeightsMode
from deepseek_export.bundle.weights import BundleWeights

__all__ = [
    "Bundle",
    "BundleWeights",
    "Manifest",
    "WeightsMode",
    "read_bundle",
]
