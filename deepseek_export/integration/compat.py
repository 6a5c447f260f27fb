"""测过的 transformers 版本、支持的模型类，以及各版本之间的差别。"""

from __future__ import annotations

import functools
import inspect
import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.errors import DsxError
from deepseek_export.parity.self_check import release, tested_range
from deepseek_export.version import MAX_TRANSFORMERS, MIN_TRANSFORMERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DENSE = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_SPARSE = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
#: 稀疏注意力的模型类从这一版起支持：索引 key 在缓存里、选中的位置由索引器返回，是这一版的写法。
_SPARSE_SINCE = (5, 24)


def require_transformers() -> None:
    """没有能用的 transformers 就拒绝；比测过的新的不拒绝，用到时自检。

    Raises:
        DsxError: ``DSX-E801`` 没装；``DSX-E802`` 太旧。
    """
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        raise DsxError("DSX-E801", "apply、restore、DsxForCausalLM 都要用到它", install_tested()) from error
    if release(version) < MIN_TRANSFORMERS:
        raise DsxError("DSX-E802", f"装的是 {version}，测过 {tested_range()}", install_tested())


def install_tested() -> str:
    """装上测过的版本的命令。"""
    low = ".".join(map(str, MIN_TRANSFORMERS))
    return f"pip install 'transformers>={low},<{MAX_TRANSFORMERS[0]}.{MAX_TRANSFORMERS[1] + 1}'"


def has_sparse_models() -> bool:
    """装着的 transformers 有没有支持的稀疏注意力模型类。"""
    return release(metadata.version("transformers")) >= _SPARSE_SINCE


def model_classes() -> tuple[str, ...]:
    """装着的这一版 transformers 里支持的模型类。"""
    return (*_DENSE, *_SPARSE) if has_sparse_models() else _DENSE


def require_model(model: Any) -> ModelConfig:
    """确认是支持的模型对象，并给出它的类型化配置。

    按类的全名比较，子类也拒绝：它可能改过 forward，而 dsx 无从知道。

    Raises:
        DsxError: ``DSX-E803`` 模型类不支持；``DSX-E103`` 到 ``DSX-E109`` 它的 config 里有 dsx 不支持的内容。
    """
    import transformers

    kind = type(model)
    if kind not in [getattr(transformers, name) for name in model_classes()]:
        raise DsxError(
            "DSX-E803",
            f"得到的是 {kind.__module__}.{kind.__qualname__}",
            f"支持 {'、'.join(model_classes())}；PEFT 等包装过的模型请先取出里面的 transformers 模型",
        )
    return model_config(model)


def model_config(model: PreTrainedModel) -> ModelConfig:
    """transformers 模型的 config → dsx 的 :class:`ModelConfig`，dtype 取权重的。"""
    data = json.loads(model.config.to_json_string(use_diff=False))
    dtype = str(model.dtype).removeprefix("torch.")
    return parse_model_config(
        {**data, "dtype": dtype, "torch_dtype": dtype}, f"{type(model).__name__} 的 config"
    )


@functools.cache
def cache_name() -> str:
    """forward 的缓存参数叫什么，输出里的字段同名：5.24 前后由 ``past_key_values`` 改成了 ``cache``。"""
    from transformers import DeepseekV3ForCausalLM

    parameters = inspect.signature(DeepseekV3ForCausalLM.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
