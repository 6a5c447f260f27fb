"""bundle：导出的产物，一个自包含的目录。"""

from deepseek_export.bundle.bundle import Bundle, read_bundle, steadily
from deepseek_export.bundle.by_reference import BundleWeights
from deepseek_export.bundle.export import export_bundle
from deepseek_export.bundle.manifest import Manifest, WeightsMode
from deepseek_export.bundle.pack import pack_bundle

__all__ = [
    "Bundle",
    "BundleWeights",
    "Manifest",
    "WeightsMode",
    "export_bundle",
    "pack_bundle",
    "read_bundle",
    "steadily",
]
