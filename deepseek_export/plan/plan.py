"""``dsx plan``：权重、缓存、导出的内存与磁盘、放不放得下、怎么切、每秒多少 token 的上界。

全是算术：权重的字节数来自 safetensors 文件头，其余由 config.json 推出。每个估算的假设都写在结果的 ``assumptions`` 里。
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek_export.checkpoint.recipe import CHUNK_BYTES
from deepseek_export.errors import DsxError, did_you_mean
from deepseek_export.plan.cluster import Ask, plan_cluster
from deepseek_export.plan.gpus import GPUS
from deepseek_export.plan.machines import parse_cluster
from deepseek_export.plan.result import BuildPlan, CachePlan, ExportPlan, Plan, WeightKind
from deepseek_export.plan.roofline import ROOFLINE_ASSUMPTIONS, Estimate
from deepseek_export.plan.shape import ModelShape, Part
from deepseek_export.plan.sized import WRITTEN, SizedModel
from deepseek_export.plan.written import HEADROOM
from deepseek_export.profile import OptimizationProfile

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
    cluster: str | None = None,
    stages: int | None = None,
    prompt: int | None = None,
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
        cluster: 几台什么机器、什么网络，写法见 :mod:`~deepseek_export.plan.machines`；给了就切成 stage，模拟流水线。
        stages: 只看切成这么多个 stage 的；缺省各种都看。
        prompt: 提示词多长，等第一个 token 的时间按它；缺省是 ``context`` 的一半。

    Raises:
        DsxError: 1xx 检查点；``DSX-E119`` 方案打开了 MTP 而检查点没有；``DSX-E703`` 不认识的 GPU；
            ``DSX-E704`` 长度超过 max_position_embeddings；``DSX-E766`` ``cluster`` 写得不对；``DSX-E767`` 其余的与它合不来。
    """
    machines = None if cluster is None else parse_cluster(cluster)
    unknown = [name for name in gpus if name.lower() not in GPUS]
    if unknown:
        todo = f"{did_you_mean(unknown[0], GPUS)}认识的 GPU：{'、'.join(GPUS)}"
        raise DsxError("DSX-E703", f"没有叫 {unknown[0]!r} 的 GPU", todo)
    model = SizedModel.open(checkpoint, profile)
    config, shape = model.source.config, model.shape
    context = _context(context, config.max_position_embeddings)
    prompt = _prompt(machines is not None, context, prompt, stages)
    kinds: dict[WeightKind, dict[Part, float]] = {kind: model.parts(kind) for kind in WRITTEN}
    kinds["stored"] = model.parts("stored")
    cache = _cache(shape, model.cache_dtype, config.dtype, batch * context)
    cache_bytes = cache.latent_bytes if shape.latent else cache.expanded_bytes
    estimate = Estimate(shape, kinds[weights], model.fp8(weights), cache_bytes, batch, context)
    planned = None
    if machines is not None:
        ask = Ask(batch, context, prompt, model.hidden_bytes(weights), stages)
        planned = plan_cluster(machines, model.layered(weights), estimate, ask)
    totals = {kind: round(sum(parts.values())) for kind, parts in kinds.items()}
    engine = model.engine_bytes()
    return Plan(
        checkpoint=str(checkpoint),
        family=config.family,
        layers=config.num_hidden_layers,
        moe_layers=config.num_moe_layers,
        mtp_modules=model.modules,
        profile=profile.name,
        weights=weights,
        batch=batch,
        context=context,
        parameters=shape.total,
        active_parameters=shape.active,
        stored=model.stored(),
        int4=config.int4 and config.int4.title,
        weight_bytes=totals,
        cache=cache,
        export=_exports(len(model.source.store), totals, model.as_published()),
        build=BuildPlan(
            disk_bytes=engine + _BUILD_CODE,
            peak_ram_bytes=_BUILD_BASE + int(_BUILD_COPIES * engine),
        ),
        gpus=[estimate.on(name, GPUS[name], count) for name in map(str.lower, gpus)],
        cluster=planned,
        assumptions=_ASSUMPTIONS + ROOFLINE_ASSUMPTIONS if gpus else _ASSUMPTIONS,
    )


def _context(asked: int | None, limit: int) -> int:
    """每条多长；没有写取缺省，模型不到就取它的最大长度。"""
    if asked is not None and asked > limit:
        raise DsxError(
            "DSX-E704", f"--context {asked} 超过模型的最大长度 {limit}", f"给不超过 {limit} 的 --context"
        )
    return min(DEFAULT_CONTEXT, limit) if asked is None else asked


def _prompt(cluster: bool, context: int, prompt: int | None, stages: int | None) -> int:
    """提示词多长；没有写是长度的一半。"""
    if not cluster and (prompt is not None or stages is not None):
        name = "--stages" if prompt is None else "--prompt"
        raise DsxError("DSX-E767", f"{name} 没有配 --cluster", "加上 --cluster，或去掉它")
    found = max(context // 2, 1) if prompt is None else prompt
    if cluster and found >= context:
        todo = "给更长的 --context，或更短的 --prompt：要留下生成的地方"
        raise DsxError("DSX-E767", f"提示词 {found} 个 token，每条一共只有 {context} 个", todo)
    return found


def _cache(shape: ModelShape, dtype: str, model_dtype: str, tokens: int) -> CachePlan:
    latent, expanded = shape.cache_bytes_per_token(dtype, model_dtype)
    return CachePlan(
        dtype=dtype,
        used="latent" if shape.latent else "expanded",
        latent_bytes_per_token=latent,
        expanded_bytes_per_token=expanded,
        latent_bytes=latent * tokens,
        expanded_bytes=expanded * tokens,
    )


def _exports(tensors: int, totals: dict[WeightKind, int], published: int | None) -> list[ExportPlan]:
    base = _EXPORT_BASE + tensors * _PER_TENSOR
    streaming = base + int(_CHUNKS * CHUNK_BYTES)
    packed = [
        ExportPlan(
            mode="packed",
            dtype=kind,
            disk_bytes=totals[kind] + HEADROOM,
            peak_ram_bytes=streaming,
        )
        for kind in WRITTEN
    ]
    reference = ExportPlan(mode="reference", dtype="float32", disk_bytes=HEADROOM, peak_ram_bytes=base)
    if published is not None:
        packed.append(
            ExportPlan(
                mode="packed", dtype="checkpoint", disk_bytes=published + HEADROOM, peak_ram_bytes=streaming
            )
        )
    return [*packed, reference]


_ASSUMPTIONS = [
    "导出的内存是上界：捕获的底数、每个张量 2 KiB 的记账，打包另加几个 64 MiB 的块；与模型大小几乎无关（40 亿参数实测 0.6 GB）",
    "int8、int4 按块 32、float16 的 scale 计；absorb 用的 kv_b 总是 int8，词嵌入是 bfloat16（int4 的是 int8），norm、router 不量化，按 float32 计",
    "建引擎：float16（FP8 的检查点，码按原样），TensorRT-RTX，内存按 0.7 GiB 加权重的 4.4 倍，由 0.8 GiB 以内的权重实测得来，更大的没有量过",
]
