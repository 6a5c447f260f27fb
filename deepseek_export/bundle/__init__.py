"""bundle：导出的产物，一个自包含的目录。"""

from deepseek_export.bundle.bundle import Bundle, read_bundle
from deepseek_export.bundle.export import export_bundle
from deepseek_export.bundle.manifest import Manifest, WeightsMode
from deepseek_export.bundle.pack import pack_bundle
from deepseek_export.bundle.reference import BundleWeights

__all__ = [
    "Bundle",
    "BundleWeights",
    "Manifest",
    "WeightsMode",
    "export_bundle",
    "pack_bundle",
    "read_bundle",
]
