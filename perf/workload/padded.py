"""演示检查点放进大模型的形状：算的是同一个函数（接受率因此是真的），一步的代价却是大模型的。

演示检查点只有 12 MB，权重整个在缓存里，一步受限于计算；部署的模型一步受限于读权重，验证多出来的几行几乎不另要时间。随机权重的大模型
有那样的代价，草稿却一个也不中。这里把训练过的权重补零放大：

- hidden、q_lora、kv_lora 乘 :data:`RATIO`，补零。RMSNorm 的均方因此小 ``RATIO`` 倍，权重乘 ``RATIO ** -0.5``、eps 除以
  ``RATIO`` 补回来；取 4，两者都是 2 的幂，bfloat16 里没有舍入。
- 注意力多出来的头、FFN 多出来的通道，权重是零，不影响输出。
- 加深：重复原来的层，``o_proj`` 与 ``down_proj`` 清零，残差流原样通过；router 是真的，选中的专家因此与原层一样分散。

零与别的数一样要读、要乘，所以时间是那个形状的时间。
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RATIO = 4
#: 放大之后的形状；没有写的与演示检查点相同，hidden、q_lora、kv_lora 由 :data:`RATIO` 决定。
SHAPE: Mapping[str, int] = MappingProxyType(
    {
        "num_hidden_layers": 24,
        "intermediate_size": 2816,
        "moe_intermediate_size": 1024,
    }
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SILENT = (".o_proj.weight", ".down_proj.weight")
_SCALED = ("hidden_size", "q_lora_rank", "kv_lora_rank")


def write_padded(source: Path, out: Path, shape: Mapping[str, int] = SHAPE) -> Path:
    """把演示检查点 ``source`` 放大写到 ``out``，bfloat16，一个分片；返回 ``out``。

    Args:
        source: 一个 MTP 模块、``first_k_dense_replace`` 为 1 的 DeepSeek-V3 检查点。
        out: 还不存在的目录。
        shape: 放大成什么形状。
    """
    small = json.loads((source / "config.json").read_text(encoding="utf-8"))
    large = {**small, **shape, **{name: RATIO * small[name] for name in _SCALED}}
    large["rms_norm_eps"] = small["rms_norm_eps"] / RATIO
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(large, indent=2) + "\n", encoding="utf-8")
    tensors = load_file(source / "model.safetensors")
    save_file(dict(_padded(tensors, small, large)), out / "model.safetensors", metadata={"format": "pt"})
    return out


def _padded(
    tensors: Mapping[str, torch.Tensor], small: Mapping[str, Any], large: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            yield name, _pad(name, tensor, small, large)
        else:
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
    real, deep = small["num_hidden_layers"], large["num_hidden_layers"]
    dense = small["first_k_dense_replace"]
    for layer in range(deep + 1):
        # 加深的层轮流取自 MoE 层；最后一个是 MTP 模块。
        added = real <= layer < deep
        origin = dense + (layer - dense) % (real - dense) if added else real if layer == deep else layer
        for rest, tensor in layers[origin].items():
            name = f"model.layers.{layer}.{rest}"
            wide = _pad(name, tensor, small, large)
            yield name, torch.zeros_like(wide) if added and name.endswith(_SILENT) else wide


def _pad(name: str, tensor: torch.Tensor, small: Mapping[str, Any], large: Mapping[str, Any]) -> torch.Tensor:
    """右下补零；由几段拼成的轴（``eh_proj`` 的输入、``kv_a_proj`` 的输出）每段各自补。"""
    if "norm" in name:
        return _zeros_after(tensor * RATIO**-0.5, [RATIO * len(tensor)])
    if name.endswith("eh_proj.weight"):
        halves = tensor.chunk(2, dim=1)
        hidden = large["hidden_size"]
        return torch.cat([_zeros_after(half, [hidden, hidden]) for half in halves], dim=1)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        latent, rope = tensor.split([small["kv_lora_rank"], small["qk_rope_head_dim"]])
        wide = [_zeros_after(latent, [large["kv_lora_rank"], large["hidden_size"]])]
        wide.append(_zeros_after(rope, [len(rope), large["hidden_size"]]))
        return torch.cat(wide)
    return _zeros_after(tensor, _axes(name, tensor, large))


def _axes(name: str, tensor: torch.Tensor, large: Mapping[str, Any]) -> list[int]:
    hidden, role = large["hidden_size"], name.removesuffix(".weight").rpartition(".")[2]
    ffn = large["moe_intermediate_size" if "experts" in name else "intermediate_size"]
    if "shared_experts" in name:
        ffn *= large["n_shared_experts"]
    columns = {"q_b_proj": large["q_lora_rank"], "kv_b_proj": large["kv_lora_rank"]}
    match role:
        case "e_score_correction_bias":
            return list(tensor.shape)
        case "gate_proj" | "up_proj":
            return [ffn, hidden]
        case "down_proj":
            return [hidden, ffn]
        case "o_proj":
            return [hidden, tensor.shape[1]]
        case "q_a_proj":
            return [large["q_lora_rank"], hidden]
        case _:
            return [tensor.shape[0], columns.get(role, hidden)]


def _zeros_after(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    wide = tensor.new_zeros(shape)
    wide[tuple(slice(n) for n in tensor.shape)] = tensor
    return wide
