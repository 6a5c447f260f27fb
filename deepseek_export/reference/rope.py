"""RoPE、YaRN 与 LongRoPE。

出处：transformers ``modeling_rope_utils.py``；YaRN（arXiv 2309.00071）；LongRoPE（arXiv 2402.13753）。

YaRN 的 mscale 生效两次：一次乘在 cos/sin 上（``RopeConfig.cos_sin_scale``，mscale 与 mscale_all_dim 相等时为 1），
一次平方后乘在 softmax scale 上（``ModelConfig.softmax_scale``）。

三种 lane 排布（``ModelConfig.rope_layout``）的分数相等，但缓存里的 ``k_pe`` 差一个置换，不能混用：

- ``interleaved``（V2）：输入成对 (x0, x1)，输出仍成对；
- ``deinterleaved``（V3，``rope_interleave=true``）：输入成对，输出前后两半；
- ``half``（MiniCPM3；V3，``rope_interleave=false``）：输入、输出都是前后两半。
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepseek_export.checkpoint import RopeConfig


def rope_frequencies(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """旋转频率与 cos/sin 的缩放。

    Args:
        rope: ``default``、``yarn`` 或 ``longrope``。
        dim: ``qk_rope_head_dim``，偶数。

    Returns:
        inv_freq [dim/2] float32；attention_scaling。
    """
    powers = rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "default":
        return 1.0 / powers, 1.0
    if rope.rope_type == "longrope":
        return 1.0 / (torch.tensor(rope.short_factor) * powers), rope.cos_sin_scale

    def correction(rotations: float) -> float:
        """旋转 ``rotations`` 圈的那一维。"""
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # 避免除零，与 transformers 相同
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolation = 1 - ramp
    inv_freq = 1.0 / (rope.factor * powers) * (1 - extrapolation) + 1.0 / powers * extrapolation
    return inv_freq, rope.cos_sin_scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """旋转最后一维。

    Args:
        x: [B, S, H, dr]；k_pe 用 H=1。
        cos, sin: [B, S, dr/2]，dtype 同 ``x``。
        layout: 见模块说明。

    Returns:
        [B, S, H, dr]。
    """
    B, S, H, dr = x.shape
    if layout == "deinterleaved":
        x = x.reshape(B, S, H, dr // 2, 2).transpose(3, 4)
    flat = x.reshape(B, S, H * dr)
    interleaved = layout == "interleaved"
    rotated = torch.onnx.ops.rotary_embedding(flat, cos, sin, None, interleaved=interleaved, num_heads=H)
    return rotated.view(B, S, H, dr)
