"""把检查点装进参考模型：每个参数恰好设置一次。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import nn

from deepseek_export.checkpoint import Checkpoint, ModelConfig, TensorStore, require_mtp
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.recipe import Recipe, load_array, mtp_recipes, weight_recipes
from deepseek_export.dtypes import DTYPES, Dtype
from deepseek_export.reference.model import Forms, ReferenceModel
from deepseek_export.reference.mtp import DraftModel

#: 权重名、浮点的配方、检查点张量 → bundle 里实际的值，形状、dtype 同配方。
Rounding = Callable[[str, Recipe, TensorStore], np.ndarray]


def torch_dtype(name: str) -> torch.dtype:
    """dsx 的名字 → torch 的 dtype；两边同名。"""
    dtype: torch.dtype = getattr(torch, DTYPES[name].name)
    return dtype


def by_torch(dtype: torch.dtype) -> Dtype:
    """:func:`torch_dtype` 的逆。"""
    return DTYPES[str(dtype).removeprefix("torch.")]


def initializer_name(parameter: str, config: ModelConfig) -> str:
    """:class:`ReferenceModel` 的参数名 → initializer 名（即检查点里的名字）。

    例：``layers.3.mlp.experts.gate_proj.weight`` → ``model.layers.3.mlp.experts.*.gate_proj.weight``；
    权重绑定时 ``head.lm_head.weight`` → ``model.embed_tokens.weight``。
    """
    if parameter == "head.lm_head.weight":
        return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for prefix, replacement in (("embed.", "model."), ("head.", "model."), ("layers.", "model.layers.")):
        if parameter.startswith(prefix):
            name = replacement + parameter.removeprefix(prefix)
            return name.replace(".mlp.experts.", ".mlp.experts.*.")
    raise KeyError(parameter)


def draft_initializer_name(parameter: str, config: ModelConfig, index: int) -> str:
    """:class:`~deepseek_export.reference.mtp.DraftModel` 的参数名 → initializer 名。

    例：``mtp.eh_proj.weight`` → ``model.layers.{num_hidden_layers + index}.eh_proj.weight``；词嵌入与 lm_head 是主模型的。
    """
    if parameter.startswith("mtp."):
        layer = config.num_hidden_layers + index
        return initializer_name(f"layers.{layer}.{parameter.removeprefix('mtp.')}", config)
    return initializer_name(parameter, config)


def load_reference(
    checkpoint: Checkpoint,
    forms: Forms,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    quantized: Mapping[str, Rounding] = MappingProxyType({}),
) -> ReferenceModel:
    """从检查点建参考模型。

    Args:
        checkpoint: 已校验的检查点。
        forms: MLA 与 MoE 的算法。
        dtype: 计算 dtype；router 权重始终 float32。
        quantized: 权重名 → 怎么量化再还原；这些权重因此与量化的 bundle 相同。

    Returns:
        eval 模式、不求梯度的模型。

    Raises:
        DsxError: ``DSX-E115`` / ``DSX-E116``，见 :func:`~deepseek_export.checkpoint.recipe.materialize`。
    """
    with torch.device("meta"):
        model = ReferenceModel(checkpoint.config, forms)
    recipes = weight_recipes(checkpoint.config, dtype)
    _fill(model, lambda name: initializer_name(name, checkpoint.config), recipes, {}, checkpoint, quantized)
    return model


def load_draft(
    checkpoint: Checkpoint,
    index: int,
    main: ReferenceModel,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    quantized: Mapping[str, Rounding] = MappingProxyType({}),
) -> DraftModel:
    """从检查点建第 ``index`` 个 MTP 模块的草稿模型；词嵌入与 lm_head 与 ``main`` 共用同一块内存。

    Raises:
        DsxError: 同 :func:`load_reference`；``DSX-E119``，检查点没有这个 MTP 模块。
    """
    require_mtp(checkpoint, index + 1)
    config = checkpoint.config
    with torch.device("meta"):
        model = DraftModel(config, index, main.forms)
    shared = {
        "model.embed_tokens.weight": main.embed.embed_tokens.weight,
        _stored_name("head.lm_head.weight", initializer_name("head.lm_head.weight", config), quantized): (
            main.head.lm_head.weight
        ),
    }
    _fill(
        model,
        lambda name: draft_initializer_name(name, config, index),
        mtp_recipes(config, index, dtype),
        shared,
        checkpoint,
        quantized,
    )
    return model


def load_tensor(
    name: str, recipe: Recipe, checkpoint: Checkpoint, quantized: Rounding | None = None
) -> torch.Tensor:
    """一个 initializer 的内容，转成 torch 张量；torch 不认 ml_dtypes 的 bfloat16，按位转。

    Args:
        name, recipe: initializer 与它的配方，已经过 ``bind_recipes``。
        checkpoint: 已校验的检查点。
        quantized: 怎么量化再还原；``None`` 是原来的值。

    Raises:
        DsxError: 同 :func:`load_reference`。
    """
    array = (quantized or load_array)(name, recipe, checkpoint.store)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _fill(
    model: nn.Module,
    name_of: Callable[[str], str],
    recipes: dict[str, Recipe],
    loaded: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    quantized: Mapping[str, Rounding],
) -> None:
    """每个参数设置一次；``loaded`` 里已有的直接共用。"""
    recipes, state = bind_recipes(recipes, checkpoint), {}
    unused = set(recipes)
    for parameter, _ in model.named_parameters():
        name = name_of(parameter)
        key = _stored_name(parameter, name, quantized)
        unused.discard(name)
        if key not in loaded:
            loaded[key] = load_tensor(name, recipes[name], checkpoint, quantized.get(key))
        state[parameter] = loaded[key]
    if unused:
        raise AssertionError(f"有配方没被任何参数用到：{sorted(unused)[:3]}")
    model.load_state_dict(state, strict=True, assign=True)
    model.eval().requires_grad_(False)


def _stored_name(parameter: str, name: str, quantized: Mapping[str, Rounding]) -> str:
    """``loaded`` 里的键；与词嵌入共享的 lm_head，两者有一个量化了就成了两份权重。"""
    alone = parameter == "head.lm_head.weight" and ("lm_head.weight" in quantized or name in quantized)
    return "lm_head.weight" if alone else name
