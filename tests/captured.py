"""捕获好的图，与跑一遍整个模型的输入：pass 的测试共用。"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import numpy as np

from deepseek_export.capture import CapturedModel, capture_model
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.recipe import load_array
from deepseek_export.passes.base import GraphModule
from deepseek_export.profile import resolve_profile
from tests.models import model_config


@functools.cache
def _captured(variant: str, profile: str) -> CapturedModel:
    return capture_model(model_config(variant), resolve_profile(profile))


def captured_graph(variant: str, profile: str = "mla+moe") -> GraphModule:
    """捕获之后、下沉之前的图；每次一份新的，捕获只做一遍。"""
    captured = copy.deepcopy(_captured(variant, profile))
    return GraphModule.from_captured(captured, model_config(variant), "float32")


def model_feeds(
    module: GraphModule,
    checkpoint: Checkpoint,
    ids: np.ndarray,
    past: Sequence[int],
    capacity: int,
    fill: Callable[[Sequence[int]], np.ndarray],
) -> dict[str, np.ndarray]:
    """权重，``ids`` ``[B, S]`` 各行接在 ``past`` 之后，每个位置都要 logits；缓存由 ``fill(形状)`` 填。"""
    B, S = ids.shape
    feeds = {name: load_array(name, recipe, checkpoint.store) for name, recipe in module.weights.items()}
    feeds |= {
        "input_ids": ids,
        "past_lens": np.array(past),
        "logits_positions": np.tile(np.arange(S), (B, 1)),
    }
    sizes = {"B": B, "T": capacity}
    caches = [tensor for tensor in module.graph.inputs if "_cache." in tensor.name]
    return feeds | {t.name: fill([sizes.get(dim, dim) for dim in t.shape]) for t in caches}
