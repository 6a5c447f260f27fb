"""``apply`` 的自检：没测过的 transformers，装上优化的小模型与没装的逐层相同，才动用户的模型。

小模型与用户的结构相同，见 :mod:`~deepseek_export.parity.self_check`；两种 attention 实现、左填充、缓存、MoE 都走一遍，撤掉之后还要逐位
等于从前。不一致时点名执行顺序里第一个不同的模块：后面的差都是它传下去的。
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepseek_export.errors import DsxError
from deepseek_export.integration.attention import ATTENTION_IMPLEMENTATIONS
from deepseek_export.integration.compat import cache_name, install_tested
from deepseek_export.parity.measures import measure
from deepseek_export.parity.self_check import agreed_note, agrees, is_newer, shrunk, tested_range
from deepseek_export.parity.tolerances import TOLERANCES

#: 各步喂几个 token：左填充的 prefill，两次单步，一次一步多个（投机）。
_STEPS = (9, 1, 1, 3)
_PADDING = 2


def check_newer(
    model: PreTrainedModel,
    install: Callable[[PreTrainedModel], object],
    restore: Callable[[PreTrainedModel], object],
) -> None:
    """transformers 比测过的新时自检；一致就告诉用户一句，然后照常。

    Args:
        model: 用户的模型，只看它的类与配置。
        install, restore: 把 absorb 形式的 MLA 与稀疏专家装上、撤掉。

    Raises:
        DsxError: ``DSX-E802`` 不一致。
    """
    version = metadata.version("transformers")
    if not is_newer(version):
        return
    kind = type(model)
    config = shrunk(model.config)
    if difference := agrees("apply", config, lambda: _difference(kind, config, install, restore)):
        raise DsxError(
            "DSX-E802",
            f"装的是 {version}，测过 {tested_range()}；{kind.__name__} 的小模型自检不一致：{difference}",
            install_tested(),
        )
    warnings.warn(agreed_note(version, f"{kind.__name__} 的小模型"), stacklevel=3)


def _difference(
    kind: type[PreTrainedModel],
    config: dict[str, Any],
    install: Callable[[PreTrainedModel], object],
    restore: Callable[[PreTrainedModel], object],
) -> str | None:
    config_class: Any = kind.config_class
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = kind(config_class.from_dict(config)).eval()
        for parameter in small.parameters():
            if parameter.ndim > 1:  # transformers 的初值太小，各层的输出会淹没在残差里
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    plain = {}
    for implementation in ATTENTION_IMPLEMENTATIONS:
        small.set_attn_implementation(implementation)
        plain[implementation] = _record(small)[0]
    try:
        install(small)
    except DsxError as error:
        return f"装不上：{error.what}"
    for implementation in ATTENTION_IMPLEMENTATIONS:
        small.set_attn_implementation(implementation)
        applied, stopped = _record(small)
        if difference := _first_difference(plain[implementation], applied) or stopped:
            return f"attn_implementation={implementation} 时{difference}"
    restore(small)
    again, _ = _record(small)
    same = all(
        torch.equal(got, want) for (_, got), (_, want) in zip(again, plain[implementation], strict=True)
    )
    return None if same else "restore 之后与从前不同"


def _first_difference(plain: list[tuple[str, Tensor]], applied: list[tuple[str, Tensor]]) -> str | None:
    tolerance = TOLERANCES["block", "float32"]
    for (name, want), (other, got) in zip(plain, applied, strict=False):
        if name != other or got.shape != want.shape:
            return f"{name} 的输出是 {list(want.shape)}，装上之后是 {other} 的 {list(got.shape)}"
        measured = measure(got.numpy(), want.numpy())
        if not tolerance.accepts(measured):
            return f" {name} 的输出差 {measured.max_abs:.2g}"
    return None


@torch.no_grad()
def _record(model: Any) -> tuple[list[tuple[str, Tensor]], str | None]:
    """跑 :data:`_STEPS`，按执行顺序记下每层的注意力、前馈的输出与 logits，以及停在哪里（跑得完就是 ``None``）。"""
    outputs: list[tuple[str, Tensor]] = []
    entered = "forward"

    def before(name: str):
        def enter(*_: Any) -> None:
            nonlocal entered
            entered = name

        return enter

    def after(name: str):
        def leave(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.append((name, (output[0] if isinstance(output, tuple) else output).clone()))

        return leave

    hooks = []
    for index, layer in enumerate(model.model.layers):
        for part in ("self_attn", "mlp"):
            module, name = getattr(layer, part), f"model.layers.{index}.{part}"
            hooks += [
                module.register_forward_pre_hook(before(name)),
                module.register_forward_hook(after(name)),
            ]
    ids = torch.arange(2 * sum(_STEPS)).view(2, -1) * 7 % (model.config.vocab_size - 1) + 1
    mask = torch.ones_like(ids)
    mask[0, :_PADDING] = 0
    cache, start = None, 0
    try:
        for count in _STEPS:
            stop = start + count
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{cache_name(): cache}
            )
            cache, start = out[cache_name()], stop
            outputs.append(("logits", out.logits.clone()))
    except Exception as error:
        return _real(outputs), f" {entered} 报错 {type(error).__name__}: {error}"
    finally:
        for hook in hooks:
            hook.remove()
    return _real(outputs), None


def _real(outputs: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """prefill 里填充的那几列没有意义。"""
    return [(name, value[1:] if value.shape[1] == _STEPS[0] else value) for name, value in outputs]
