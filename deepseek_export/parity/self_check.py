"""没测过的 transformers 不凭版本号信它，也不凭版本号拒绝它：先在一个很小的模型上自检。

小模型与用户的模型结构相同（:func:`shrunk`）：两层，维度缩小，路由、RoPE、有没有 q_lora 都照原样。比过一致就记在磁盘缓存里，同一个
transformers 版本、同样的源码不再比第二次；不一致不记，每次都再比。
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_export.disk_cache import DiskCache
from deepseek_export.version import MAX_TRANSFORMERS, MIN_TRANSFORMERS

_CACHE = DiskCache("self-checks")
_PACKAGE = Path(__file__).parents[1]
#: 参与比较的是 dsx 的这些目录，改了就重比。
_SOURCES = ("integration", "ops", "parity", "reference")
#: 缩小之后的维度。RoPE 的宽度不动：longrope 的频率表与它等长。
_SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_n_heads": 32,
    "num_nextn_predict_layers": 0,
}
_PER_LAYER = ("mlp_layer_types", "indexer_types", "layer_types")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tested_range() -> str:
    """契约测试跑过的 transformers，给人看的。"""
    return " 到 ".join(".".join(map(str, version)) for version in (MIN_TRANSFORMERS, MAX_TRANSFORMERS))


def release(version: str) -> tuple[int, int]:
    """``5.25.0.dev0`` → (5, 25)。"""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def is_newer(version: str) -> bool:
    """比测过的都新。"""
    return release(version) > MAX_TRANSFORMERS


def shrunk(config: Any) -> dict[str, Any]:
    """transformers 的配置缩成两层的小模型；结构上的选择都不变。

    Args:
        config: ``PreTrainedConfig``。

    Returns:
        ``config.json`` 的内容，float32，没有量化，也没有特殊 token。
    """
    data = json.loads(config.to_json_string(use_diff=False))
    layers = data["num_hidden_layers"]
    small: dict[str, Any] = {name: value for name, value in _SMALL.items() if data.get(name) is not None}
    small |= {name: [data[name][0], data[name][layers - 1]] for name in _PER_LAYER if data.get(name)}
    small |= {name: None for name in _TOKEN_IDS if name in data}
    if data.get("q_lora_rank") is not None:
        small["q_lora_rank"] = 24
    if data.get("qk_head_dim") is not None:
        small["qk_head_dim"] = _SMALL["qk_nope_head_dim"] + data["qk_rope_head_dim"]
    if data.get("first_k_dense_replace") is not None:
        small["first_k_dense_replace"] = min(data["first_k_dense_replace"], 1)
    if data.get("n_routed_experts") is not None:
        groups, chosen = data.get("n_group") or 1, data.get("topk_group") or 1
        small["n_routed_experts"] = 4 * groups
        small["num_experts_per_tok"] = min(data["num_experts_per_tok"], 2 * chosen)
    data.pop("quantization_config", None)
    data.pop("head_dim", None)
    return data | small | {"dtype": "float32", "torch_dtype": "float32"}


def agrees(kind: str, config: Mapping[str, Any], compare: Callable[[], str | None]) -> str | None:
    """这个 transformers 与 dsx 在小模型上一致吗；一致过就不再比。

    Args:
        kind: 比的是什么，缓存的键的一部分。
        config: 小模型的配置。
        compare: 比一次：一致返回 ``None``，否则返回差在哪里。

    Returns:
        ``None``，或者差在哪里。
    """
    key = _key(kind, config)
    if _CACHE.get(key) is not None:
        return None
    difference = compare()
    if difference is None:
        _CACHE.put(key, b"agrees")
    return difference


def agreed_note(version: str, what: str) -> str:
    """一致之后说的那一句。"""
    return f"transformers {version} 没有测过（测过 {tested_range()}）；{what} 自检一致，继续"


def _key(kind: str, config: Mapping[str, Any]) -> str:
    """transformers、torch 的版本，两边的源码，配置：变了一样就重比。"""
    digest = hashlib.sha256()
    versions = [metadata.version(name) for name in ("transformers", "torch")]
    digest.update(json.dumps([kind, versions, dict(config)], sort_keys=True).encode())
    for path in _source_files(str(config["model_type"])):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _source_files(model_type: str) -> list[Path]:
    ours = [path for folder in _SOURCES for path in (_PACKAGE / folder).rglob("*.py")]
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    theirs = [*(root / "models" / model_type).glob("*.py"), *root.glob("*.py")]
    return sorted(ours) + sorted(theirs)
