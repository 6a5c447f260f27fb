"""manifest → 各个量用容差表的哪一行；只看 manifest，不导入 torch。

缓存比模型窄时，舍入不是误差而是方案的一部分，所以参照的缓存舍入到同样的 dtype；舍入的代价对没有舍入的基准另比（``loss`` 级）。
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_export.parity.tolerances import Dtype, Key

if TYPE_CHECKING:
    from deepseek_export.bundle import Manifest

#: 注意力的，其余的。
Keys = tuple[Key, Key]


def narrow_cache(manifest: Manifest) -> Dtype | None:
    """比模型窄的缓存的 dtype；不窄就是 ``None``。"""
    dtype = manifest.cache.dtype
    return None if dtype in (manifest.dtype, "float32") else dtype


def index_int8(manifest: Manifest) -> bool:
    """索引 key 存成 int8：打分时 query 与 key 都舍入，选中的集合可以与没有舍入的不同。"""
    return manifest.profile.dsa.index_cache_dtype == "int8"


def router_dtype(manifest: Manifest) -> Dtype:
    """路由的近平局判据取哪个 dtype：模型与缓存里较窄的那一个。"""
    return narrow_cache(manifest) or ("int8" if index_int8(manifest) else manifest.dtype)


def selection_dtype(manifest: Manifest, dtype: Dtype) -> Dtype:
    """选 key 的并列带取哪个 dtype；索引 key 是 int8 的，末位之差会换一个码。"""
    return "int8" if index_int8(manifest) else dtype


def op_keys(manifest: Manifest, attention: Dtype) -> Keys:
    """单个算子；``attention`` 见 :func:`~deepseek_export.parity.subgraph.attention_dtype`。"""
    return ("op", attention, manifest.quant), ("op", manifest.dtype, manifest.quant)


def block_keys(manifest: Manifest, attention: Dtype) -> Keys:
    """单个块；``attention`` 同 :func:`op_keys`。量化的容差本来就宽得多。

    缓存比模型窄时，两侧会把几乎相等的数舍入到相邻的两个值，以缓存的 dtype 为准；算子库连乘数都舍入到 bfloat16 时还要再宽
    （int8 缓存的乘数留约 15 位，比缓存自己的一个码小得多）。
    """
    rest: Key = ("block", manifest.dtype, manifest.quant)
    narrow = narrow_cache(manifest)
    if attention not in (manifest.dtype, "int8"):
        return ("block", attention, None), rest
    if manifest.quant is not None or narrow is None:
        return rest, rest
    return ("narrow_cache", narrow, None), rest


def logits_key(manifest: Manifest) -> Key:
    """logits，参照与 bundle 用同样的权重与缓存 dtype；量化与 float16 的容差本来就更宽。"""
    narrow = narrow_cache(manifest)
    if narrow is not None and manifest.dtype == "float32" and manifest.quant is None:
        return "logits_narrow_cache", narrow, None
    return "logits", manifest.dtype, manifest.quant


def cache_loss_key(manifest: Manifest) -> Key:
    """窄缓存的 bundle 对没有舍入的基准；float16 模型的容差已经容得下。"""
    if index_int8(manifest):
        return "index_loss", "int8", None
    narrow = narrow_cache(manifest)
    if narrow is not None and manifest.dtype == "float32":
        return "cache_loss", narrow, None
    return "logits", manifest.dtype, None
