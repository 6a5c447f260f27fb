"""bundle 里有什么，说成一份汇总：``dsx inspect`` 打印的就是它。"""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_export.bundle import Bundle, Manifest
from deepseek_export.bundle.manifest import WeightsEntry
from deepseek_export.bundle.stages import StageSet, is_stage_set
from deepseek_export.dtypes import DTYPES
from deepseek_export.report.blocks import graph_blocks

CONTEXT = 8192
#: 同 :mod:`deepseek_export.engine.record`；它要 onnx，这里不该等。
_ENGINE_RECORDS = "engines/*/engine.json"
#: 试跑一次用的大小；S + past 不能超过 T，L 是 K + 1。
_TRIAL = {"B": 1, "S": 8, "T": 64, "K": 1, "K+1": 2}


class CacheShape(NamedTuple):
    """决定 KV 缓存大小的几个数，取自公开的 config.json。"""

    name: str
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def latent(self) -> int:
        """MLA：每个 token 每层缓存的数。"""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded(self) -> int:
        """展开的逐头 K 与 V。"""
        return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)


PUBLISHED = (
    CacheShape("DeepSeek-V2-Lite", 27, 16, 512, 128, 64, 128),
    CacheShape("DeepSeek-V3", 61, 128, 512, 128, 64, 128),
)


def inspect(bundle: Path | str) -> dict[str, Any]:
    """bundle 里有什么：算子、pass、回退、输入输出、权重与缓存的大小；``dsx inspect --json`` 输出的就是它。

    只读 manifest.json，不加载模型。

    Args:
        bundle: ``export`` 的输出目录，或一套 stage：说的是整个模型，另有 ``stages``，每个 stage 的层、权重与引擎。

    Returns:
        只有字符串、数、列表与字典；字节数都是整数。

    Raises:
        DsxError: 4xx，bundle 有问题；``DSX-E741``，不是完整的一套 stage。
    """
    path = Path(bundle)
    if is_stage_set(path):
        return _inspect_stages(StageSet.open(path))
    manifest = Bundle.open(path).manifest
    return summarize(manifest) | {"polygraphy": polygraphy_trials(path, manifest)}


def _inspect_stages(stages: StageSet) -> dict[str, Any]:
    """整个模型的汇总，权重是各 stage 的合起来、几个都有的算一次；试跑的命令要各张图自己的权重，没有。"""
    bundles = [Bundle.open(directory) for directory in stages.directories]
    recipes = {name: one for bundle in bundles for name, one in bundle.manifest.weights.recipes.items()}
    mode = bundles[0].manifest.weights.mode
    # 按引用的几个 stage 会链接同一个文件，只算一次。
    found = {name: None for bundle in bundles for name in bundle.manifest.weights.files}
    entries = {name: one for bundle in bundles for name, one in bundle.manifest.files.items()}
    weights = WeightsEntry(mode=mode, files=list(found), recipes=recipes)
    whole = stages.record.whole.model_copy(update={"weights": weights, "files": entries})
    items = [
        {
            "directory": item.directory,
            "layers": item.layers,
            "weight_bytes": item.weight_bytes,
            "graphs": [graph.file for graph in bundle.manifest.graphs],
            "engines": sorted(record.parent.name for record in bundle.path.glob(_ENGINE_RECORDS)),
        }
        for item, bundle in zip(stages.record.stages, bundles, strict=True)
    ]
    return summarize(whole) | {"polygraphy": {}, "stages": items}


def summarize(manifest: Manifest) -> dict[str, Any]:
    """manifest 的汇总。"""
    config, cache, recipes = manifest.model, manifest.cache, manifest.weights.recipes
    shape = CacheShape(
        "",
        config.num_hidden_layers,
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    # 展开的缓存没有 int8 这一种，按模型的 dtype 比。
    wide = manifest.dtype if cache.dtype == "int8" else cache.dtype
    expanded = DTYPES[wide].nbytes(shape.expanded * cache.num_layers)
    # 索引 key 两种形式都有。
    expanded += cache.bytes_per_token - DTYPES[cache.dtype].nbytes(
        cache.values_per_token_per_layer * cache.num_layers
    )
    return {
        "dsx_version": manifest.dsx_version,
        "family": config.family,
        "layers": config.num_hidden_layers,
        "moe_layers": config.num_moe_layers,
        "profile": manifest.profile.name,
        "target": manifest.target,
        "dtype": manifest.dtype,
        "source": manifest.source.path,
        "graphs": [
            {
                "file": graph.file,
                "role": graph.role,
                "op_counts": graph.op_counts,
                "inputs": [value.model_dump() for value in graph.inputs],
                "outputs": [value.model_dump() for value in graph.outputs],
            }
            for graph in manifest.graphs
        ],
        "blocks": graph_blocks(manifest),
        "passes": [
            {"graph": graph.file, **result.model_dump(mode="json")}
            for graph in manifest.graphs
            for result in graph.passes
        ],
        "fallbacks": manifest.fallbacks,
        "cpu_library": manifest.cpu_library,
        "weights": {
            "mode": manifest.weights.mode,
            "count": len(recipes),
            "bytes": sum(recipe.nbytes for recipe in recipes.values()),
            "recipes": dict(Counter(recipe.op for recipe in recipes.values())),
            "sha256_from": _hash_sources(manifest),
        },
        "int4": manifest.model.int4 and manifest.model.int4.title,
        "quantization": manifest.quantization and manifest.quantization.model_dump(mode="json"),
        "float32_islands": manifest.float32_islands,
        "cache": {
            "dtype": cache.dtype,
            "tensors": [tensor.model_dump() for tensor in cache.tensors],
            "values_per_token_per_layer": cache.values_per_token_per_layer,
            "expanded_values_per_token_per_layer": shape.expanded,
            "bytes_per_token": cache.bytes_per_token,
            "context": CONTEXT,
            "bytes_at_context": cache.bytes_per_token * CONTEXT,
            "expanded_bytes_at_context": expanded * CONTEXT,
            "ratio": expanded / cache.bytes_per_token,
        },
        "published": [_published(shape) for shape in PUBLISHED],
    }


def _hash_sources(manifest: Manifest) -> dict[str, int]:
    """按引用的：检查点文件的 sha256 从哪里来 → 几个文件，``none`` 是导出时没有记的；打包的是自己写的，没有这一项。"""
    files, weights = manifest.files, manifest.weights
    named = weights.files if weights.mode == "reference" else []
    return dict(Counter(files[name].sha256_from if name in files else "none" for name in named))


def polygraphy_trials(path: Path, manifest: Manifest) -> dict[str, str]:
    """每张图用 Polygraphy 在 ONNX Runtime 上试跑一次的命令；不给形状时它取 1，而容量 1 的缓存放不下一步。

    Polygraphy 不会按配方生成权重，CPU 上也没有 bfloat16：按引用的、bfloat16 的、给 TensorRT 的没有。
    """
    if manifest.weights.mode == "reference" or manifest.target.startswith("tensorrt"):
        return {}
    commands = {}
    for graph in manifest.graphs:
        drafts = any(value.name == "draft_ids" for value in graph.inputs)
        sizes = _TRIAL | {"L": _TRIAL["K+1"] if drafts else 1}
        shapes = [
            f"{value.name}:[{','.join(str(sizes.get(str(dim), dim)) for dim in value.shape)}]"
            for value in graph.inputs
        ]
        words = ["polygraphy", "run", str(path / graph.file), "--onnxrt", "--input-shapes"]
        commands[graph.file] = " ".join([shlex.join(words), *(f"'{shape}'" for shape in shapes)])
    return commands


def _published(shape: CacheShape) -> dict[str, Any]:
    latent, expanded = (
        DTYPES["bfloat16"].nbytes(n * shape.num_hidden_layers) for n in (shape.latent, shape.expanded)
    )
    return {
        "name": shape.name,
        "layers": shape.num_hidden_layers,
        "values_per_token_per_layer": shape.latent,
        "expanded_values_per_token_per_layer": shape.expanded,
        "bytes_per_token": latent,
        "expanded_bytes_per_token": expanded,
        "bytes_at_context": latent * CONTEXT,
        "expanded_bytes_at_context": expanded * CONTEXT,
        "saving": 1 - latent / expanded,
    }
