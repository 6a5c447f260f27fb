"""``dsx plan``：权重、缓存、导出的内存与磁盘、放不放得下、怎么切、每秒多少 token 的上界。

全是算术：权重的字节数来自 safetensors 文件头，其余由 config.json 推出。每个估算的假设都写在结果的 ``assumptions`` 里。
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deepseek_export.checkpoint import Checkpoint, require_mtp
from deepseek_export.checkpoint.recipe import CHUNK_BYTES, WeightDtype
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError, did_you_mean
from deepseek_export.plan.gpus import GPUS
from deepseek_export.plan.result import BuildPlan, CachePlan, ExportPlan, Plan, StoredWeights, WeightKind
from deepseek_export.plan.roofline import ROOFLINE_ASSUMPTIONS, Estimate
from deepseek_export.plan.shape import PARTS, ModelShape, Part, part_of
from deepseek_export.plan.written import HEADROOM, written_bytes
from deepseek_export.profile import OptimizationProfile

#: 每种权重写成什么：模型 dtype 与量化。
_WRITTEN: dict[WeightKind, tuple[WeightDtype, Quantization | None]] = {
    "float32": ("float32", None),
    "float16": ("float16", None),
    "int8": ("float32", Quantization(kind="int8")),
    "int4": ("float32", Quantization(kind="int4")),
}
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
        gpus: :data:`~deepseek_export.plan.gpus.GPUS` 里的名字，不分大小写。
        count: 每种 GPU 有几块。
        batch: 同时生成的序列数。
        context: 每条序列的长度；缺省 4096，模型不到就取它的最大长度。
        weights: 权重在显存里的 dtype；``stored`` 是检查点里的原样。

    Raises:
        DsxError: 1xx 检查点；``DSX-E119`` 方案打开了 MTP 而检查点没有；``DSX-E703`` 不认识的 GPU；
            ``DSX-E704`` 长度超过 max_position_embeddings。
    """
    unknown = [name for name in gpus if name.lower() not in GPUS]
    if unknown:
        todo = f"{did_you_mean(unknown[0], GPUS)}认识的 GPU：{'、'.join(GPUS)}"
        raise DsxError("DSX-E703", f"没有叫 {unknown[0]!r} 的 GPU", todo)
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
    profile.check_model(config.family, config.indexer is not None)
    cache = _cache(shape, cache_dtype, config.dtype, batch * context)
    cache_bytes = cache.latent_bytes if shape.latent else cache.expanded_bytes
    fp8 = _fp8_share(source, used, shape) if weights == "stored" else dict.fromkeys(PARTS, 0.0)
    estimate = Estimate(shape, kinds[weights], fp8, cache_bytes, batch, context)
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
        gpus=[estimate.on(name, GPUS[name], count) for name in map(str.lower, gpus)],
        assumptions=_ASSUMPTIONS + ROOFLINE_ASSUMPTIONS if gpus else _ASSUMPTIONS,
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


def _fp8_share(source: Checkpoint, used: list[str], shape: ModelShape) -> dict[Part, float]:
    """各部分有几分之几的参数存成 FP8。"""
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name in used:
        spec = source.store[name]
        if spec.dtype.startswith("F8"):
            counts[part_of(name, spec.shape)] += math.prod(spec.shape)
    return {part: counts[part] / max(shape.parameters[part], 1) for part in PARTS}


def _cache(shape: ModelShape, dtype: str, model_dtype: str, tokens: int) -> CachePlan:
    """展开的缓存没有 int8 这一种，按模型的 dtype 算；索引 key 另有自己的开关。"""
    int8 = dtype == "int8"
    wide = DTYPES[model_dtype if int8 else dtype]
    index = (DTYPES["int8"] if shape.index_int8 else wide).nbytes(shape.index_cache_values)
    latent = DTYPES[dtype].nbytes(shape.latent_cache_values(int8)) + index
    expanded = wide.nbytes(shape.expanded_cache_values) + index
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
