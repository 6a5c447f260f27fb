"""测试用的 4 位检查点：照格式的说明逐个字打包，与 dsx 读它的代码互不相干。

同样的权重存两遍：打包的，与按定义还原成 float32 的孪生。
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from deepseek_export.checkpoint.synthetic import write_checkpoint
from tests.unit.test_checkpoint import TINY

#: 每个线性层的宽都是 32 的倍数，高都是 8 的倍数。
SMALL: dict[str, Any] = TINY | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
EXPERTS = ".mlp.experts."
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Variant:
    """打包成哪一种。

    Attributes:
        method, group, symmetric, act_order: 见 dsx 的 ``Int4Layout``。
        v2: GPTQ 的 ``gptq_v2``，零点不减一。
        scales: scale 的 dtype。
        packed: 哪些线性层打包；缺省是路由的专家。
        small: scale 小到 float16 放不下。
    """

    method: Literal["compressed-tensors", "awq", "gptq"]
    group: int = 32
    symmetric: bool = True
    act_order: bool = False
    v2: bool = False
    scales: torch.dtype = torch.float16
    packed: Callable[[str], bool] = field(default=lambda name: EXPERTS in name)
    small: bool = False


def everything(name: str) -> bool:
    """除 lm_head 之外的线性层。"""
    return name != "lm_head.weight"


#: Kimi-K2-Thinking 的样子：只有路由的专家，对称，bfloat16 的 scale。
KIMI = Variant("compressed-tensors", scales=torch.bfloat16)
VARIANTS: dict[str, Variant] = {
    "kimi": KIMI,
    "compressed-asym": Variant("compressed-tensors", symmetric=False),
    "compressed-actorder": Variant("compressed-tensors", act_order=True),
    "awq": Variant("awq", symmetric=False, packed=everything),
    "gptq": Variant("gptq", packed=everything),
    "gptq-asym": Variant("gptq", symmetric=False),
    "gptq-v2": Variant("gptq", symmetric=False, v2=True, scales=torch.bfloat16),
    "gptq-actorder": Variant("gptq", act_order=True),
}


def int4_twins(
    directory: Path, variant: Variant, config: dict[str, Any] = SMALL, **options: Any
) -> tuple[Path, Path]:
    """(打包的检查点, float32 的孪生)。"""
    base = write_checkpoint(directory / "base", config, dtype="float32", **options)
    plain = load_file(base / "model.safetensors")
    packed, rng = dict(plain), np.random.default_rng(7)
    chosen = [name for name, w in plain.items() if w.ndim == 2 and _linear(name) and variant.packed(name)]
    for name in chosen:
        parts, plain[name] = _quantised(name.removesuffix(".weight"), plain[name].shape, variant, rng)
        del packed[name]
        packed |= parts
    values = json.loads((base / "config.json").read_text(encoding="utf-8"))
    declared = values | {"quantization_config": quantization_config(variant, [*plain])}
    return (
        _saved(directory / "int4", packed, declared),
        _saved(directory / "twin", plain, values),
    )


def quantization_config(variant: Variant, names: list[str]) -> dict[str, Any]:
    """config.json 里的声明；没有打包的线性层都列出来。"""
    skipped = [n.removesuffix(".weight") for n in names if _linear(n) and not variant.packed(n)]
    if variant.method == "compressed-tensors":
        weights = {
            "actorder": "group" if variant.act_order else None,
            "block_structure": None,
            "dynamic": False,
            "group_size": variant.group,
            "num_bits": 4,
            "observer": "minmax",
            "observer_kwargs": {},
            "strategy": "group",
            "symmetric": variant.symmetric,
            "type": "int",
        }
        group = {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        return {
            "config_groups": {"group_0": group},
            "format": "pack-quantized",
            "global_compression_ratio": None,
            "ignore": skipped,
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
    if variant.method == "awq":
        values = {"quant_method": "awq", "bits": 4, "group_size": variant.group, "zero_point": True}
        return {**values, "version": "gemm", "modules_to_not_convert": skipped or None}
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": variant.group,
        "damp_percent": 0.1,
        "desc_act": variant.act_order,
        "sym": variant.symmetric,
        "true_sequential": True,
        "checkpoint_format": "gptq_v2" if variant.v2 else "gptq",
    }


def _linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "_with_mqa.weight", "lm_head.weight"))


def _quantised(
    module: str, shape: tuple[int, ...], variant: Variant, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """随便的码、零点与 scale；打包的几个张量，与它们的定义算出的权重。"""
    rows, width = shape
    groups = width // variant.group
    codes = rng.integers(0, 16, (rows, width))
    # v1 存的是零点减一，15 说不清是 16 还是 0：不用它。
    zeros = np.full((rows, groups), 8) if variant.symmetric else rng.integers(1, 16, (rows, groups))
    scales = torch.from_numpy(rng.uniform(0.004, 0.02, (rows, groups))).to(variant.scales)
    if variant.small:
        scales = torch.full_like(scales, 2.0**-24 * 1.5)
    order = np.arange(width) // variant.group
    if variant.act_order:
        order = rng.permutation(order)
    weight = torch.from_numpy((codes - zeros[:, order]).astype(np.float32)) * scales.float()[:, order]
    tensors = _packed(codes, zeros, scales, order, variant)
    return {f"{module}.{key}": value.contiguous() for key, value in tensors.items()}, weight


def _packed(
    codes: np.ndarray, zeros: np.ndarray, scales: torch.Tensor, order: np.ndarray, variant: Variant
) -> dict[str, torch.Tensor]:
    index = torch.from_numpy(order.astype(np.int32))
    if variant.method == "compressed-tensors":
        tensors = {
            "weight_packed": words(codes),
            "weight_scale": scales,
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if not variant.symmetric:
            tensors["weight_zero_point"] = words(zeros.T).T
        return tensors | ({"weight_g_idx": index} if variant.act_order else {})
    if variant.method == "awq":
        return {
            "qweight": words(interleaved(codes.T)),
            "qzeros": words(interleaved(zeros.T)),
            "scales": scales.T,
        }
    stored = zeros if variant.v2 else zeros - 1
    return {"qweight": words(codes).T, "qzeros": words(stored.T), "scales": scales.T, "g_idx": index}


def words(values: np.ndarray) -> torch.Tensor:
    """[行, 8*列] → [行, 列] int32：第 i 个放在第 4i 位起。"""
    made = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for column in range(values.shape[1]):
        made[:, column // 8] |= values[:, column].astype(np.int64) << (4 * (column % 8))
    return torch.from_numpy(made.astype(np.uint32).view(np.int32))


def interleaved(values: np.ndarray) -> np.ndarray:
    """AWQ：每 8 个里，第 i 个位置放第 ``_AWQ_ORDER[i]`` 个。"""
    made = np.empty_like(values)
    for column in range(values.shape[1]):
        made[:, column] = values[:, column // 8 * 8 + _AWQ_ORDER[column % 8]]
    return made


def _saved(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
