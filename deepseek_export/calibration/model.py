"""校准整个模型：嵌入，逐层，lm_head，再是各个 MTP 模块。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deepseek_export.calibration.gptq import one_thread
from deepseek_export.calibration.layers import FORMS, Window, calibrate_layer, gram_of
from deepseek_export.calibration.overlay import codes_file
from deepseek_export.calibration.text import CalibrationText
from deepseek_export.calibration.weights import CalibratedWeights, Formats, shapes
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.progress import Progress
from deepseek_export.reference.mla import RMSNorm
from deepseek_export.reference.model import DecoderLayer, Embed
from deepseek_export.reference.mtp import MtpModule

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Calibrated:
    """校准的结果。

    Attributes:
        weights: 校准了的检查点张量。
        nearest: 见过的 token 太少、照常取最近的码的。
    """

    weights: tuple[str, ...]
    nearest: tuple[str, ...]


def calibrate(
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    text: CalibrationText,
    path: Path,
    modules: int,
    progress: Progress,
) -> Calibrated:
    """校准 ``recipes`` 里全部 int4 的权重，码写到 ``path``。

    内存以一层的注意力、一个 MLP 或专家与它的 Gram 矩阵为界，另有校准文本各窗的隐状态。只用一个线程，结果因此与线程数无关。

    Args:
        checkpoint: 检查点。
        recipes: 导出的配方，已经过 ``bind_recipes``。
        text: 校准的文本。
        path: 写到哪里，见 :mod:`~deepseek_export.calibration.overlay`。
        modules: 导出了几个 MTP 模块。
        progress: 进度。

    Raises:
        DsxError: ``DSX-E115`` / ``DSX-E116``，权重有问题；``DSX-E662``，激活溢出。
    """
    formats = Formats.of(recipes)
    sizes = shapes(checkpoint)
    wanted = {name: sizes[name] for name in formats.calibrated}
    with one_thread(), torch.no_grad(), codes_file(path, wanted, formats.calibrated) as writer:
        weights = CalibratedWeights(checkpoint, formats, writer)
        _walk(checkpoint, text, modules, weights, progress)
    return Calibrated(tuple(weights.done), tuple(weights.nearest))


def _walk(
    checkpoint: Checkpoint,
    text: CalibrationText,
    modules: int,
    weights: CalibratedWeights,
    progress: Progress,
) -> None:
    config = checkpoint.config
    progress.start("校准", config.num_hidden_layers + 1 + modules)
    with torch.device("meta"):
        embed = Embed(config)
    embed.embed_tokens.weight = nn.Parameter(weights.runtime(_EMBED), requires_grad=False)
    windows = [Window(*embed(ids[None], torch.zeros(1, dtype=torch.int64))) for ids in text.windows]
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = DecoderLayer(config, config.is_moe_layer(index), FORMS, config.runs_indexer(index))
        weights.fill(layer, f"model.layers.{index}.", skipped="mlp.experts.")
        calibrate_layer(layer, index, config, windows, weights)
        progress.advance(1, f"layers.{index}")
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    weights.fill(norm, "model.norm.")
    hidden = [norm(window.x) for window in windows]
    name = _EMBED if config.tie_word_embeddings else _HEAD
    with torch.device("meta"):
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    head.weight = nn.Parameter(weights.plain(name), requires_grad=False)
    weights.calibrate({name: head}, gram_of(hidden, config.hidden_size))
    progress.advance(1, "lm_head")
    for index in range(modules):
        hidden = _mtp(checkpoint, text, index, embed, hidden, weights)
        progress.advance(1, f"mtp {index}")


def _mtp(
    checkpoint: Checkpoint,
    text: CalibrationText,
    index: int,
    embed: Embed,
    hidden: list[torch.Tensor],
    weights: CalibratedWeights,
) -> list[torch.Tensor]:
    """第 ``index`` 个 MTP 模块；``hidden`` 的第 i 行对第 ``i + index + 1`` 个 token，所以每往后一个少一行。"""
    config = checkpoint.config
    number = config.num_hidden_layers + index
    with torch.device("meta"):
        module = MtpModule(config, index, FORMS)
    weights.fill(module, f"model.layers.{number}.", skipped="mlp.experts.")
    shifted = Embed(config, index + 1)
    shifted.embed_tokens = embed.embed_tokens
    past = torch.zeros(1, dtype=torch.int64)
    found = [shifted(ids[None, index + 1 :], past) for ids in text.windows]
    joined = [
        torch.cat([module.enorm(x), module.hnorm(before[:, : x.shape[1]])], dim=-1)
        for (x, _, _), before in zip(found, hidden, strict=True)
    ]
    eh_proj = f"model.layers.{number}.eh_proj.weight"
    weights.calibrate({eh_proj: module.eh_proj}, gram_of(joined, 2 * config.hidden_size))
    windows = [Window(module.eh_proj(x), cos, sin) for x, (_, cos, sin) in zip(joined, found, strict=True)]
    calibrate_layer(module, number, config, windows, weights)
    return [module.shared_head.norm(window.x) for window in windows]
