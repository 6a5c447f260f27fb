"""稀疏注意力的小模型：随机的 token、参考模型分几次走完的 logits、发布格式的字段。"""

from __future__ import annotations

from typing import Any

import torch

from deepseek_export.reference import ReferenceModel
from tests.models import DSA, ODD, TOLERANCE, VARIANTS

LOGITS = TOLERANCE[torch.float32]
TOPK = DSA["index_topk"]


def tokens(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, ODD["vocab_size"], (batch, length), generator=g)


def logits(
    model: ReferenceModel, ids: torch.Tensor, chunks: list[int] | None = None, capacity: int = 128
) -> torch.Tensor:
    """分几次走完，全部位置的 logits。"""
    B, caches, parts, start = ids.shape[0], model.empty_caches(ids.shape[0], capacity), [], 0
    for size in chunks or [ids.shape[1]]:
        positions = torch.arange(size).expand(B, -1)
        past = torch.full((B,), start)
        got, _, caches = model(ids[:, start : start + size], past, positions, caches)
        parts.append(got)
        start += size
    return torch.cat(parts, 1)


def vars_of(variant: str) -> dict[str, Any]:
    family, changes = VARIANTS[variant]
    plain = {key: value for key, value in {**ODD, **changes}.items() if value is not None}
    return plain | {
        "model_type": family,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "torch_dtype": "bfloat16",
        **({"rope_theta": 10000.0} if "rope_parameters" not in plain else {}),
    }
