"""各个点共用的：形状、随机输入、还没有写过的输出、比较。"""

from __future__ import annotations

import secrets
from typing import Literal

import torch

from deepseek_export.parity.measures import Measure, measure

LATENT, ROPE, SCALE = 512, 64, 0.1147
DtypeName = Literal["float16", "bfloat16"]
Inputs = tuple[torch.Tensor, ...]
Outputs = tuple[torch.Tensor, ...]


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


def unwritten(like: torch.Tensor) -> torch.Tensor:
    """形状、dtype 同 ``like``，填着不会是结果的数。"""
    return scribble(torch.empty_like(like))


def scribble(tensor: torch.Tensor) -> torch.Tensor:
    """填上不会是结果的数：NaN，整数是 -7。"""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)


def compared(got: torch.Tensor, want: torch.Tensor) -> Measure:
    """差多少。"""
    return measure(got.float().cpu().numpy(), want.float().cpu().numpy())
