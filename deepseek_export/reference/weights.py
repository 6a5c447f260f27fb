"""把检查点装进参考模型：每个参数恰好设置一次。"""

from __future__ import annotations

from typing import Literal

import torch

from deepseek_export.checkpoint import Checkpoint, ModelConfig
from deepseek_export.checkpoint.recipe import load_array, weight_recipes
from deepseek_export.reference.model import Forms, ReferenceModel

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def load_reference(
    checkpoint: Checkpoint, forms: Forms, dtype: Literal["float32", "float16", "bfloat16"] = "float32"
) -> ReferenceModel:
    """从检查点建参考模型。

    Args:
        checkpoint: 已校验的检查点。
        forms: MLA 与 MoE 的写法。
        dtype: 计算 dtype；router 权重始终 float32。

    Returns:
        eval 模式、不求梯度的模型。

    Raises:
        DsxError: ``DSX-E115`` / ``DSX-E116``，见 :func:`~deepseek_export.checkpoint.recipe.materialize`。
    """
    with torch.device("meta"):
        model = ReferenceModel(checkpoint.config, forms)
    recipes = weight_recipes(checkpoint.config, dtype)
    loaded: dict[str, torch.Tensor] = {}
    state = {}
    for parameter, _ in model.named_parameters():
        name = initializer_name(parameter, checkpoint.config)
        if name not in loaded:
            array = load_array(name, recipes.pop(name), checkpoint.store)
            if array.dtype.name == "bfloat16":
                loaded[name] = torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
            else:
                loaded[name] = torch.from_numpy(array)
        state[parameter] = loaded[name]
    if recipes:
        raise AssertionError(f"有配方没被任何参数用到：{sorted(recipes)[:3]}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
