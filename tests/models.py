"""测试共用的小模型：由 transformers 建、随机初始化、存成真检查点。"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

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

#: 6 个头、12 个专家分 3 组、头宽 24/16/20：都不是 2 的幂，写死的维度会露馅。
ODD = dict(
    vocab_size=211,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=6,
    n_shared_experts=2,
    n_routed_experts=12,
    num_experts_per_tok=4,
    n_group=3,
    topk_group=2,
    routed_scaling_factor=1.7,
    first_k_dense_replace=1,
    q_lora_rank=36,
    kv_lora_rank=40,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    eos_token_id=None,
    bos_token_id=None,
)

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
        {"q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None, "rope_parameters": YARN},
    ),
    "v2-bias-tied": (
        "deepseek_v2",
        {"attention_bias": True, "tie_word_embeddings": True, "topk_method": "group_limited_greedy"},
    ),
}


def build_model(variant: str, seed: int = 0, **overrides):
    """transformers 模型，float32，权重放大到激活不退化、路由有正有负。"""
    family, changes = VARIANTS[variant]
    settings = {**ODD, **changes, **overrides}
    config_class, model_class = {
        "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
        "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[family]
    config = config_class(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(("bias", "e_score_correction_bias")):
                # 足够大的负 bias：带 bias 的分数会小于零，组外置 0 还是 -inf 就有了区别。
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
            elif "inv_freq" not in name:
                spread = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def save_checkpoint(model, directory: Path, dtype: torch.dtype | None = None, **kwargs) -> Path:
    """存成检查点目录。"""
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(directory, **kwargs)
    return directory
