"""重新生成 graphs/：固定的小配置、各方案、各目标的图清单，由 tests/contract/test_golden_graphs.py 逐行比较。"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from deepseek_export.capture import CapturedModel, capture_draft, capture_model
from deepseek_export.checkpoint import ModelConfig, parse_model_config
from deepseek_export.checkpoint.families import FAMILIES, MOE_KEYS
from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.passes import graph_listing, lower
from deepseek_export.profile import OptimizationProfile, resolve_profile
from deepseek_export.records import QUANT_TARGETS, TARGETS, TENSORRT_TARGETS

GRAPHS = Path(__file__).resolve().parent.parent / "graphs"

PROFILES = ("baseline", "mla", "moe", "mla+moe")

#: 没有 MoE 的家族只有这两个方案与别的不同。
DENSE_PROFILES = ("baseline", "mla")

#: 稀疏注意力与路由无关，记这两个就够。
SPARSE_PROFILES = ("baseline", "mla+moe")

#: 带 MTP 的家族另记 ``full`` 的主模型与草稿模型。
MTP_FAMILIES = ("deepseek_v3",)

#: 量化的清单：家族 → 方案与格式；换上的节点与方案无关，记一份就够。块 32 要求这个家族的专家宽度是 32 的倍数。
QUANTIZED: dict[str, tuple[str, Quantization]] = {
    "deepseek_v3": ("mla+moe", Quantization(kind="int4", block=32, keep=("lm_head",)))
}

#: 量化的清单之一：同样的格式，检查点里宽度除得尽的权重是 AWQ 的 4 位，零点照搬；只有 ``ort-cpu`` 放得下。
AFFINE, AFFINE_TARGET = "int4-affine", "ort-cpu"

#: 节点的写法由它们决定，记在每份清单的第一行。
TOOLCHAIN = ("torch", "onnxscript", "onnx")

#: 两层：一层 dense，一层 MoE。
_SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "hidden_act": "silu",
}

CONFIGS: dict[str, dict[str, Any]] = {
    # 如 V2-Lite：没有 q_lora，greedy 路由，不归一化。
    "deepseek_v2": _SHARED
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": _SHARED
    | {
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 96,
        "q_lora_rank": 20,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    # V3 加 post_mlp_layernorm，路由没有偏置。
    "axk1": _SHARED
    | {
        "model_type": "axk1",
        "q_lora_rank": 20,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    # 没有 MoE，多出三个缩放，longrope。kimi_k2、glm4_moe_lite、sarvam_mla、youtu 的图与 deepseek_v3 的没有结构差别，不另记。
    "minicpm3": {key: value for key, value in _SHARED.items() if key not in MOE_KEYS}
    | {
        "model_type": "minicpm3",
        "q_lora_rank": 20,
        "tie_word_embeddings": True,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.1, 1.2, 1.3],
            "original_max_position_embeddings": 64,
        },
    },
    # 稀疏注意力：第一层自己挑 key，第二层沿用它的。
    "glm_moe_dsa": _SHARED
    | {
        "model_type": "glm_moe_dsa",
        "q_lora_rank": 20,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "index_topk": 16,
        "index_head_dim": 12,
        "index_n_heads": 4,
        "indexer_types": ["full", "shared"],
    },
}


#: 记哪些目标：两种 TensorRT 的流水线相同，只记第一个。
RECORDED = tuple(target for target in TARGETS if target not in TENSORRT_TARGETS[1:])


def profiles_of(family: str) -> tuple[str, ...]:
    """一个家族要记的方案，不含 ``full``。"""
    if FAMILIES[family].indexer_layout is not None:
        return SPARSE_PROFILES
    return PROFILES if FAMILIES[family].has_moe else DENSE_PROFILES


def toolchain_line() -> str:
    """清单的第一行，例如 ``# torch 2.13.0, onnxscript 0.7.2, onnx 1.23.0``。"""
    return "# " + ", ".join(f"{package} {version(package).partition('+')[0]}" for package in TOOLCHAIN)


def golden_listings(family: str) -> Iterator[tuple[str, str]]:
    """逐个产出 (文件名, 内容)；每个方案只捕获一次，再下沉到各目标。"""
    config = parse_model_config(CONFIGS[family], f"tools/make_graphs.py 的 {family}")
    for name in profiles_of(family):
        profile = resolve_profile(name)
        captured = capture_model(config, profile)
        yield from _listings(f"{family}.{name}", captured, config, profile)
    if family in QUANTIZED:
        name, quantization = QUANTIZED[family]
        profile = resolve_profile(name)
        captured = capture_model(config, profile)
        for target in QUANT_TARGETS:
            proto = lower(captured, config, profile, "float32", target, quantization=quantization).proto
            name = f"{family}.{profile.name}.{quantization.kind}.{target}.txt"
            yield name, f"{toolchain_line()}\n{graph_listing(proto)}"
        lowered = lower(
            captured, config, profile, "float32", AFFINE_TARGET, quantization=quantization, int4=_awq
        )
        name = f"{family}.{profile.name}.{AFFINE}.{AFFINE_TARGET}.txt"
        yield name, f"{toolchain_line()}\n{graph_listing(lowered.proto)}"
    if family in MTP_FAMILIES:
        profile = resolve_profile("full")
        yield from _listings(f"{family}.full", capture_model(config, profile), config, profile)
        yield from _listings(f"{family}.full.mtp", capture_draft(config, profile, 0), config, profile)


def golden_names(family: str) -> set[str]:
    """一个家族的全部清单文件名。"""
    stems = [*profiles_of(family), *(("full", "full.mtp") if family in MTP_FAMILIES else ())]
    names = {f"{family}.{stem}.{target}.txt" for stem in stems for target in RECORDED}
    if family in QUANTIZED:
        profile, quantization = QUANTIZED[family]
        names |= {f"{family}.{profile}.{quantization.kind}.{target}.txt" for target in QUANT_TARGETS}
        names.add(f"{family}.{profile}.{AFFINE}.{AFFINE_TARGET}.txt")
    return names


def _awq(recipe: Recipe) -> Int4Layout | None:
    return None if recipe.shape[-1] % 32 else Int4Layout("awq", 32, symmetric=False)


def _listings(
    stem: str, captured: CapturedModel, config: ModelConfig, profile: OptimizationProfile
) -> Iterator[tuple[str, str]]:
    for target in RECORDED:
        listing = graph_listing(lower(captured, config, profile, "float32", target).proto)
        yield f"{stem}.{target}.txt", f"{toolchain_line()}\n{listing}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=GRAPHS, help="默认是 graphs/。"
)
def main(out: Path) -> None:
    """重新生成 graphs/ 下的全部清单；提交前请读一遍 git diff。"""
    out.mkdir(parents=True, exist_ok=True)
    for family in CONFIGS:
        for name, text in golden_listings(family):
            (out / name).write_text(text, encoding="utf-8")
            click.echo(f"{out / name}：{text.count(chr(10))} 行")


if __name__ == "__main__":
    main()
