"""测试共用的小模型：由 transformers 建、随机初始化、存成真检查点。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.checkpoint.families import FAMILIES, MOE_KEYS
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.ops.table import DOMAIN, OPS, OPSET_VERSION, PLUGIN_NAMESPACE, PLUGIN_VERSION

#: 两种等价算法之间允许的差，相对于结果的最大绝对值。float32 是累加次序，float16 是中间值各舍入一次（2**-11 的几倍）。
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.3 * i for i in range(8)],
    "long_factor": [1.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}

#: 6 个头、12 个专家分 3 组、头宽 24/16/20：都不是 2 的幂，写死的维度会露馅。
ODD = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_shared_experts": 2,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "q_lora_rank": 36,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
    "bos_token_id": None,
}

#: 小的索引器；宽 24，其中 16 个 lane 旋转。
DSA = {"index_topk": 24, "index_head_dim": 24, "index_n_heads": 32}
SHARED = ["full", "shared", "full", "shared"]

#: 名字 → (family, 相对 ODD 的改动)。覆盖 issue 里点名的每一种结构差异。
VARIANTS: dict[str, tuple[str, dict]] = {
    "v3": ("deepseek_v3", {}),
    "v3-yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "v3-half-rope": ("deepseek_v3", {"rope_interleave": False}),
    "v3-no-norm-topk": ("deepseek_v3", {"norm_topk_prob": False}),
    "v3-no-q-lora": ("deepseek_v3", {"q_lora_rank": None}),
    "v3-bias-tied": ("deepseek_v3", {"attention_bias": True, "tie_word_embeddings": True}),
    "v3-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "v3-all-dense": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "v2-greedy": ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None}),
    "v2-group": ("deepseek_v2", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
    "v2-lite": (
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": None,
            "topk_group": None,
            "rope_parameters": YARN,
        },
    ),
    "v2-bias-tied": (
        "deepseek_v2",
        {"attention_bias": True, "tie_word_embeddings": True, "topk_method": "group_limited_greedy"},
    ),
    # 官方的 beta_fast、beta_slow 都是 1：yarn 的斜坡退化成一级台阶。
    "kimi": ("kimi_k2", {"n_group": 1, "topk_group": 1, "rope_parameters": YARN | {"beta_fast": 1}}),
    "glm": (
        "glm4_moe_lite",
        {
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "dense", "sparse"],
            "first_k_dense_replace": 2,
        },
    ),
    "sarvam": (
        "sarvam_mla",
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": YARN},
    ),
    "axk1": ("axk1", {"rope_parameters": YARN}),
    # 32 个索引头：头少了 relu 之后恰好为零的并列就多（specs/dsa）。topk 比测试的序列短得多。
    "v32": ("deepseek_v32", DSA | {"rope_parameters": YARN}),
    "glm-dsa": (
        "glm_moe_dsa",
        DSA | {"n_group": 1, "topk_group": 1, "num_hidden_layers": 4, "indexer_types": SHARED},
    ),
    "youtu": ("youtu", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "minicpm3": ("minicpm3", {"rope_parameters": LONGROPE, "scale_emb": 3.5, "dim_model_base": 20}),
}


def hf_config(variant: str, **overrides):
    """transformers 的配置。"""
    family, changes = VARIANTS[variant]
    values = {**ODD, **changes, **overrides}
    if not FAMILIES[family].has_moe:
        values = {key: value for key, value in values.items() if key not in MOE_KEYS}
    return CONFIG_MAPPING[FAMILIES[family].transformers_type](**values)


def model_config(variant: str, **overrides) -> ModelConfig:
    """dsx 的配置，不建模型、不落盘。"""
    data = json.loads(hf_config(variant, **overrides).to_json_string())
    return parse_model_config({**data, "model_type": VARIANTS[variant][0], "dtype": "float32"}, variant)


def build_model(variant: str, seed: int = 0, **overrides):
    """transformers 模型，float32，权重放大到激活不退化、路由有正有负。"""
    config = hf_config(variant, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.published_as = VARIANTS[variant][0]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias") and not FAMILIES[model.published_as].router_bias:
                parameter.zero_()
            elif "norm" in name and not name.endswith("bias"):
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("k_norm.bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(("bias", "e_score_correction_bias")):
                # 足够大的负 bias：带 bias 的分数会小于零，组外置 0 还是 -inf 就有了区别。
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
            elif not name.endswith(("inv_freq", "embed_scale")):
                spread = 1.0 if "embed" in name else max(parameter.shape[-1], 1) ** -0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def save_checkpoint(model, directory: Path, dtype: torch.dtype | None = None, **kwargs) -> Path:
    """存成检查点目录。"""
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(directory, **kwargs)
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"model_type": model.published_as}), encoding="utf-8")
    return directory


def fp8_twins(directory: Path, config: Mapping[str, Any], **options: Any) -> tuple[Path, Path]:
    """同样的权重存两遍：FP8 分块的检查点，与按定义反量化成 float32 的孪生。

    Args:
        directory: 两个检查点的上级目录。
        config: 带 ``quantization_config``。
        **options: 原样交给 ``write_checkpoint``。
    """
    fp8 = write_checkpoint(directory / "fp8", config, dtype="float32", **options)
    height, width = config["quantization_config"]["weight_block_size"]
    arrays = load_file(fp8 / "model.safetensors")
    for name in [name for name in arrays if name.endswith("_scale_inv")]:
        weight, scales = arrays[name.removesuffix("_scale_inv")], arrays.pop(name)
        scales = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
        rows, columns = weight.shape
        arrays[name.removesuffix("_scale_inv")] = weight.float() * scales[:rows, :columns]
    twin = directory / "twin"
    twin.mkdir()
    save_file(arrays, twin / "model.safetensors")
    plain = json.loads((fp8 / "config.json").read_text(encoding="utf-8"))
    del plain["quantization_config"]
    (twin / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    return fp8, twin


def one_node_model(
    function: onnx.FunctionProto,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.dtype],
    **attributes,
) -> onnx.ModelProto:
    """只有一个 ``dsx::`` 节点、带函数体的模型；输入的形状除了秩都不写死。"""
    spec = OPS[function.name]
    kind = helper.np_dtype_to_tensor_dtype

    def info(name: str, dtype: np.dtype, rank: int):
        return helper.make_tensor_value_info(
            name, kind(np.dtype(dtype)), [f"{name}_{i}" for i in range(rank)]
        )

    node = helper.make_node(
        spec.name,
        [port.name for port in spec.inputs],
        [port.name for port in spec.outputs],
        domain=DOMAIN,
        plugin_namespace=PLUGIN_NAMESPACE,
        plugin_version=PLUGIN_VERSION,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [info(name, array.dtype, array.ndim) for name, array in inputs.items()],
        [info(port.name, outputs[port.name], len(port.dims)) for port in spec.outputs],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)


def ort_session(model: onnx.ModelProto, profile: Path | None = None) -> ort.InferenceSession:
    """安静的 ONNX Runtime CPU 会话；给了 ``profile`` 就打开剖析，文件名以它开头。"""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def distance(got, want) -> float:
    """最大绝对误差除以 ``want`` 的最大绝对值（不小于 1）；NaN 算无穷大。"""
    got, want = (
        np.asarray(t.detach() if isinstance(t, torch.Tensor) else t).astype(np.float64) for t in (got, want)
    )
    assert got.shape == want.shape
    if got.size == 0:
        return 0.0
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1.0)
    return float("inf") if np.isnan(error) else float(error)
