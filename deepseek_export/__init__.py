"""dsx：把 DeepSeek 系检查点编译成 ONNX / TensorRT，并证明与 PyTorch 相等。

顶层函数按需导入，``import deepseek_export`` 本身不加载 torch。

>>> import deepseek_export as dsx  # doctest: +SKIP
>>> dsx.export("CKPT", "OUT", "mla+moe")  # doctest: +SKIP
>>> print(dsx.load("OUT").generate("床前明月光").text[0])  # doctest: +SKIP
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from deepseek_export.version import __version__ as __version__

if TYPE_CHECKING:
    from deepseek_export.api import (
        build,
        compare,
        export,
        export_stages,
        load,
        pack,
        pack_stages,
        pack_triton,
        split,
        verify,
    )
    from deepseek_export.benchmark.bundle import bench
    from deepseek_export.checkpoint.weight_only import Quantization
    from deepseek_export.errors import DsxError
    from deepseek_export.inspection import inspect
    from deepseek_export.integration.apply import apply, restore
    from deepseek_export.integration.causal_lm import DsxForCausalLM
    from deepseek_export.model import Chat, CompiledModel
    from deepseek_export.plan import make_plan
    from deepseek_export.profile import OptimizationProfile
    from deepseek_export.runtime import GenerationResult, SamplingParams, TextStream, TokenLogprobs
    from deepseek_export.serving import Engine, EngineSettings

_EXPORTS = {
    "export": "deepseek_export.api",
    "export_stages": "deepseek_export.api",
    "load": "deepseek_export.api",
    "pack": "deepseek_export.api",
    "pack_stages": "deepseek_export.api",
    "pack_triton": "deepseek_export.api",
    "split": "deepseek_export.api",
    "build": "deepseek_export.api",
    "verify": "deepseek_export.api",
    "compare": "deepseek_export.api",
    "inspect": "deepseek_export.inspection",
    "bench": "deepseek_export.benchmark.bundle",
    "make_plan": "deepseek_export.plan",
    "CompiledModel": "deepseek_export.model",
    "Chat": "deepseek_export.model",
    "SamplingParams": "deepseek_export.runtime",
    "GenerationResult": "deepseek_export.runtime",
    "TokenLogprobs": "deepseek_export.runtime",
    "TextStream": "deepseek_export.runtime",
    "Engine": "deepseek_export.serving",
    "EngineSettings": "deepseek_export.serving",
    "apply": "deepseek_export.integration.apply",
    "restore": "deepseek_export.integration.apply",
    "DsxForCausalLM": "deepseek_export.integration.causal_lm",
    "Quantization": "deepseek_export.checkpoint.weight_only",
    "OptimizationProfile": "deepseek_export.profile",
    "DsxError": "deepseek_export.errors",
}

__all__ = [
    "Chat",
    "CompiledModel",
    "DsxError",
    "DsxForCausalLM",
    "Engine",
    "EngineSettings",
    "GenerationResult",
    "OptimizationProfile",
    "Quantization",
    "SamplingParams",
    "TextStream",
    "TokenLogprobs",
    "apply",
    "bench",
    "build",
    "compare",
    "export",
    "export_stages",
    "inspect",
    "load",
    "make_plan",
    "pack",
    "pack_stages",
    "pack_triton",
    "restore",
    "split",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """没有装 transformers 时不列要它的那几个：``help()`` 会逐个去取。"""
    names = {*globals(), *__all__}
    with suppress(ModuleNotFoundError):
        if all(map(find_spec, ("torch", "transformers"))):
            return sorted(names)
    return sorted(name for name in names if ".integration." not in _EXPORTS.get(name, ""))
