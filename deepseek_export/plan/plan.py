"""``dsx plan``：权重、缓存、导出的内存与磁盘、放不放得下、怎么切、每秒多少 token 的上界。

全是算术：权重的字节数来自 safetensors 文件头，其余由 config.json 推出。每个估算的假设都写在结果的 ``assumptions`` 里。
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepseek_export.checkpoint import Checkpoint, require_mtp
from deepseek_export.checkpoint.recipe import CHUNK_BYTES, WeightDtype
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.errors import DsxError
from deepseek_export.plan.gpus import GPUS, Gpu
from deepseek_export.plan.shape import PARTS, ModelShape, Part, part_of
from deepseek_export.plan.written import HEADROOM, written_bytes
from deepseek_export.profile import OptimizationProfile

WeightKind = Literal["stored", "float32", "float16", "int8", "int4"]
Split = Literal["single", "tensor", "expert", "pipeline"]

#: 每种权重写成什么：模型 dtype 与量化。
_WRITTEN: dict[WeightKind, tuple[WeightDtype, Quantization | None]] = {
    "float32": ("float32", None),
    "float16": ("float16", None),
    "int8": ("float32", Quantization(kind="int8")),
    "int4": ("float32", Quantization(kind="int4")),
}
_CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
#: 显存里留给激活、工作区与碎片的比例。
RESERVE = 0.10
#: 捕获与改图的内存，与模型大小无关：演示检查点的导出峰值（README）。
_EXPORT_BASE = 460 << 20
#: 每个检查点张量的文件头、配方与它那一份图；DeepSeek-V3（91,991 个张量）按引用导出的峰值实测 549 MiB，这样算是 640 MiB。
_PER_TENSOR = 2 << 10
#: 打包时同时在内存里的块：gate、up 各有原文、转换后的一份、每元素一字节的掩码，再加交错好的两块。
_CHUNKS = 6.5
#: ``dsx build`` 的峰值内存：底数加 float16 权重的几倍（TensorRT-RTX 1.7，8、97、433、818 MiB 的权重实测 0.69、0.90、2.34、3.84 GiB）；
#: 引擎里权重之外的是代码。
_BUILD_BASE = 700 << 20
_BUILD_COPIES = 4.4
_BUILD_CODE = 64 << 20
DEFAULT_CONTEXT = 4096
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredWeights(_Entry):
    """检查点里一种 dtype 的张量。"""

    dtype: str
    tensors: int
    bytes: int


class CachePlan(_Entry):
    """KV 缓存：潜向量与展开的各多大；``used`` 是方案实际用的那一种。"""

    dtype: str
    used: Literal["latent", "expanded"]
    latent_bytes_per_token: int
    expanded_bytes_per_token: int
    latent_bytes: int
    expanded_bytes: int


class ExportPlan(_Entry):
    """导出要多少磁盘与内存；``mode`` 同 ``dsx export --weights``，``dtype`` 的 int8、int4 是 ``--quant``（``ort-cpu``）。"""

    mode: Literal["packed", "reference"]
    dtype: Literal["float32", "float16", "int8", "int4"]
    disk_bytes: int
    peak_ram_bytes: int


class BuildPlan(_Entry):
    """由 float16 的 bundle 建一个 TensorRT 引擎（一种 SM）要多少磁盘与内存。"""

    disk_bytes: int
    peak_ram_bytes: int


class SplitPlan(_Entry):
    """``gpus`` 块卡按一种方式切：最满的那块卡放多少，放不放得下。"""

    split: Split
    gpus: int
    weight_bytes: int
    cache_bytes: int
    fits: bool


class GpuPlan(_Entry):
    """在一种 GPU 上：请求的卡数怎么切得下，至少要几块，速度的上界。"""

    gpu: str
    title: str
    usable_bytes: int
    requested: list[SplitPlan]
    smallest: SplitPlan | None
    decode_tokens_per_second: float | None
    decode_bound: Literal["memory", "compute"] | None
    prefill_tokens_per_second: float | None


class Plan(_Entry):
    """全部估算。"""

    checkpoint: str
    family: str
    layers: int
    moe_layers: int
    mtp_modules: int
    profile: str
    weights: WeightKind
    batch: int
    context: int
    parameters: int
    active_parameters: int
    stored: list[StoredWeights]
    weight_bytes: dict[WeightKind, int]
    cache: CachePlan
    export: list[ExportPlan]
    build: BuildPlan
    gpus: list[GpuPlan]
    assumptions: list[str]


def make_plan(
    checkpoint: Path | str,
    profile: OptimizationProfile,
    *,
    gpus: Sequence[str] = (),
    count: int = 1,
    batch: int = 1,
    context: int | None = None,
    weights: WeightKind = "stored",
) -> Plan:
    """估算；只读 config.json 与 safetensors 文件头。

    Args:
        checkpoint: 检查点目录。
        profile: 优化方案，决定缓存的形式与每步跑哪些专家。
        gpus: :data:`~deepseek_export.plan.gpus.GPUS` 里的名字。
        count: 每种 GPU 有几块。
        batch: 同时生成的序列数。
        context: 每条序列的长度；缺省 4096，模型不到就取它的最大长度。
        weights: 权重在显存里的 dtype；``stored`` 是检查点里的原样。

    Raises:
        DsxError: 1xx 检查点；``DSX-E119`` 方案打开了 MTP 而检查点没有；``DSX-E703`` 不认识的 GPU；
            ``DSX-E704`` 长度超过 max_position_embeddings。
    """
    unknown = [name for name in gpus if name not in GPUS]
    if unknown:
        raise DsxError("DSX-E703", f"没有叫 {unknown[0]!r} 的 GPU", f"认识的 GPU：{'、'.join(GPUS)}")
    source = Checkpoint.open(checkpoint)
    config = source.config
    limit = config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, limit) if context is None else context
    if context > limit:
        raise DsxError(
            "DSX-E704", f"--context {context} 超过模型的最大长度 {limit}", f"给不超过 {limit} 的 --context"
        )
    modules = require_mtp(source) if profile.mtp.enabled else 0
    shape = ModelShape.build(config, profile, modules)
    used = _used(source, modules)
    kinds: dict[WeightKind, dict[Part, float]] = {
        kind: {part: float(count) for part, count in written_bytes(config, profile, modules, *how).items()}
        for kind, how in _WRITTEN.items()
    }
    kinds["stored"] = _stored_parts(source, used)
    cache_dtype = config.dtype if profile.mla.cache_dtype == "model" else profile.mla.cache_dtype
    cache = _cache(shape, cache_dtype, config.dtype, batch * context)
    estimate = _Estimate(shape, kinds[weights], cache, batch, context)
    totals = {kind: round(sum(parts.values())) for kind, parts in kinds.items()}
    return Plan(
        checkpoint=str(checkpoint),
        family=config.family,
        layers=config.num_hidden_layers,
        moe_layers=config.num_moe_layers,
        mtp_modules=modules,
        profile=profile.name,
        weights=weights,
        batch=batch,
        context=context,
        parameters=shape.total,
        active_parameters=shape.active,
        stored=_stored(source, used),
        weight_bytes=totals,
        cache=cache,
        export=_exports(len(source.store), totals),
        build=BuildPlan(
            disk_bytes=totals["float16"] + _BUILD_CODE,
            peak_ram_bytes=_BUILD_BASE + int(_BUILD_COPIES * totals["float16"]),
        ),
        gpus=[estimate.on(name, GPUS[name], count) for name in gpus],
        assumptions=_ASSUMPTIONS + _GPU_ASSUMPTIONS if gpus else _ASSUMPTIONS,
    )


def _used(source: Checkpoint, modules: int) -> list[str]:
    """要用的张量：没有打开 MTP 时不含 MTP 层，主干的副本也不算。"""
    mtp, copies = set(source.mtp_tensors), (".embed_tokens.weight", ".shared_head.head.weight")
    skipped = {name for name in mtp if not modules or name.endswith(copies)} | set(source.ignored)
    return [name for name in source.store if name not in skipped]


def _stored(source: Checkpoint, used: list[str]) -> list[StoredWeights]:
    tensors: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name in used:
        spec = source.store[name]
        tensors[spec.dtype] += 1
        total[spec.dtype] += spec.nbytes
    return [StoredWeights(dtype=dtype, tensors=tensors[dtype], bytes=total[dtype]) for dtype in sorted(total)]


def _stored_parts(source: Checkpoint, used: list[str]) -> dict[Part, float]:
    parts: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    for name in used:
        spec = source.store[name]
        parts[part_of(name, spec.shape)] += spec.nbytes
    return parts


def _cache(shape: ModelShape, dtype: str, model_dtype: str, tokens: int) -> CachePlan:
    """展开的缓存没有 int8 这一种，按模型的 dtype 比。"""
    int8 = dtype == "int8"
    latent = shape.latent_cache_values(int8) * _CACHE_BYTES[dtype]
    expanded = shape.expanded_cache_values * _CACHE_BYTES[model_dtype if int8 else dtype]
    return CachePlan(
        dtype=dtype,
        used="latent" if shape.latent else "expanded",
        latent_bytes_per_token=latent,
        expanded_bytes_per_token=expanded,
        latent_bytes=latent * tokens,
        expanded_bytes=expanded * tokens,
    )


def _exports(tensors: int, totals: dict[WeightKind, int]) -> list[ExportPlan]:
    base = _EXPORT_BASE + tensors * _PER_TENSOR
    streaming = base + int(_CHUNKS * CHUNK_BYTES)
    packed = [
        ExportPlan(
            mode="packed",
            dtype=kind,
            disk_bytes=totals[kind] + HEADROOM,
            peak_ram_bytes=streaming,
        )
        for kind in _WRITTEN
    ]
    reference = ExportPlan(mode="reference", dtype="float32", disk_bytes=HEADROOM, peak_ram_bytes=base)
    return [*packed, reference]


_ASSUMPTIONS = [
    "导出的内存是上界：捕获的底数、每个张量 2 KiB 的记账，打包另加几个 64 MiB 的块；与模型大小几乎无关（40 亿参数实测 0.6 GB）",
    "int8、int4 按块 32、float32 的 scale 计；词嵌入、norm、router 不量化，按 float32 计，absorb 用的 kv_b 按 bfloat16 计",
    "建引擎：float16，TensorRT-RTX，内存按 0.7 GiB 加权重的 4.4 倍，由 0.8 GiB 以内的权重实测得来，更大的没有量过",
]
_GPU_ASSUMPTIONS = [
    f"显存留出 {RESERVE:.0%} 给激活、工作区与碎片；GB 按十进制",
    "tensor：头与列均分，潜缓存每卡一份（MLA 只有一个 KV 头），展开的缓存按头均分；"
    "expert：专家均分，其余每卡一份，batch 按卡分；pipeline：按层均分，词嵌入与 lm_head 各在一端",
    "速度是 roofline 上界：每步把用到的权重与缓存各读一遍，带宽与算力都取峰值，不计通信与 kernel 开销；"
    "batch 里命中的专家数按均匀路由估计；pipeline 一步要走完各段，单个 batch 只有一块卡的带宽；投机解码不计",
]


class _Estimate:
    """同一个模型、同一组 batch 与 context，在不同 GPU 上各算一遍。"""

    def __init__(
        self, shape: ModelShape, parts: dict[Part, float], cache: CachePlan, batch: int, context: int
    ) -> None:
        self.shape, self.parts, self.batch, self.context = shape, parts, batch, context
        self.cache_bytes = cache.latent_bytes if shape.latent else cache.expanded_bytes
        self.total = sum(parts.values())

    def on(self, name: str, gpu: Gpu, count: int) -> GpuPlan:
        usable = int(gpu.memory * (1 - RESERVE))
        requested = list(self._splits(count, usable))
        fitting = [split for n in _COUNTS for split in self._splits(n, usable) if split.fits]
        smallest = min(fitting, key=lambda s: (s.gpus, s.weight_bytes + s.cache_bytes), default=None)
        chosen = [split for split in requested if split.fits]
        decode = [self._decode(gpu, split) for split in chosen]
        best = max(decode, key=lambda pair: pair[0], default=None)
        return GpuPlan(
            gpu=name,
            title=gpu.title,
            usable_bytes=usable,
            requested=requested,
            smallest=smallest,
            decode_tokens_per_second=best and best[0],
            decode_bound=best and best[1],
            prefill_tokens_per_second=self._prefill(gpu, count) if chosen else None,
        )

    def _splits(self, n: int, usable: int) -> Iterator[SplitPlan]:
        """``n`` 块卡的每一种切法里最满的那块卡；切不开的（头数、专家数、层数不够）不列。"""
        c, parts, shape = self.shape.config, self.parts, self.shape

        def split(kind: Split, weights: float, cache: float) -> SplitPlan:
            weight_bytes, cache_bytes = math.ceil(weights), math.ceil(cache)
            fits = weight_bytes + cache_bytes <= usable
            return SplitPlan(
                split=kind, gpus=n, weight_bytes=weight_bytes, cache_bytes=cache_bytes, fits=fits
            )

        if n == 1:
            yield split("single", self.total, self.cache_bytes)
            return
        if c.num_attention_heads % n == 0:
            weights = parts["small"] + (self.total - parts["small"]) / n
            yield split("tensor", weights, self.cache_bytes / (1 if shape.latent else n))
        if parts["experts"] and c.n_routed_experts % n == 0:
            rows = math.ceil(self.batch / n) / self.batch
            weights = self.total - parts["experts"] * (1 - 1 / n)
            yield split("expert", weights, self.cache_bytes * rows)
        if n <= shape.cached_layers:
            rows = math.ceil(shape.cached_layers / n) / shape.cached_layers
            ends = max(parts["embed"], parts["head"])
            inner = self.total - parts["embed"] - parts["head"]
            yield split("pipeline", inner * rows + ends, self.cache_bytes * rows)

    def _decode(self, gpu: Gpu, split: SplitPlan) -> tuple[float, Literal["memory", "compute"]]:
        """一步给每条序列一个 token：带宽与算力各要多久，取慢的。"""
        shape, parts = self.shape, self.parts
        weights = self.total - parts["experts"] * (1 - shape.experts_read(self.batch))
        if parts["head"]:  # 另有 lm_head 时，词嵌入只查几行
            weights -= parts["embed"]
        copies = split.gpus if split.split == "tensor" and shape.latent else 1
        n = 1 if split.split == "pipeline" else split.gpus
        memory = (weights + self.cache_bytes * copies) / (gpu.bandwidth * n)
        flops = self.batch * (2.0 * shape.active + shape.attention_flops(self.context))
        compute = flops / (gpu.flops * n)
        return self.batch / max(memory, compute), "memory" if memory >= compute else "compute"

    def _prefill(self, gpu: Gpu, count: int) -> float:
        """长 prompt 受算力限制；注意力按平均长度 ``context / 2`` 计。"""
        return gpu.flops * count / (2.0 * self.shape.active + self.shape.attention_flops(self.context // 2))
