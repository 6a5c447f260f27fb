"""``apply`` 与 ``restore``：在加载好的 transformers 模型上逐项打开优化，也能原样退回去。"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.errors import DsxError
from deepseek_export.integration.attention import (
    AbsorbedV2Attention,
    AbsorbedV3Attention,
    check_implementation,
    projection_obstacle,
)
from deepseek_export.integration.compat import has_sparse_models, model_config, require_model
from deepseek_export.integration.experts import SparseV2Experts, SparseV3Experts, experts_obstacle
from deepseek_export.integration.mtp import load_mtp
from deepseek_export.integration.mtp_generate import mtp_generate
from deepseek_export.integration.self_check import check_newer
from deepseek_export.profile import OptimizationProfile, resolve_profile

Model = TypeVar("Model", bound=PreTrainedModel)

ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    v2.DeepseekV2Attention: AbsorbedV2Attention,
    v3.DeepseekV3Attention: AbsorbedV3Attention,
}
EXPERTS: dict[type[nn.Module], type[nn.Module]] = {
    v2.DeepseekV2Experts: SparseV2Experts,
    v3.DeepseekV3Experts: SparseV3Experts,
}
#: 稀疏注意力的索引器，随注意力一起换。
INDEXERS: dict[type[nn.Module], type[nn.Module]] = {}
if has_sparse_models():
    from deepseek_export.integration import sparse_attention

    ATTENTION |= sparse_attention.ATTENTION
    INDEXERS |= sparse_attention.INDEXERS
    EXPERTS |= sparse_attention.EXPERTS
#: 自检用的方案：每一步都走替换过的代码。
_ABSORB = OptimizationProfile.model_validate(
    {"mla": {"enabled": True, "form": "absorb"}, "moe": {"enabled": True}}
)
_ORIGINALS = {replaced: original for original, replaced in (ATTENTION | INDEXERS | EXPERTS).items()}


def apply(
    model: Model, profile: str | Path | OptimizationProfile, *, checkpoint: Path | str | None = None
) -> Model:
    """把方案里打开的优化装到模型上，就地进行，不复制任何参数。

    - ``mla``：解码走 absorb，不再每步展开整个缓存；``mla.form=auto`` 时 prefill 与训练仍是 transformers 自己的代码；
      稀疏注意力的模型只读选中的行，prefill 也是（``auto`` 时，收集比展开还费的长度除外）；
    - ``moe``：只算有 token 的专家；
    - ``mtp``：从检查点读回 MTP 权重，greedy 的 ``generate`` 用它投机解码，batch 任意，输出不变。

    state_dict、缓存的内容、``save_pretrained``、梯度都不变。对装过的模型再调用就是换方案；方案全部关闭等于 :func:`restore`。
    检查都在动手之前：报错时模型原样不动。

    Args:
        model: ``DeepseekV2ForCausalLM``、``DeepseekV3ForCausalLM``；transformers 5.24 起还有 ``DeepseekV32ForCausalLM``、
            ``GlmMoeDsaForCausalLM``。
        profile: 方案名（``mla+moe``）、TOML 文件或方案对象。
        checkpoint: MTP 权重所在的检查点目录；缺省是模型加载时的那个。

    Returns:
        同一个模型对象。

    Raises:
        DsxError: ``DSX-E802`` transformers 比测过的新，自检不一致；``DSX-E803`` 模型类；``DSX-E804`` 模型现在的状态不能替换；``DSX-E805`` 方案里有这里做不到的设置；
            ``DSX-E806`` / ``DSX-E119`` 找不到 MTP 权重；
            方案本身的错见 :func:`~deepseek_export.profile.resolve_profile`。
    """
    resolved = resolve_profile(profile)
    config = require_model(model)
    _check_profile(resolved)
    if resolved.mla.enabled or resolved.moe.enabled:
        check_newer(model, lambda small: _install(small, model_config(small), _ABSORB), restore)
    return _install(model, config, resolved, checkpoint)


def _install(
    model: Model,
    config: ModelConfig,
    resolved: OptimizationProfile,
    checkpoint: Path | str | None = None,
) -> Model:
    """:func:`apply` 的后半：方案与模型类都查过了。"""
    absorbs = resolved.mla.enabled and resolved.mla.form != "naive"
    attention = _targets(model, ATTENTION) if absorbs else []
    indexers = _targets(model, INDEXERS) if absorbs else []
    experts = _targets(model, EXPERTS) if resolved.moe.enabled else []
    for name, module in attention:
        _check_attention(name, module)
    for name, module in indexers:
        _check_forward(name, module)
    for name, module in experts:
        _check_experts(name, module)
    draft = None
    if resolved.mtp.enabled:
        _check_mtp(config)
        check_implementation(model.config)
        draft = load_mtp(model, config, checkpoint, resolved.mtp.num_draft_tokens)
    restore(model)
    if draft is not None:
        attention += _targets(draft.module, ATTENTION) if attention else []
        experts += _targets(draft.module, EXPERTS) if experts else []
        owner: Any = model
        owner.dsx_mtp = draft
        owner.generate = functools.partial(mtp_generate, model, draft)
    for _, module in attention:
        module.__class__ = ATTENTION[type(module)]
        module.dsx_form = resolved.mla.form
    for _, module in indexers:
        module.__class__ = INDEXERS[type(module)]
    for _, module in experts:
        module.__class__ = EXPERTS[type(module)]
    return model


def restore(model: Model) -> Model:
    """撤掉 :func:`apply` 装上的一切，回到 transformers 自己的代码；没装过的模型原样返回。

    Returns:
        同一个模型对象。

    Raises:
        DsxError: ``DSX-E803`` 模型类不支持；``DSX-E804`` 装上的模块又被换了类（例如参数化），不知道该还原成什么。
    """
    require_model(model)
    _refuse_subclasses(model, _ORIGINALS)
    for module in model.modules():
        original = _ORIGINALS.get(type(module))
        if original is not None:
            module.__class__ = original
            vars(module).pop("dsx_form", None)
    if vars(model).pop("dsx_mtp", None) is not None:
        vars(model).pop("generate", None)
    return model


def _targets(model: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> list[tuple[str, Any]]:
    """要替换的模块及其名字；已经替换过的也算。"""
    kinds = {*table, *table.values()}
    _refuse_subclasses(model, kinds)
    return [(name, module) for name, module in model.named_modules() if type(module) in kinds]


def _refuse_subclasses(model: nn.Module, kinds: Collection[type[nn.Module]]) -> None:
    """这些类的子类：参数化、别的库的补丁。按类替换与还原都认不出它们，跳过就是悄悄少优化一层。"""
    for name, module in model.named_modules():
        if isinstance(module, tuple(kinds)) and type(module) not in kinds:
            raise _state(f"{name} 的类被换成了 {type(module).__name__}", "先撤掉参数化或补丁")


def _check_profile(profile: OptimizationProfile) -> None:
    if profile.mla.cache_dtype != "model":
        raise DsxError(
            "DSX-E805",
            f"mla.cache_dtype={profile.mla.cache_dtype}：缓存是 transformers 的，dtype 跟着模型走",
            "去掉这个设置；要换缓存 dtype，用 dsx export",
        )
    if profile.dsa.index_cache_dtype != "cache":
        raise DsxError(
            "DSX-E805",
            f"dsa.index_cache_dtype={profile.dsa.index_cache_dtype}：缓存是 transformers 的，索引 key 跟着模型的 dtype",
            "去掉这个设置；要 int8 的索引 key，用 dsx export",
        )
    if profile.mtp.verify != "greedy":
        raise DsxError(
            "DSX-E805",
            f"mtp.verify={profile.mtp.verify}：transformers 里的 MTP 只验证 greedy",
            "去掉这个设置；要拒绝采样，用 dsx export",
        )
    if profile.fallback.on_drift != "refuse":
        raise DsxError(
            "DSX-E805",
            f"fallback.on_drift={profile.fallback.on_drift}：apply 不做导出时的校验，没有什么可退",
            "去掉这个设置",
        )


def _check_mtp(config: ModelConfig) -> None:
    if config.indexer is not None:
        raise DsxError(
            "DSX-E805",
            f"mtp.enabled：{config.family} 的 MTP 模块有自己的索引器，transformers 没有它的缓存",
            "去掉 mtp；要投机解码，用 dsx export",
        )


def _check_attention(name: str, module: Any) -> None:
    _check_forward(name, module)
    check_implementation(module.config)
    if obstacle := projection_obstacle(module.kv_b_proj):
        what, todo = obstacle
        raise _state(f"{name}.kv_b_proj {what}", todo)


def _check_experts(name: str, module: Any) -> None:
    _check_forward(name, module)
    if obstacle := experts_obstacle(module):
        what, todo = obstacle
        raise _state(f"{name} {what}", todo)


def _check_forward(name: str, module: nn.Module) -> None:
    """accelerate 等把包装过的 forward 挂在实例上，替换类之后它仍会调用旧的。"""
    if "forward" in vars(module):
        raise _state(
            f"{name} 的 forward 被别的库包装过（例如 accelerate 的 offload）",
            "不用 device_map / offload 加载",
        )


def _state(what: str, todo: str) -> DsxError:
    return DsxError("DSX-E804", what, todo)
