"""``dsx verify`` 要比什么：每张图在每个层级上与谁比、用哪一行容差、什么不比。只看参数，不碰文件，不导入 torch。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from deepseek_export.errors import DsxError
from deepseek_export.ops.table import LIGHTNING_INDEXER, MLA_ATTENTION, MOE_EXPERTS, SPARSE_MLA_ATTENTION
from deepseek_export.parity.keys import (
    block_keys,
    cache_loss_key,
    index_int8,
    logits_key,
    narrow_cache,
    op_keys,
)
from deepseek_export.parity.tolerances import Dtype, Key

if TYPE_CHECKING:
    from deepseek_export.backend.base import Limits
    from deepseek_export.bundle import Manifest
    from deepseek_export.bundle.manifest import GraphEntry
    from deepseek_export.records import OpSite

Level = Literal["activations", "op", "block", "model", "tokens", "loss"]
#: 可以点名要的层级；``activations`` 只有 float16 的 bundle 才有，``loss`` 只有量化的与缓存比模型窄的才有，都随 ``model`` 一起比。
LEVELS: tuple[Level, ...] = ("op", "block", "model", "tokens")
#: tokens 级缺省续写多少个 token。
DEFAULT_STEPS = 64
#: 与谁比：``eager`` 算子的参考实现，``reference`` 同一个方案的参考模型，``oracle`` transformers，``rounded`` 权重与缓存同样舍入的参考模型。
Against = Literal["eager", "reference", "oracle", "rounded"]
#: 逐块比较的两次前向。
PHASES = ("prefill", "decode")
#: 断开的图在 ONNX Runtime 的 CPU 上跑，它能跑的 dtype。
CUT_DTYPES = ("float32", "float16")

_NO_BFLOAT16 = (
    "bfloat16 只在引擎上比整个模型：op、block 与草稿模型的逐块比较要 ONNX Runtime，它没有 bfloat16 的算子"
)
_NO_OPS = "op 层没有可比的：这个方案没有 dsx:: 算子"
_QUANTIZED = "量化的 bundle 不逐 token 比：权重变了，换一个 token 不算错；代价见 loss 一行"
_QUANTIZED_BFLOAT16 = (
    "量化的 bfloat16 bundle 只比 model：换一个 token 不算错；量化的代价要逐层看路由，引擎里看不到"
)
_REJECTION = "mtp.verify=rejection 的输出是随机的，不与 greedy 比；分布由 specs/mtp 的测试证明"


class Way(NamedTuple):
    """一种走法：各条 prompt 单独走还是一批走，每次几个 token（``None`` 一次走完），是否投机。"""

    name: str
    batch: bool = False
    chunk: int | None = None
    speculative: bool = False


MODEL_WAYS = (
    Way("prefill"),
    Way("chunks of 7", chunk=7),
    Way("token by token", chunk=1),
    Way("ragged batch", batch=True),
)
TOKEN_WAYS = (Way("alone"), Way("batch", batch=True))
SPECULATIVE_WAYS = (
    Way("speculative alone", speculative=True),
    Way("speculative batch", batch=True, speculative=True),
)


@dataclass(frozen=True)
class Check:
    """一张图在一个层级上的比较；由 ``levels/`` 里同名的文件去做。

    Attributes:
        level: 层级。
        graph: 图的文件名。
        against: 与谁比。
        keys: 容差表的键：op、block 先是注意力的，后是其余的；量化的 loss 先是路由分叉之前的，后是全部的；activations 没有；别的只有一个。
        steps: 分几步，供显示进度。
        sites: op 级比哪几个算子。
        ways: model、tokens 级有哪几种走法。
        prompts: model、tokens、loss 级比前几条 prompt。
        notes: 要写进报告的话；``{oracle}`` 换成基准的名字。
        skipped: 不比，理由在 ``notes`` 里。
    """

    level: Level
    graph: str
    against: Against
    keys: tuple[Key, ...]
    steps: int
    sites: tuple[OpSite, ...] = ()
    ways: tuple[Way, ...] = ()
    prompts: int = 0
    notes: tuple[str, ...] = ()
    skipped: bool = False


def requested(levels: Sequence[str]) -> tuple[Level, ...]:
    """点名要的层级，按从小到大的次序，不重复。

    Raises:
        DsxError: ``DSX-E607``，有不认识的，或一个也没有。
    """
    todo = f"可选：{'、'.join(LEVELS)}；activations、loss 随 model 一起比，不用点名"
    if isinstance(levels, str):
        raise DsxError("DSX-E607", f"levels 是字符串 {levels!r}，要的是列表", f'写成 ["{levels}"]；{todo}')
    for level in levels:
        if level not in LEVELS:
            raise DsxError("DSX-E607", f"没有层级 {level!r}", todo)
    if not levels:
        raise DsxError("DSX-E607", "levels 是空的，没有要比的", todo)
    return tuple(level for level in LEVELS if level in levels)


def checks(
    manifest: Manifest, limits: Limits, levels: Sequence[Level], lengths: Sequence[int], attention: Dtype
) -> list[Check]:
    """要比的与说明为什么不比的，按报告里的次序。

    Args:
        manifest: bundle 的 manifest。
        limits: 运行整个模型的后端做得到什么。
        levels: 见 :func:`requested`。
        lengths: 各条 prompt 的 token 数。
        attention: 注意力按哪个 dtype 的容差比，见 :func:`~deepseek_export.parity.subgraph.attention_dtype`。
    """
    cut = _cut_checks(manifest, levels, attention)
    if manifest.dtype not in CUT_DTYPES:
        cut = [replace(check, notes=(_NO_BFLOAT16,), skipped=True) for check in cut]
    if manifest.dtype == "float16" and "model" in levels:
        # 排在最前：溢出之后，后面各级的 NaN 都由它而来。
        cut.insert(0, Check("activations", manifest.main.file, "reference", (), 1, prompts=len(lengths)))
    few: tuple[str, ...] = ()
    if limits.max_batch is not None and limits.max_batch < len(lengths):
        lengths = lengths[: limits.max_batch]
        few = (f"引擎的批大小至多 {len(lengths)}：model、tokens 两级只比前 {len(lengths)} 条",)
    return cut + [
        replace(check, prompts=len(lengths), notes=few + check.notes)
        for check in _whole_checks(manifest, limits, levels, lengths)
    ]


def _cut_checks(manifest: Manifest, levels: Sequence[Level], attention: Dtype) -> list[Check]:
    """要从图里截出一段来比的：算子与块；草稿模型的 logits 也在这里比。"""
    made: list[Check] = []
    if "op" in levels:
        keys = op_keys(manifest, attention)
        for entry in manifest.graphs:
            sites = _op_sites(entry)
            made.append(Check("op", entry.file, "eager", keys, len(sites), sites))
        if not any(check.sites for check in made):
            made[-1] = replace(made[-1], notes=(_NO_OPS,))
    keys = block_keys(manifest, attention)
    if "block" in levels:
        steps = len(PHASES) * (2 + 2 * manifest.model.num_hidden_layers)
        made.append(Check("block", manifest.main.file, "reference", keys, steps))
    for entry in manifest.drafts:
        if "block" in levels:
            made.append(Check("block", entry.file, "reference", keys, len(PHASES) * 6))
        if "model" in levels:
            made.append(Check("model", entry.file, "reference", (logits_key(manifest),), 1))
    return made


def _op_sites(entry: GraphEntry) -> tuple[OpSite, ...]:
    """每种算子取第一处与最后一处；gate 与 experts 一起比，记在 experts 名下。"""
    chosen: list[OpSite] = []
    ops = (LIGHTNING_INDEXER, SPARSE_MLA_ATTENTION, MLA_ATTENTION, MOE_EXPERTS)
    for op in (spec.name for spec in ops):
        sites = [site for site in entry.sites if site.op == op]
        chosen += sites[:1] + sites[1:][-1:]
    return tuple(chosen)


def _whole_checks(
    manifest: Manifest, limits: Limits, levels: Sequence[Level], lengths: Sequence[int]
) -> list[Check]:
    """整个主模型的：logits、舍入的代价、续写的 token。"""
    made: list[Check] = []
    file, dtype, narrow = manifest.main.file, manifest.dtype, narrow_cache(manifest)
    quant = None if manifest.quantization is None else manifest.quantization.kind
    rounded = narrow is not None or index_int8(manifest)
    against: Against = "rounded" if quant is not None or rounded else "oracle"
    keys = (logits_key(manifest),)
    notes: tuple[str, ...] = ()
    if "model" in levels:
        rows = limits.logits_rows
        if rows is not None and rows < max(lengths):
            notes = (f"引擎一次至多给 {rows} 行 logits：model 级里一次走完的，其实 {rows} 个一段",)
        topk = manifest.model.indexer.topk if manifest.model.indexer is not None else 0
        if topk and max(lengths) <= topk:
            notes += (f"没有一条 prompt 比 index_topk（{topk}）长：model 级没有比到稀疏的那一段，op 级比到",)
        made.append(Check("model", file, against, keys, len(MODEL_WAYS), ways=MODEL_WAYS, notes=notes))
    if quant is not None and ("model" in levels or "tokens" in levels):
        loss: tuple[Key, ...] = (("loss", dtype, quant), ("loss_all", dtype, quant))
        skipped = dtype not in CUT_DTYPES
        notes = (_QUANTIZED_BFLOAT16 if skipped else _QUANTIZED,)
        made.append(Check("loss", file, "oracle", loss, len(lengths), notes=notes, skipped=skipped))
    elif rounded and "model" in levels:
        what = [] if narrow is None else [f"缓存是 {narrow}，比模型的 {dtype} 窄"]
        what += ["索引 key 是 int8"] if index_int8(manifest) else []
        notes = (
            f"{'，'.join(what)}：model、tokens 的基准是同样缓存的 dsx 参考模型，舍入的代价（对 {{oracle}}）见 loss 一行",
        )
        made.append(Check("loss", file, "oracle", (cache_loss_key(manifest),), len(lengths), notes=notes))
    if quant is None and "tokens" in levels:
        random = bool(manifest.drafts) and manifest.profile.mtp.verify == "rejection"
        ways = TOKEN_WAYS + (SPECULATIVE_WAYS if manifest.drafts and not random else ())
        notes = (_REJECTION,) if random else ()
        steps = len(lengths) + len(ways)
        made.append(Check("tokens", file, against, keys, steps, ways=ways, notes=notes))
    return made
