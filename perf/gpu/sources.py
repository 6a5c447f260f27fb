"""各个点共用的：形状、随机输入、还没有写过的输出、比较。"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Literal

import torch

from deepseek_export.kernels.program import LaunchTable
from deepseek_export.parity.measures import Measure, measure

LATENT, ROPE, SCALE = 512, 64, 0.1147
DtypeName = Literal["float16", "bfloat16"]
Inputs = tuple[torch.Tensor, ...]
Outputs = tuple[torch.Tensor, ...]
#: 专家的形状：名字 → (E, k, D, I)。``tiny`` 只为在 sanitizer 下跑得完。
EXPERTS = {"V3": (256, 8, 7168, 2048), "V2-Lite": (64, 6, 2048, 1408), "tiny": (8, 2, 128, 64)}


class Source:
    """随机输入；种子写进结果。"""

    def __init__(self, device: str) -> None:
        self.device, self.seed = device, secrets.randbelow(2**31)
        self._generator = torch.Generator(device).manual_seed(self.seed)

    def randn(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """标准正态乘 ``scale``。"""
        return torch.randn(*shape, generator=self._generator, device=self.device, dtype=dtype).mul_(scale)

    def rand(self, *shape: int) -> torch.Tensor:
        """[0, 1) 均匀，float32。"""
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def int8(self, *shape: int) -> torch.Tensor:
        """每个字节均匀，int8。"""
        return torch.randint(
            -128, 128, shape, generator=self._generator, device=self.device, dtype=torch.int8
        )

    def lens(self, past: Sequence[int]) -> torch.Tensor:
        """``past_lens``。"""
        return torch.tensor(past, device=self.device, dtype=torch.int64)

    def cache(self, past: Sequence[int], S: int, T: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """缓存 [B, 1, T, ``width``]；看不见的行是 NaN，负的长度按 0。"""
        rows = self.randn(len(past), 1, T, width, dtype=dtype)
        for b, length in enumerate(past):
            rows[b, :, max(length, 0) + S :] = float("nan")
        return rows

    def latent_queries(self, B: int, S: int, H: int, dtype: torch.dtype) -> torch.Tensor:
        """latent 注意力的 ``q``。"""
        return self.randn(B, S, H, LATENT + ROPE, dtype=dtype)

    def routed(
        self, N: int, E: int, k: int, D: int, used: int | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """专家的 (x, topk_ids, topk_weights)；给了 ``used`` 就只路由到前几个专家。"""
        ids = self.rand(N, used or E).topk(k, dim=-1).indices.to(torch.int32)
        return self.randn(N, D, dtype=dtype), ids, self.rand(N, k)


def latent_context(q: torch.Tensor) -> torch.Tensor:
    """latent 注意力没有写过的输出：[H, B*S, r]。"""
    B, S, H, _ = q.shape
    return unwritten(q.new_empty(H, B * S, LATENT))


def latent_bytes(q: torch.Tensor) -> int:
    """latent 注意力的 ``q`` 与输出有几个字节。"""
    return 2 * q.numel() * (2 * LATENT + ROPE) // (LATENT + ROPE)


def shapes_of(table: LaunchTable[Any], tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """契约里各输入的形状：int4 的码两个一字节，torch 的张量最后一维只有一半。"""
    return [
        (*tensor.shape[:-1], tensor.shape[-1] * 2) if port.dtype == "int4" else tuple(tensor.shape)
        for port, tensor in zip(table.inputs, tensors, strict=True)
    ]


def unwritten(like: torch.Tensor) -> torch.Tensor:
    """形状、dtype 同 ``like``，填着不会是结果的数。"""
    return scribble(torch.empty_like(like))


def scribble(tensor: torch.Tensor) -> torch.Tensor:
    """填上不会是结果的数：NaN，整数是 -7。"""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)


def compared(got: torch.Tensor, want: torch.Tensor) -> Measure:
    """差多少。"""
    return measure(got.float().cpu().numpy(), want.float().cpu().numpy())
