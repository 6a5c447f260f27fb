"""Python 接口：``export``、``load``、``pack``、``build``、``verify``、``compare``。命令行只是它们的一层薄壳。"""

from deepseek_export.api.bundles import build, pack, pack_stages, pack_triton, split
from deepseek_export.api.compiling import ExportOptions, ParityRefused, export, export_stages
from deepseek_export.api.loading import load
from deepseek_export.api.proving import compare, verify

__all__ = [
    "ExportOptions",
    "ParityRefused",
    "build",
    "compare",
    "export",
    "export_stages",
    "load",
    "pack",
    "pack_stages",
    "pack_triton",
    "split",
    "verify",
]
