"""dsx：把 DeepSeek 系检查点编译成 ONNX / TensorRT，并证明与 PyTorch 相等。

顶层函数按需导入，``import deepseek_export`` 本身不加载 torch。

>>> import deepseek_export as dsx  # doctest: +SKIP
>>> dsx.export("CKPT", "OUT", "mla+moe")  # doctest: +SKIP
>>> print(dsx.load("OUT").generate("床前明月光").text[0])  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deepseek_export.version import __version__ as __version__

if TYPE_CHECKING:
    from deepseek_export.api import CompiledModel, build, compare, export, load, pack, split, verify
    from deepseek_export.checkpoint.weight_only import Quantization
    from deepseek_export.errors import DsxError
    from deepseek_export.integration.apply import apply, restore
    from deepseek_export.integration.causal_lm import DsxForCausalLM
    from deepseek_export.plan import make_plan
    from deepseek_export.profile import OptimizationProfile

_EXPORTS = {
    "export": "deepseek_export.api",
    "load": "deepseek_export.api",
    "pack": "deepseek_export.api",
    "split": "deepseek_export.api",
    "build": "deepseek_export.api",
    "verify": "deepseek_export.api",
    "compare": "deepseek_export.api",
    "Quantization": "deepseek_export.checkpoint.weight_only",
    "make_plan": "deepseek_export.plan",
    "apply": "deepseek_export.integration.apply",
    "restore": "deepseek_export.integration.apply",
    "CompiledModel": "deepseek_export.api",
    "DsxForCausalLM": "deepseek_export.integration.causal_lm",
    "DsxError": "deepseek_export.errors",
    "OptimizationProfile": "deepseek_export.profile",
}

__all__ = [
    "CompiledModel",
    "DsxError",
    "DsxForCausalLM",
    "OptimizationProfile",
    "Quantization",
    "apply",
    "build",
    "compare",
    "export",
    "load",
    "make_plan",
    "pack",
    "restore",
    "split",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
