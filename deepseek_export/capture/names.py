"""捕获图里值与节点的命名约定；对齐校验按这些名字取块边界。"""

from __future__ import annotations

EMBED_X, EMBED_COS, EMBED_SIN = "embed/x", "embed/cos", "embed/sin"
LOGITS, HIDDEN = "logits", "hidden"
INPUT_IDS, PAST_LENS, LOGITS_POSITIONS = "input_ids", "past_lens", "logits_positions"
#: 只有打开 MTP 的主模型才有的输入与输出。
DRAFT_IDS, DRAFT_PROBS, UNIFORM, TEMPERATURE = "draft_ids", "draft_probs", "uniform", "temperature"
NUM_ACCEPTED, NEXT_ID = "num_accepted", "next_id"
#: 只有草稿模型才有的。
PREV_HIDDEN, DRAFT_ID, COMBINED = "prev_hidden", "draft_id", "mtp/combined"


def attn_residual(layer: int) -> str:
    """第 ``layer`` 层注意力之后的残差 [B, S, D]。"""
    return f"layers.{layer}/attn_residual"


def layer_output(layer: int) -> str:
    """第 ``layer`` 层的输出 [B, S, D]；``-1`` 是嵌入的输出。"""
    return EMBED_X if layer < 0 else f"layers.{layer}/x"


def selection(layer: int) -> dict[str, str]:
    """第 ``layer`` 层挑的 key：块的端口 → 值名，``indices`` [B, S, topk]、``counts`` [B, S]。"""
    return {port: f"layers.{layer}/{port}" for port in ("indices", "counts")}


def cache_input(cache: str, layer: int) -> str:
    """缓存输入名，例如 ``kv_cache.3``。"""
    return f"{cache}.{layer}"


def cache_output(cache: str, layer: int) -> str:
    """缓存输出名，例如 ``kv_cache_out.3``。"""
    return f"{cache}_out.{layer}"
