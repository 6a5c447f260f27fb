"""一个检查点在一种方案下的大小：每个张量在哪一部分、换成各种 dtype 有多少字节。"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deepseek_export.checkpoint import Checkpoint, require_mtp
from deepseek_export.checkpoint.fp8_sources import Fp8Sources
from deepseek_export.checkpoint.int4_published import published_quantization
from deepseek_export.checkpoint.recipe import WeightDtype
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.dtypes import DTYPES
from deepseek_export.plan.result import StoredWeights, WeightKind
from deepseek_export.plan.shape import PARTS, ModelShape, Part, part_of
from deepseek_export.plan.stages import LayeredModel, layer_of
from deepseek_export.plan.written import written_bytes, written_tensors
from deepseek_export.profile import OptimizationProfile

#: 每种权重写成什么：模型 dtype 与量化；检查点里的原样不写。
WRITTEN: Mapping[WeightKind, tuple[WeightDtype, Quantization | None]] = {
    "float32": ("float32", None),
    "float16": ("float16", None),
    "int8": ("float32", Quantization(kind="int8")),
    "int4": ("float32", Quantization(kind="int4")),
}


@dataclass(frozen=True)
class SizedModel:
    """打开了的检查点与方案。

    Attributes:
        source: 检查点。
        profile: 方案。
        modules: 方案打开 MTP 时有几个草稿模块，没有打开是 0。
        shape: 参数的个数与代价。
    """

    source: Checkpoint
    profile: OptimizationProfile
    modules: int
    shape: ModelShape

    @classmethod
    def open(cls, checkpoint: Path | str, profile: OptimizationProfile) -> SizedModel:
        """只读 config.json 与 safetensors 文件头。

        Raises:
            DsxError: 1xx 检查点；``DSX-E119`` 方案打开了 MTP 而检查点没有；``DSX-E136`` 方案说了索引 key 怎么存而模型没有。
        """
        source = Checkpoint.open(checkpoint)
        profile.check_model(source.config.family, source.config.indexer is not None)
        modules = require_mtp(source) if profile.mtp.enabled else 0
        return cls(source, profile, modules, ModelShape.build(source.config, profile, modules))

    @property
    def cache_dtype(self) -> str:
        """缓存的 dtype。"""
        named = self.profile.mla.cache_dtype
        return self.source.config.dtype if named == "model" else named

    def hidden_bytes(self, weights: WeightKind) -> float:
        """层与层之间的一个数几个字节。"""
        return DTYPES[self.source.config.dtype if weights == "stored" else WRITTEN[weights][0]].nbytes(1)

    def used(self) -> list[str]:
        """要用的张量：没有打开 MTP 时不含 MTP 层，主干的副本也不算。"""
        layers, copies = self.source.config.num_hidden_layers, set(self.source.mtp_tensors)
        copies = {
            name for name in copies if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
        }
        skipped = copies | set(self.source.ignored)
        kept = layers + self.modules  # 按层号看：FP8 的 scale 也随它的层
        return [name for name in self.source.store if name not in skipped and (layer_of(name) or 0) < kept]

    def stored(self) -> list[StoredWeights]:
        """检查点里各种 dtype 的张量。"""
        tensors: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for name in self.used():
            spec = self.source.store[name]
            tensors[spec.dtype] += 1
            total[spec.dtype] += spec.nbytes
        return [
            StoredWeights(dtype=dtype, tensors=tensors[dtype], bytes=total[dtype]) for dtype in sorted(total)
        ]

    def tensors(self, weights: WeightKind) -> Iterator[tuple[str, Part, int]]:
        """每个张量：名字、在哪一部分、换成 ``weights`` 多少字节。"""
        if weights != "stored":
            yield from written_tensors(self.source.config, self.profile, self.modules, *WRITTEN[weights])
            return
        for name in self.used():
            spec = self.source.store[name]
            yield name, part_of(name, spec.shape), spec.nbytes

    def as_published(self) -> int | None:
        """``--quant checkpoint`` 打包写多少字节；不是 4 位的检查点、或照搬不了的为 ``None``。"""
        int4 = self.source.config.int4
        if int4 is None or int4.layout.act_order:
            return None
        quantization = published_quantization(self.source, self.modules, affine=True)
        written = written_tensors(self.source.config, self.profile, self.modules, "float32", quantization)
        return sum(nbytes for _, _, nbytes in written)

    def parts(self, weights: WeightKind) -> dict[Part, float]:
        """各部分一共多少字节。"""
        found: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        for _, part, nbytes in self.tensors(weights):
            found[part] += nbytes
        return found

    def engine_bytes(self) -> int:
        """TensorRT 的 float16 引擎里的权重；FP8 的检查点字节原样留着，不还原成两倍大的。"""
        fp8 = Fp8Sources.of(self.source)
        parts = written_bytes(
            self.source.config, self.profile, self.modules, "float16", tensorrt=True, fp8=fp8
        )
        return sum(parts.values())

    def fp8(self, weights: WeightKind) -> dict[Part, float]:
        """各部分有几分之几的参数是 FP8；换成别的 dtype 就没有。"""
        counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
        for name in self.used() if weights == "stored" else ():
            spec = self.source.store[name]
            if spec.dtype.startswith("F8"):
                counts[part_of(name, spec.shape)] += math.prod(spec.shape)
        return {part: counts[part] / max(self.shape.parameters[part], 1) for part in PARTS}

    def layered(self, weights: WeightKind) -> LayeredModel:
        """按层拆开。"""
        return LayeredModel.build(self.shape, self.tensors(weights), self.fp8(weights), self.cache_dtype)
