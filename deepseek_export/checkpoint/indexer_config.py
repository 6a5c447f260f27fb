"""稀疏注意力（DSA）的字段：索引器的尺寸，RoPE 的排布，哪些层自己排名、哪些沿用前面的。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_export.checkpoint.families import Family, RopeLayout
from deepseek_export.checkpoint.fields import Fields

_CODE = "DSX-E130"
#: 每层的名字；发布的检查点用前一个，transformers 另存时用后一个。
_LAYER_TYPES = ("deepseek_sparse_attention", "indexed_attention")
_LETTERS = {"F": "full", "S": "shared"}


@dataclass(frozen=True)
class IndexerConfig:
    """索引器。

    Attributes:
        topk: 每个 query 选几个 key。
        n_heads, head_dim: 索引 query 的头数与头宽；key 只有一个头。
        rope_layout: 前 ``qk_rope_head_dim`` 个 lane 怎么旋转。
        full_layers: 主干每层是自己排名，还是沿用前面最近的那一层的。
    """

    topk: int
    n_heads: int
    head_dim: int
    rope_layout: RopeLayout
    full_layers: tuple[bool, ...]


def parse_indexer(f: Fields, family: Family, layers: int, rope_dim: int) -> IndexerConfig:
    """读索引器的字段。

    Args:
        f: 整个 config.json。
        family: 有索引器的家族。
        layers: 主干层数。
        rope_dim: ``qk_rope_head_dim``。

    Raises:
        DsxError: ``DSX-E130`` 取值不支持或互相矛盾；``DSX-E106`` 缺字段。
    """
    assert family.indexer_layout is not None
    if f.data.get("q_lora_rank") is None:
        raise f.bad("q_lora_rank", "整数：索引器的 query 由它而来", _CODE)
    head_dim = f.integer("index_head_dim", low=rope_dim + 1, code=_CODE)
    # transformers 不读这个字段，旋转方式按模型类写死；与之矛盾的结果就与它不同。
    interleave = family.indexer_layout != "half"
    f.must_equal("indexer_rope_interleave", interleave, code=_CODE)
    types = f.data.get("layer_types")
    if types is not None and types not in [[kind] * layers for kind in _LAYER_TYPES]:
        raise f.bad("layer_types", f" {layers} 项的列表，全是 {' 或全是 '.join(_LAYER_TYPES)}", _CODE)
    return IndexerConfig(
        topk=f.integer("index_topk", code=_CODE),
        n_heads=f.integer("index_n_heads", code=_CODE),
        head_dim=head_dim,
        rope_layout=family.indexer_layout,
        full_layers=_full_layers(f, layers) if family.shares_indices else (True,) * layers,
    )


def _full_layers(f: Fields, layers: int) -> tuple[bool, ...]:
    """``indexer_types``，其次 ``index_topk_pattern``，再次 ``index_topk_freq`` 与 ``index_skip_topk_offset``，都没有就每层都是。

    几种写法同时出现的要说同一件事。
    """
    found: dict[str, tuple[bool, ...]] = {}
    for key in ("indexer_types", "index_topk_pattern"):
        value = f.data.get(key)
        if value is not None:
            found[key] = _listed(f, key, value, layers)
    if f.data.get("index_topk_freq") is not None:
        freq = f.integer("index_topk_freq", code=_CODE)
        offset = 2
        if f.data.get("index_skip_topk_offset") is not None:
            offset = f.integer("index_skip_topk_offset", low=0, code=_CODE)
        found["index_topk_freq"] = tuple(max(i - offset + 1, 0) % freq == 0 for i in range(layers))
    elif f.data.get("index_skip_topk_offset") is not None and not found:
        raise f.bad("index_skip_topk_offset", "与 index_topk_freq 同时出现", _CODE)
    if not found:
        return (True,) * layers
    key, full = next(iter(found.items()))
    for other, same in found.items():
        if same != full:
            raise f.bad(other, f"与 {key} 一致", _CODE)
    if not full[0]:
        raise f.bad(key, "从 full 开始：第一层前面没有可以沿用的", _CODE)
    return full


def _listed(f: Fields, key: str, value: Any, layers: int) -> tuple[bool, ...]:
    names = [_LETTERS.get(letter, letter) for letter in value] if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) != layers or not {*map(str, names)} <= {"full", "shared"}:
        raise f.bad(key, f" {layers} 项，每项是 full（F）或 shared（S）", _CODE)
    return tuple(name == "full" for name in names)
