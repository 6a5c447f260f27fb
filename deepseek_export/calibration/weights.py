"""校准用的权重：按检查点的名字逐个读，量化了的换成运行时实际用的值。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek_export.calibration.gptq import Codes, Gram, gptq
from deepseek_export.calibration.overlay import CodesWriter
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.checkpoint import Shapes, expected_mtp_tensors, expected_tensors
from deepseek_export.checkpoint.int4_codes import keeps_codes
from deepseek_export.checkpoint.recipe import Recipe, load_array
from deepseek_export.checkpoint.weight_only import BlockFormat, block_scales, block_steps, dequantized
from deepseek_export.errors import DsxError
from deepseek_export.reference.weights import torch_dtype

#: 一个专家至少见过这么多 token 才校准；更少的 H 靠不住，照常取最近的码。
MIN_TOKENS = 128


def is_calibrated(recipe: Recipe) -> bool:
    """要校准的码与 scale：int4 的，照发布的 4 位码写的除外，那些读出来就是运行时的值。"""
    if recipe.of is None or recipe.form is None or recipe.form.kind != "int4":
        return False
    return not keeps_codes(recipe.of.int4, recipe.form)


@dataclass(frozen=True)
class Formats:
    """检查点的张量 → 导出成什么格式。

    Attributes:
        calibrated: 要校准的，int4。
        rounded: 不校准、取最近的码的（w_kv_b、词嵌入）。
    """

    calibrated: Mapping[str, BlockFormat]
    rounded: Mapping[str, BlockFormat]

    @classmethod
    def of(cls, recipes: Mapping[str, Recipe]) -> Formats:
        """由导出的配方。"""
        calibrated: dict[str, BlockFormat] = {}
        rounded: dict[str, BlockFormat] = {}
        for recipe in recipes.values():
            if recipe.form is None or recipe.op == "scales":
                continue
            form = dict.fromkeys(recipe.sources, recipe.form)
            if is_calibrated(recipe):
                calibrated |= form
            elif recipe.of is not None and not keeps_codes(recipe.of.int4, recipe.form):
                rounded |= form
        return cls(calibrated, rounded)


def shapes(checkpoint: Checkpoint) -> Shapes:
    """主干与各个 MTP 模块的张量 → 形状；4 位的是还原之后的。"""
    config = checkpoint.config
    found = expected_tensors(config)
    for index in range(config.num_mtp_layers):
        found |= expected_mtp_tensors(config, index)
    return found


class CalibratedWeights:
    """逐个读权重，逐个校准，码写进 ``writer``。

    Args:
        checkpoint: 检查点。
        formats: 哪些权重是什么格式。
        writer: 码写到哪里。

    Attributes:
        done: 校准了的张量。
        nearest: 要校准而照常取了最近的码的：见过的 token 太少，或输入全是零。
    """

    def __init__(self, checkpoint: Checkpoint, formats: Formats, writer: CodesWriter) -> None:
        self.checkpoint, self.formats, self.writer = checkpoint, formats, writer
        self._shapes = shapes(checkpoint)
        self.done: list[str] = []
        self.nearest: list[str] = []

    def plain(self, name: str) -> Tensor:
        """检查点里的权重，float32。"""
        recipe = Recipe(op="copy", sources=(name,), shape=self._shapes[name], dtype="float32")
        (recipe,) = bind_recipes({name: recipe}, self.checkpoint).values()
        return torch.from_numpy(load_array(name, recipe, self.checkpoint.store))

    def fill(self, module: nn.Module, prefix: str, skipped: str = "") -> None:
        """装进 ``module``：要校准的先是浮点的，其余的是运行时用的值。

        Args:
            module: meta 设备上的模块，参数名接在 ``prefix`` 之后就是检查点里的名字。
            prefix: 以点结尾。
            skipped: 名字里有它的参数不装。
        """
        wanted = [(name, one) for name, one in module.named_parameters() if not (skipped and skipped in name)]
        state = {name: self._parameter(f"{prefix}{name}", one) for name, one in wanted}
        module.load_state_dict(state, strict=False, assign=True)
        module.eval().requires_grad_(False)

    def _parameter(self, name: str, meta: Tensor) -> Tensor:
        # V2、A.X-K1 没有路由的偏置：是零。
        missing = name not in self._shapes
        return torch.zeros(meta.shape) if missing else self.runtime(name)

    def runtime(self, name: str) -> Tensor:
        """运行时的值；要校准的还没有校准，是浮点的。"""
        weight = self.plain(name)
        form = self.formats.rounded.get(name)
        return weight if form is None else torch.from_numpy(dequantized(weight.numpy(), form))

    def calibrate(self, linears: Mapping[str, nn.Linear], gram: Gram) -> None:
        """输入相同的几个线性层：取码、写下，权重就地换成还原的值；不量化的（``keep``）跳过。

        Args:
            linears: 检查点里的权重名 → 线性层。
            gram: 它们的输入。

        Raises:
            DsxError: ``DSX-E662``，输入里有 NaN、Inf。
        """
        wanted = {name: linear for name, linear in linears.items() if name in self.formats.calibrated}
        if not wanted:
            return
        if not gram.finite:
            raise DsxError(
                "DSX-E662",
                f"校准的文本在 {next(iter(wanted))} 的输入里算出了 NaN 或 Inf",
                "先用 dsx verify 看没有量化的模型在 float32 下对不对；对的话换一段文本",
            )
        (form,) = {self.formats.calibrated[name] for name in wanted}
        rows = torch.cat([linear.weight.data for linear in wanted.values()])
        root = gram.inverse_root() if gram.tokens >= MIN_TOKENS else None
        (self.nearest if root is None else self.done).extend(wanted)
        codes = nearest(rows, form) if root is None else gptq(rows, root, form)
        start = 0
        for name, linear in wanted.items():
            part = slice(start, start := start + linear.out_features)
            mine = Codes(codes.steps[part], codes.scales[part])
            self.writer.write(name, mine.steps, mine.scales)
            linear.weight.data = mine.values(form.block)


def nearest(weight: Tensor, form: BlockFormat) -> Codes:
    """没有校准时的码：每块的 scale 取平方误差最小的，码取最近的。"""
    array = weight.numpy()
    scales = block_scales(array, form)
    steps = torch.from_numpy(block_steps(array, scales, form))
    return Codes(steps, torch.from_numpy(scales.astype("float32")).to(torch_dtype(form.scale)))
