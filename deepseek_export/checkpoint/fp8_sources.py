"""FP8 分块的检查点里哪些张量是 FP8；原样取出它们的码与 scale 的配方。"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepseek_export.checkpoint.checkpoint import Checkpoint
from deepseek_export.checkpoint.quantization import FP8_DTYPE, SCALE_SUFFIX
from deepseek_export.checkpoint.recipe import Recipe

_LEAST_COLUMNS = 16


@dataclass(frozen=True)
class Fp8Sources:
    """检查点里的 FP8 张量。

    Attributes:
        block: 一个 scale 管几行、几列。
        names: 张量名。
    """

    block: tuple[int, int]
    names: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Fp8Sources | None:
        """不是 FP8 的检查点为 ``None``。"""
        block = checkpoint.config.weight_block_size
        if block is None:
            return None
        store = checkpoint.store
        return cls(block, frozenset(name for name in store if store[name].dtype == FP8_DTYPE))

    @property
    def readable(self) -> bool:
        """kernel 读得了：沿输入维每 2 的幂个码一个 scale，不少于一次矩阵乘的 16 个。"""
        columns = self.block[1]
        return columns >= _LEAST_COLUMNS and columns & (columns - 1) == 0

    def holds(self, recipe: Recipe) -> bool:
        """这个浮点权重的字节能不能原样留着：来源都是 FP8，只叠放，不重排。"""
        return (
            recipe.op in ("copy", "stack")
            and not recipe.keeps_bytes
            and bool(recipe.sources)
            and self.names.issuperset(recipe.sources)
        )

    def recipes(self, recipe: Recipe) -> tuple[Recipe, Recipe]:
        """一个浮点权重 → 码与 scale 的配方，都原样取自检查点；排列与检查点的相同，所以没有叠放的按引用也指得进去。"""
        *stacked, rows, columns = recipe.shape
        height, width = self.block
        scales = (*stacked, -(-rows // height), -(-columns // width))
        return (
            Recipe(op=recipe.op, sources=recipe.sources, shape=recipe.shape, dtype="int8"),
            Recipe(op=recipe.op, sources=_scales(recipe.sources), shape=scales, dtype="float32"),
        )


def _scales(sources: Iterable[str]) -> tuple[str, ...]:
    return tuple(name + SCALE_SUFFIX for name in sources)
